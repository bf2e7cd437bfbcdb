"""The graphs of the cuDNN backend: what they compute, how they are built, chosen, kept and run.

All images are channels-last; a map is float32 and has one number a pixel::

    forward          y = u |u| r,  u = conv(x, w) + bias               r = 1 / n
    scale_backward   du = g dy/du,  q = sum over channels of g y
    input_gradient   dx = dgrad(du, w) + x s                           s = boxT(dL/dn / n)

cuDNN compiles each to one kernel. It adds up ``q`` with atomics where the channels of a pixel are more than a tile.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]

#: What a plan may need at most; those for the layers of ResNet-50 need nothing (cuDNN 9.26, compiled for sm_90).
_WORKSPACE_BYTES = 256 * 2**20
_MEASUREMENTS = 5


# ---- the graphs


@dataclass(frozen=True)
class Layer:
    """A convolution as its graphs see it: ``x [N, C, H, W]``, ``weight [K, C, R, S]``, ``y [N, K, P, Q]``."""

    x: Shape
    weight: Shape
    y: Shape
    stride: Shape
    padding: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Graph:
    """Which graph of a layer; what a plan is remembered by.

    ``bias``: forward adds one. ``linear``: the layer keeps ``u`` (float16), which forward writes and scale_backward reads.
    """

    kind: str
    layer: Layer
    bias: bool = False
    linear: bool = False


class Canvas:
    """A cuDNN graph while it is drawn. Tensors go by the names that :meth:`Runner.run` is called with."""

    NAMES = ("x", "w", "bias", "r", "y", "u", "g", "kept", "slope", "du", "q", "s", "dx")

    def __init__(self, library: ModuleType, layer: Layer, **where: Any) -> None:
        self.add = library.reduction_mode.ADD
        self.dtype = {torch.bfloat16: library.data_type.BFLOAT16, torch.float16: library.data_type.HALF}[layer.dtype]
        self.float = library.data_type.FLOAT
        self.graph = library.pygraph(
            io_data_type=self.dtype, intermediate_data_type=self.float, compute_data_type=self.float, **where
        )

    @classmethod
    def uid(cls, name: str) -> int:
        return cls.NAMES.index(name) + 1

    def image(self, name: str, shape: Shape) -> Any:
        return self._input(name, shape, self.dtype)

    def map(self, name: str, image: Shape) -> Any:
        """One number for each pixel of ``image``."""
        return self._input(name, map_of(image), self.float)

    def _input(self, name: str, shape: Shape, dtype: Any) -> Any:
        return self.graph.tensor(
            name=name, dim=list(shape), stride=_strides(shape), data_type=dtype, uid=self.uid(name)
        )

    def write_image(self, name: str, tensor: Any, shape: Shape) -> None:
        self._write(name, tensor, shape, self.dtype)

    def write_map(self, name: str, tensor: Any, image: Shape) -> None:
        self._write(name, tensor, map_of(image), self.float)

    def _write(self, name: str, tensor: Any, shape: Shape, dtype: Any) -> None:
        tensor.set_dim(list(shape)).set_stride(_strides(shape))
        tensor.set_output(True).set_data_type(dtype).set_uid(self.uid(name))

    def sum_over_channels(self, tensor: Any) -> Any:
        return self.graph.reduction(tensor, mode=self.add)


def _strides(shape: Shape) -> list[int]:
    _, c, h, w = shape
    return [h * w * c, 1, w * c, c]


def map_of(image: Shape) -> Shape:
    """The shape of a map of ``image``."""
    return (image[0], 1, *image[2:])


def draw(which: Graph, library: ModuleType, **where: Any) -> Any:
    """``which`` as a graph of the package ``cudnn``; ``where`` it will run: a handle, or properties of a device."""
    canvas = Canvas(library, which.layer, **where)
    _DRAW[which.kind](canvas, which)
    return canvas.graph


def _forward(c: Canvas, which: Graph) -> None:
    layer = which.layer
    u = c.graph.conv_fprop(c.image("x", layer.x), c.image("w", layer.weight), **_window(layer))
    if which.bias:
        u = c.graph.add(u, c.image("bias", (1, layer.weight[0], 1, 1)))
    if which.linear:
        c.write_image("u", u, layer.y)
    y = c.graph.mul(c.graph.mul(u, c.graph.abs(u)), c.map("r", layer.y))
    c.write_image("y", y, layer.y)


def _scale_backward(c: Canvas, which: Graph) -> None:
    """``kept`` is ``l``, ``dl/du = slope |l|``; or ``y``, and then ``|l| = sqrt(|y| n)`` makes it ``sqrt(slope |y|)``."""
    layer = which.layer
    g, kept, slope = c.image("g", layer.y), c.image("kept", layer.y), c.map("slope", layer.y)
    steep = c.graph.mul(c.graph.abs(kept), slope)
    squared = c.graph.mul(kept, c.graph.abs(kept)) if which.linear else kept
    c.write_image("du", c.graph.mul(steep if which.linear else c.graph.sqrt(steep), g), layer.y)
    c.write_map("q", c.sum_over_channels(c.graph.mul(squared, g)), layer.y)


def _input_gradient(c: Canvas, which: Graph) -> None:
    layer = which.layer
    dx = c.graph.conv_dgrad(c.image("du", layer.y), c.image("w", layer.weight), **_window(layer))
    dx.set_dim(list(layer.x)).set_stride(_strides(layer.x))
    pulled = c.graph.mul(c.image("x", layer.x), c.map("s", layer.x))
    c.write_image("dx", c.graph.add(dx, pulled), layer.x)


def _window(layer: Layer) -> dict[str, list[int]]:
    return {"stride": list(layer.stride), "padding": list(layer.padding), "dilation": [1, 1]}


_DRAW = {
    "forward": _forward,
    "scale_backward": _scale_backward,
    "input_gradient": _input_gradient,
}


# ---- building and running them


@functools.cache
def package() -> ModuleType:
    """nvidia-cudnn-frontend."""
    return importlib.import_module("cudnn")


def deterministic() -> bool:
    """Whether torch was told so, for everything or for cuDNN."""
    return torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def compile_plans(graph: Any, library: ModuleType) -> None:
    """Leaves ``graph`` with the plan that cuDNN's heuristics like best; raises where there is none."""
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([library.heur_mode.A])
    if deterministic():
        graph.deselect_numeric_notes([library.numerical_note.NONDETERMINISTIC])
    graph.deselect_workspace_greater_than(_WORKSPACE_BYTES)
    graph.build_plans()


