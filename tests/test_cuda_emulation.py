"""The CUDA kernels without a GPU: their sources run in an emulator (tests/cuda_emulation) behind ``backend="native"``.

What this cannot show is speed, and what depends on real concurrency; ``make gpu-sanitize`` looks for the latter on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bcos_kernels as bk
from bcos_kernels import native, portable, reference
from bcos_kernels.contract import NormNeeds, NormOptions
from tests import cuda_emulation, test_native
from tests.op_cases import Case, matrix, modes
from tests.test_native import CHANNELS_LAST, CONTIGUOUS, CONV_CASES, EXPONENTS_AND_MODES, LINEAR_CASES, describe

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not())),
]

#: The second has several blocks a channel in channels-last.
NORM_SHAPES = [(3, 37, 7, 9), (2, 16, 48, 48), (5, 300, 1, 1), (1, 1, 3, 5)]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]
#: (the last warp runs first, copies land only where they are waited for)
SCHEDULES = list(itertools.product([False, True], repeat=2))


@pytest.fixture(autouse=True)
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``backend="native"`` runs the CUDA operators on CPU tensors."""
    emulated = cuda_emulation.load()
    monkeypatch.setattr(native, "_ops", lambda: emulated)
    monkeypatch.setitem(native._DTYPES, "cpu", native._DTYPES["cuda"])
    emulated.force_fused(None)
    emulated.set_schedule(True, True)
    emulated.take_counts()
    yield emulated
    assert emulated.take_counts()[2] == 0, "ldmatrix with bank conflicts"


# ---- every operator, on every path that the table takes


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("fmt", [CHANNELS_LAST, CONTIGUOUS], ids=lambda f: str(f)[6:])
def test_shared_matrix(dtype: torch.dtype, fmt: torch.memory_format) -> None:
    def call(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str, case: Case, b: Any, **_: Any) -> Tensor:
        layer = bk.bcos_conv2d if case.is_conv else bk.bcos_linear
        return layer(x, weight, bias, backend=backend, **{**case.options, "b": b})

    cases = list(modes(matrix()))
    # the float64 kernels see every case in both formats, the others, which are the same template, a third each
    third = 0 if dtype == torch.float64 else 1 + DTYPES.index(dtype) % 3
    for i, case in enumerate(cases):
        if third and i % 3 != third - 1:
            continue
        made = case.inputs()
        tensors = [made["x"], made["weight"], made.get("bias")]
        if case.is_conv:
            tensors[0] = made["x"].to(memory_format=fmt)
        options = {key: case.options[key] for key in ("max_out",) if key in case.options}
        test_native.check(call, tensors, case.options["b"], dtype, case=case, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CONV_CASES, ids=describe)
def test_conv2d(case: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, options = test_native.make_conv(case)
    if dtype == torch.bfloat16 and options.get("max_out", 1) > 1 and options.get("normalize_weight"):
        pytest.skip("the reference rounds the unit rows on the way, so that other rows win")
    for b, detach in [(2.0, False), ("learnable", True)]:
        test_native.check(bk.bcos_conv2d, tensors, b, dtype, detach_scale=detach, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=describe)
def test_linear(case: dict[str, Any], dtype: torch.dtype) -> None:
    test_native.test_linear(case, dtype)


@pytest.mark.parametrize(
    "case", [{}, {"k": (1, 1)}, {"padding": 1, "format": CONTIGUOUS}, {"max_out": 2}], ids=describe
)
def test_contract(case: dict[str, Any]) -> None:
    """What is kept, every choice of gradients, and that no argument is written to."""
    test_native.test_contract(case, torch.float32)


def test_ties_nan_and_zeros() -> None:
    test_native.test_ties_and_nan_go_where_torch_max_sends_them()
    test_native.test_a_row_of_zeros()


@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck(k: int) -> None:
    test_native.test_gradcheck(k, 1.5)


# ---- batch norm


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("fmt", [CHANNELS_LAST, CONTIGUOUS], ids=lambda f: str(f)[6:])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_batch_norm(shape: tuple[int, ...], fmt: torch.memory_format, dtype: torch.dtype) -> None:
    for add, relu in [(False, False), (False, True), (True, True)]:
        test_native.test_batch_norm(shape, fmt, dtype, add, relu)


@pytest.mark.parametrize("fmt", [CHANNELS_LAST, CONTIGUOUS], ids=lambda f: str(f)[6:])
def test_batch_norm_contract(fmt: torch.memory_format) -> None:
    test_native.test_batch_norm_contract(fmt, torch.float32)


@pytest.mark.parametrize("fmt", [CHANNELS_LAST, CONTIGUOUS], ids=lambda f: str(f)[6:])
def test_batch_norm_far_from_zero(fmt: torch.memory_format) -> None:
    test_native.test_batch_norm_far_from_zero(fmt)


def test_batch_norm_of_many_pixels() -> None:
    """Several blocks a channel in the contiguous format too."""
    x, weight, bias = (t.float() for t in test_native.norm_inputs((3, 2, 320, 240), CONTIGUOUS))
    options = NormOptions(1e-5)
    ours, theirs = (m.batch_norm_uncentered2d(x, None, weight, bias, None, options) for m in (native, portable))
    for a, t in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, t)
    needs = NormNeeds(True, True, True, False)
    given = (torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), x, None, *theirs[1:3], weight, bias)
    ours, theirs = (m.batch_norm_uncentered2d_backward(*given, options, needs) for m in (native, portable))
    for a, t in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, t, rtol=1e-4, atol=1e-4)


