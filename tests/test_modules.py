"""The layers as modules: names of parameters, settings, representation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import bcos_kernels as bk
from bcos_kernels import modules, reference
from tests.tolerances import OUTPUT, assert_close


def test_parameters_have_the_public_names() -> None:
    conv = bk.BcosConv2d(6, 4, (3, 5), max_out=2, bias=True, b=nn.Parameter(torch.tensor(1.5)))
    assert {k: tuple(v.shape) for k, v in conv.state_dict().items()} == {
        "b": (),
        "linear.weight": (8, 6, 3, 5),
        "linear.bias": (8,),
    }
    assert list(bk.BcosLinear(3, 2).state_dict()) == ["linear.weight"]
    assert conv.weight is conv.linear.weight
    assert conv.bias is conv.linear.bias
    assert bk.BcosLinear(3, 2).bias is None


def test_representation_says_what_matters() -> None:
    assert "B=2" in repr(bk.BcosLinear(3, 2))
    text = repr(bk.BcosConv2d(3, 2, 1, b=nn.Parameter(torch.tensor(1.25)), max_out=3, normalize_weight=True))
    assert "B=learnable, now 1.25, max_out=3, normalize_weight=True" in text
    assert "logit_bias=-1.5" in repr(bk.LogitLayer(None, -1.5))
    assert "0.485" in repr(modules.Normalize((0.485,), (0.229,)))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_count_in_the_norm(mode: str) -> None:
    torch.manual_seed(0)
    conv = bk.BcosConv2d(3, 4, 3, padding=1, padding_mode=mode).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode=mode)
    assert_close(conv(x), reference.conv2d(padded, conv.weight), OUTPUT)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_words(padding: str) -> None:
    conv = bk.BcosConv2d(3, 4, 3, padding=padding)
    expected = (1, 4, 6, 6) if padding == "same" else (1, 4, 4, 4)
    assert conv(torch.rand(1, 3, 6, 6)).shape == expected


def test_copies_and_pickles() -> None:
    for module in (bk.BcosConv2d(6, 4, 3), bk.BcosLinear(6, 4), bk.BatchNormUncentered2d(6), bk.AddInverse()):
        x = torch.rand(2, 6, 5, 6)
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(again.eval()(x), module.eval()(x))


@pytest.mark.parametrize(
    ("module", "definition"),
    [
        (bk.DetachableLayerNorm((4, 5)), lambda x, m: reference.layer_norm(x, (4, 5), m.weight, m.bias)),
        (bk.DetachableLayerNorm(5, elementwise_affine=False), lambda x, m: reference.layer_norm(x, (5,))),
        (bk.DetachableGroupNorm2d(2, 6), lambda x, m: reference.group_norm(x, 2, m.weight, m.bias)),
        (bk.DetachableGELU(), lambda x, m: reference.gelu(x)),
    ],
)
def test_explanation_mode_changes_the_gradient_not_the_value(module: nn.Module, definition: object) -> None:
    module = module.double()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    plain = module(x)
    with bk.explanation_mode(module):
        frozen = module(x)
    assert_close(frozen, plain, OUTPUT)
    assert_close(plain, definition(x, module), OUTPUT)
    upstream = torch.randn_like(plain)
    grads = [torch.autograd.grad(y, x, upstream)[0] for y in (plain, frozen)]
    assert not torch.allclose(*grads)


def test_gelu_in_explanation_mode_is_linear() -> None:
    gelu = bk.DetachableGELU().double()
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    with bk.explanation_mode(gelu):
        y = gelu(x)
    (w,) = torch.autograd.grad(y.sum(), x)
    assert_close(w * x, y, OUTPUT)


def test_inverse_channels() -> None:
    image = torch.rand(3, 4, 5)
    out = bk.AddInverse()(image)
    assert torch.equal(out[:3], image)
    assert torch.equal(out[3:], 1 - image)
    assert bk.AddInverse()(image[None]).shape == (1, 6, 4, 5)


def test_logit_layer() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(bk.LogitLayer()(x), x)
    assert torch.equal(bk.LogitLayer(2.0, -1.0)(x), x / 2 - 1)
    assert not bk.LogitLayer(2.0, -1.0).state_dict()


def test_second_derivative_of_a_similarity_in_explanation_mode_is_the_true_one() -> None:
    """The map that was applied depends on the length of the embedding, although its first derivative does not."""
    similarity = bk.CosineLogits(torch.randn(3, 4, dtype=torch.float64))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    with bk.explanation_mode(similarity):
        assert torch.autograd.gradgradcheck(similarity, x)
