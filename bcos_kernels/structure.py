"""What a network that nobody described does: its classifier, the pooling before it, and what has no exact explanation.

``torch.fx`` writes down the calls of one forward pass. From them follows which linear layer is the classifier and which
pooling it stands behind, and whether anything between the layers is more than the layers: a product of two things that both
depend on the image, say, has no linear map that an explanation could show.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from bcos_kernels.conversions import converter, stays

#: Functions and methods that are linear in one tensor, or linear wherever they have a gradient, or take no part at all.
# fmt: off
_LINEAR = frozenset((
    "add", "add_", "iadd", "sub", "sub_", "isub", "neg", "cat", "concat", "concatenate", "stack", "flatten",
    "unflatten", "reshape", "view", "permute", "transpose", "movedim", "moveaxis", "t", "swapaxes", "unsqueeze",
    "squeeze", "expand", "expand_as", "repeat", "repeat_interleave", "contiguous", "clone", "to", "type", "type_as",
    "float", "half", "double", "mean", "sum", "getitem", "chunk", "split", "unbind", "narrow", "select",
    "index_select", "roll", "flip", "pad", "dropout", "adaptive_avg_pool2d", "avg_pool2d", "relu", "relu_",
    "leaky_relu", "interpolate", "pixel_shuffle", "channel_shuffle", "identity", "Identity", "stochastic_depth",
    "drop_path", "_assert",
))
# fmt: on
#: Linear in each factor, so linear as long as only one of them depends on the image.
_PRODUCTS = frozenset(("mul", "mul_", "imul", "matmul", "bmm", "multiply", "einsum"))
#: What these return does not depend on the pixels.
_SIZES = frozenset(("size", "dim", "numel", "ndimension"))
#: Layers that may stand between the pooling and the classifier, and do to each location what they did to the mean.
_PER_LOCATION = frozenset(("Identity", "Dropout", "Flatten", "LayerNorm2d"))
_POOLS = frozenset(("FastAdaptiveAvgPool",))


@dataclass(frozen=True)
class Structure:
    """``head`` and ``pool``: paths of the classifier and of the pooling that it may trade places with, or None."""

    head: str | None
    pool: str | None
    problems: tuple[str, ...]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return converter(m) is not None or stays(m) or super().is_leaf_module(m, module_qualified_name)


def analyse(model: nn.Module) -> Structure:
    """The structure of ``model``, an image classifier that takes one tensor; it is not changed.

    Raises:
        ValueError: ``torch.fx`` cannot follow the forward pass; the message says why.
    """
    try:
        # in evaluation mode: what only training does is of no interest here
        graph = _Tracer().trace(copy.deepcopy(model).eval())
    except Exception as error:  # whatever a forward pass raises when it meets proxies for tensors
        raise ValueError(
            f"model: cannot convert a {type(model).__name__}: torch.fx cannot follow its forward pass: {error}"
        ) from error
    head, pool = _head_and_pool(model, graph)
    return Structure(head, pool, tuple(_problems(model, graph)))


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _problems(model: nn.Module, graph: fx.Graph) -> Iterator[str]:
    depends: set[fx.Node] = set()
    found: set[str] = set()
    for node in graph.nodes:
        inputs = [n for n in node.all_input_nodes if n in depends]
        if node.op == "placeholder":
            depends.add(node)
        if not inputs or node.op == "output":
            continue
        name = _name(node)
        if node.op == "call_method" and name in _SIZES:
            continue
        if name == "getattr":
            if node.args[1] in ("T", "mT"):
                depends.add(node)
            continue
        depends.add(node)
        if node.op == "call_module" or name in _LINEAR:
            continue
        if name in _PRODUCTS and len(inputs) == 1:
            continue
        if name in ("truediv", "div", "itruediv") and node.args[0] in depends and node.args[1] not in depends:
            continue
        if (problem := f"{_where(model, node)}: {name}()") not in found:
            found.add(problem)
            yield problem


def _where(model: nn.Module, node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return f"forward of {type(model).__name__}"
    path, kind = list(stack.values())[-1]
    return f"{path or 'model'}: {kind.__name__}, in its forward"


def _head_and_pool(model: nn.Module, graph: fx.Graph) -> tuple[str | None, str | None]:
    output = next(n for n in graph.nodes if n.op == "output")
    result = output.args[0]
    node = _skip(model, result) if isinstance(result, fx.Node) else None
    if node is None or not isinstance(_layer(model, node), nn.Linear):
        return None, None
    before = _skip(model, node.all_input_nodes[0])
    layer = None if before is None else _layer(model, before)
    pools = isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))
    if before is not None and (pools or type(layer).__name__ in _POOLS):
        return str(node.target), str(before.target)
    return str(node.target), None


def _layer(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _skip(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The first call behind ``node``, going back, that is not the same for each location and their mean."""
    while True:
        if node.op == "call_module":
            if type(_layer(model, node)).__name__ not in _PER_LOCATION:
                return node
        elif _name(node) not in ("flatten", "dropout", "identity"):
            return node
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
