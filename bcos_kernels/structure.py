"""What a forward pass does between the layers: its classifier, the pooling before it, and what has no exact explanation.

``torch.fx`` records the calls of one forward pass. From them follows which linear layer is the classifier and which pooling
stands before it, and whether anything between the layers is more than the layers: the product of two things that both
depend on the image, for example, has no linear map that an explanation could show.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bcos_kernels.conversions import Recipe, attention_kind, converter, is_linear_layer, stays
from bcos_kernels.identity import averages_all, class_name, known_class
from bcos_kernels.modules import AttentionPool2d
from bcos_kernels.verification import set_mode, shared_copy

#: Functions and methods that are linear in one tensor, or linear wherever they have a gradient, or take no part at all.
# fmt: off
_LINEAR = frozenset((
    "neg", "flatten", "unflatten", "reshape", "view", "permute", "transpose", "movedim", "moveaxis", "t", "swapaxes",
    "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "repeat_interleave", "contiguous", "clone", "to", "type",
    "type_as", "float", "half", "double", "mean", "sum", "getitem", "chunk", "split", "unbind", "narrow", "select",
    "index_select", "roll", "flip", "pad", "dropout", "adaptive_avg_pool2d", "avg_pool2d", "relu", "relu_",
    "leaky_relu", "interpolate", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "identity", "Identity",
    "stochastic_depth", "drop_path", "_assert",
))
# fmt: on
#: Packages whose functions have these meanings; a function of the same name elsewhere may do anything.
_PACKAGES = frozenset(("torch", "_operator", "builtins", "torchvision", "timm"))
_ADDITIONS = frozenset(("add", "add_", "iadd", "sub", "sub_", "isub", "subtract"))
_JOINS = frozenset(("cat", "concat", "concatenate", "stack"))
#: Settings of these packages that save memory by computing layers again; they branch on what fx cannot tell.
_RECOMPUTING = ("memory_efficient", "grad_checkpointing")
#: Linear in each factor, so linear as long as only one of them depends on the image.
_PRODUCTS = frozenset(("mul", "mul_", "imul", "matmul", "bmm", "multiply", "einsum"))
_QUOTIENTS = frozenset(("truediv", "div", "itruediv", "div_", "divide"))
#: Methods and attributes that do not depend on the pixels.
_SIZES = frozenset(("size", "dim", "numel", "ndimension", "is_contiguous"))
_LIKE = frozenset(("expand_as", "view_as", "reshape_as", "type_as", "to"))
_PROPERTIES = frozenset(("shape", "ndim", "device", "dtype", "is_cuda", "layout", "requires_grad"))
#: What treats all channels of the image alike, so that it may come before the first layer.
_BEFORE = frozenset(
    ("contiguous", "clone", "to", "type", "type_as", "float", "half", "double", "interpolate", "_assert")
)
_BEFORE_LAYERS = frozenset(
    class_name(kind)
    for kind in (nn.Identity, nn.Upsample, nn.AvgPool2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d)
)
#: What makes patches of an image, with the channel running fastest.
_PATCHES = frozenset(("unflatten", "permute", "flatten"))
_PATCH_LAYERS = frozenset(("einops.layers.torch.Rearrange",))
#: Modules whose output depends on the size of their input alone.
_POSITIONS = frozenset(("bcos.models.vit.PosEmbSinCos2d", "bcos_kernels/SinCosPositions"))
#: Layers that may stand between the pooling and the classifier, and do to each location what they did to the mean.
_PER_LOCATION = frozenset(
    (
        *(class_name(kind) for kind in (nn.Identity, nn.Dropout, nn.Flatten)),
        "timm.layers.norm.LayerNorm2d",
        "torchvision.models.convnext.LayerNorm2d",
    )
)
_FAST_POOL = "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool"


@dataclass(frozen=True)
class Structure:
    """What :func:`analyse` found.

    ``head`` and ``pool``: paths of the classifier and of the pooling that it may trade places with, or None. ``problems``:
    what cannot be converted. ``constants``: what is added to the image's contributions and is no bias of a layer, such as
    positions and class tokens. ``aliased``: paths of layers that work in place on what is used again.
    """

    head: str | None
    pool: str | None
    problems: tuple[str, ...]
    constants: tuple[str, ...]
    aliased: tuple[str, ...]


#: In the meta data of a node: whether the call is differentiated.
_GRADIENT = "gradient"


class _Tracer(fx.Tracer):
    #: the innermost module whose forward pass could not be followed
    failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = converter(m) is not None or stays(m) or known_class(m, _POSITIONS) is not None
        return known or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[_GRADIENT] = torch.is_grad_enabled()
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or f"{self.path_of_module(m)}: {type(m).__name__}, whose"
            raise


def analyse(model: nn.Module, first: str, recipe: Recipe, *, patches: bool = False) -> Structure:
    """The structure of ``model``, an image classifier that takes one tensor; it is not changed.

    ``first`` is the path of the layer that sees the image; ``patches``: that is a linear layer on patches.

    Raises:
        ValueError: ``torch.fx`` cannot follow the forward pass; the message says why.
    """
    model = shared_copy(model)
    for module in model.modules():
        for name in _RECOMPUTING:
            if getattr(module, name, False) and class_name(type(module)).split(".")[0] in _PACKAGES:
                setattr(module, name, False)
    set_mode(model, False)
    graph = _trace(model)
    walk = _Walk(model, graph, model.get_submodule(first), first, recipe, patches)
    problems = list(walk.problems())
    if not problems and not _trains_on_one_tensor(model):
        problems.append("its output in training, which is not a single tensor (leave auxiliary classifiers out)")
    head, pool = _head_and_pool(model, graph)
    constants, aliased = tuple(dict.fromkeys(walk.constants)), tuple(_aliased(model, graph))
    return Structure(head, pool, tuple(dict.fromkeys(problems)), constants, aliased)


def _trace(model: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return tracer.trace(model, _defaults(model))
    except Exception as error:  # whatever a forward pass raises when it meets proxies for tensors
        said = str(error).splitlines()
        raise ValueError(
            f"model: cannot convert a {type(model).__name__}: {tracer.failed or 'its'} forward pass cannot be followed "
            "without running it, since it branches on its input, or calls code that takes nothing but tensors. There, "
            "PyTorch says: " + (said[0] if said else type(error).__name__)
        ) from error


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The arguments that a call with an image alone leaves at their defaults."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())
    simple = (type(None), bool, int, float, str)
    return {p.name: p.default for p in parameters[2:] if isinstance(p.default, simple)}  # behind self and the image


def _trains_on_one_tensor(model: nn.Module) -> bool:
    """Whether the forward pass returns a single tensor in training too, as far as it can be followed there."""
    try:
        set_mode(model, True)
        graph = _Tracer().trace(model, _defaults(model))
    except Exception:  # it draws random numbers, for example: that says nothing about what it returns
        return True
    result = _result(graph)
    return isinstance(result, fx.Node) and not isinstance(result.target, type)  # a class: it makes a named tuple


def _aliased(model: nn.Module, graph: fx.Graph) -> Iterator[str]:
    """Layers that work in place on a tensor that something else uses too, which sees the result."""
    for node in graph.nodes:
        module = _module(model, node)
        if module is not None and getattr(module, "inplace", False) and len(node.all_input_nodes[0].users) > 1:
            yield str(node.target)


def _result(graph: fx.Graph) -> Any:
    return next(n for n in graph.nodes if n.op == "output").args[0]


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _operands(node: fx.Node) -> tuple[Any, Any]:
    """The two operands of a call, by position or by name; None for one that it has not."""
    values = [*node.args[:2], *(node.kwargs[k] for k in ("input", "other") if k in node.kwargs), None, None]
    return values[0], values[1]


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.dtype) and not value.is_floating_point


def _where(model: nn.Module, node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return f"forward of {type(model).__name__}"
    path, kind = list(stack.values())[-1]
    return f"{path or 'model'}: {kind.__name__}, in its forward"


class _Walk:
    """One pass over the graph, from the image to the output.

    A node *depends* where the pixels have a part in it. It is *raw* until the first layer: there, the six channels of a
    B-cos network's input take the place of three.
    """

    def __init__(
        self, model: nn.Module, graph: fx.Graph, layer: nn.Module, first: str, recipe: Recipe, patches: bool
    ) -> None:
        self.model, self.graph, self.layer, self.first, self.recipe = model, graph, layer, first, recipe
        self.before = _BEFORE | _PATCHES if patches else _BEFORE
        self.layers_before = _BEFORE_LAYERS | _PATCH_LAYERS if patches else _BEFORE_LAYERS
        self.depends: set[fx.Node] = set()
        self.raw: set[fx.Node] = set()
        self.calls = 0
        self.constants: list[str] = []

    def problems(self) -> Iterator[str]:
        images = [n for n in self.graph.nodes if n.op == "placeholder"]
        yield from (f"the argument {n.name} of its forward pass, besides the image" for n in images[1:] if not n.args)
        self.raw, self.depends = set(images[:1]), set(images[:1])
        for node in self.graph.nodes:
            inputs = self._uses(node)
            if node.op in ("placeholder", "output") or not inputs or self._is_size(node):
                continue
            self.depends.add(node)
            if any(n in self.raw for n in inputs):
                yield from self._raw(node, inputs)
            else:
                yield from self._problem(node, inputs)
        if self.calls > 1:
            yield f"{self.first}: {type(self.layer).__name__}, the first layer, which is called {self.calls} times"
        result = _result(self.graph)
        if not isinstance(result, fx.Node):
            yield f"its output, a {type(result).__name__} instead of a tensor of logits"
        elif result not in self.depends or result in self.raw:
            yield "its output, which does not depend on the image through the first layer"

    def _uses(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a call that depend on the image, one for each place: ``x * x`` has two."""
        found: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), found.append)
        return [n for n in found if n in self.depends]

    def _is_size(self, node: fx.Node) -> bool:
        name = _name(node)
        if node.op == "call_method":
            # of a constant: only the size or dtype of the other tensor counts
            return name in _SIZES or (name in _LIKE and node.args[0] not in self.depends)
        if node.op == "call_module":
            return known_class(self.model.get_submodule(str(node.target)), _POSITIONS) is not None
        return name == "getattr" and node.args[1] in _PROPERTIES

    def _raw(self, node: fx.Node, inputs: list[fx.Node]) -> Iterator[str]:
        """Before the first layer: only what treats all channels alike and adds nothing."""
        module, name = _module(self.model, node), _name(node)
        if module is self.layer:
            self.calls += 1
            return
        self.raw.add(node)
        if module is not None:
            allowed = known_class(module, self.layers_before) is not None
        elif name in _PRODUCTS | _QUOTIENTS:
            numbers = [v for v in _operands(node) if isinstance(v, (int, float))]
            left_first = name in _PRODUCTS or _operands(node)[0] in inputs
            allowed = len(inputs) == len(numbers) == 1 and left_first and "rounding_mode" not in node.kwargs
        else:
            integers = any(_is_integer(value) for value in (*node.args, *node.kwargs.values()))
            allowed = name in self.before and self._is_known_function(node) and not integers
        if not allowed:
            what = type(module).__name__ if module is not None else f"{name}()"
            yield (
                f"{_where(self.model, node)}: {what} on the image itself (prepare the image outside of the network; "
                "bcosify's `normalize` takes the place of a normalisation)"
            )

    def _problem(self, node: fx.Node, inputs: list[fx.Node]) -> Iterator[str]:
        name, where = _name(node), _where(self.model, node)
        left, right = _operands(node)
        if not node.meta[_GRADIENT]:
            yield f"{where}: {name}() under torch.no_grad(), which an explanation cannot look through"
        if node.op == "call_module":
            yield from self._layer(node)
        elif name == "getattr" and node.args[1] in ("T", "mT"):
            pass
        elif not self._is_known_function(node):
            yield f"{where}: {name}()"
        elif name in _ADDITIONS:
            for value in (left, right):
                yield from self._addition(value, where)
        elif name in _JOINS:
            tensors = left if left is not None else node.kwargs.get("tensors")
            if not isinstance(tensors, fx.Node):  # what chunk() and split() return goes in as one
                self.constants += [self._constant(t) for t in tensors if t not in self.depends]  # type: ignore[union-attr]
        elif name in _PRODUCTS:
            if len(inputs) > 1:
                yield f"{where}: {name}()"
        elif name in _QUOTIENTS:
            if left not in self.depends or right in self.depends or node.kwargs.get("rounding_mode") is not None:
                yield f"{where}: {name}()"
        elif name not in _LINEAR or any(_is_integer(value) for value in (*node.args, *node.kwargs.values())):
            yield f"{where}: {name}()"
        elif name == "pad" and (node.kwargs.get("value") or (len(node.args) > 3 and node.args[3])):
            yield f"{where}: pad() with a constant other than 0"

    def _is_known_function(self, node: fx.Node) -> bool:
        package = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
        return node.op != "call_function" or package in _PACKAGES

    def _layer(self, node: fx.Node) -> Iterator[str]:
        module = self.model.get_submodule(str(node.target))
        if converter(module) is None and not stays(module):
            yield f"{node.target}: {type(module).__name__}"
        kind = attention_kind(module)
        if kind is not None and (why := kind.why_not_called(node)) is not None:
            yield f"{node.target}: {type(module).__name__} called with {why}"
        if kind is AttentionPool2d and self.recipe.biases:
            self.constants.append(f"{node.target}.positional_embedding")

    def _addition(self, value: Any, where: str) -> Iterator[str]:
        """A constant that is added. One that is the same everywhere is a bias, whatever its name."""
        if (isinstance(value, fx.Node) and value in self.depends) or (isinstance(value, (int, float)) and value == 0):
            return
        name = self._constant(value)
        if self.recipe.biases or self._varies(value):
            self.constants.append(name)
        else:
            yield f"{where}: the constant {name} that it adds (keep=['biases', ...] would keep it)"

    def _sources(self, value: Any) -> list[str]:
        """The paths of the tensors that a constant is made of; none for a number, or for what is computed from sizes."""
        if not isinstance(value, fx.Node):
            return []
        if value.op == "get_attr":
            return [str(value.target)]
        return [path for n in value.all_input_nodes if n not in self.depends for path in self._sources(n)]

    def _constant(self, value: Any) -> str:
        """How a message names the constant."""
        if paths := self._sources(value):
            return ", ".join(dict.fromkeys(paths))
        if isinstance(value, fx.Node):
            return f"{value.target}" if value.op == "call_module" else f"{_where(self.model, value)}: {_name(value)}()"
        return repr(value)

    def _varies(self, value: Any) -> bool:
        """Whether the constant has another value for each location, or token: a position."""
        paths = self._sources(value)
        if not paths:
            return isinstance(value, fx.Node)  # computed from the size of the image
        return any(sum(side > 1 for side in _tensor(self.model, path).shape) > 1 for path in paths)


