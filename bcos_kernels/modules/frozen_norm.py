"""Uncentered batch norm that training leaves alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bcos_kernels.functional import batch_norm_uncentered2d


class FrozenBatchNormUncentered2d(nn.Module):
    """``x / sqrt(running_var + eps) * weight (+ bias)`` per channel; all of it is constant, in training too.

    The counterpart of ``torchvision.ops.FrozenBatchNorm2d`` and timm's ``FrozenBatchNormAct2d``, with the names of their
    buffers. ``running_mean`` is kept for their checkpoints alone. ``act``: an activation that follows, or None.

    Shapes: ``[N, C, H, W]`` to the same. Buffers: ``[C]``; ``bias`` is None in a network without biases.
    """

    weight: Tensor
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        act: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("bias", None)
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        z = batch_norm_uncentered2d(input, self.running_var, self.weight, self.bias, training=False, eps=self.eps)
        return z if self.act is None else self.act(z)

    def _load_from_state_dict(self, state_dict: dict[str, object], prefix: str, *args: object) -> None:
        # an ordinary batch norm's, which theirs loads too
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
