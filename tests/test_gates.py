"""Activations and squeeze-and-excitation: torch's values and gradients; in explanation mode the gate is a constant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from bcos_kernels import modules
from tests.tolerances import GRADIENT, OUTPUT, assert_close

GATES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "gelu": (modules.DetachableGELU(), F.gelu),
    "gelu_tanh": (modules.DetachableGELU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (modules.DetachableSiLU(), F.silu),
    "hardswish": (modules.DetachableHardswish(), F.hardswish),
}


@pytest.mark.parametrize("name", GATES)
def test_activation(name: str) -> None:
    layer, definition = GATES[name]
    x = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    expected = definition(x)
    slope = torch.autograd.grad(expected.sum(), x)[0]
    layer.set_explanation_mode(False)
    assert_close(torch.autograd.grad(layer(x).sum(), x)[0], slope, GRADIENT)
    layer.set_explanation_mode(True)
    y = layer(x)
    assert_close(y, expected, OUTPUT)
    weights = torch.autograd.grad(y.sum(), x)[0]
    assert_close(weights * x, expected, OUTPUT)
    assert not torch.allclose(weights, slope)


def test_squeeze_and_excitation() -> None:
    torch.manual_seed(0)
    source = SqueezeExcitation(6, 3).double()
    layer = modules.DetachableSqueezeExcitation(source)
    assert layer.state_dict().keys() == source.state_dict().keys()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    expected = source(x)
    assert_close(layer(x), expected, OUTPUT)
    assert_close(torch.autograd.grad(layer(x), x, upstream)[0], torch.autograd.grad(expected, x, upstream)[0], GRADIENT)
    layer.set_explanation_mode(True)
    assert_close(torch.autograd.grad(layer(x), x, upstream)[0], upstream * (expected / x).detach(), GRADIENT)


def test_sentences() -> None:
    with pytest.raises(ValueError, match='approximate must be "none" or "tanh"; got \'erf\''):
        modules.DetachableGELU("erf")
    with pytest.raises(ValueError, match="a Linear is no squeeze-and-excitation layer that is known"):
        modules.DetachableSqueezeExcitation(nn.Linear(2, 2))
