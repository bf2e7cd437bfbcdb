"""What only a GPU can show: every usable backend on CUDA tensors, CUDA graphs, autocast, deterministic mode, big networks.

``tests/test_triton.py`` runs there too, with the whole matrix.
"""

from __future__ import annotations

import pytest
import torch
import torchvision

import bcos_kernels as bk
from tests.op_cases import Case, matrix, modes
from tests.tolerances import GRADIENT, OUTPUT, assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

CASES = list(modes(matrix()))


@pytest.mark.parametrize("case", CASES[::2], ids=lambda c: c.name)
def test_automatic_choice_equals_reference(case: Case) -> None:
    tensors = case.inputs(device="cuda")
    upstream = None
    results = []
    for backend in ("auto", "reference"):
        y = case.run(tensors, backend=backend)
        upstream = torch.randn_like(y) if upstream is None else upstream
        grads = torch.autograd.grad(y, list(tensors.values()), upstream, allow_unused=True, materialize_grads=True)
        results.append([y, *grads])
    for name, actual, expected in zip(("y", *tensors), *results, strict=True):
        assert_close(actual, expected, OUTPUT if name == "y" else GRADIENT, name)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return bk.bcosify(torchvision.models.resnet18(num_classes=10)).cuda().to(memory_format=torch.channels_last)


def images(n: int = 8) -> torch.Tensor:
    return bk.AddInverse()(torch.rand(n, 3, 64, 64, device="cuda")).contiguous(memory_format=torch.channels_last)


def test_cuda_graphs() -> None:
    """``mode="reduce-overhead"`` records forward and backward; replays must give what eager mode gives."""
    model = network()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = images()
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        y.square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        expected = model(x)
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
        expected.square().mean().backward()
        for g, p in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(g, p.grad, rtol=0.1, atol=0.1 * float(p.grad.abs().max()))
        model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    model = network()
    with torch.autocast("cuda", dtype=dtype):
        y = model(images())
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_deterministic() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for _ in range(2):
            model = network()
            torch.manual_seed(1)
            model(images()).square().mean().backward()
            runs.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_explanation() -> None:
    explanation = bk.explain(network(), torch.rand(4, 3, 64, 64, device="cuda"))
    assert explanation.rgba().isfinite().all()


def test_side_stream_and_second_device() -> None:
    layer = bk.BcosConv2d(6, 16, 3, padding=1).to(f"cuda:{torch.cuda.device_count() - 1}")
    x = torch.randn(2, 6, 16, 16, device=layer.weight.device)
    with torch.cuda.device(x.device):
        expected = layer(x)
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        y = layer(x)
    stream.synchronize()
    torch.testing.assert_close(y, expected)