def _tensor(model: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), name)
    return tensor


def _head_and_pool(model: nn.Module, graph: fx.Graph) -> tuple[str | None, str | None]:
    result = _result(graph)
    node = _skip(model, result) if isinstance(result, fx.Node) else None
    head = None if node is None else _module(model, node)
    if node is None or head is None or not is_linear_layer(head) or _calls(model, graph, head) > 1:
        return None, None
    before = _skip(model, node.all_input_nodes[0])
    pool = None if before is None else _module(model, before)
    if before is None or pool is None or not _pools(pool) or _calls(model, graph, pool) > 1:
        return str(node.target), None
    return str(node.target), str(before.target)


def _calls(model: nn.Module, graph: fx.Graph, module: nn.Module) -> int:
    return sum(_module(model, node) is module for node in graph.nodes)


def _pools(module: nn.Module) -> bool:
    """Whether the module averages over all locations of ``[N, C, H, W]``."""
    return averages_all(module) or (known_class(module, (_FAST_POOL,)) is not None and module.dim == (2, 3))


def _skip(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The first call behind ``node``, going back, that is not the same for each location and their mean."""
    while True:
        if (module := _module(model, node)) is not None:
            if known_class(module, _PER_LOCATION) is None:
                return node
        elif _name(node) not in ("flatten", "dropout", "identity"):
            return node
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
