"""Which backend is the fastest for a call: ``choices.json``, which ``python -m benchmarks.choice`` makes from measurements.

The table goes by device, dtype, operation and class of shapes::

    {"cpu": {"float32": {"conv2d": {"1x1 s1": ["native", "portable"]}}}}

A list holds what was measured, the fastest first. A backend that is not in it comes behind, in the order of
``dispatch.BACKENDS``; one that does not exist, cannot be used or cannot run a call is passed over.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from bcos_kernels.contract import Call

Table = dict[str, dict[str, dict[str, dict[str, list[str]]]]]

TABLE = Path(__file__).with_name("choices.json")
#: Fewer input channels than this are a network's first layer, where most of a tile would be empty.
STEM_CHANNELS = 16


def shape_class(call: Call) -> str:
    """What decides between backends: ``"1x1 s1"``, ``"3x3 s2"``, ``"stem"``, ``"groups"``, ``"max_out"``, ...

    It is looked up for every call of a layer: attributes are read once, and the common layers come first.
    """
    weight, o = call.weight, call.options
    if weight is None or "norm" in call.op:
        return "norm"
    if isinstance(o.b, Tensor) or o.b != 2:
        return "linear part" if o.is_linear else "general b"
    if o.max_out > 1:
        return "max_out"
    shape = weight.shape
    if len(shape) != 4:
        return "linear"
    _, channels, height, width = shape
    if o.groups > 1:
        return "depthwise" if channels == 1 else "groups"
    if channels < STEM_CHANNELS:
        return "stem"
    if height == width and height in (1, 3) and o.stride in ((1, 1), (2, 2)) and o.dilation == (1, 1):
        return f"{height}x{height} s{o.stride[0]}"
    return "other"


def device_class(device: torch.device) -> str:
    """``"cpu"``, or a GPU's generation: ``"sm90"``."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@functools.cache
def table() -> Table:
    loaded: Table = json.loads(TABLE.read_text())
    return loaded


def order(op: str, device: torch.device, dtype: torch.dtype, shapes: str, names: Iterable[str]) -> list[str]:
    """``names``, those that were measured for such a call first."""
    by_op = table().get(device_class(device), {}).get(str(dtype).removeprefix("torch."), {})
    known, names = by_op.get(op, {}).get(shapes, []), list(names)
    return [*(n for n in known if n in names), *(n for n in names if n not in known)]
