"""What only a GPU can show: every usable backend on CUDA tensors, CUDA graphs, autocast, deterministic mode, big networks.

``tests/test_triton.py`` runs there too, with the whole matrix.
"""

from __future__ import annotations

import copy
import socket
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision

import bcos_kernels as bk
from bcos_kernels import choice, cudnn, cudnn_graphs, dispatch
from tests.networks import SIDE, make
from tests.op_cases import Case, matrix, modes
from tests.test_cudnn import CASES as CUDNN_CASES
from tests.test_cudnn import channels_last
from tests.test_fused import listened_to
from tests.tolerances import GRADIENT, OUTPUT, assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

CASES = list(modes(matrix()))


def run(case: Case, tensors: dict[str, torch.Tensor], backend: str) -> list[torch.Tensor]:
    """``y`` and the gradients; skips, with the sentence, what the backend refuses."""
    try:
        y = case.run(tensors, backend=backend)
    except RuntimeError as error:
        if str(error).startswith(f"{backend}: "):
            pytest.skip(str(error))
        raise
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    found = torch.autograd.grad(y, list(tensors.values()), upstream, allow_unused=True, materialize_grads=True)
    return [y, *found]


def check(case: Case, tensors: dict[str, torch.Tensor], backend: str) -> None:
    double = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
    results = run(case, tensors, backend), run(case, double, "reference")
    for name, actual, expected in zip(("y", *tensors), *results, strict=True):
        assert_close(actual, expected, OUTPUT if name == "y" else GRADIENT, name)


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("case", CASES[::2], ids=lambda c: c.name)
def test_equals_reference(case: Case, backend: str) -> None:
    """In float64, of which every backend has its own way or none. (Triton's matrix: ``test_triton.py``.)"""
    check(case, case.inputs(device="cuda"), backend)


@pytest.mark.parametrize("name", ["resnet", "densenet", "clip_resnet", "simple_vit"])
def test_layers_that_run_together(name: str) -> None:
    """As one after another, in output, gradients and explanation: ``test_fused.py`` on a GPU."""
    model = bk.bcosify(make(name)).cuda()
    x = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64, device="cuda")
    results = []
    for one in (model, listened_to(model)):
        y = one(bk.AddInverse()(x))
        grads = torch.autograd.grad(y.square().mean(), list(one.parameters()))
        results.append([y, bk.explain(one, x).weights, *grads])
    for a, e in zip(*results, strict=True):
        assert_close(a, e, GRADIENT)


@pytest.fixture
def _own_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_RUNNER", cudnn_graphs.Runner())


@pytest.mark.usefixtures("_own_plans")
@pytest.mark.parametrize("tune", ["0", "1"], ids=["heuristics", "measured"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"detach_scale": True}, {"normalize_weight": True}], ids=str)
@pytest.mark.parametrize("case", CUDNN_CASES, ids=lambda c: c.name)
def test_cudnn_equals_reference(
    case: Case, options: dict[str, Any], dtype: torch.dtype, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tune == "1" and options:
        pytest.skip("measured without options only")
    monkeypatch.setenv("BCOS_CUDNN_TUNE", tune)
    case = replace(case, options={**case.options, **options})
    check(case, channels_last(case.inputs(dtype, device="cuda")), "cudnn")


@pytest.mark.usefixtures("_own_plans")
def test_cudnn_first_in_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, as if the table named it first for every layer: it runs what it takes, the others go on."""
    if (sentence := cudnn.unavailable()) is not None:
        pytest.skip(sentence)
    monkeypatch.setattr(choice, "order", lambda op, device, dtype, shapes, names: sorted(names, key="cudnn".__ne__))
    model, x = network(), images()

    def results(model: torch.nn.Module, x: torch.Tensor, backend: str) -> list[torch.Tensor]:
        dispatch.forget()
        with bk.use_backend(backend), torch.autocast("cuda", dtype=torch.bfloat16, enabled=x.dtype == torch.float32):
            y = model(x)
        return [y.detach(), *torch.autograd.grad(y.double().square().mean(), list(model.parameters()))]

    ours, eager = (results(model, x, backend) for backend in ("auto", "reference"))
    exact = results(copy.deepcopy(model).double(), x.double(), "reference")
    dispatch.forget()
    plans = cudnn._RUNNER._plans
    assert {which.kind for (which, *_), p in plans.items() if isinstance(p, cudnn_graphs.Plan)} >= {
        "forward",
        "scale_backward",
    }
    for name, a, b, e in zip(("y", *dict(model.named_parameters())), ours, eager, exact, strict=True):
        error, allowed = (float((t - e).norm() / e.norm()) for t in (a, b))
        assert error <= 1.2 * allowed + 0.01, name


def test_cudnn_in_a_cuda_graph() -> None:
    if (sentence := cudnn.unavailable()) is not None:
        pytest.skip(sentence)
    x, w = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((4, 64, 14, 14), (64, 64, 3, 3)))
    x = x.contiguous(memory_format=torch.channels_last)

    def layer() -> torch.Tensor:
        return bk.bcos_conv2d(x, w, padding=1, backend="cudnn")

    with torch.no_grad():
        layer()  # builds the plan
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer()
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer())


def test_ddp_on_one_gpu() -> None:
    """Through NCCL, alone: DDP's hooks and buckets around the operators. Two processes: ``test_triton_training.py``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        model, x = network().eval(), images()
        ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
        found = []
        for forward in (ddp, model):
            model.zero_grad()
            forward(x).square().mean().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    finally:
        torch.distributed.destroy_process_group()


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
