"""The compiled CPU backend, against the definition in float64."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bcos_kernels as bk
from bcos_kernels import build_record, dispatch, native, portable
from bcos_kernels.contract import Call, Needs, NormNeeds, NormOptions, Options, Saved
from tests.op_cases import Case, matrix, modes, reference_of_kernels
from tests.tolerances import GRADIENT, OUTPUT, assert_close

ROOT = Path(__file__).resolve().parent.parent
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))

needs_extension = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
# Both are needed by the fused 1x1 path: more channels than one panel of 64, and a number that is no multiple of 16.
DEFAULT_CASE = {"n": 2, "c": 40, "o": 72, "size": (9, 11), "k": (3, 3), "format": CHANNELS_LAST, "bias": True}

CONV_CASES: list[dict[str, Any]] = [
    {},
    {"format": CONTIGUOUS},
    {"k": (1, 1)},
    {"k": (1, 1), "format": CONTIGUOUS},
    {"k": (1, 1), "stride": 2},
    {"k": (1, 1), "stride": (1, 2), "bias": False},
    {"k": (1, 1), "padding": 1},
    {"k": (1, 1), "normalize_weight": True},
    {"k": (1, 1), "n": 8, "size": (28, 28), "c": 24, "o": 150},
    {"k": (1, 1), "size": (1, 1)},
    {"stride": 2, "padding": 1},
    {"stride": 2, "padding": 1, "format": CONTIGUOUS},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"k": (7, 7), "stride": 2, "padding": 3, "c": 6, "size": (32, 32)},
    {"k": (7, 7), "stride": 2, "padding": 3, "c": 6, "size": (32, 32), "format": CONTIGUOUS},
    {"k": (3, 5), "padding": (1, 2), "dilation": 2, "size": (14, 17)},
    {"groups": 4, "padding": 1},
    {"groups": 4, "padding": 1, "format": CONTIGUOUS},
    {"groups": 40, "o": 40, "padding": 1},
    {"groups": 40, "o": 80, "padding": 1, "format": CONTIGUOUS},
    {"max_out": 2, "padding": 1},
    {"max_out": 3, "o": 24, "groups": 2, "format": CONTIGUOUS},
    {"max_out": 3, "o": 24, "groups": 2, "bias": False},
    {"max_out": 2, "k": (1, 1)},
    {"normalize_weight": True, "bias": False, "max_out": 2},
    {"normalize_weight": True},
    {"n": 0, "padding": 1},
    {"n": 0, "k": (1, 1), "max_out": 2},
    {"n": 1, "size": (30, 30), "c": 3, "o": 5},
]
EXPONENTS = [1.0, 1.5, 2.0, 2.5, "learnable"]
EXPONENTS_AND_MODES = [*((b, False) for b in EXPONENTS), (2.0, True), ("learnable", True)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def make_conv(case: dict[str, Any], seed: int = 0) -> tuple[list[Tensor | None], dict[str, Any]]:
    """``(x, weight, bias)`` in float64, and the options."""
    case = {**DEFAULT_CASE, **case}
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=rng)

    groups, max_out = case.get("groups", 1), case.get("max_out", 1)
    x = normal(case["n"], case["c"], *case["size"]).to(memory_format=case["format"])
    weight = normal(case["o"] * max_out, case["c"] // groups, *case["k"]) * 0.2
    bias = normal(case["o"] * max_out) * 0.2 if case["bias"] else None
    names = ("stride", "padding", "dilation", "groups", "max_out", "normalize_weight")
    return [x, weight, bias], {name: case[name] for name in names if name in case}


def run(function: Any, tensors: list[Tensor | None], b: Any, dtype: torch.dtype, backend: str, **options: Any) -> Any:
    """Output and gradients, with a gradient that is not contiguous."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    exponent = torch.tensor(1.7, dtype=dtype, requires_grad=True) if b == "learnable" else b
    y = function(*leaves, b=exponent, backend=backend, **options)
    rng = torch.Generator().manual_seed(7)
    grad = torch.randn((2, *y.shape), dtype=torch.float64, generator=rng).movedim(0, -1)[..., 0]
    wanted = [t for t in (*leaves, exponent if b == "learnable" else None) if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(dtype))]


