"""Outputs that are modified in place: as behind ``nn.Linear`` and ``nn.Conv2d``, right, or refused in words, never wrong."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bcos_kernels as bk
from tests.op_cases import LEARNABLE, SHAPES, Case
from tests.tolerances import GRADIENT, OUTPUT, assert_close

CONV, LINEAR = SHAPES[0], SHAPES[11]
BACKENDS = [name for name in ("native", "portable", "reference") if bk.available_backends()[name] is None]


def modified(y: Tensor) -> Tensor:
    """The common ways, one after the other; a view too."""
    y += 1
    y.view(-1)[:3].mul_(2)
    y = y.mul_(1.5)
    return F.relu(y, inplace=True)


def out_of_place(y: Tensor) -> Tensor:
    factor = torch.full(y.shape, 1.5, dtype=y.dtype)
    factor.view(-1)[:3] = 3
    return F.relu((y + 1) * factor)


def gradients(y: Tensor, tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    y = y.double()
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((y * y * weights).sum(), list(tensors.values()), **options)


OPTIONS: list[dict[str, Any]] = [
    {"b": 2},
    {"b": 1},
    {"b": 1.5},
    {"b": LEARNABLE},
    {"b": 2, "max_out": 2},
    {"b": 1, "max_out": 2},
    {"b": 2, "detach_scale": True, "normalize_weight": True},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.name)
def test_output_of_a_layer(shape: Case, options: dict[str, Any], backend: str) -> None:
    rows = shape.weight[0] * options.get("max_out", 1)
    case = replace(shape, weight=(rows, *shape.weight[1:])).with_options(**options)
    tensors = case.inputs()
    expected = out_of_place(case.run(tensors, backend="reference"))
    y = modified(case.run(tensors, backend=backend))
    assert_close(y, expected, OUTPUT)
    for name, a, e in zip(tensors, gradients(y, tensors), gradients(expected, tensors), strict=True):
        assert_close(a, e, GRADIENT, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [CONV, SHAPES[3], LINEAR], ids=lambda c: c.name)
def test_in_lower_precision(shape: Case, dtype: torch.dtype) -> None:
    """With kernels of their own; and inside autocast, which must not change how backward computes the output anew."""
    tensors = shape.inputs(dtype)
    exact = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
    expected = gradients(out_of_place(shape.run(exact, backend="reference")), exact)
    y = modified(shape.run(tensors))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(y, tensors)
    for name, a, e in zip(tensors, found, expected, strict=True):
        assert_close(a, e, GRADIENT, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [CONV, LINEAR], ids=lambda c: c.name)
def test_second_derivative(case: Case, backend: str) -> None:
    tensors = case.inputs()

    def second(y: Tensor) -> tuple[Tensor, ...]:
        first = gradients(y, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), list(tensors.values()))

    expected = second(out_of_place(case.run(tensors, backend="reference")))
    for name, a, e in zip(tensors, second(modified(case.run(tensors, backend=backend))), expected, strict=True):
        assert_close(a, e, GRADIENT, name)


def test_gradient_of_a_layer_that_keeps_its_graph() -> None:
    """The outputs of the backward operator are outputs of an autograd.Function too."""
    tensors = LINEAR.inputs()
    for g in gradients(LINEAR.run(tensors), tensors, create_graph=True):
        g += 1
        g.sum().backward(retain_graph=True)


def in_checkpoint(reentrant: bool) -> Callable[[Callable[..., Tensor], list[Tensor]], Tensor]:
    def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        return checkpoint(function, *tensors, use_reentrant=reentrant)

    return run


def with_hooks(manager: Callable[[], Any]) -> Callable[[Callable[..., Tensor], list[Tensor]], Tensor]:
    def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        with manager():
            return function(*tensors)

    return run


RUNS = {
    "checkpoint": in_checkpoint(False),
    "reentrant checkpoint": in_checkpoint(True),
    "save_on_cpu": with_hooks(torch.autograd.graph.save_on_cpu),
    # torch's own check of versions does not look behind hooks
    "hooks": with_hooks(lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)),
    "compiled": lambda function, tensors: torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors),
}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", [CONV, LINEAR], ids=lambda c: c.name)
def test_with_other_ways_to_save(case: Case, run: str, inside: bool) -> None:
    torch._dynamo.reset()
    tensors = case.inputs()
    names = list(tensors)

    def function(*values: Tensor) -> Tensor:
        y = case.run(dict(zip(names, values, strict=True)))
        return modified(y) if inside else y

    if run == "reentrant checkpoint":  # its backward pass needs .backward()
        y = RUNS[run](function, list(tensors.values()))
        y = y if inside else modified(y)
        (y * y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        found = tuple(t.grad for t in tensors.values())
    else:
        y = RUNS[run](function, list(tensors.values()))
        y = y if inside else modified(y)
        if run == "compiled" and not inside:  # the graph that was compiled keeps its output
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(y, tensors)
            return
        found = gradients(y, tensors)
    expected = gradients(out_of_place(case.run(tensors, backend="reference")), tensors)
    for name, a, e in zip(names, found, expected, strict=True):
        assert_close(a, e, GRADIENT, name)


@pytest.mark.parametrize("explaining", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_network_with_in_place_operations(backend: str, explaining: bool) -> None:
    """Googlenet's blocks: ``F.relu(..., inplace=True)`` and sums directly behind layers."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = bk.BcosConv2d(4, 6, 3, padding=1, max_out=2)
            self.skip = bk.BcosConv2d(4, 6, 1)
            self.head = bk.BcosLinear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y += F.relu(self.skip(x), inplace=True)
            y = F.relu(y, inplace=True)
            z = self.head(y.mean((2, 3)))
            z += 0.1
            return torch.relu_(z)

    class OutOfPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv(x) + F.relu(self.skip(x)))
            return torch.relu(self.head(y.mean((2, 3))) + 0.1)

    torch.manual_seed(0)
    net, other = Net().double(), OutOfPlace().double()
    other.load_state_dict(net.state_dict())
    for module in (*net.modules(), *other.modules()):
        if isinstance(module, (bk.BcosConv2d, bk.BcosLinear)):
            module.set_explanation_mode(explaining)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    with bk.use_backend(backend):
        found = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    with bk.use_backend("reference"):
        expected = torch.autograd.grad(other(x).square().sum(), [x, *other.parameters()])
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e, GRADIENT)


