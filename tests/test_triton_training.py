"""The Triton backend under what training puts around it: the compiler, autocast, checkpointing, DDP, deterministic mode.

In the interpreter (``test_triton_interpreter.py`` starts it) or on a GPU, like ``test_triton.py``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bcos_kernels as bk
from tests.tolerances import GRADIENT, OUTPUT, assert_close

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1 (test_triton_interpreter.py)", allow_module_level=True)
pytest.importorskip("triton")

from bcos_kernels.triton import tiles  # noqa: E402

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"


BOTH_WAYS = pytest.mark.usefixtures("on_triton")


@pytest.fixture(params=[True, False], ids=["fused", "passes"])
def on_triton(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with tiles.force(request.param), bk.use_backend("triton"):
        yield
    torch.backends.cudnn.conv.fp32_precision = before


def network() -> nn.Sequential:
    """One of each layer: k x k with MaxOut, batch norm, 1x1, depthwise, linear."""
    torch.manual_seed(0)
    model = nn.Sequential(
        bk.BcosConv2d(6, 8, 3, padding=1, max_out=2, normalize_weight=True),
        bk.BatchNormUncentered2d(8),
        bk.BcosConv2d(8, 8, 1, bias=True),
        bk.BcosConv2d(8, 8, 3, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        bk.BcosLinear(8, 4),
    )
    return model.to(DEVICE, memory_format=torch.channels_last)


def images(n: int = 3) -> Tensor:
    x = torch.rand(n, 6, 5, 4, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE, memory_format=torch.channels_last)


def step(model: nn.Module, forward: Any = None) -> list[Tensor]:
    """The output, the gradient of the images and those of the parameters."""
    x = images().requires_grad_()
    y = (forward or model)(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])]


def expected() -> list[Tensor]:
    with bk.use_backend("reference"):
        model = network().double()
        x = images().double().requires_grad_()
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def check(found: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    tables = [{torch.float32: OUTPUT[dtype], dtype: OUTPUT[dtype]}]
    tables += [{torch.float32: 2 * GRADIENT[dtype]}] * (len(found) - 1)  # several layers deep
    for actual, exact, table in zip(found, expected(), tables, strict=True):
        assert_close(actual, exact, table)


@BOTH_WAYS
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(compiler: str) -> None:
    model = network()
    torch._dynamo.reset()
    check(step(model, torch.compile(model, fullgraph=True, backend=compiler)))


@BOTH_WAYS
def test_autocast() -> None:
    model = network()

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return model(x)

    found = step(model, forward)
    assert found[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in found[1:])
    with bk.use_backend("reference"):
        eager = step(model, forward)
    # rounded after every layer: how much that is, the reference under autocast shows
    for ours, theirs, exact in zip(found, eager, expected(), strict=True):
        assert float((ours - exact).norm()) <= 1.5 * float((theirs - exact).norm()) + 0.01 * float(exact.norm())


@BOTH_WAYS
def test_gradient_checkpointing() -> None:
    model = network().eval()  # forward runs twice: running statistics would see the batch twice
    plain = step(model)
    again = step(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@BOTH_WAYS
def test_deterministic_mode() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (step(network()) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(first)


def _rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for fused in (True, False):
            with tiles.force(fused), bk.use_backend("triton"):
                model, whole = (network().eval() for _ in range(2))  # batch statistics would differ between the halves
                ddp = nn.parallel.DistributedDataParallel(model)
                ddp(images(4)[2 * rank : 2 * rank + 2]).square().mean().backward()
                whole(images(4)).square().mean().backward()
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                assert_close(p.grad, q.grad.double(), {torch.float32: 1e-5})
    finally:
        torch.distributed.destroy_process_group()


def test_ddp() -> None:
    """Two processes with half of the batch each have the gradients of one with all of it. Through gloo: one GPU will do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port,), nprocs=2)