def check(function: Any, tensors: list[Tensor | None], b: Any, dtype: torch.dtype, **options: Any) -> None:
    """Against the definition in float64, by the one tolerance table.

    Two rows of MaxOut that are closer than the rounding may swap places in another dtype: there, the definition runs in the
    same dtype, on the same convolution, and both are allowed their rounding. dB in bfloat16 is left to the other dtypes: one
    number, the sum of many of either sign, whose own size says nothing of its error.
    """
    rounded = [None if t is None else t.to(dtype).double() for t in tensors]
    truth_dtype = dtype if options.get("max_out", 1) > 1 else torch.float64
    with reference_of_kernels():
        truth = run(function, rounded, b, truth_dtype, "reference", **options)
    ours = run(function, rounded, b, dtype, "native", **options)
    if dtype == torch.bfloat16 and b == "learnable":
        ours, truth = ours[:-1], truth[:-1]
    for i, (value, expected) in enumerate(zip(ours, truth, strict=True)):
        assert value.dtype == dtype
        table = GRADIENT if i else OUTPUT
        if truth_dtype != torch.float64:
            table = {key: 2 * limit for key, limit in table.items()}
        assert_close(value, expected, table, f"{b} {options} tensor {i}")


# ---- the build


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on this machine")
@pytest.mark.skipif(build_record.flag("BCOS_NO_EXTENSION"), reason="BCOS_NO_EXTENSION is set")
def test_is_built_where_a_compiler_is_found() -> None:
    """So that nothing below is skipped silently. By hand: ``python setup.py build_ext --inplace``."""
    assert native.unavailable() is None


def find_out_anew() -> None:
    native.unavailable.cache_clear()
    dispatch.forget()


def test_another_torch_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build_info", lambda: {"torch": "1.0.0"})
    find_out_anew()
    try:
        if native._LIBRARY.exists():
            sentence = dispatch.unavailable("native")
            told = f"native: the compiled extension was built for torch 1.0.0, this is torch {torch.__version__}"
            assert sentence == f"{told}; `{build_record.rebuild_command()}` builds it"
            with pytest.raises(RuntimeError, match="built for torch 1"):
                bk.bcos_linear(torch.ones(1, 2), torch.ones(3, 2), backend="native")
        assert bk.bcos_linear(torch.ones(1, 2), torch.ones(3, 2)).shape == (1, 3)
    finally:
        monkeypatch.undo()
        find_out_anew()


def test_missing_extension_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build_info", lambda: None)
    find_out_anew()
    try:
        sentence = str(dispatch.unavailable("native"))
        assert sentence.startswith("native: the compiled extension is missing: ")
        assert build_record.rebuild_command() in sentence
    finally:
        monkeypatch.undo()
        find_out_anew()


@needs_extension
def test_build_info_and_linkage() -> None:
    info = native.build_info()
    assert info is not None
    assert info["torch"] == torch.__version__
    assert set(info) == {"torch", "compiler", "flags", "cuda_archs", "no_cuda", "sources"}
    assert info["sources"] == build_record.source_hash(ROOT / "csrc")
    if shutil.which("readelf"):
        linked = subprocess.run(["readelf", "-d", native._LIBRARY], capture_output=True, text=True).stdout
        assert "libtorch_cpu" in linked
        assert "python" not in linked.split("Library rpath")[0].split("Library runpath")[0]
        assert "libgomp" not in linked  # at::parallel_for must use the OpenMP that torch brings


