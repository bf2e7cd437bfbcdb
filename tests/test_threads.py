"""Backends and explanations belong to the thread or asyncio task that asked for them. Barriers decide who is where."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bcos_kernels as bk
from bcos_kernels import dispatch, portable
from tests.lookalikes import PlainConv2d

Barrier = threading.Barrier


def together(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions return, each in a thread of its own; raises what one of them raised."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [f.result(60) for f in [pool.submit(function) for function in functions]]


# ---- backends


@pytest.fixture(autouse=True)
def default() -> Iterator[None]:
    yield
    assert dispatch._choices.get() == ()
    bk.set_default_backend("auto")


def test_each_thread_has_its_own_backend() -> None:
    names, barrier = dispatch.names() * 2, Barrier(2 * len(dispatch.names()))

    def ask(name: str) -> list[str]:
        seen = []
        for _ in range(3):
            with bk.use_backend(name):
                barrier.wait()
                seen.append(dispatch.requested(None))
                barrier.wait()
        return [*seen, dispatch.requested(None)]

    answers = together(*(lambda name=name: ask(name) for name in names))
    assert answers == [[name] * 3 + ["auto"] for name in names]


def test_blocks_may_end_in_any_order() -> None:
    first, second = bk.use_backend("portable"), bk.use_backend("reference")
    second.__exit__()
    first.__exit__()
    with bk.use_backend("native"):
        first, second = bk.use_backend("portable").__enter__(), bk.use_backend("reference").__enter__()
        first.__exit__()
        assert dispatch.requested(None) == "reference"
        second.__exit__()
        assert dispatch.requested(None) == "native"
    with first, second, first:  # an object may be used again, and twice
        assert dispatch.requested(None) == "portable"


def test_a_switch_ends_with_its_block_and_replaces_the_last_one() -> None:
    with bk.use_backend("portable"):
        for name in ("native", "reference") * 20:
            switch = bk.use_backend(name)
        assert len(dispatch._choices.get()) == 2
        assert dispatch.requested(None) == "reference"
        with bk.use_backend("portable"):
            assert dispatch.requested(None) == "portable"
        assert dispatch.requested(None) == "reference"
        switch.__exit__()  # to the switch before
        assert dispatch.requested(None) == "native"
    assert dispatch.requested(None) == "auto"


def test_default_of_the_process() -> None:
    bk.set_default_backend("portable")
    with bk.use_backend("reference"):
        assert together(lambda: dispatch.requested(None)) == ["portable"]
        assert dispatch.requested(None) == "reference"
    assert dispatch.requested(None) == "portable"
    with pytest.raises(ValueError, match="backend: unknown name 'fast'"):
        bk.set_default_backend("fast")


def test_tasks_have_their_own_backend() -> None:
    async def ask(name: str) -> list[str]:
        seen = []
        for _ in range(3):
            with bk.use_backend(name):
                await asyncio.sleep(0)
                seen.append(dispatch.requested(None))
            await asyncio.sleep(0)
        return [*seen, dispatch.requested(None)]

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*map(ask, dispatch.names()))

    assert asyncio.run(all_of_them()) == [[name] * 3 + ["auto"] for name in dispatch.names()]


def test_backward_runs_where_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = portable.linear_backward
    monkeypatch.setattr(portable, "linear_backward", lambda *args: (calls.append(1), original(*args))[1])
    layer, x = bk.BcosLinear(3, 2), torch.randn(4, 3)
    with bk.use_backend("portable"):
        y = layer(x)
    with bk.use_backend("reference"):
        together(y.sum().backward)
    assert calls == [1]
    assert layer.weight.grad is not None


# ---- explanations


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (bk.BcosConv2d(6, 8, 3), bk.BatchNormUncentered2d(8), nn.ReLU(), nn.Dropout(0.5), bk.BcosConv2d(8, 4, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


def images(n: int = 2) -> Tensor:
    return torch.rand(n, 6, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf).square().sum(), leaf)[0]


class Meeting(nn.Module):
    """Waits for others in the middle of a forward pass, where ``wait`` says so for its thread."""

    def __init__(self, barrier: Barrier) -> None:
        super().__init__()
        self.barrier, self.local = barrier, threading.local()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(getattr(self.local, "meetings", 0)):
            self.barrier.wait(60)
        return x


def test_eight_threads_explain_one_model() -> None:
    model = network().eval()
    expected = bk.explain(model, images(), 1).weights
    barrier = Barrier(8)
    model.insert(2, Meeting(barrier))
    wanted = [p.requires_grad for p in model.eval().parameters()]

    def explain() -> list[Tensor]:
        model[2].local.meetings = 1
        return [bk.explain(model, images(), 1).weights for _ in range(3)]

    for results in together(*[explain] * 8):
        assert all(torch.equal(w, expected) for w in results)
    assert not any(getattr(m, "detach", False) or m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_training_goes_on_while_another_thread_explains() -> None:
    model = network().eval()
    expected = bk.explain(model, images(), 1).weights
    model(images()).square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    barrier = Barrier(2)
    model.insert(2, Meeting(barrier))

    def explain() -> Tensor:
        model[2].local.meetings = 2  # the other thread's whole step is done between them
        return bk.explain(model, images(), 1).weights

    def train() -> None:
        barrier.wait(60)
        model(images()).square().sum().backward()
        barrier.wait(60)

    assert torch.equal(together(explain, train)[0], expected)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


def test_a_model_in_training_mode_stays_in_evaluation_until_the_last_explanation_is_made() -> None:
    model = network()
    model[3].eval()
    modes = [m.training for m in model.modules()]
    expected = bk.explain(model, images(), 1).weights
    assert [m.training for m in model.modules()] == modes
    barrier = Barrier(2)
    model.insert(0, Meeting(barrier))
    modes.insert(1, True)

    def first() -> Tensor:
        model[0].local.meetings = 1
        weights = bk.explain(model, images(), 1).weights
        barrier.wait(60)
        return weights

    def second() -> Tensor:
        model[0].local.meetings = 2  # the second time, the first thread has left
        return bk.explain(model, images(), 1).weights

    for weights in together(first, second):
        assert torch.equal(weights, expected)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("ours", [True, False])
def test_enter_enter_leave_explain(ours: bool) -> None:
    """A enters, B enters, A leaves, B explains; then nothing is left in explanation mode."""
    torch.manual_seed(0)
    model = network().eval() if ours else nn.Sequential(PlainConv2d(6, 4, 3)).double()
    plain = gradient(model, images())
    with bk.explanation_mode(model):
        expected = gradient(model, images())
    assert not torch.allclose(plain, expected)
    barrier = Barrier(2)

    def a() -> None:
        with bk.explanation_mode(model):
            barrier.wait(60)
        barrier.wait(60)

    def b() -> Tensor:
        with bk.explanation_mode(model):
            barrier.wait(60)
            barrier.wait(60)
            return gradient(model, images())

    assert torch.equal(together(a, b)[1], expected)
    assert torch.equal(gradient(model, images()), plain)


def test_one_layer_that_raises_does_not_leave_the_others_on() -> None:
    class Raises(PlainConv2d):
        def set_explanation_mode(self, activate: bool = True) -> None:
            self.detach = activate
            if not activate:
                raise KeyError("not off")

    model = nn.Sequential(Raises(6, 4, 1), PlainConv2d(4, 4, 1), PlainConv2d(4, 4, 1))
    for _ in range(2):
        with pytest.raises(KeyError, match="not off"), bk.explanation_mode(model):
            assert all(m.detach for m in model)
        assert not any(m.detach for m in model)


def test_generators_and_tasks_interleave() -> None:
    model, other = network().eval(), network().eval()
    plain = gradient(model, images())
    with bk.explanation_mode(model):
        expected = gradient(model, images())

    def block(which: nn.Module) -> Iterator[None]:
        with bk.explanation_mode(which):
            yield

    a, b = block(model), block(other)
    next(a), next(b)
    a.close()
    assert [model[0].detach, other[0].detach] == [False, True]
    b.close()
    assert not other[0].detach

    async def explain() -> Tensor:
        with bk.explanation_mode(model):
            await asyncio.sleep(0)
            return gradient(model, images())

    async def train() -> Tensor:
        await asyncio.sleep(0)
        return gradient(model, images())

    async def all_of_them() -> list[Tensor]:
        return await asyncio.gather(explain(), train(), explain(), train())

    results = asyncio.run(all_of_them())
    assert [torch.equal(r, e) for r, e in zip(results, [expected, plain] * 2, strict=True)] == [True] * 4


def test_copies_made_inside_are_not_in_explanation_mode() -> None:
    model = network()
    with bk.explanation_mode(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert [m[0].detach for m in (model, *copies)] == [True, False, False]
    model.apply(lambda m: m.set_explanation_mode() if hasattr(m, "set_explanation_mode") else None)
    assert copy.deepcopy(model)[0].detach  # the layers' own switch is copied


def test_a_swapped_layer_is_explained_by_thread_too() -> None:
    model = bk.accelerate(nn.Sequential(PlainConv2d(6, 4, 3))).double()
    plain = gradient(model, images())
    with bk.explanation_mode(model):
        assert model[0].detach
        assert not model[0].source.detach
        assert not torch.allclose(gradient(model, images()), plain)
        assert torch.equal(together(lambda: gradient(model, images()))[0], plain)


@pytest.mark.parametrize("swapped", [False, True])
def test_replicas_of_data_parallel_keep_the_mode(swapped: bool) -> None:
    """They are other objects, and run in threads of their own."""
    model = bk.accelerate(nn.Sequential(PlainConv2d(6, 4, 3))) if swapped else network()
    with bk.explanation_mode(model):
        replica = model[0]._replicate_for_data_parallel()
    assert replica.detach
    assert not model[0].detach
    assert not model[0]._replicate_for_data_parallel().detach


def checkpointed(layer: nn.Module, x: Tensor) -> tuple[Tensor | None, int]:
    """The gradient, and how many threads ran the layer: so many checkpoints in each other that there are two, as on a GPU."""
    threads: set[int] = set()

    def run(x: Tensor, depth: int) -> Tensor:
        if depth:
            return checkpoint(run, x, depth - 1, use_reentrant=True)
        threads.add(threading.get_ident())
        return layer(x)

    leaf = x.clone().requires_grad_()
    run(leaf, 62).square().sum().backward()
    return leaf.grad, len(threads)


def test_checkpoints_in_threads_of_autograd() -> None:
    layer, x = bk.BcosLinear(3, 3).double(), torch.randn(2, 3, dtype=torch.float64)
    with bk.explanation_mode(layer):
        grad, threads = checkpointed(layer, x)
        assert torch.equal(grad, gradient(layer, x))
    assert threads == 2
    assert torch.equal(checkpointed(layer, x)[0], gradient(layer, x))


def test_checkpoints_in_tasks_of_one_thread() -> None:
    """The tasks share what the thread leaves for the engine; each leaves its own with every forward pass."""
    layer, x = bk.BcosLinear(3, 3).double(), torch.randn(2, 3, dtype=torch.float64)

    async def explain() -> Tensor | None:
        with bk.explanation_mode(layer):
            await asyncio.sleep(0)
            return checkpointed(layer, x)[0]

    async def visit() -> None:
        with bk.explanation_mode(layer):
            pass

    async def train() -> Tensor | None:
        return checkpointed(layer, x)[0]

    async def all_of_them(*tasks: Callable[[], Any]) -> list[Any]:
        return await asyncio.gather(*(task() for task in tasks))

    plain = gradient(layer, x)
    with bk.explanation_mode(layer):
        expected = gradient(layer, x)
    assert not torch.allclose(plain, expected)
    assert torch.equal(asyncio.run(all_of_them(explain, visit))[0], expected)
    results = asyncio.run(all_of_them(explain, train))
    assert [torch.equal(r, e) for r, e in zip(results, (expected, plain), strict=True)] == [True, True]


def test_compiled_code_follows_the_mode_of_its_own_model() -> None:
    model, other = network().eval(), network().eval()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    plain = gradient(compiled, images())
    with bk.explanation_mode(model):
        expected = gradient(model, images())
    for _ in range(3):
        with bk.explanation_mode(other):
            assert torch.equal(gradient(compiled, images()), plain)
        with bk.explanation_mode(model):
            assert torch.equal(gradient(compiled, images()), expected)
        bk.explain(compiled, images())
        assert torch.equal(gradient(compiled, images()), plain)
        assert together(lambda: torch.equal(gradient(compiled, images()), plain)) == [True]
    if torch.__version__ >= "2.14":  # earlier the graph breaks at a context variable
        assert len(graphs) == 4
