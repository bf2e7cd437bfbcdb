"""Normalisation layers whose variance can be taken as a constant (explanation mode)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from bcos_kernels import reference
from bcos_kernels.contract import accumulator
from bcos_kernels.functional import batch_norm_with_squares, layer_norm, layer_norm_with_squares
from bcos_kernels.modules.detachable import DetachableModule, constants, has_hooks, runs


class _AllReduce(torch.autograd.Function):
    """The sum over all processes. Its gradient is the sum of theirs: the losses of all processes are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grads[0], ctx.group), None


# Not an nn.BatchNorm2d: tools that look for those replace them by norms that subtract the mean (nn.SyncBatchNorm, Lightning's
# sync_batchnorm), or fold them into convolutions as if they did. `_NormBase` has the parameters, buffers and checkpoints.
class BatchNormUncentered2d(_NormBase, DetachableModule):
    """Batch norm that does not subtract the mean; see :func:`bcos_kernels.batch_norm_uncentered2d`.

    Arguments and buffers are those of ``nn.BatchNorm2d``, so that its checkpoints load, plus ``bias`` (False: none).
    ``running_mean`` is kept for that alone; it is neither used nor updated.

    It does not subclass ``nn.BatchNorm2d``, so torch's functions for batch norms ignore it: use
    :func:`convert_sync_batchnorm` and :func:`update_bn` of this package instead.
    """

    #: take the variance over all processes, in training; see :func:`convert_sync_batchnorm`
    synchronised: bool = False
    process_group: dist.ProcessGroup | None = None

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
        if self.training and self.synchronised and dist.is_available() and dist.is_initialized():
            return self._over_all_processes(input, residual, relu, momentum or 0.0), None
        weight, bias = self.weight, self.bias
        detach, constant = self.modes()
        if constant:
            weight, bias = constants(weight, bias)
        return batch_norm_with_squares(
            input,
            self.running_var,
            weight,
            bias,
            training=self.training or self.running_var is None,
            residual=residual,
            relu=relu,
            momentum=momentum if momentum is not None else 0.0,
            eps=self.eps,
            detach_var=detach,
            squares=squares,
        )

    def _over_all_processes(self, input: Tensor, residual: Tensor | None, relu: bool, momentum: float) -> Tensor:
        """:meth:`followed`, with the variance about the mean of all processes' batches. A process may have no images."""
        x = input.to(accumulator(input.dtype))
        with torch.no_grad():
            sums = torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() / self.num_features])])
            dist.all_reduce(sums, group=self.process_group)
            count = sums[-1].clamp_min(1)
            mean = (sums[:-1] / count)[:, None, None]
        # the mean needs no gradient: the variance is smallest about it, so that it does not change when the mean moves
        var = _AllReduce.apply((x - mean).square().sum((0, 2, 3)), self.process_group) / count
        if self.running_var is not None:
            with torch.no_grad():
                weight = (sums[-1] > 0).to(self.running_var.dtype) * momentum
                self.running_var.lerp_(var.to(self.running_var.dtype), weight)
        weight, bias = self.weight, self.bias
        detach, constant = self.modes()
        if constant:
            weight, bias = constants(weight, bias)
        return reference.batch_norm_uncentered2d(
            x, var, weight, bias, residual=residual, relu=relu, eps=self.eps, detach_var=detach
        ).to(input.dtype)


def convert_sync_batchnorm(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """What ``nn.SyncBatchNorm.convert_sync_batchnorm`` is for ordinary networks: statistics over all processes.

    In training, uncentered batch norms then take the variance about the mean of all processes' batches, which may be of
    different sizes; the result is that of one process with the whole batch. Ordinary batch norms become torch's
    ``SyncBatchNorm``. Without ``torch.distributed`` nothing changes.

    Args:
        model: changed in place.
        process_group: over which processes; None for all.

    Returns:
        ``model``, or the ``SyncBatchNorm`` in its place.

    Raises:
        ValueError: a batch norm with a forward pass of its own, which torch's would not have.
    """
    for path, module in model.named_modules():
        if isinstance(module, BatchNormUncentered2d):
            module.synchronised, module.process_group = True, process_group
        elif (
            isinstance(module, _BatchNorm)
            and not runs(module, _BatchNorm.forward)
            and not isinstance(module, nn.SyncBatchNorm)
        ):
            raise ValueError(
                f"model: {path or 'it'} is a {type(module).__name__} with a forward pass of its own, which SyncBatchNorm "
                "would not have; accelerate() first, if it is a norm of a B-cos package"
            )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)


def update_bn(loader: Iterable[Any], model: nn.Module, device: torch.device | int | None = None) -> None:
    """``torch.optim.swa_utils.update_bn`` for networks with uncentered batch norms: their running variances anew, after the
    weights were averaged. The same arguments; batches are what the model takes, or lists and tuples that begin with it."""
    norms = {m: m.momentum for m in model.modules() if isinstance(m, (BatchNormUncentered2d, _BatchNorm))}
    if not norms:
        return
    modes = {m: m.training for m in model.modules()}
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
        model.train()
        with torch.no_grad():
            for batch in loader:
                x = batch[0] if isinstance(batch, (list, tuple)) else batch
                model(x if device is None else x.to(device))
    finally:
        for norm, momentum in norms.items():
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training


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
        weight, bias = self.weight, self.bias
        detach, constant = self.modes()
        if not detach:
            return super().forward(input)
        if constant:
            weight, bias = constants(weight, bias)
        return layer_norm(input, self.normalized_shape, weight, bias, eps=self.eps, detach_var=True)

    def with_squares(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`forward`, and the sums of squares for the next B-cos layer; see :func:`bcos_kernels.bcos_linear`."""
        weight, bias = self.weight, self.bias
        detach, constant = self.modes()
        if constant:
            weight, bias = constants(weight, bias)
        return layer_norm_with_squares(input, self.normalized_shape, weight, bias, eps=self.eps, detach_var=detach)


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