def test_refusals_are_sentences() -> None:
    half = Call("conv2d", torch.ones(1, 1, 1, 1, dtype=torch.float16))
    assert "float16" in str(native.why_not(half))
    wide = Call("linear", torch.ones(1, 1), torch.ones(257, 1), Options(max_out=257))
    assert "257" in str(native.why_not(wide))
    meta = Call("linear", torch.ones(1, 1, device="meta"), torch.ones(1, 1, device="meta"))
    assert "meta" in str(native.why_not(meta))


@needs_extension
def test_is_the_automatic_choice_on_the_cpu() -> None:
    x, w = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1)
    assert dispatch.choose("auto", Call("conv2d", x, w)) is native


# ---- the operations


def describe(case: dict[str, Any]) -> str:
    return "-".join(f"{k}={str(v).replace('torch.', '')}" for k, v in case.items()) or "default"


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CONV_CASES, ids=describe)
def test_conv2d(case: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, options = make_conv(case)
    if dtype == torch.bfloat16 and options.get("max_out", 1) > 1 and options.get("normalize_weight"):
        pytest.skip("the reference rounds the unit rows on the way, so that other rows win")
    for b, detach in EXPONENTS_AND_MODES:
        check(bk.bcos_conv2d, tensors, b, dtype, detach_scale=detach, **options)


LINEAR_CASES: list[dict[str, Any]] = [
    {},
    {"shape": (3, 5)},
    {"shape": ()},
    {"shape": (0,)},
    {"shape": (300,), "c": 130, "o": 200},
    {"shape": (300,), "c": 200, "o": 130, "bias": False},
    {"max_out": 2},
    {"max_out": 3, "shape": (2, 3), "bias": False},
    {"normalize_weight": True},
]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=describe)
def test_linear(case: dict[str, Any], dtype: torch.dtype) -> None:
    case = {"shape": (37,), "c": 48, "o": 70, "bias": True, **case}
    rng = torch.Generator().manual_seed(0)
    m = case.get("max_out", 1)
    x = torch.randn((*case["shape"], case["c"]), dtype=torch.float64, generator=rng)
    weight = torch.randn((case["o"] * m, case["c"]), dtype=torch.float64, generator=rng) * 0.2
    bias = torch.randn(case["o"] * m, dtype=torch.float64, generator=rng) * 0.2 if case["bias"] else None
    options = {name: case[name] for name in ("max_out", "normalize_weight") if name in case}
    for b, detach in EXPONENTS_AND_MODES:
        check(bk.bcos_linear, [x, weight, bias], b, dtype, detach_scale=detach, **options)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_shared_matrix(dtype: torch.dtype) -> None:
    def call(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str, case: Case, b: Any, **_: Any) -> Tensor:
        tensors = {"x": x, "weight": weight} | ({"bias": bias} if bias is not None else {})
        options = {**case.options, "b": b}
        layer = bk.bcos_conv2d if case.is_conv else bk.bcos_linear
        return layer(tensors["x"], tensors["weight"], tensors.get("bias"), backend=backend, **options)

    for case in modes(matrix()):
        given_tensors = case.inputs()
        tensors = [given_tensors["x"], given_tensors["weight"], given_tensors.get("bias")]
        check(call, tensors, case.options["b"], dtype, case=case, max_out=case.options.get("max_out", 1))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_extension
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("case", "b", "dtype"),
    # every path with both dtypes and both forms of the scale, and these two with each other
    [
        ({}, 2.0, torch.float32),
        ({}, 2.5, torch.bfloat16),
        ({"k": (1, 1)}, 2.0, torch.bfloat16),
        ({"k": (1, 1)}, 2.5, torch.float32),
        ({"padding": 1, "format": CONTIGUOUS}, 2.0, torch.bfloat16),
        ({"padding": 1, "format": CONTIGUOUS}, 2.5, torch.float32),
    ],
    ids=str,
)
def test_no_less_accurate_than_the_eager_reference(case: dict[str, Any], b: float, dtype: torch.dtype) -> None:
    """The error against float64 is at most 1.2 times the eager reference's own in that dtype: root mean square, 8 draws.

    With two threads: with one, ATen hands 1x1 convolutions to another library, with another order of summation.
    """
    totals = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(8):
        tensors, options = make_conv({**case, "n": 4}, seed)
        rounded = [None if t is None else t.to(dtype).double() for t in tensors]
        truth = run(bk.bcos_conv2d, rounded, b, torch.float64, "reference", **options)
        for row, backend in enumerate(("native", "reference")):
            got = run(bk.bcos_conv2d, rounded, b, dtype, backend, **options)
            totals[row] += torch.stack([(g.double() - t).square().mean() for g, t in zip(got, truth, strict=True)])
    assert (totals[0].sqrt() <= 1.2 * totals[1].sqrt()).all(), (totals[0] / totals[1]).sqrt()


