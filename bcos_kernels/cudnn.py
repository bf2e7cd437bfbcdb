"""The cuDNN backend: a convolution and its scale as one graph, which cuDNN compiles to one kernel (B = 2).

The graphs are in ``cudnn_graphs.py``. Around them, the norm of a pixel, and what turns one map into the next (window sums,
root, reciprocal), is PyTorch's own; the gradient of the weights is ATen's.

cuDNN says whether it has a kernel for a graph only when it is asked to build it. So ``why_not`` builds what the call would
run: the first call of a shape takes about a second. cuDNN's heuristics choose between its kernels; ``BCOS_CUDNN_TUNE=1``
measures them instead.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_kernels import cudnn_graphs, reference
from bcos_kernels.contract import Call, Forward, Gradients, Needs, Options, Saved, conv_output_size, winner_dtype
from bcos_kernels.cudnn_graphs import Graph, Layer, Runner, Shape, image, map_of
from bcos_kernels.weights import unit_rows, unit_rows_backward

#: Channels are read 16 bytes at a time.
_CHANNELS = 8

_RUNNER = Runner()


# ---- which calls


@functools.cache
def unavailable() -> str | None:
    if importlib.util.find_spec("cudnn") is None:
        return "cudnn: the package nvidia-cudnn-frontend is not installed; pip install 'bcos_kernels[cudnn]'"
    if not torch.cuda.is_available():
        return "cudnn: there is no CUDA device"
    try:
        cudnn_graphs.package()
    except (ImportError, OSError, RuntimeError) as error:
        return f"cudnn: the package cudnn cannot be imported: {error}"
    return None


def why_not(call: Call) -> str | None:
    x, weight, o = call.x, call.weight, call.options
    if weight is None or not call.op.startswith("conv2d"):
        return f"cudnn: graphs are for convolutions; this is {call.op}"
    if call.op == "conv2d_backward" and cudnn_graphs.deterministic():
        return "cudnn: its sums over channels are not deterministic, and torch is told to be"
    return _RUNNER.wrong_device(x.device) or _refusal(x, weight, o) or _without_kernel(call, _layer(x, weight, o))


def _refusal(x: Tensor, weight: Tensor, o: Options) -> str | None:
    """What the graphs cannot express, or cuDNN is known not to take."""
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"cudnn: graphs take bfloat16 and float16; x is {_name(x)}, weight {_name(weight)}"
    if not o.is_quadratic:
        return "cudnn: graphs are for B = 2, given as a number"
    if o.max_out > 1 or o.groups > 1 or o.dilation != (1, 1):
        return "cudnn: graphs have no MaxOut, groups or dilation"
    if weight.shape[0] % _CHANNELS or weight.shape[1] % _CHANNELS:
        return f"cudnn: graphs take multiples of {_CHANNELS} channels; weight is {list(weight.shape)}"
    if any(p > k // 2 for p, k in zip(o.padding, weight.shape[2:], strict=True)):
        return "cudnn: graphs take padding up to half the kernel size"
    if x.numel() == 0 or x.numel() >= 2**31:
        return f"cudnn: graphs take from 1 to 2^31 - 1 numbers; x is {list(x.shape)}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "cudnn: graphs take channels-last images; x.to(memory_format=torch.channels_last) makes one"
    if x.data_ptr() % 16:
        return "cudnn: graphs take images that begin at a multiple of 16 bytes; x is a view into the midst of another"
    if not torch.backends.cudnn.enabled:
        return "cudnn: torch.backends.cudnn.enabled is False"
    return None


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _without_kernel(call: Call, layer: Layer) -> str | None:
    keeps = call.options.keeps_linear(layer.dtype)
    if call.op == "conv2d":
        graphs = [Graph("forward", layer, call.bias, call.for_backward and keeps)]
    else:
        graphs = [Graph("scale_backward", layer, linear=keeps)]
        if not call.options.detach_scale:
            graphs.append(Graph("input_gradient", layer))
    sentences = (_RUNNER.why_not(graph, call.x.device) for graph in graphs)
    return next((s for s in sentences if s is not None), None)


# ---- the operations


def _layer(x: Tensor, weight: Tensor, o: Options) -> Layer:
    kernel = (weight.shape[2], weight.shape[3])
    size = conv_output_size((x.shape[2], x.shape[3]), kernel, o.stride, o.padding, o.dilation)
    y = (x.shape[0], weight.shape[0], *size)
    return Layer(tuple(x.shape), tuple(weight.shape), y, o.stride, o.padding, x.dtype)


def _new_image(like: Tensor, shape: Shape) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _patch_norm(x: Tensor, layer: Layer, squares: Tensor | None) -> Tensor:
    """One pass over ``x``, unless the sum of its squares is known, and a few over the map."""
    if squares is None:
        # reads x in its own dtype and adds up in float32; x.float().square().sum(1) would write ten bytes an element more
        squares = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square()
    return F.avg_pool2d(squares, *_pool(layer)).add_(reference.PATCH_NORM_EPS).sqrt_().contiguous()


def _pool(layer: Layer) -> tuple[Any, ...]:
    """A window sum as average pooling: one kernel, in float32."""
    return (layer.weight[2:], layer.stride, layer.padding, False, True, 1)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, for_backward: bool, squares: Tensor | None = None
) -> Forward:
    layer = _layer(x, weight, options)
    keep = for_backward and options.keeps_linear(x.dtype)
    norm = _patch_norm(x, layer, squares)
    y = _new_image(x, layer.y)
    more = {}
    if bias is not None:
        more["bias"] = image(bias.to(x.dtype).view(1, -1, 1, 1))
    if keep:
        more["u"] = torch.empty_like(y)
    which = Graph("forward", layer, bias is not None, keep)
    _RUNNER.run(which, x=x, w=image(unit_rows(weight, options)), r=norm.reciprocal(), y=y, **more)
    u = more["u"] if keep else x.new_empty(0)
    return Forward(y, norm, u, x.new_empty(0, dtype=winner_dtype(1)))


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, options: Options, needs: Needs
) -> Gradients:
    o = options
    layer = _layer(x, weight, o)
    linear = o.keeps_linear(x.dtype)
    unit = unit_rows(weight, o)
    reciprocal = saved.norm.reciprocal()
    factor = 1 if o.detach_scale else 2
    slope = reciprocal * (factor if linear else factor**2)
    du, q = _new_image(x, layer.y), torch.zeros_like(reciprocal)
    which = Graph("scale_backward", layer, linear=linear)
    _RUNNER.run(which, g=image(grad), kept=image(saved.kept), slope=slope, du=du, q=q)
    dx = empty = grad.new_empty(0)
    pulls = needs.x and not o.detach_scale
    if pulls:
        dnorm_over_norm = -q * reciprocal ** (3 if linear else 2)
        like = torch.empty(map_of(layer.x), device=x.device)
        s = torch.ops.aten.avg_pool2d_backward(dnorm_over_norm, like, *_pool(layer))
        dx = _new_image(x, layer.x)
        _RUNNER.run(Graph("input_gradient", layer), du=du, w=image(unit), x=x, s=s.contiguous(), dx=dx)
    mask = [needs.x and not pulls, needs.weight, needs.bias]
    if any(mask):
        sizes = None if bias is None else list(bias.shape)
        by_aten, dunit, dbias = torch.ops.aten.convolution_backward(
            du, x, unit, sizes, o.stride, o.padding, o.dilation, False, [0, 0], o.groups, mask
        )
        dx = by_aten if mask[0] else dx
    return Gradients(
        dx,
        unit_rows_backward(dunit, weight, o) if needs.weight else empty,
        dbias if needs.bias else empty,
        empty,
    )
