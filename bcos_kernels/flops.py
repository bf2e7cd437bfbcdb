"""Formulas for ``torch.utils.flop_counter.FlopCounterMode``, imported with it: see the end of :mod:`bcos_kernels.ops`.

A layer counts as the convolution or matrix product inside it, by torch's own formula; its norms and scale count as none, as
every norm does there. Shapes stand in for tensors. With MaxOut the product has a channel for every row of the weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, register_flop_formula


@register_flop_formula(torch.ops.bcos.conv2d)
def _conv2d(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape[0])


@register_flop_formula(torch.ops.bcos.conv2d_backward)
def _conv2d_backward(*arguments: Any, **__: Any) -> int:
    grad, x, weight, *_, needs, _, stride, padding, dilation, groups, _, _, _, _ = arguments
    product = [grad[0], weight[0], *grad[2:]]
    where = (stride, padding, dilation, False, [0, 0], groups)
    return conv_backward_flop(  # type: ignore[call-arg]  # the decorator makes out_shape from out_val
        product, x, weight, None, *where, needs[:3], out_val=[x, weight, weight[:1]]
    )


def _product(x: Any, weight: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


@register_flop_formula(torch.ops.bcos.linear)
def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _product(x, weight)


@register_flop_formula(torch.ops.bcos.linear_backward)
def _linear_backward(*arguments: Any, **__: Any) -> int:
    _, x, weight, _, _, _, _, _, needs, *_ = arguments
    return sum(needs[:2]) * _product(x, weight)
