"""The cuDNN backend without a GPU: its graphs are compiled for one that is not there, and computed by PyTorch on the CPU.

``test_gpu.py`` runs it where there is one.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_kernels import cudnn, cudnn_graphs, dispatch
from bcos_kernels.contract import Call, Options
from tests.op_cases import Case
from tests.tolerances import GRADIENT, OUTPUT, assert_close

HALF = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


class OnTheCPU(cudnn_graphs.Runner):
    """Computes what a graph says, in float32, and rounds where a tensor is written."""

    def __init__(self) -> None:
        super().__init__()
        self.built: list[cudnn_graphs.Graph] = []
        self.missing: set[str] = set()
        self.ran: list[str] = []

    def wrong_device(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "cudnn: not here"

    def _build(self, which: cudnn_graphs.Graph, device: torch.device) -> Any:
        self.built.append(which)
        return f"cudnn: no kernel for {which.kind}" if which.kind in self.missing else cudnn_graphs.Plan(None, 0)

    def run(self, which: cudnn_graphs.Graph, **tensors: Tensor) -> None:
        assert not isinstance(self._plan(which, CPU), str)
        assert set(tensors) == set(cudnn_graphs.operands(which, CPU))
        for name, expected in cudnn_graphs.operands(which, CPU).items():
            given = tensors[name]
            assert (given.shape, given.dtype) == (expected.shape, expected.dtype), name
            assert given.is_contiguous(memory_format=torch.channels_last), name
        self.ran.append(which.kind)
        getattr(self, which.kind)(which, **{k: t.float() for k, t in tensors.items()}, out=tensors)

    def forward(
        self, which: cudnn_graphs.Graph, *, x: Tensor, w: Tensor, r: Tensor, out: dict[str, Tensor], **more: Any
    ) -> None:
        u = F.conv2d(x, w, None, which.layer.stride, which.layer.padding)
        u = u + more["bias"] if which.bias else u
        out["y"].copy_(u * u.abs() * r)
        if which.linear:
            out["u"].copy_(u)

    def scale_backward(
        self, which: cudnn_graphs.Graph, *, g: Tensor, kept: Tensor, slope: Tensor, out: dict[str, Tensor], **_: Any
    ) -> None:
        assert not out["q"].any(), "cuDNN adds to what is there"
        steep = kept.abs() * slope
        out["du"].copy_(g * (steep if which.linear else steep.sqrt()))
        squared = kept * kept.abs() if which.linear else kept
        out["q"].copy_((g * squared).sum(1, keepdim=True))

    def input_gradient(
        self,
        which: cudnn_graphs.Graph,
        *,
        du: Tensor,
        w: Tensor,
        x: Tensor,
        s: Tensor,
        out: dict[str, Tensor],
        **_: Any,
    ) -> None:
        layer = which.layer
        dx = torch.nn.grad.conv2d_input(layer.x, w, du, layer.stride, layer.padding)
        out["dx"].copy_(dx + x * s)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnTheCPU]:
    made = OnTheCPU()
    monkeypatch.setattr(cudnn, "_RUNNER", made)
    monkeypatch.setattr(cudnn, "unavailable", lambda: None)
    dispatch.forget()
    yield made
    monkeypatch.undo()
    dispatch.forget()


CASES = [
    Case("3x3", (2, 16, 7, 5), (8, 16, 3, 3), {"padding": 1}),
    Case("3x3 stride 2", (2, 8, 8, 7), (16, 8, 3, 3), {"padding": 1, "stride": 2}, bias=True),
    Case("1x1", (2, 8, 4, 3), (24, 8, 1, 1), {}, bias=True),
    Case("1x1 stride 2", (2, 8, 5, 4), (8, 8, 1, 1), {"stride": 2}),
    Case("3x5 pairs", (2, 8, 9, 8), (8, 8, 3, 5), {"padding": (1, 2), "stride": (2, 1)}),
    Case("7x7", (1, 8, 11, 10), (8, 8, 7, 7), {"padding": 3, "stride": 2}),
]


def channels_last(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        k: t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() if t.dim() == 4 else t
        for k, t in tensors.items()
    }


# ---- what is computed


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", [{}, {"detach_scale": True}, {"normalize_weight": True}], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_equals_the_definition(case: Case, options: dict[str, Any], dtype: torch.dtype, runner: OnTheCPU) -> None:
    case = replace(case, options={**case.options, **options})
    tensors = channels_last(case.inputs(dtype))
    double = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
    y, expected = case.run(tensors, backend="cudnn"), case.run(double, backend="reference")
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = torch.autograd.grad(y, list(tensors.values()), grad)
    exact = torch.autograd.grad(expected, list(double.values()), grad.double())
    assert_close(y, expected, OUTPUT, "y")
    for name, a, e in zip(tensors, found, exact, strict=True):
        assert_close(a, e, GRADIENT, name)
    assert runner.ran == ["forward", "scale_backward", *(["input_gradient"] if not options.get("detach_scale") else [])]
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_only_wanted_gradients(runner: OnTheCPU) -> None:
    tensors = channels_last(CASES[0].inputs(torch.bfloat16))
    tensors["x"] = tensors["x"].detach()
    CASES[0].run(tensors, backend="cudnn").sum().backward()
    assert runner.ran == ["forward", "scale_backward"]
    assert tensors["weight"].grad is not None


def test_float16_keeps_the_linear_output_for_backward_only(runner: OnTheCPU) -> None:
    tensors = channels_last(CASES[0].inputs(torch.float16))
    with torch.no_grad():
        CASES[0].run(tensors, backend="cudnn")
    CASES[0].run(tensors, backend="cudnn")
    assert [g.linear for g in runner.built] == [False, True]


def test_squares_may_be_given(runner: OnTheCPU) -> None:
    x = torch.randn(2, 8, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    w = torch.randn(8, 8, 3, 3).bfloat16()
    squares = x.float().square().sum(1, keepdim=True)
    o = Options(padding=(1, 1))
    given, computed = (cudnn.conv2d(x, w, None, o, True, s) for s in (squares, None))
    assert_close(given.norm, computed.norm.double(), OUTPUT)
    assert_close(cudnn.conv2d(x, w, None, o, True, 4 * squares).norm, 2 * computed.norm.double(), {torch.float32: 1e-3})


def test_strided_gradient_of_any_format(runner: OnTheCPU) -> None:
    tensors = channels_last(CASES[0].inputs(torch.bfloat16))
    y = CASES[0].run(tensors, backend="cudnn")
    wide = torch.randn(*y.shape[:-1], 2 * y.shape[-1]).bfloat16()
    before = wide.clone()
    strided = torch.autograd.grad(y, list(tensors.values()), wide[..., ::2], retain_graph=True)
    dense = torch.autograd.grad(y, list(tensors.values()), wide[..., ::2].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))
    assert torch.equal(wide, before)


# ---- which calls


def call(op: str = "conv2d", dtype: torch.dtype = torch.bfloat16, x: Any = None, w: Any = None, **options: Any) -> Call:
    x = torch.ones(1, 8, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last) if x is None else x
    w = torch.ones(8, 8, 1, 1, dtype=dtype) if w is None else w
    return Call(op, x, w, Options(**options))


REFUSED = {
    "B = 2": call(b=1.5),
    "given as a number": call(b=torch.tensor(2.0)),
    "MaxOut": call(max_out=2),
    "groups": call(groups=2),
    "dilation": call(dilation=(2, 1)),
    "padding up to half": call(padding=(1, 1)),
    "bfloat16 and float16; x is float32": call(dtype=torch.float32),
    "weight float32": call(w=torch.ones(8, 8, 1, 1)),
    "multiples of 8 channels": call(x=torch.ones(1, 6, 4, 4).bfloat16(), w=torch.ones(8, 6, 1, 1).bfloat16()),
    "channels-last": call(x=torch.ones(1, 8, 4, 4).bfloat16()),
    "from 1 to": call(x=torch.ones(0, 8, 4, 4).bfloat16()),
    "multiple of 16 bytes": call(
        x=torch.ones(2, 1, 4, 4, 8).bfloat16().flatten()[1:129].view(1, 4, 4, 8).permute(0, 3, 1, 2)
    ),
    "for convolutions; this is linear": call("linear"),
    "this is batch_norm_uncentered2d": call("batch_norm_uncentered2d"),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refuses_in_a_sentence(sentence: str, runner: OnTheCPU) -> None:
    reason = cudnn.why_not(REFUSED[sentence])
    assert reason is not None
    assert reason.startswith("cudnn: ")
    assert sentence in reason
    assert not runner.built


def test_takes_the_plain_call(runner: OnTheCPU) -> None:
    assert cudnn.why_not(call()) is None
    assert cudnn.why_not(call("conv2d_backward")) is None


def test_needs_a_device_and_the_package() -> None:
    reason = cudnn.unavailable()
    if not torch.cuda.is_available():
        assert reason is not None
        assert reason.startswith("cudnn: ")
    assert cudnn_graphs.Runner().wrong_device(CPU) == "cudnn: graphs need CUDA; the tensor is on cpu"


@pytest.mark.parametrize("everything", [True, False])
def test_backward_is_refused_in_deterministic_mode(
    everything: bool, runner: OnTheCPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    if everything:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert cudnn.why_not(call()) is None
    assert "not deterministic" in str(cudnn.why_not(call("conv2d_backward")))


# ---- plans


def test_a_plan_is_built_once(runner: OnTheCPU) -> None:
    threads = [threading.Thread(target=cudnn.why_not, args=(call(),)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(runner.built) == 1
    cudnn.why_not(call(x=torch.ones(2, 8, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)))
    assert len(runner.built) == 2


def test_the_next_backend_takes_over_where_there_is_no_kernel(runner: OnTheCPU, caplog: Any) -> None:
    runner.missing = {"input_gradient"}
    tensors = channels_last(CASES[0].inputs(torch.bfloat16))
    with dispatch.forget_logged(), caplog.at_level(logging.INFO, "bcos_kernels"):
        for _ in range(2):
            y = CASES[0].run(tensors, backend="cudnn")
            (dx,) = torch.autograd.grad(y.sum(), tensors["x"])
    assert runner.ran == ["forward", "forward"]
    assert len([m for m in caplog.messages if "no kernel for input_gradient" in m]) == 1
    double = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
    (exact,) = torch.autograd.grad(CASES[0].run(double, backend="reference").sum(), double["x"])
    assert_close(dx, exact, GRADIENT)
    runner.missing.add("forward")
    with pytest.raises(RuntimeError, match="no kernel for forward"):
        CASES[1].run(channels_last(CASES[1].inputs(torch.bfloat16)), backend="cudnn")


class Library:
    """What ``Runner`` asks of the package ``cudnn``: plan 1 of 3 is fast, plan 2 cannot be built."""

    class cudnnGraphNotSupportedError(Exception):  # noqa: N801 - its name there
        pass

    def __init__(self, *, supported: bool = True) -> None:
        self.supported = supported
        self.ran: list[int | None] = []
        self.heur_mode = self.numerical_note = self
        self.A = self.NONDETERMINISTIC = None

    def graph(self) -> Library:
        return self

    def build_plans(self) -> None:
        if not self.supported:
            raise self.cudnnGraphNotSupportedError("no engine\nand much more")

    def build_plan_at_index(self, index: int) -> None:
        if index == 2:
            raise RuntimeError("does not fit")

    def get_execution_plan_count(self) -> int:
        return 3

    def get_workspace_size(self) -> int:
        return 7

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return 10 * index

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("tune", [False, True])
def test_plan_is_the_heuristics_or_the_fastest(tune: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(cudnn_graphs, "package", lambda: library)
    monkeypatch.setattr(cudnn_graphs, "draw", lambda *args, **where: library.graph())
    monkeypatch.setattr(cudnn_graphs.Runner, "_handle", lambda self, device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        cudnn_graphs.Runner, "_measure", lambda self, graph, pack, workspace, index, device: [3.0, 1.0][index]
    )
    monkeypatch.setenv("BCOS_CUDNN_TUNE", "1" if tune else "0")
    one = call()
    which = cudnn_graphs.Graph("forward", cudnn._layer(one.x, one.weight, one.options))
    plan = cudnn_graphs.Runner()._plan(which, CPU)
    assert isinstance(plan, cudnn_graphs.Plan)
    assert (plan.index, plan.workspace) == ((1, 10) if tune else (None, 7))
    library.supported = False
    reason = cudnn_graphs.Runner().why_not(which, CPU)
    assert reason == "cudnn: no kernel for forward of x [1, 8, 4, 4], weight [8, 8, 1, 1]: no engine"


# ---- the graphs themselves


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="needs nvidia-cudnn-frontend")
@pytest.mark.skipif(sys.platform != "linux", reason="puts a library in the driver's place")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_every_graph_compiles_for_hopper(tmp_path: Path) -> None:
    """cuDNN itself validates the graphs and compiles them to machine code, for a device that is only described to it."""
    here = Path(__file__).parent
    driver = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", driver, here / "cudnn_driver.c"], check=True)
    search = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("LD_LIBRARY_PATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "tests.cudnn_plans"],
        cwd=here.parent,
        env={**os.environ, "LD_LIBRARY_PATH": search},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert {f["kind"] for f in found} == {"forward", "scale_backward", "input_gradient"}
    assert not [f for f in found if f["error"]]
    assert not any(f["workspace"] for f in found)
    kernels = [line for line in lines if line.startswith("cudnn_generated")]
    assert len(kernels) == len(found)
    if int(lines[0].removeprefix("cuDNN ")) < 92600:
        return  # compiles them, but its kernels for sm_90 want to see the device
    assert sum("sm90_convFwd_pointwise_pointwise_pointwise" in k for k in kernels) == 7
    assert sum("sm90_convBwdData_pointwise_pointwise" in k for k in kernels) == 4
