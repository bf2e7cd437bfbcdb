"""Normalisation layers whose variance can be taken as a constant (explanation mode)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_kernels import reference
from bcos_kernels.functional import batch_norm_with_squares, layer_norm, layer_norm_with_squares
from bcos_kernels.modules.detachable import DetachableModule, has_hooks, runs


class BatchNormUncentered2d(nn.BatchNorm2d, DetachableModule):
    """Batch norm that does not subtract the mean; see :func:`bcos_kernels.batch_norm_uncentered2d`.

    Arguments and buffers are those of ``nn.BatchNorm2d``, so that its checkpoints load, plus ``bias`` (False: none).
    ``running_mean`` is kept for that alone; it is neither used nor updated.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.followed(input)[0]

    def followed(
        self, input: Tensor, residual: Tensor | None = None, *, relu: bool = False, squares: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The norm and what follows it in one operation: a residual, ReLU, the sums of squares for the next layer's norm.

        See :func:`bcos_kernels.functional.batch_norm_with_squares`.
        """
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        return batch_norm_with_squares(
            input,
            self.running_var,
            self.constant(self.weight),
            self.constant(self.bias),
            training=self.training or self.running_var is None,
            residual=residual,
            relu=relu,
            momentum=momentum if momentum is not None else 0.0,
            eps=self.eps,
            detach_var=self.detach,
            squares=squares,
        )


def is_plain_relu(module: nn.Module) -> bool:
    """Whether nothing would be missed if the module were not called but its function applied."""
    return type(module) is nn.ReLU and runs(module, nn.ReLU.forward) and not has_hooks(module)


class BatchNormActUncentered2d(BatchNormUncentered2d):
    """:class:`BatchNormUncentered2d` followed by an activation, its child ``act`` (timm's ``BatchNormAct2d``)."""

    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        if is_plain_relu(self.act):
            return self.followed(input, relu=True)[0]
        return self.act(super().forward(input))


class DetachableLayerNorm(nn.LayerNorm, DetachableModule):
    """``nn.LayerNorm``; in explanation mode the variance is a constant, the mean is not."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.detach:
            return super().forward(input)
        return layer_norm(
            input,
            self.normalized_shape,
            self.constant(self.weight),
            self.constant(self.bias),
            eps=self.eps,
            detach_var=True,
        )

    def with_squares(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`forward`, and the sums of squares for the next B-cos layer; see :func:`bcos_kernels.bcos_linear`."""
        return layer_norm_with_squares(
            input,
            self.normalized_shape,
            self.constant(self.weight),
            self.constant(self.bias),
            eps=self.eps,
            detach_var=self.detach,
        )


class DetachableLayerNorm2d(DetachableLayerNorm):
    """Layer norm over the channels of every location of ``[N, C, H, W]`` (also called position norm)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DetachableGroupNorm2d(nn.GroupNorm, DetachableModule):
    """``nn.GroupNorm`` of ``[N, C, H, W]``; in explanation mode the variance is a constant, the mean is not."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4:
            raise ValueError(f"input must have 4 axes, [N, C, H, W]; got {list(input.shape)}")
        if not self.detach:
            return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        return reference.group_norm(input, self.num_groups, self.weight, self.bias, eps=self.eps, detach_var=True)
