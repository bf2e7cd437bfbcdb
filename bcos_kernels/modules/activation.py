"""Activations with an explanation mode. ReLU needs none: its gradient already is its linear map."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class DetachableActivation(DetachableModule):
    """Any activation ``f`` with ``f(0) = 0``, as ``x * gate`` with ``gate = f(x) / x``.

    In explanation mode the gate is a constant. Where ``x`` is 0, it is the derivative that PyTorch gives ``f`` there.

    Args:
        act: a module that maps every element by itself and has no parameters, such as ``nn.ReLU6()`` or ``nn.ELU()``. It is
            copied, and does not work in place.

    Shapes: any, to the same.

    Raises:
        ValueError: ``act`` is another number than 0 at 0, as a sigmoid is: that share of its output has no gate.
    """

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        if (value := self.at_zero(act)) != 0:
            raise ValueError(f"act must be 0 at 0; a {type(act).__name__} is {value:g}")
        self.act = copy.deepcopy(act)
        if getattr(act, "inplace", False):
            self.act.inplace = False  # type: ignore[assignment]
        zero = torch.zeros(1, dtype=torch.float64, device="cpu", requires_grad=True)
        with torch.inference_mode(False), torch.enable_grad():
            self.slope_at_zero = float(torch.autograd.grad(self.act(zero), zero)[0])

    @staticmethod
    def at_zero(act: nn.Module) -> float:
        """``act(0)``."""
        with torch.no_grad():
            return float(act(torch.zeros(1, dtype=torch.float64, device="cpu")))

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.act(input)
        if not self.detach:
            return y
        zero = input == 0
        gate = torch.where(zero, self.slope_at_zero, y / torch.where(zero, 1, input))
        return reference.scaled(input, gate, detach=True)
