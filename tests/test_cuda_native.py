"""``backend="native"`` on a GPU: the same cases as in the emulator and on the CPU, and what only a GPU can show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bcos_kernels as bk
from bcos_kernels import native
from bcos_kernels.contract import Call, Options
from tests import test_native
from tests.test_cuda_emulation import DTYPES, FUSED_CASES, HALVES, NORM_SHAPES, assert_rounded_once, convolve
from tests.test_native import CHANNELS_LAST, CONTIGUOUS, CONV_CASES, EXPONENTS_AND_MODES, LINEAR_CASES, describe


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return native.unavailable() or native.why_not(Call("linear", torch.ones(1, 1, device="cuda")))


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

DEVICE = "cuda"


@pytest.fixture(autouse=True, params=[None, True], ids=["table", "fused"])
def ops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """float32 is compared at float32's tolerance, so TF32 stays off."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [s.fp32_precision for s in settings]
    for s in settings:
        s.fp32_precision = "ieee"
    native._ops().force_fused(request.param)
    yield native._ops()
    native._ops().force_fused(None)
    for s, precision in zip(settings, before, strict=True):
        s.fp32_precision = precision


def on_gpu(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The native backend there, the reference on the CPU."""

    def call(*tensors: Tensor | None, b: Any, backend: str, **options: Any) -> Tensor:
        if backend == "native":
            tensors = tuple(None if t is None else t.to(DEVICE) for t in tensors)
            b = b.to(DEVICE) if isinstance(b, Tensor) else b
        return layer(*tensors, b=b, backend=backend, **options).cpu()

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CONV_CASES, ids=describe)
def test_conv2d(case: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, options = test_native.make_conv(case)
    if dtype in HALVES and options.get("max_out", 1) > 1:
        pytest.skip("other rows win where sums are rounded in another order")
    if dtype == torch.float16 and case == {"k": (1, 1), "padding": 1}:
        pytest.skip("float16 overflows: the padding's pixels have a bias and a norm of 0.001")
    for b, detach in EXPONENTS_AND_MODES:
        test_native.check(on_gpu(bk.bcos_conv2d), tensors, b, dtype, detach_scale=detach, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=describe)
def test_linear(case: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype in HALVES and case.get("max_out", 1) > 1:
        pytest.skip("other rows win where sums are rounded in another order")
    case = {"shape": (37,), "c": 48, "o": 70, "bias": True, **case}
    rng = torch.Generator().manual_seed(0)
    m = case.get("max_out", 1)
    x = torch.randn((*case["shape"], case["c"]), dtype=torch.float64, generator=rng)
    weight = torch.randn((case["o"] * m, case["c"]), dtype=torch.float64, generator=rng) * 0.2
    bias = torch.randn(case["o"] * m, dtype=torch.float64, generator=rng) * 0.2 if case["bias"] else None
    options = {name: case[name] for name in ("max_out", "normalize_weight") if name in case}
    for b, detach in EXPONENTS_AND_MODES:
        test_native.check(on_gpu(bk.bcos_linear), [x, weight, bias], b, dtype, detach_scale=detach, **options)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("fmt", [CHANNELS_LAST, CONTIGUOUS], ids=lambda f: str(f)[6:])
@pytest.mark.parametrize("shape", [*NORM_SHAPES, (16, 64, 56, 56)], ids=str)
def test_batch_norm(shape: tuple[int, ...], fmt: torch.memory_format, relu: bool) -> None:
    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        *,
        b: None,
        backend: str,
        running: Tensor,
        **options: Any,
    ) -> Tensor:
        return bk.batch_norm_uncentered2d(
            x, running.to(x), weight, bias, residual=residual, relu=relu, backend=backend, **options
        )

    x, weight, bias = test_native.norm_inputs(shape, fmt)
    residual = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    running = torch.linspace(0.5, 2, shape[1])
    for training in (True, False):
        test_native.check(
            on_gpu(call), [x, weight, bias, residual], None, torch.float32, running=running, training=training
        )


#: Layers of a ResNet-50 at 224 x 224.
BIG_CASES: list[dict[str, Any]] = [
    {"n": 4, "c": 64, "o": 64, "size": (56, 56), "padding": 1},
    {"n": 4, "c": 128, "o": 128, "size": (28, 28), "padding": 1},
    {"n": 4, "c": 512, "o": 512, "size": (7, 7), "padding": 1},
    {"n": 4, "c": 256, "o": 64, "size": (56, 56), "k": (1, 1)},
    {"n": 4, "c": 64, "o": 256, "size": (56, 56), "k": (1, 1)},
    {"n": 4, "c": 256, "o": 512, "size": (56, 56), "k": (1, 1), "stride": 2},
    {"n": 4, "c": 8, "o": 64, "size": (112, 112), "k": (7, 7), "stride": 2, "padding": 3},
]


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", FUSED_CASES + BIG_CASES, ids=describe)
def test_fused_conv2d(case: dict[str, Any], dtype: torch.dtype, ops: Any) -> None:
    ops.force_fused(True)
    for b in (2.0, "learnable"):
        first, truth = convolve(case, dtype, b, DEVICE)
        assert_rounded_once(first, truth)
        second, _ = convolve(case, dtype, b, DEVICE)
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("b", [2.0, "learnable"])
def test_passes_give_the_same_bits_again(b: Any) -> None:
    tensors, options = test_native.make_conv({"n": 8, "size": (40, 40), "padding": 1})
    runs = [
        test_native.run(on_gpu(bk.bcos_conv2d), tensors, b, torch.bfloat16, "native", **options)[0] for _ in range(2)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("b", [2.0, 1.5])
def test_gradcheck(k: int, b: float) -> None:
    rng = torch.Generator().manual_seed(3)
    shapes = [(2, 4, 5, 5), (6, 2, k, k), (6,)]
    leaves = [torch.randn(s, dtype=torch.float64, generator=rng).to(DEVICE).requires_grad_() for s in shapes]

    def conv(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return bk.bcos_conv2d(x, w, bias, b=b, padding=k // 2, groups=2, backend="native")

    assert torch.autograd.gradcheck(conv, leaves)


def test_more_than_two_to_the_31_elements() -> None:
    """The last rows of a tensor of 2.4 billion elements (4.8 GB) as if they were alone."""
    rows, last = 2**25, 1000
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    x = torch.zeros(rows, 72, dtype=torch.bfloat16, device=DEVICE)
    x[-last:] = torch.randn(last, 72, device=DEVICE)
    weight = torch.randn(8, 72, dtype=torch.bfloat16, device=DEVICE)
    whole = native.linear(x, weight, None, Options(), False)
    alone = native.linear(x[-last:].clone(), weight, None, Options(), False)
    torch.testing.assert_close(whole.y[-last:], alone.y)
    torch.testing.assert_close(whole.norm[-last:], alone.norm)


def test_learned_exponent_in_a_cuda_graph() -> None:
    """Nothing waits for the GPU: B stays there."""
    x = torch.randn(4, 16, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight, b = torch.randn(8, 16, 3, 3, device=DEVICE), torch.tensor(1.7, device=DEVICE)
    options = Options(b, padding=(1, 1))
    native.conv2d(x, weight, None, options, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = native.conv2d(x, weight, None, options, True).y
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, native.conv2d(x, weight, None, options, True).y)
