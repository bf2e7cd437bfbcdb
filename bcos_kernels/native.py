"""The compiled backend: the extension that ``setup.py`` builds from ``csrc/``, for the CPU.

The convolution stays with oneDNN; what surrounds it is fused into few passes (docs/backends.md says how). Loaded on the
first use, and only if it was built for the torch that is running.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bcos_kernels.contract import Call, Forward, Gradients, Needs, Options, Saved

_LIBRARY = Path(__file__).with_name("_native.so")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_MISSING = "native: the compiled extension is missing; pip install . with a C++ compiler builds it"

_LINEAR, _QUADRATIC, _GENERAL = range(3)


def build_info() -> dict[str, str] | None:
    """What the extension was built with (``torch``, ``compiler``, ``flags``, ``cuda_archs``), None if there is none."""
    try:
        module = importlib.import_module("bcos_kernels._build_info")
    except ImportError:
        return None
    info: dict[str, str] = module.build_info()
    return info


def _mismatch(built_for: str, running: str) -> str | None:
    if built_for == running:
        return None
    return f"native: built for torch {built_for}, this is torch {running}; pip install . builds it anew"


@functools.cache
def unavailable() -> str | None:
    info = build_info()
    if info is None or not _LIBRARY.exists():
        return _MISSING
    sentence = _mismatch(info["torch"], str(torch.__version__))
    if sentence is None:
        try:
            torch.ops.load_library(_LIBRARY)
        except OSError as error:
            sentence = f"native: the compiled extension cannot be loaded: {error}"
    return sentence


def why_not(call: Call) -> str | None:
    if call.x.device.type != "cpu":
        return f"native: kernels need the CPU; the tensor is on {call.x.device.type}"
    if call.x.dtype not in _DTYPES:
        return f"native: kernels take float32, float64 and bfloat16; the tensor is {str(call.x.dtype)[6:]}"
    if call.weight is not None and not call.op.startswith("batch_norm") and call.weight.dtype != call.x.dtype:
        return "native: kernels need x and weight in one dtype"
    if call.options.max_out > 256:
        return f"native: kernels take max_out up to 256; it is {call.options.max_out}"
    return None


def _ops() -> Any:
    if (sentence := unavailable()) is not None:
        raise RuntimeError(sentence)
    return torch.ops.bcos_native


def _exponent(options: Options) -> tuple[float, int]:
    """B and which of the three forms of the scale it takes; a tensor takes the general one, whatever its value."""
    if isinstance(options.b, Tensor):
        return float(options.b.detach()), _GENERAL
    form = _LINEAR if options.is_linear else _QUADRATIC if options.is_quadratic else _GENERAL
    return options.b, form


def _conv_arguments(o: Options) -> tuple[Any, ...]:
    return (o.stride, o.padding, o.dilation, o.groups, o.max_out, o.normalize_weight)


def _keeps(options: Options, dtype: torch.dtype, for_backward: bool) -> tuple[bool, bool]:
    """Whether forward keeps the linear output, and the winners of MaxOut."""
    return for_backward and options.keeps_linear(dtype), for_backward and options.max_out > 1


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, for_backward: bool) -> Forward:
    keeps = _keeps(options, x.dtype, for_backward)
    return Forward(*_ops().conv2d(x, weight, bias, *_exponent(options), *_conv_arguments(options), *keeps))


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, options: Options, needs: Needs
) -> Gradients:
    kept, norm, winner = saved
    return Gradients(
        *_ops().conv2d_backward(
            grad,
            x,
            weight,
            bias,
            kept,
            norm,
            winner,
            list(needs),
            *_exponent(options),
            *_conv_arguments(options),
            options.detach_scale,
        )
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, for_backward: bool) -> Forward:
    o = options
    keeps = _keeps(o, x.dtype, for_backward)
    return Forward(*_ops().linear(x, weight, bias, *_exponent(o), o.max_out, o.normalize_weight, *keeps))


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, options: Options, needs: Needs
) -> Gradients:
    o = options
    kept, norm, winner = saved
    return Gradients(
        *_ops().linear_backward(
            grad,
            x,
            weight,
            bias,
            kept,
            norm,
            winner,
            list(needs),
            *_exponent(o),
            o.max_out,
            o.normalize_weight,
            o.detach_scale,
        )
    )


def batch_norm_uncentered2d(
    x: Tensor, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    z, mean, batch_var = _ops().batch_norm(x, var, weight, bias, eps)
    return z, mean, batch_var


def batch_norm_uncentered2d_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    batch_stats: bool,
    detach_var: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _ops().batch_norm_backward(grad, x, mean, var, weight, eps, batch_stats, detach_var, *needs)
    return dx, dweight, dbias