@st.composite
def conv_cases(draw: Any) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    k = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (2, 3), (5, 1)]))
    dilation = draw(st.integers(1, 2))
    per_group = draw(st.integers(1, 35))
    return {
        "n": draw(st.integers(0, 3)),
        "c": groups * per_group,
        "o": groups * draw(st.integers(1, 70)),
        "size": tuple(draw(st.integers(dilation * (side - 1) + 1, 20)) for side in k),
        "k": k,
        "stride": draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 1)])),
        "padding": draw(st.sampled_from([(0, 0), (0, 0), (1, 1), (0, 2)])),
        "dilation": dilation,
        "groups": groups,
        "max_out": draw(st.integers(1, 3)),
        "format": draw(st.sampled_from([CHANNELS_LAST, CONTIGUOUS])),
        "bias": draw(st.booleans()),
        # A row of one weight is 1 or -1 when normalised: its gradient is 0, and nothing is relative to that.
        "normalize_weight": draw(st.booleans()) and per_group * k[0] * k[1] > 1,
    }


@needs_extension
@settings(derandomize=True, deadline=None, max_examples=int(os.environ.get("BCOS_EXAMPLES", "60")), database=None)
@given(
    case=conv_cases(),
    b=st.sampled_from([2.0, 2.0, *EXPONENTS]),
    detach=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_conv2d_property(case: dict[str, Any], b: Any, detach: bool, dtype: torch.dtype) -> None:
    tensors, options = make_conv(case)
    check(bk.bcos_conv2d, tensors, b, dtype, detach_scale=detach, **options)


@needs_extension
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"k": (1, 1)},
        {"k": (1, 1), "stride": 2},
        {"k": (1, 1), "bias": False},
        {"padding": 1, "format": CONTIGUOUS},
        {"groups": 4},
        {"max_out": 2},
    ],
    ids=describe,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_contract(case: dict[str, Any], dtype: torch.dtype) -> None:
    """Like the portable backend: what is kept, shapes and dtypes; every choice of gradients; no argument is written to."""
    tensors, names = make_conv(case)
    x, weight, bias = (None if t is None else t.to(dtype) for t in tensors)
    assert x is not None
    assert weight is not None
    pair = {k: (v, v) if isinstance(v, int) and k in ("stride", "padding") else v for k, v in names.items()}
    for b, for_backward in itertools.product((1.0, 2.0, 1.5, torch.tensor(1.5, dtype=dtype)), (True, False)):
        options = Options(b, **pair)
        ours = native.conv2d(x, weight, bias, options, for_backward)
        theirs = portable.conv2d(x, weight, bias, options, for_backward)
        for a, t in zip(ours, theirs, strict=True):
            assert (a.shape, a.dtype) == (t.shape, t.dtype)
        if not for_backward:
            continue
        y, norm, linear, winner = ours
        saved = Saved(linear if options.keeps_linear(dtype) else y, norm, winner)
        grad = torch.randn_like(y)
        copies = [t.clone() for t in (grad, x, weight, *saved)]
        for flags in itertools.product((False, True), repeat=4):
            needs = Needs(*flags)
            needs = needs._replace(bias=needs.bias and bias is not None, b=needs.b and isinstance(b, Tensor))
            got = native.conv2d_backward(grad, x, weight, bias, saved, options, needs)
            want = portable.conv2d_backward(grad, x, weight, bias, saved, options, needs)
            for need, a, t in zip(needs, got, want, strict=True):
                if need:
                    torch.testing.assert_close(a, t.view_as(a), rtol=1e-4, atol=1e-4, check_dtype=False)
                else:
                    assert a.numel() == 0
        for copy, t in zip(copies, (grad, x, weight, *saved), strict=True):
            assert torch.equal(copy, t)


