"""Activations with an explanation mode. ReLU needs none: its gradient already is its linear map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bcos_kernels import reference
from bcos_kernels.modules.detachable import DetachableModule


class DetachableGELU(DetachableModule):
    """``x * gate`` with ``gate = 0.5 (1 + erf(x / sqrt 2))``; in explanation mode the gate is a constant."""

    def forward(self, input: Tensor) -> Tensor:
        return reference.gelu(input, detach_gate=True) if self.detach else F.gelu(input)
