"""In which dtype sums are taken, and how large the numbers of a tensor are."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Norms, scales and sums are computed in float32, or in float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(t: Tensor) -> Tensor:
    """``t`` in its accumulator's dtype."""
    return t.to(accumulator(t.dtype))


def readable(t: Tensor) -> bool:
    """Whether looking at a value of ``t`` is possible, and free: it lies in this machine's memory, and no program is traced.

    Fake tensors are subclasses; the wrappers of ``vmap`` and ``torch.func.grad`` have no values of their own, which only a
    private function tells.
    """
    return (
        t.device.type == "cpu"
        and type(t) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def extent(t: Tensor) -> tuple[float, float]:
    """The least and the largest value of a tensor that is not empty; NaN where one is."""
    if t.numel() < 4096:  # one call instead of two; for channels-last tensors it is slow
        least, largest = t.aminmax()
        return least.item(), largest.item()
    return t.amin().item(), t.amax().item()


def magnitude(t: Tensor) -> float:
    """The largest ``|t|``."""
    least, largest = extent(t)
    return max(-least, largest)
