"""Convolutions that PyTorch 2.14.1 does wrong on a CPU, on every backend: see ``bcos_kernels/convolution.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import bcos_kernels as bk
from bcos_kernels import native
from tests.tolerances import GRADIENT, OUTPUT, assert_close

Strides = tuple[int, int, int, int]


class Case(NamedTuple):
    """``None`` for strides: channels-last, as PyTorch makes it."""

    x: Strides
    weight: Strides
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    x_strides: Strides | None = None
    weight_strides: Strides | None = None
    dtype: torch.dtype = torch.float32


CASES = [
    # the stride of an axis of size 1: the output, dx and dweight, each wrong in some of these
    Case((1, 8, 14, 1), (32, 4, 3, 1), 2, padding=(0, 4), weight_strides=(12, 1, 4, 7)),
    Case((1, 8, 14, 1), (32, 4, 3, 1), 2, padding=(0, 4), x_strides=(112, 1, 8, 1), weight_strides=(12, 1, 4, 1)),
    Case((1, 4, 3, 3), (32, 2, 1, 3), 2, padding=(0, 4), weight_strides=(6, 1, 3, 2)),
    Case((1, 32, 3, 1), (64, 8, 1, 2), 4, padding=(0, 1), weight_strides=(16, 1, 5, 8)),
    Case((2, 8, 3, 3), (8, 4, 1, 2), 2, (2, 1), (1, 0), weight_strides=(8, 1, 2, 4)),
    Case((1, 8, 1, 1), (64, 2, 3, 1), 4, (2, 1), (1, 4), weight_strides=(6, 1, 2, 1000)),
    Case((1, 8, 14, 14), (8, 2, 3, 2), 4, (2, 2), (0, 1), x_strides=(7, 1, 112, 8), dtype=torch.float64),
    Case((2, 8, 3, 1), (1, 8, 3, 1), 1, (2, 2), (0, 0), weight_strides=(1000, 1, 8, 7), dtype=torch.float64),
    # bfloat16 on narrow images: NaN, wrong, and a process that dies
    Case((2, 8, 3, 1), (2, 4, 1, 3), 2, (1, 2), (0, 1), dtype=torch.bfloat16),
    Case((1, 16, 1, 2), (8, 16, 3, 5), 1, (3, 3), (1, 2), dtype=torch.bfloat16),
    Case((1, 4, 3, 2), (8, 1, 3, 5), 4, (1, 2), (1, 2), dtype=torch.bfloat16),
    Case((1, 8, 7, 4), (64, 1, 5, 3), 8, (1, 3), dtype=torch.bfloat16),
    Case((1, 4, 1, 1), (16, 2, 2, 1), 2, (1, 3), (2, 5), (2, 2), dtype=torch.bfloat16),
    Case((2, 64, 1, 1), (8, 16, 1, 3), 4, (3, 2), (0, 5), (1, 2), dtype=torch.bfloat16),
    Case((2, 4, 3, 1), (16, 1, 5, 1), 4, (1, 3), (1, 2), (1, 2), dtype=torch.bfloat16),
    # bfloat16, 1x1 with a stride: writes past the end
    Case((1, 2, 3, 14), (4, 2, 1, 1), 1, (1, 2), dtype=torch.bfloat16),
]


def _laid_out(t: torch.Tensor, strides: Strides | None) -> torch.Tensor:
    dense = t.to(memory_format=torch.channels_last)
    return dense if strides is None else dense.as_strided(t.shape, strides)


def check(case: Case, backend: str) -> None:
    torch.manual_seed(0)
    x = _laid_out(torch.randn(case.x).to(case.dtype), case.x_strides).requires_grad_()
    weight = _laid_out(torch.randn(case.weight).to(case.dtype), case.weight_strides).requires_grad_()
    options = case._asdict()
    for name in ("x", "weight", "x_strides", "weight_strides", "dtype"):
        del options[name]
    exact = [t.detach().double().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, weight)]
    expected = bk.bcos_conv2d(*exact, backend="reference", **options)
    y = bk.bcos_conv2d(x, weight, backend=backend, **options)
    upstream = torch.randn_like(expected).to(case.dtype).to(memory_format=torch.channels_last)
    assert_close(y, expected, OUTPUT, f"{backend} {case} y")
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for name, a, e in zip(("dx", "dweight"), torch.autograd.grad(y, (x, weight), upstream), wanted, strict=True):
        assert_close(a, e, GRADIENT, f"{backend} {case} {name}")


@pytest.mark.parametrize("backend", ["reference", "portable", "native"])
def test_what_torch_does_wrong(backend: str) -> None:
    """In another process, which dies where the error is met."""
    if backend == "native" and native.unavailable() is not None:
        pytest.skip(str(native.unavailable()))
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_convolution", backend],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


if __name__ == "__main__":
    for each in CASES * 3:  # memory that is not the tensor's differs from time to time
        check(each, sys.argv[1])