def test_batch_norm_of_nothing_and_gradcheck() -> None:
    test_native.test_batch_norm_of_nothing()
    test_native.test_batch_norm_gradcheck()


def test_given_squares() -> None:
    x, weight = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)
    options = native.Options(padding=(1, 1))
    squares = x.square().sum(1, keepdim=True)
    ours = native.conv2d(x, weight, None, options, True, squares)
    torch.testing.assert_close(ours.norm, native.conv2d(x, weight, None, options, True).norm)
    doubled = native.conv2d(x, weight, None, options, True, 4 * squares)
    torch.testing.assert_close(doubled.norm, 2 * ours.norm)


# ---- the fused convolution

#: Odd sizes beside the tiles' (8 x 16, 64 and 128 pixels; 64 and 128 channels; 32 and 64 inputs a stage).
FUSED_CASES: list[dict[str, Any]] = [
    # the halo kernel: 3x3, stride 1, 64 or 128 channels
    {"c": 64, "o": 64, "size": (9, 17), "padding": 1},
    {"c": 64, "o": 130, "n": 1, "size": (9, 20), "padding": 0},
    {"c": 128, "o": 96, "n": 1, "size": (7, 18), "padding": 2},
    {"c": 128, "o": 136, "n": 3, "size": (4, 4), "padding": 1, "normalize_weight": True},
    # the implicit product
    {"c": 8, "o": 12, "size": (9, 11), "k": (3, 5), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"c": 40, "o": 136, "n": 1, "size": (12, 13), "k": (1, 1)},
    {"c": 24, "o": 70, "n": 3, "size": (20, 21), "k": (1, 1), "stride": 2, "normalize_weight": True},
    {"c": 32, "o": 72, "size": (9, 11), "padding": 1, "stride": 2},
    {"c": 16, "o": 200, "n": 1, "size": (95, 91), "k": (1, 1)},  # 68 x 2 tiles of 128 x 128
    {"c": 16, "o": 40, "n": 2, "size": (93, 91), "k": (1, 1), "bias": False},  # 133 tiles of 128 x 64
]


def convolve(
    case: dict[str, Any], dtype: torch.dtype, b: Any, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """``(y, l, n)`` of the fused kernel, and the same by the definition in float64."""
    tensors, options = test_native.make_conv({**case, "format": CHANNELS_LAST})
    x, weight, bias = (None if t is None else t.to(device, dtype) for t in tensors)
    assert x is not None
    assert weight is not None
    pairs = {
        k: (v, v) if isinstance(v, int) and k in ("stride", "padding", "dilation") else v for k, v in options.items()
    }
    given = native.Options(torch.tensor(1.7, dtype=dtype, device=device) if b == "learnable" else b, **pairs)
    y, norm, linear, _ = native._ops().conv2d(
        x, weight, bias, *native._exponent(given), *native._conv_arguments(given), True, False, None
    )
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    wide_b = given.b.double() if isinstance(given.b, Tensor) else given.b
    truth = reference.conv2d(*wide, b=wide_b, **pairs)  # type: ignore[arg-type]
    truth_linear = reference.conv2d(*wide, b=1, **pairs)  # type: ignore[arg-type]
    windows = (weight.shape[2:], given.stride, given.padding, given.dilation)
    return [y, linear, norm], [truth, truth_linear, reference.patch_norm(x.double(), *windows, 1)]


def assert_rounded_once(ours: list[Tensor], truth: list[Tensor]) -> None:
    """``(y, l, n)`` differ from the truth by the sum's float32 and one rounding to the output's dtype, if any."""
    for what, value, expected in zip(("y", "linear", "norm"), ours, truth, strict=True):
        half_a_digit = torch.finfo(value.dtype).eps / 2
        error = (value.double() - expected).abs() - half_a_digit * expected.abs()
        assert float(error.max()) <= 3e-6 * float(expected.abs().max()), what


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", FUSED_CASES, ids=describe)
def test_fused_conv2d(case: dict[str, Any], dtype: torch.dtype, ops: Any) -> None:
    ops.force_fused(True)
    for b in (2.0, "learnable"):
        ours, truth = convolve(case, dtype, b)
        launches, products, _ = ops.take_counts()
        assert launches == 1
        assert products > 0
        assert_rounded_once(ours, truth)


@pytest.mark.parametrize("case", [FUSED_CASES[i] for i in (0, 2, 4, 9)], ids=describe)
def test_order_of_warps_and_copies_changes_nothing(case: dict[str, Any], ops: Any) -> None:
    """A barrier or a wait too few would: see emulation.h."""
    ops.force_fused(True)
    results = []
    for schedule in SCHEDULES:
        ops.set_schedule(*schedule)
        results.append(convolve(case, torch.bfloat16, 2.0)[0])
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)