@needs_extension
def test_ties_and_nan_go_where_torch_max_sends_them() -> None:
    x = torch.ones(1, 1, 1, 3)
    x[..., 2] = torch.nan
    weight = torch.tensor([1.0, 1.0, 0.5, 0.5, 2.0, 2.0]).view(6, 1, 1, 1)
    for fmt in (CHANNELS_LAST, CONTIGUOUS):
        inputs = [x.to(memory_format=fmt), weight]
        grads = []
        for backend in ("native", "reference"):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = bk.bcos_conv2d(*leaves, max_out=3, backend=backend)
            grads.append([y, *torch.autograd.grad(y[..., :2].sum(), leaves)])
        for a, t in zip(*grads, strict=True):
            torch.testing.assert_close(a, t, equal_nan=True)


@needs_extension
def test_a_row_of_zeros() -> None:
    """No length, no direction: the norm is 1e-12, and its gradient is that of torch's own norm, 0."""
    x = torch.zeros(3, 20, requires_grad=True)
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = bk.bcos_linear(x, weight, backend="native")
    for g in torch.autograd.grad(y.sum(), (x, weight)):
        assert torch.equal(g, torch.zeros_like(g))


@needs_extension
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("b", [2.0, 1.5])
def test_gradcheck(k: int, b: float) -> None:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=rng, requires_grad=True)
    w = torch.randn(6, 2, k, k, dtype=torch.float64, generator=rng, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, generator=rng, requires_grad=True)

    def conv(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return bk.bcos_conv2d(x, w, bias, b=b, padding=k // 2, groups=2, max_out=1, backend="native")

    assert torch.autograd.gradcheck(conv, (x, w, bias))


@needs_extension
def test_threads_do_not_change_the_result() -> None:
    tensors, options = make_conv({"k": (1, 1), "n": 4, "size": (20, 20)})
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(bk.bcos_conv2d, tensors, 2.0, torch.float32, "native", **options))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert_close(one, three, GRADIENT)


@needs_extension
@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="one instruction set only")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The kernels that older processors get, and the layer without the fused matrix product."""
    names = "test_conv2d_property or test_linear or test_batch_norm"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", names, __file__],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "BCOS_EXAMPLES": "15"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


# ---- uncentered batch norm


def norm_inputs(shape: tuple[int, ...], fmt: torch.memory_format, offset: float = 0.5) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, generator=rng) * 2 + offset
    weight = torch.rand(shape[1], dtype=torch.float64, generator=rng) + 0.5
    bias = torch.randn(shape[1], dtype=torch.float64, generator=rng)
    return [x.to(memory_format=fmt), weight, bias]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("fmt", [CHANNELS_LAST, CONTIGUOUS], ids=lambda f: str(f)[6:])
@pytest.mark.parametrize("shape", [(3, 37, 7, 9), (4, 6, 40, 40), (5, 300, 1, 1), (1, 1, 3, 5)], ids=str)
@pytest.mark.parametrize(("add", "relu"), [(False, False), (False, True), (True, True)])
def test_batch_norm(
    shape: tuple[int, ...], fmt: torch.memory_format, dtype: torch.dtype, add: bool, relu: bool
) -> None:
    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None, *more: Tensor, b: Any, **kw: Any) -> Tensor:
        # the same in every dtype: where a ReLU's gradient jumps, another rounding is another result
        running = torch.linspace(0.5, 2, x.shape[1], dtype=torch.bfloat16).to(x.dtype)
        residual = more[0] if more else None
        return bk.batch_norm_uncentered2d(x, running, weight, bias, residual=residual, relu=relu, **kw)

    x, weight, bias = norm_inputs(shape, fmt)
    more = [torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))] if add else []
    for training, detach in itertools.product((True, False), repeat=2):
        for tensors in ([x, weight, bias], [x, weight, None], [x, None, None]):
            check(call, [*tensors, *more], None, dtype, training=training, detach_var=detach)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("fmt", [CHANNELS_LAST, CONTIGUOUS], ids=lambda f: str(f)[6:])
def test_batch_norm_contract(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    """Like the portable backend: what is kept; every choice of gradients; no argument is written to."""
    x, weight, bias = (t.to(dtype) for t in norm_inputs((3, 37, 7, 9), fmt))
    residual = torch.randn_like(x)
    for more, relu, shift in itertools.product((None, residual), (False, True), (None, bias)):
        options = NormOptions(1e-5, relu=relu, squares=True)
        ours = native.batch_norm_uncentered2d(x, None, weight, shift, more, options)
        theirs = portable.batch_norm_uncentered2d(x, None, weight, shift, more, options)
        for a, t in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, t, rtol=1e-5, atol=1e-5)
        z = ours.z if relu and more is not None else None
        grad = torch.randn_like(x)
        arguments = (grad, x, z, ours.mean, ours.var, weight, shift)
        copies = [None if t is None else t.clone() for t in arguments]
        for flags in itertools.product((False, True), repeat=4):
            needs = NormNeeds(*flags)
            needs = needs._replace(bias=needs.bias and shift is not None, residual=needs.residual and z is not None)
            got = native.batch_norm_uncentered2d_backward(*arguments, options, needs)
            want = portable.batch_norm_uncentered2d_backward(*arguments, options, needs)
            for a, t in zip(got, want, strict=True):
                torch.testing.assert_close(a, t, rtol=1e-4, atol=1e-4)
        assert all(t is None or torch.equal(t, c) for t, c in zip(arguments, copies, strict=True))


@needs_extension
@pytest.mark.parametrize("fmt", [CHANNELS_LAST, CONTIGUOUS], ids=lambda f: str(f)[6:])
def test_batch_norm_far_from_zero(fmt: torch.memory_format) -> None:
    """A mean of 1000 deviations: sums of squares would lose the variance in float32."""
    x, *_ = norm_inputs((4, 20, 33, 35), fmt, offset=2000.0)
    x = x.float()
    _, mean, var, _ = native.batch_norm_uncentered2d(x, None, None, None, None, NormOptions(1e-5))
    truth_var, truth_mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
    torch.testing.assert_close(var.double(), truth_var, rtol=2e-6, atol=0)
    torch.testing.assert_close(mean.double(), truth_mean, rtol=2e-7, atol=0)


@needs_extension
def test_batch_norm_of_nothing() -> None:
    options = NormOptions(1e-5, squares=True)
    f = native.batch_norm_uncentered2d(torch.empty(0, 3, 4, 4), None, torch.ones(3), None, None, options)
    assert f.z.shape == (0, 3, 4, 4)
    assert f.mean.shape == f.var.shape == (3,)
    assert f.squares.shape == (0, 1, 4, 4)


@needs_extension
def test_batch_norm_gradcheck() -> None:
    x, weight, bias = (t.requires_grad_() for t in norm_inputs((2, 3, 4, 5), CHANNELS_LAST))

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bk.batch_norm_uncentered2d(x, None, weight, bias, training=True, backend="native")

    assert torch.autograd.gradcheck(norm, (x, weight, bias))
