"""Formulas for ``torch.utils.flop_counter.FlopCounterMode``, imported with it: see the end of :mod:`bcos_kernels.ops`.

A layer counts as the convolution or matrix product inside it, by torch's own formula. Norms and the scale count as 0 FLOPs,
as in torch's formulas. Shapes stand in for tensors. With MaxOut the product has a channel for every row of the weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, register_flop_formula


def _named(op: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """By the names of the schema."""
    return {a.name: value for a, value in zip(op.default._schema.arguments, arguments, strict=True)}


@register_flop_formula(torch.ops.bcos.conv2d)
def _conv2d(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape[0])


@register_flop_formula(torch.ops.bcos.conv2d_backward)
def _conv2d_backward(*arguments: Any, **__: Any) -> int:
    a = _named(torch.ops.bcos.conv2d_backward, arguments)
    grad, x, weight = a["grad"], a["x"], a["weight"]
    product = [grad[0], weight[0], *grad[2:]]
    where = (a["stride"], a["padding"], a["dilation"], False, [0, 0], a["groups"])
    return conv_backward_flop(  # type: ignore[call-arg]  # the decorator makes out_shape from out_val
        product, x, weight, None, *where, a["needs"][:3], out_val=[x, weight, weight[:1]]
    )


def _product(x: Any, weight: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


@register_flop_formula(torch.ops.bcos.linear)
def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _product(x, weight)


@register_flop_formula(torch.ops.bcos.linear_backward)
def _linear_backward(*arguments: Any, **__: Any) -> int:
    a = _named(torch.ops.bcos.linear_backward, arguments)
    return sum(a["needs"][:2]) * _product(a["x"], a["weight"])
