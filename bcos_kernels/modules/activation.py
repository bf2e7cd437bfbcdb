"""Activations with an explanation mode. ReLU needs none: its gradient already is its linear map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bcos_kernels import reference
from bcos_kernels.modules.detachable import DetachableModule


class DetachableGELU(DetachableModule):
    """``x * gate`` with ``gate = 0.5 (1 + erf(x / sqrt 2))``; in explanation mode the gate is a constant.

    Args:
        approximate: "none", or "tanh" for the approximation of ``torch.nn.GELU``.

    Raises:
        ValueError: ``approximate`` is another word.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f'approximate must be "none" or "tanh"; got {approximate!r}')
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        if self.detach:
            return reference.gelu(input, approximate=self.approximate, detach_gate=True)
        return F.gelu(input, approximate=self.approximate)

    def extra_repr(self) -> str:
        return "" if self.approximate == "none" else f"approximate={self.approximate!r}"


class DetachableSiLU(DetachableModule):
    """``x * sigmoid(x)``; in explanation mode the sigmoid is a constant."""

    def forward(self, input: Tensor) -> Tensor:
        return reference.silu(input, detach_gate=True) if self.detach else F.silu(input)


class DetachableHardswish(DetachableModule):
    """``x * clamp(x + 3, 0, 6) / 6``; in explanation mode the factor is a constant."""

    def forward(self, input: Tensor) -> Tensor:
        return reference.hardswish(input, detach_gate=True) if self.detach else F.hardswish(input)