def test_order_of_warps_changes_no_pass(ops: Any) -> None:
    tensors, options = test_native.make_conv({"c": 40, "o": 72, "size": (30, 30), "format": CONTIGUOUS, "padding": 1})
    results = []
    for schedule in SCHEDULES[::2]:
        ops.set_schedule(*schedule)
        results.append(test_native.run(bk.bcos_conv2d, tensors, "learnable", torch.float32, "native", **options))
    for one, another in zip(*results, strict=True):
        assert torch.equal(one, another)


@pytest.mark.parametrize(
    ("x", "weight", "groups"),
    [((7, 4800, 3, 3), (600, 8, 3, 3), 600), ((33000, 128), (3, 128), 1)],
    ids=["contiguous", "rows"],
)
def test_more_work_than_blocks(x: tuple[int, ...], weight: tuple[int, ...], groups: int, ops: Any) -> None:
    """A launch has 4096 blocks at most: here each of them makes several rounds."""
    rng = torch.Generator().manual_seed(0)
    tensors: list[Tensor | None] = [torch.randn(x, dtype=torch.float64, generator=rng)]
    tensors += [torch.randn(weight, dtype=torch.float64, generator=rng), None]
    for last_warp_first in (False, True):
        ops.set_schedule(last_warp_first, True)
        if groups > 1:
            test_native.check(bk.bcos_conv2d, tensors, 2.0, torch.float32, groups=groups, padding=1)
        else:
            test_native.check(bk.bcos_linear, tensors, 2.0, torch.float32)


def surrounded_by_nans(t: Tensor) -> Tensor:
    """A copy in the middle of a larger piece of memory, where a read beside it shows."""
    room = torch.full((t.numel() + 512,), torch.nan, dtype=t.dtype)
    inner = room[256 : 256 + t.numel()]
    strides = t.stride()
    copy = torch.as_strided(inner, t.shape, strides, inner.storage_offset())
    return copy.copy_(t)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "passes"])
@pytest.mark.parametrize("case", [FUSED_CASES[i] for i in (1, 2, 4, 5)], ids=describe)
def test_reads_nothing_beside_its_arguments(case: dict[str, Any], fused: bool, ops: Any) -> None:
    ops.force_fused(fused)
    tensors, options = test_native.make_conv({**case, "format": CHANNELS_LAST})
    leaves = [None if t is None else surrounded_by_nans(t.to(torch.bfloat16)) for t in tensors]
    for t in leaves:
        if t is not None:
            t.requires_grad_()
    y = bk.bcos_conv2d(*leaves, backend="native", **options)  # type: ignore[arg-type]
    results = [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], surrounded_by_nans(torch.ones_like(y)))]
    assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
def test_fused_layers_through_autograd(dtype: torch.dtype, ops: Any) -> None:
    ops.force_fused(True)
    for b, detach in EXPONENTS_AND_MODES:
        if b == 1.0:
            continue
        tensors, options = test_native.make_conv({**FUSED_CASES[0], "size": (5, 6)})
        test_native.check(bk.bcos_conv2d, tensors, b, dtype, detach_scale=detach, **options)
        rows = [tensors[0].flatten(1)[:, :64].contiguous(), tensors[1].flatten(1)[:, :64].contiguous(), tensors[2]]
        test_native.check(bk.bcos_linear, rows, b, dtype, detach_scale=detach)


@pytest.mark.parametrize(
    "case",
    [{"size": (5, 5)}, {"size": (1, 1), "padding": 1}, {"c": 12}, {"groups": 4}, {"max_out": 2}],
    ids=describe,
)
def test_what_the_kernels_do_not_take_goes_through_passes(case: dict[str, Any], ops: Any) -> None:
    ops.force_fused(True)
    tensors, options = test_native.make_conv({"format": CONTIGUOUS, "c": 40, "o": 48, **case})
    ops.take_counts()
    test_native.check(bk.bcos_conv2d, tensors, 2.0, torch.bfloat16, **options)
    assert ops.take_counts()[1] == 0
