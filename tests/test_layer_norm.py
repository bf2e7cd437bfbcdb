"""``layer_norm``, its module and the operators, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import bcos_kernels as bk
from bcos_kernels import dispatch
from bcos_kernels.functional import layer_norm_with_squares
from bcos_kernels.modules import FusedSequential, fused
from models.vit import SimpleViT, Size
from tests.tolerances import GRADIENT, OUTPUT, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 5, 12), (4, 7), (9,), (2, 3, 4, 5))


def inputs(
    shape: tuple[int, ...] = (3, 5, 12), axes: int = 1, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng, dtype=torch.float64) * 2 + 1
    weight, bias = (torch.randn(shape[-axes:], generator=rng, dtype=torch.float64) for _ in range(2))
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "portable", "native"])
def test_equals_reference(backend: str, shape: tuple[int, ...], detach: bool, dtype: torch.dtype) -> None:
    axes = 2 if len(shape) == 4 else 1
    tensors = inputs(shape, axes, dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    results = []
    for leaves, name in ((tensors, backend), (exact, "reference")):
        z = bk.layer_norm(leaves[0], shape[-axes:], *leaves[1:], detach_var=detach, backend=name)
        upstream = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view(z.shape).to(z.dtype)
        results.append([z, *torch.autograd.grad(z, leaves, upstream)])
    for name, a, e in zip(("z", "dx", "dweight", "dbias"), *results, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, OUTPUT if name == "z" else GRADIENT, name)


@pytest.mark.parametrize("affine", [(False, False), (True, False), (True, True)])
def test_gradcheck(affine: tuple[bool, bool]) -> None:
    present = (True, *affine)
    tensors = [t for t, wanted in zip(inputs((2, 4)), present, strict=True) if wanted]

    def call(*given: torch.Tensor, **options: Any) -> torch.Tensor:
        rest = iter(given)
        x, weight, bias = (next(rest) if wanted else None for wanted in present)
        return bk.layer_norm(x, 4, weight, bias, **options)

    assert gradcheck(call, tensors)
    assert gradgradcheck(call, tensors)
    assert gradgradcheck(lambda *given: call(*given, detach_var=True), tensors)


def test_strided_input_and_gradient() -> None:
    x, weight, bias = inputs((3, 12, 5))
    turned = x.detach().mT.requires_grad_()
    weight, bias = weight.detach()[:1].expand(12), bias.detach()[:1].expand(12)
    for options in ({}, {"detach_var": True}):
        grads = []
        for backend in ("auto", "reference"):
            z = bk.layer_norm(turned, 12, weight, bias, backend=backend, **options)
            grads.append(torch.autograd.grad(z, turned, torch.linspace(0, 1, 180).double().view(3, 12, 5).mT)[0])
        assert_close(*grads, GRADIENT)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(detach: bool, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(dtype=dtype)
    torch.library.opcheck(torch.ops.bcos.layer_norm.default, (x, weight, bias, 1, 1e-5, detach, True, "auto"))
    z, mean, rstd, _ = torch.ops.bcos.layer_norm(x, weight, bias, 1, 1e-5, detach, False, "auto")
    needs = [True, True, True]
    torch.library.opcheck(
        torch.ops.bcos.layer_norm_backward.default,
        (torch.randn_like(z), x, mean, rstd, weight, bias, needs, 1, 1e-5, detach, "auto"),
    )


def test_squares_are_those_of_the_result() -> None:
    x, weight, bias = inputs(dtype=torch.bfloat16)
    z, squares = layer_norm_with_squares(x, 12, weight, bias, eps=1e-5, detach_var=False)
    assert squares is not None
    assert not squares.requires_grad
    assert_close(squares, z.double().square().sum(-1, keepdim=True), {torch.float32: 1e-6})


def test_empty_batch() -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    for detach in (False, True):
        z = bk.layer_norm(x, 3, weight, detach_var=detach)
        dx, dw = torch.autograd.grad(z.sum(), (x, weight))
        assert dx.shape == x.shape
        assert not dw.any()


def test_autocast_does_what_it_does_to_torchs_own() -> None:
    layer = bk.DetachableLayerNorm(12)
    x = torch.randn(3, 12).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), bk.explanation_mode(layer):
        explained = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = layer(x)
    assert plain.dtype == explained.dtype
    assert_close(explained, plain, OUTPUT)


def test_a_backend_without_a_kernel_leaves_it_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    with dispatch.forget_logged(), caplog.at_level("INFO", "bcos_kernels"):
        bk.layer_norm(torch.ones(2, 3), 3, backend="native")
    assert any(m.startswith("native: ") for m in caplog.messages)


@pytest.mark.parametrize("stem", [(), (4, 8)], ids=["patches", "stem"])
def test_norms_that_feed_linear_layers(stem: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the norm gives the linear layer its sums of squares; that changes neither result nor explanation."""
    torch.manual_seed(0)
    model = bk.bcosify(SimpleViT(Size(16, 2, 2, 1 if stem else 8, stem), 5)).double()
    assert sum(isinstance(m, FusedSequential) for m in model.modules()) == 3  # two feed-forward parts, the head
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    results = []
    original = layer_norm_with_squares
    calls = []
    monkeypatch.setattr(
        "bcos_kernels.modules.norm.layer_norm_with_squares", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    for gains in (False, True):
        monkeypatch.setattr(fused, "_gains", lambda x, gains=gains: gains)
        model.zero_grad()
        y = model(bk.AddInverse()(x))
        y.square().sum().backward()
        explanation = bk.explain(model, x)
        results.append([y, explanation.weights, *(p.grad.clone() for p in model.parameters())])
        assert len(calls) == (6 if gains else 0)
    for plain, given in zip(*results, strict=True):
        assert_close(given, plain, GRADIENT)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: bk.layer_norm(torch.ones(2, 3), 2),
            ValueError,
            r"normalized_shape must be the last axes of x \[2, 3\]",
        ),
        (lambda: bk.layer_norm(torch.ones(2, 3), ()), ValueError, "normalized_shape must be the last axes"),
        (lambda: bk.layer_norm(torch.ones(2, 3), (1, 2, 3)), ValueError, "normalized_shape must be the last axes"),
        (
            lambda: bk.layer_norm(torch.ones(2, 3), 3, torch.ones(2)),
            ValueError,
            r"weight must be of normalized_shape \[3\]",
        ),
        (lambda: bk.layer_norm(torch.ones(2, 3), 3, None, torch.ones(3, device="meta")), ValueError, "bias is on meta"),
        (lambda: bk.layer_norm(torch.ones(2, 3).int(), 3), TypeError, "x must be of a floating dtype"),
        (lambda: bk.layer_norm(torch.ones(2, 3), 3, eps=-1.0), ValueError, "eps must not be negative"),
    ],
)
def test_sentences(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()
