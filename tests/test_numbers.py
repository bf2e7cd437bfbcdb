"""Numbers that float32 and float16 cannot hold on the way to a result that they can: every backend on a CPU, right values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bcos_kernels as bk
from bcos_kernels import extremes, native, reference
from tests.tolerances import GRADIENT, OUTPUT, assert_close, relative_error

BACKENDS = [
    "reference",
    "portable",
    pytest.param(
        "native", marks=pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
    ),
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(function: object, tensors: dict[str, Tensor], dtype: torch.dtype, backend: str, **options: object) -> None:
    """Output and gradients; those of ``x`` and ``y`` row by row, each in proportion to its own size."""
    rounded = {k: t.to(dtype) for k, t in tensors.items()}
    both = []
    for name, wide in ((backend, False), ("reference", True)):
        leaves = {k: (t.double() if wide else t).clone().requires_grad_() for k, t in rounded.items()}
        y = function(**leaves, backend=name, **options)  # type: ignore[operator]
        grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
        both.append({"y": y.detach(), **dict(zip(leaves, grads, strict=True))})
    for key, value in both[0].items():
        table = OUTPUT if key == "y" else GRADIENT
        pairs = zip(value, both[1][key], strict=True) if key in ("x", "y") else [(value, both[1][key])]
        for i, (a, e) in enumerate(pairs):
            assert a.dtype == dtype
            size = e.abs().max().clamp_min(float(torch.finfo(dtype).tiny))
            error = float((a.double() - e).abs().max() / size)
            assert error <= table[dtype], f"{key}[{i}]: {a.flatten()[:3].tolist()} is not {e.flatten()[:3].tolist()}"


def test_the_definition_in_float16_is_near_that_in_float64() -> None:
    x, weight = normal(3, 16), normal(5, 16, seed=1)
    x[1] = 0
    for scale_x, scale_w in ((1.0, 1e-2), (300.0, 0.1), (1e-3, 1.0)):
        rounded = (x * scale_x).half(), (weight * scale_w).half()
        y = reference.linear(*rounded)
        assert y.dtype == torch.float16
        assert_close(y, reference.linear(*(t.double() for t in rounded)), OUTPUT)
    image = (normal(2, 3, 6, 6) * 300).half()
    kernel = (normal(4, 3, 3, 3) * 0.05).half()
    assert_close(reference.conv2d(image, kernel), reference.conv2d(image.double(), kernel.double()), OUTPUT)
    for norm in (
        lambda t: reference.batch_norm_uncentered2d(t, None),
        lambda t: reference.layer_norm(t, (6,)),
        lambda t: reference.group_norm(t, 3),
        lambda t: reference.gelu(t, approximate="tanh"),
        reference.gelu,
        reference.silu,
        reference.hardswish,
        lambda t: reference.attention(t, t, t),
    ):
        z = norm(image)
        assert z.dtype == torch.float16
        assert_close(z, norm(image.double()), OUTPUT)


@on_every_backend
@pytest.mark.parametrize("b", [2, 1.5])
def test_zero_rows_have_gradient_zero_through_the_norm(backend: str, b: float) -> None:
    """dn/dx is 0 at the origin: what is left of dx is du w."""
    tensors = {"x": normal(4, 6), "weight": normal(3, 6, seed=1), "bias": normal(3, seed=2)}
    tensors["x"][1] = 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        compare(bk.bcos_linear, tensors, dtype, backend, b=b)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_every_length_in_one_call(backend: str, dtype: torch.dtype, bias: bool) -> None:
    lengths = (1e-30, 1e-25, 1e-20, 1e-15, 1e-12, 1e-6, 1.0, 1e10, 1e20, 1e30)
    tensors = {"x": normal(len(lengths), 8) * torch.tensor(lengths, dtype=torch.float64)[:, None]}
    tensors["weight"] = normal(5, 8, seed=1)
    if bias:
        tensors["bias"] = normal(5, seed=2) * 1e-6  # with 1, dx of the shortest rows would be 1e54
    for b in (2, 2.5):
        for max_out in (1, 5):
            compare(bk.bcos_linear, tensors, dtype, backend, b=b, max_out=max_out)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_of_every_brightness_in_one_call(backend: str, dtype: torch.dtype) -> None:
    sizes = (0.0, 1e-25, 1e-18, 1e-12, 1.0, 1e12, 1e20, 1e30)
    tensors = {"x": normal(len(sizes), 4, 5, 5) * torch.tensor(sizes, dtype=torch.float64)[:, None, None, None]}
    tensors["weight"] = normal(6, 2, 3, 3, seed=1)
    for b in (2, 1.5):
        compare(bk.bcos_conv2d, tensors, dtype, backend, b=b, groups=2, padding=1)


@on_every_backend
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_weights_of_every_size(backend: str, size: float) -> None:
    """Of unit length they have no size; as they are, dweight is 2 g |cos| x and what underflows in y does not there."""
    tensors = {"x": normal(4, 8), "weight": normal(6, 8, seed=1) * size}
    compare(bk.bcos_linear, tensors, torch.float32, backend, normalize_weight=True)
    if size < 1:
        compare(bk.bcos_linear, tensors, torch.float32, backend)


@on_every_backend
@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e10, 1e19, 1e30])
def test_norms_of_every_size(backend: str, size: float) -> None:
    image = {"x": normal(3, 4, 5, 5) * size, "weight": normal(4, seed=1)}
    rows = {"x": normal(5, 7) * size, "weight": normal(7, seed=1), "bias": normal(7, seed=2)}
    for dtype in (torch.float32, torch.bfloat16):
        compare(bk.batch_norm_uncentered2d, image, dtype, backend, running_var=None, training=True)
        compare(bk.layer_norm, rows, dtype, backend, normalized_shape=(7,))


@on_every_backend
def test_large_and_small_gradients(backend: str) -> None:
    """g y overflows where g cos^2, which is wanted, does not."""
    x, weight = (normal(4, 8) * 1e12).float(), (normal(5, 8, seed=1) * 1e-2).float()
    for size in (1e-25, 1e30):
        results = []
        for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
            y = bk.bcos_linear(*leaves, backend=name)
            results.append(torch.autograd.grad(y, leaves[0], torch.full_like(y, size))[0])
        assert_close(results[0], results[1], GRADIENT)


def test_ordinary_numbers_zeros_and_nan_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("computed in float64")

    monkeypatch.setattr(extremes, "_forward_in", refuse)
    monkeypatch.setattr(extremes, "_backward_in", refuse)
    rows, images = normal(4, 8).float(), normal(2, 4, 6, 6).float()
    rows[1], images[1] = 0, 0
    for bad in (0.0, math.nan):
        rows[3, 0] = images[0, 0, 0, 0] = bad
        for max_out in (1, 2):
            for layer, x, weight in (
                (bk.bcos_linear, rows, normal(6, 8, seed=1)),
                (bk.bcos_conv2d, images, normal(6, 4, 3, 3, seed=1)),
            ):
                leaf = x.clone().requires_grad_()
                y = layer(leaf, weight.float(), max_out=max_out)  # type: ignore[operator]
                y.sum().backward()
                assert bool(y.isnan().any()) == math.isnan(bad)
                assert leaf.grad is not None
                assert bool(leaf.grad.isnan().any()) == math.isnan(bad)


def test_float16_is_as_exact_as_its_digits() -> None:
    x, weight = (normal(2, 8, 6, 6) * 1e3).half(), (normal(4, 8, 3, 3, seed=1) * 0.1).half()
    wide = [t.double().requires_grad_() for t in (x, weight)]
    leaves = [t.requires_grad_() for t in (x, weight)]
    y, expected = bk.bcos_conv2d(*leaves, backend="portable"), bk.bcos_conv2d(*wide, backend="reference")
    upstream = torch.full_like(y, 1e-2)
    grads = torch.autograd.grad(y, leaves, upstream)
    for a, e in zip((y, *grads), (expected, *torch.autograd.grad(expected, wide, upstream.double())), strict=True):
        assert relative_error(a, e) < 4 * 2**-11