@dataclass(frozen=True)
class Plan:
    graph: Any
    workspace: int
    #: among the graph's plans; None: the one that the heuristics chose
    index: int | None = None


class Runner:
    """Builds every graph once for a device, and runs it on the current stream."""

    def __init__(self) -> None:
        self._plans: dict[tuple[Graph, int, bool], Plan | str] = {}
        self._lock = threading.Lock()
        self._own = threading.local()  # a handle belongs to one thread: the backward pass has its own

    def wrong_device(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"cudnn: graphs need CUDA; the tensor is on {device.type}"
        if _capability(device.index) < (8, 0):
            major, minor = _capability(device.index)
            return f"cudnn: graphs need compute capability 8.0 (Ampere); {device} has {major}.{minor}"
        return None

    def why_not(self, which: Graph, device: torch.device) -> str | None:
        """None, or a sentence where cuDNN has no kernel for this graph."""
        plan = self._plan(which, device)
        return plan if isinstance(plan, str) else None

    def run(self, which: Graph, **tensors: Tensor) -> None:
        """``tensors`` by the names in the graph, outputs too."""
        device = next(iter(tensors.values())).device
        plan = self._plan(which, device)
        if isinstance(plan, str):
            raise RuntimeError(plan)
        pack = {Canvas.uid(name): t for name, t in tensors.items()}
        self._execute(plan.graph, pack, plan.workspace, plan.index, device)

    def _execute(
        self, graph: Any, pack: dict[int, Tensor], workspace: int, index: int | None, device: torch.device
    ) -> None:
        with torch.cuda.device(device):
            handle = self._handle(device)
            package().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
            scratch = torch.empty(max(workspace, 1), dtype=torch.uint8, device=device)
            if index is None:
                graph.execute(pack, scratch, handle=handle)
            else:
                graph.execute_plan_at_index(pack, scratch, index, handle)

    def _handle(self, device: torch.device) -> Any:
        handles = self._own.__dict__.setdefault("handles", {})
        if device.index not in handles:
            with torch.cuda.device(device):
                handles[device.index] = package().create_handle()
        return handles[device.index]

    def _plan(self, which: Graph, device: torch.device) -> Plan | str:
        key = (which, device.index, deterministic())
        if key not in self._plans:
            with self._lock:
                if key not in self._plans:
                    self._plans[key] = self._build(which, device)
        return self._plans[key]

    def _build(self, which: Graph, device: torch.device) -> Plan | str:
        library = package()
        with torch.cuda.device(device):
            graph = draw(which, library, handle=self._handle(device))
            try:
                compile_plans(graph, library)
            except (RuntimeError, library.cudnnGraphNotSupportedError) as error:
                x, weight = list(which.layer.x), list(which.layer.weight)
                first = (str(error).splitlines() or [""])[0][:200]
                return f"cudnn: no kernel for {which.kind} of x {x}, weight {weight}: {first}"
            if os.environ.get("BCOS_CUDNN_TUNE") == "1" and not torch.cuda.is_current_stream_capturing():
                return self._fastest(graph, library, which, device)
        return Plan(graph, graph.get_workspace_size())

    def _fastest(self, graph: Any, library: ModuleType, which: Graph, device: torch.device) -> Plan:
        """By measurement, on zeros; a plan that does not build or run is passed over."""
        pack = {Canvas.uid(n): t for n, t in operands(which, device).items()}
        times: dict[int, float] = {}
        for index in range(graph.get_execution_plan_count()):
            try:
                graph.build_plan_at_index(index)
                workspace = graph.get_workspace_size_plan_at_index(index)
                times[index] = self._measure(graph, pack, workspace, index, device)
            except (RuntimeError, library.cudnnGraphNotSupportedError):
                continue
        if not times:
            return Plan(graph, graph.get_workspace_size())
        best = min(times, key=lambda index: times[index])
        return Plan(graph, graph.get_workspace_size_plan_at_index(best), best)

    def _measure(self, graph: Any, pack: dict[int, Tensor], workspace: int, index: int, device: torch.device) -> float:
        """Milliseconds, the best of a few."""
        best = float("inf")
        for _ in range(_MEASUREMENTS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._execute(graph, pack, workspace, index, device)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end))
        return best


def image(t: Tensor) -> Tensor:
    """``t`` as a graph reads it: channels-last and aligned."""
    t = t.contiguous(memory_format=torch.channels_last)
    return t.clone() if t.data_ptr() % 16 else t


def operands(which: Graph, device: torch.device) -> dict[str, Tensor]:
    """Zeros in the place of every tensor of the graph."""
    layer = which.layer
    images = {"x": layer.x, "dx": layer.x, "w": layer.weight, "bias": (1, layer.weight[0], 1, 1)}
    names = {
        "forward": ("x", "w", "r", "y", *(["bias"] if which.bias else []), *(["u"] if which.linear else [])),
        "scale_backward": ("g", "kept", "slope", "du", "q"),
        "input_gradient": ("du", "w", "x", "s", "dx"),
    }[which.kind]
    maps = {"s": layer.x, "r": layer.y, "slope": layer.y, "q": layer.y}
    return {
        name: torch.zeros(map_of(maps[name]), device=device)
        if name in maps
        else image(torch.zeros(images.get(name, layer.y), dtype=layer.dtype, device=device))
        for name in names
    }
