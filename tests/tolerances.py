"""The one tolerance table: relative to the largest magnitude of the expected tensor.

Largest errors over the matrix of ``test_layers.py`` (2026-11-23, x86 with AVX-512, one thread, portable and native backends):

======== ======= =========
dtype    output  gradients
======== ======= =========
float64  5e-16   4e-15
float32  7e-7    6e-7
bfloat16 8e-3    9e-3
float16  1.3e-3  1.5e-3
======== ======= =========

The table leaves a factor of three to five to the half precisions (rounding, which depends on the order of a sum) and more to
the others, whose networks, gradient checks and sums of many terms lose a few digits more; the golden vectors ask for 1e-9.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUT = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2.5e-2, torch.float16: 4e-3}
GRADIENT = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected; both compared in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{list(actual.shape)} is not {list(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_close(actual: Tensor, expected: Tensor, table: dict[torch.dtype, float], what: str = "") -> None:
    """``actual`` in its own dtype's tolerance of ``expected`` (usually float64)."""
    error = relative_error(actual, expected)
    assert error <= table[actual.dtype], f"{what}: relative error {error:.2e} > {table[actual.dtype]:.0e}"
