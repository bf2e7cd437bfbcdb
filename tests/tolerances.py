"""The one tolerance table: relative to the largest magnitude of the expected tensor.

float64: the golden vectors ask for 1e-9 (outputs) and 1e-6 (gradients); observed at most 2e-13, the table leaves two orders.
float32 and below: a few units of the last place of a sum of a thousand products, twice as many for gradients; observed over
the test matrix on x86 with AVX-512: float32 2e-6, bfloat16 1.2e-2, float16 1.6e-3.
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
