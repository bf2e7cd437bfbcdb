"""What ``dispatch`` sees of the Triton backend. Its operations are in ``layers``, ``batch_norm`` and ``layer_norm``.

They are imported, and Triton with them, by the first call that runs here: importing this module costs nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from bcos_kernels.contract import Call

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_OPERATIONS = {
    "conv2d": "layers",
    "conv2d_backward": "layers",
    "linear": "layers",
    "linear_backward": "layers",
    "batch_norm_uncentered2d": "batch_norm",
    "batch_norm_uncentered2d_backward": "batch_norm",
    "layer_norm": "layer_norm",
    "layer_norm_backward": "layer_norm",
}


def unavailable() -> str | None:
    if not _installed():
        return "triton: the package triton is not installed"
    if not _interpreted() and not torch.cuda.is_available():
        return "triton: there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def why_not(call: Call) -> str | None:
    x = call.x
    if x.dtype not in _DTYPES:
        return f"triton: {call.op} has no kernel for {x.dtype}"
    if not x.is_cuda and not (x.device.type == "cpu" and _interpreted() and call.explicit):
        return f"triton: kernel needs CUDA; tensor is on {x.device.type}"
    if x.is_cuda and _capability(x.device.index) < (8, 0):
        major, minor = _capability(x.device.index)
        return f"triton: kernel needs compute capability 8.0 (Ampere); {x.device} has {major}.{minor}"
    if call.op.startswith("conv2d") and x.numel() == 0 and x.shape[0] != 0:
        return f"triton: {call.op} has no kernel for images without pixels or channels; x is {list(x.shape)}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def __getattr__(name: str) -> Any:
    if name not in _OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    operation = getattr(importlib.import_module(f"bcos_kernels.triton.{_OPERATIONS[name]}"), name)
    globals()[name] = operation
    return operation