@pytest.mark.parametrize("case", [CONV, LINEAR], ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["x", "weight"])
def test_modified_argument_raises(case: Case, name: str) -> None:
    """torch's own error."""
    tensors = case.inputs()
    changed = tensors[name] * 1
    y = case.run({**tensors, name: changed})
    with torch.no_grad():
        changed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_output_of_a_batch_norm(relu: bool, residual: bool, training: bool, backend: str) -> None:
    """Right; or torch's own error where the output is the mask of a ReLU, as behind torch's own."""
    rng = torch.Generator().manual_seed(0)
    x, r = (torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=rng, requires_grad=True) for _ in range(2))
    tensors = {"x": x, "weight": torch.rand(3, dtype=torch.float64, generator=rng).requires_grad_()}
    if residual:
        tensors["residual"] = r

    def run(backend: str) -> Tensor:
        var = None if training else torch.ones(3, dtype=torch.float64)
        return bk.batch_norm_uncentered2d(**tensors, running_var=var, training=training, relu=relu, backend=backend)

    expected = gradients(out_of_place(run("reference")), tensors)
    y = modified(run(backend))
    if relu and (residual or backend == "reference"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(y, tensors)
        return
    found = gradients(y, tensors)
    for name, a, e in zip(tensors, found, expected, strict=True):
        assert_close(a, e, GRADIENT, name)


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 4)], ids=str)
@pytest.mark.parametrize("detach_var", [True, False])
def test_output_of_a_layer_norm(shape: tuple[int, ...], detach_var: bool) -> None:
    tensors = {"x": torch.randn(shape, dtype=torch.float64).requires_grad_()}
    run = lambda backend: bk.layer_norm(tensors["x"], 4, detach_var=detach_var, backend=backend)  # noqa: E731
    (found,) = gradients(modified(run("auto")), tensors)
    (expected,) = gradients(out_of_place(run("reference")), tensors)
    assert_close(found, expected, GRADIENT)


@pytest.mark.parametrize("case", [CONV, LINEAR], ids=lambda c: c.name)
def test_output_is_freed_by_backward(case: Case) -> None:
    """What notices a modification holds no memory, and is in no cycle: without the garbage collector."""
    gc.disable()
    try:
        tensors = case.inputs()
        y = case.run(tensors)
        node, loss = y.grad_fn, y.sum()
        saved = node.saved_tensors[4]  # type: ignore[union-attr]
        assert saved.data_ptr() == y.data_ptr()
        pieces = weakref.ref(y), weakref.ref(saved)
        del y, saved
        assert pieces[1]() is not None
        loss.backward()
        assert [piece() for piece in pieces] == [None, None]
        assert not any(getattr(t, "nbytes", 0) for t in vars(node.watch).values())  # type: ignore[union-attr]
        watch = weakref.ref(node.watch)  # type: ignore[union-attr]
        del node, loss
        assert watch() is None
    finally:
        gc.enable()
