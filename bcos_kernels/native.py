"""The compiled backend: the extension that ``setup.py`` builds from ``csrc/``, for the CPU and, where nvcc was found, CUDA.

What it fuses on each, docs/backends.md says. Loaded on the first use, and only if it was built for the torch that is running.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bcos_kernels.contract import (
    Call,
    Forward,
    Gradients,
    Needs,
    NormForward,
    NormGradients,
    NormNeeds,
    NormOptions,
    Options,
    Saved,
)

_LIBRARY = Path(__file__).with_name("_native.so")
_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}
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


@functools.cache
def _gpu_not_covered(index: int) -> str | None:
    archs = (build_info() or {}).get("cuda_archs", "")
    if not archs:
        return "native: built without CUDA; pip install . with nvcc builds the kernels"
    capability = torch.cuda.get_device_capability(index)
    if not covers(archs, capability):
        major, minor = capability
        return (
            f"native: compiled for {archs}, this GPU is sm_{major}{minor};"
            f' TORCH_CUDA_ARCH_LIST="{major}.{minor}" pip install . adds it'
        )
    return None


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``archs``, as in TORCH_CUDA_ARCH_LIST, runs on a GPU of this compute capability.

    Machine code runs on its own major version from its minor version on (``9.0a``: on exactly that), PTX on all later ones.
    """
    for arch in re.split(r"[;, ]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            continue
        major, minor, exact, ptx = match.groups()
        version = (int(major), int(minor))
        same_family = version[0] == capability[0] and version <= capability
        if version == capability or (same_family and exact != "a") or (ptx and not exact and version <= capability):
            return True
    return False


def why_not(call: Call) -> str | None:
    device = call.x.device.type
    if device not in _DTYPES:
        return f"native: kernels need the CPU or CUDA; the tensor is on {device}"
    if call.x.dtype not in _DTYPES[device]:
        names = ", ".join(str(dtype)[6:] for dtype in _DTYPES[device])
        return f"native: kernels for {device} take {names}; the tensor is {str(call.x.dtype)[6:]}"
    if call.op.startswith("layer_norm"):
        return "native: layer_norm has no kernel of its own, since torch's is as good"
    if device == "cuda" and (sentence := _gpu_not_covered(call.x.device.index)) is not None:
        return sentence
    if call.weight is not None and not call.op.startswith("batch_norm") and call.weight.dtype != call.x.dtype:
        return "native: kernels need x and weight in one dtype"
    if call.options.max_out > 256:
        return f"native: kernels take max_out up to 256; it is {call.options.max_out}"
    return None


def _ops() -> Any:
    if (sentence := unavailable()) is not None:
        raise RuntimeError(sentence)
    return torch.ops.bcos_native


def _exponent(options: Options) -> tuple[float, Tensor | None, int]:
    """B as a number or a tensor, and which form of the scale it takes; a tensor takes the general one, whatever its value."""
    if isinstance(options.b, Tensor):
        return 0.0, options.b, _GENERAL
    form = _LINEAR if options.is_linear else _QUADRATIC if options.is_quadratic else _GENERAL
    return options.b, None, form


def _conv_arguments(o: Options) -> tuple[Any, ...]:
    return (o.stride, o.padding, o.dilation, o.groups, o.max_out, o.normalize_weight)


def _keeps(options: Options, dtype: torch.dtype, for_backward: bool) -> tuple[bool, bool]:
    """Whether forward keeps the linear output, and the winners of MaxOut."""
    return for_backward and options.keeps_linear(dtype), for_backward and options.max_out > 1


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    squares: Tensor | None = None,
) -> Forward:
    keeps = _keeps(options, x.dtype, for_backward)
    return Forward(*_ops().conv2d(x, weight, bias, *_exponent(options), *_conv_arguments(options), *keeps, squares))


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


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    squares: Tensor | None = None,
) -> Forward:
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
    x: Tensor,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: NormOptions,
) -> NormForward:
    o = options
    return NormForward(*_ops().batch_norm(x, var, weight, bias, residual, o.eps, o.relu, o.squares))


def batch_norm_uncentered2d_backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: NormOptions,
    needs: NormNeeds,
) -> NormGradients:
    o = options
    return NormGradients(
        *_ops().batch_norm_backward(grad, x, z, mean, var, weight, bias, o.eps, o.relu, o.detach_var, list(needs))
    )
