"""The public package ``bcos`` (B-cos v2): its layers and ours, with the same weights, on the same input."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import bcos_kernels as bk
from tests.tolerances import GRADIENT, OUTPUT, assert_close

peer = importlib.import_module("bcos.modules")
norms = importlib.import_module("bcos.modules.norms")


def compare(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, explain: bool) -> None:
    """Same state, same input: output, input gradient, parameter gradients and state afterwards must agree."""
    ours, theirs = ours.double(), theirs.double()
    ours.load_state_dict(theirs.state_dict())  # the keys are theirs, both ways
    theirs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, theirs):
        module.set_explanation_mode(explain)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
        y.backward(upstream)
        results.append((y, leaf.grad, {k: p.grad for k, p in module.named_parameters()}, module.state_dict()))
    (y, dx, grads, state), (y2, dx2, grads2, state2) = results
    assert_close(y, y2, OUTPUT, "y")
    assert_close(dx, dx2, GRADIENT, "dx")
    assert grads.keys() == grads2.keys()
    for name, grad in grads.items():
        assert_close(grad, grads2[name], GRADIENT, name)
    for name, value in state.items():
        assert_close(value.double(), state2[name].double(), OUTPUT, name)


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "b": 1.5},
    {"kernel_size": 3, "padding": 1, "groups": 2, "b": 2.5},
    {"kernel_size": 3, "padding": 1, "max_out": 2},
    {"kernel_size": 3, "padding": 1, "b": 1, "max_out": 2},
    {"kernel_size": (3, 5), "padding": (1, 2), "max_out": 3, "b": 1.25},
]


@pytest.mark.parametrize("explain", [False, True])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution(options: dict[str, Any], explain: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    ours = bk.BcosConv2d(6, 4, **options, normalize_weight=True)
    compare(ours, peer.BcosConv2d(6, 4, **options), x, explain)


@pytest.mark.parametrize("explain", [False, True])
@pytest.mark.parametrize("options", [{}, {"b": 1.5}, {"b": 1}, {"max_out": 2}, {"max_out": 3, "b": 2.5}], ids=str)
def test_linear(options: dict[str, Any], explain: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    ours = bk.BcosLinear(7, 5, **options, normalize_weight=True)
    compare(ours, peer.BcosLinear(7, 5, **options), x, explain)


@pytest.mark.parametrize("explain", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_norms(training: bool, explain: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8, 5, 4, dtype=torch.float64) + 0.5
    compare(bk.BatchNormUncentered2d(8).train(training), norms.BatchNormUncentered2d(8).train(training), x, explain)
    compare(bk.DetachableGroupNorm2d(4, 8), norms.DetachableGroupNorm2d(4, 8), x, explain)
    compare(bk.DetachableLayerNorm(4), norms.DetachableLayerNorm(4), x, explain)


def test_their_context_manager_switches_our_layers_and_ours_theirs() -> None:
    common = importlib.import_module("bcos.common")
    ours, theirs = bk.BcosConv2d(3, 4, 1), peer.BcosConv2d(3, 4, 1)
    with common.explanation_mode(ours), bk.explanation_mode(theirs):
        assert ours.detach
        assert theirs.detach
    assert not ours.detach
    assert not theirs.detach
