"""``batch_norm_uncentered2d`` and its module, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import bcos_kernels as bk
from bcos_kernels.contract import accumulator
from bcos_kernels.functional import batch_norm_with_squares
from tests.tolerances import GRADIENT, OUTPUT, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: what may follow the norm in the same pass: (a residual, ReLU)
FOLLOWED = pytest.mark.parametrize(
    ("residual", "relu"), [(False, False), (False, True), (True, False), (True, True)], ids=["", "relu", "+", "+ relu"]
)


def inputs(
    dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (3, 4, 5, 7), *, residual: bool = False
) -> list[torch.Tensor]:
    """x, weight, bias, and a residual where wanted."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng, dtype=torch.float64) * 2 + 1
    weight, bias = (torch.randn(shape[1], generator=rng, dtype=torch.float64) for _ in range(2))
    more = [torch.randn(shape, generator=rng, dtype=torch.float64)] if residual else []
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias, *more)]


def run(tensors: list[torch.Tensor], var: torch.Tensor | None, **options: Any) -> torch.Tensor:
    x, weight, bias, residual = (*tensors, None)[:4]
    return bk.batch_norm_uncentered2d(x, var, weight, bias, residual=residual, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["auto", "portable"])
@FOLLOWED
def test_equals_reference(
    dtype: torch.dtype,
    detach: bool,
    training: bool,
    memory_format: torch.memory_format,
    backend: str,
    residual: bool,
    relu: bool,
) -> None:
    tensors = inputs(dtype, residual=residual)
    tensors[0] = tensors[0].detach().to(memory_format=memory_format).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    running = torch.rand(4, dtype=torch.float64) + 0.5
    variances = [running.to(torch.float32 if dtype != torch.float64 else dtype), running.clone()]
    results = []
    for leaves, var, name in ((tensors, variances[0], backend), (exact, variances[1], "reference")):
        z = run(leaves, var, training=training, relu=relu, detach_var=detach, momentum=0.3, backend=name)
        upstream = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view(z.shape).to(z.dtype)
        results.append([z, *torch.autograd.grad(z, leaves, upstream)])
    for name, a, e in zip(("z", "dx", "dweight", "dbias", "dresidual"), *results, strict=False):
        assert a.dtype == dtype
        assert_close(a, e, OUTPUT if name == "z" else GRADIENT, name)
    assert results[0][0].is_contiguous(memory_format=memory_format)
    assert_close(variances[0], variances[1], OUTPUT, "running_var")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [(False, False), (True, False), (True, True)])
@FOLLOWED
def test_gradcheck(training: bool, affine: tuple[bool, bool], residual: bool, relu: bool) -> None:
    var = torch.rand(3, dtype=torch.float64) + 0.5
    present = (True, *affine, residual)
    leaves = inputs(shape=(2, 3, 2, 3), residual=residual)
    tensors = [t for t, wanted in zip(leaves, present, strict=False) if wanted]

    def call(*given: torch.Tensor) -> torch.Tensor:
        rest = iter(given)
        x, weight, bias, more = (next(rest) if wanted else None for wanted in present)
        return bk.batch_norm_uncentered2d(x, var.clone(), weight, bias, residual=more, relu=relu, training=training)

    assert gradcheck(call, tensors)
    assert gradgradcheck(call, tensors)


@FOLLOWED
def test_second_derivative_in_explanation_mode_is_the_true_one(residual: bool, relu: bool) -> None:
    x, weight, _, *more = inputs(shape=(2, 3, 2, 3), residual=residual)

    def call(x: torch.Tensor, w: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return run([x, w, None, *more], None, training=True, relu=relu, detach_var=True)

    assert gradgradcheck(call, (x, weight, *more))


def test_relu_keeps_its_output_only_behind_a_residual() -> None:
    """Without one, the sign is found from x again: nothing but x and the channels' own values is kept."""
    for residual in (False, True):
        tensors = inputs(torch.float32, residual=residual)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            z = run(tensors, None, training=True, relu=True)
        full = [t for t in kept if t.shape == z.shape]
        assert [t.data_ptr() for t in full] == [t.data_ptr() for t in ([tensors[0], z] if residual else [tensors[0]])]


def test_residual_of_another_memory_format() -> None:
    tensors = inputs(residual=True)
    expected = run(tensors, None, training=True, relu=True, backend="reference")
    last = [t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in tensors[3:]]
    for backend in ("auto", "portable"):
        z = run([*tensors[:3], *last], None, training=True, relu=True, backend=backend)
        assert z.is_contiguous()
        assert_close(z, expected, OUTPUT)
        found = torch.autograd.grad(z.sum(), last)[0]
        assert_close(found, torch.autograd.grad(expected.sum(), tensors[3], retain_graph=True)[0], GRADIENT)


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_squares_are_those_of_the_result(backend: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x, weight, bias, residual = inputs(dtype, residual=True)
    z, squares = batch_norm_with_squares(
        x.detach().to(memory_format=memory_format).requires_grad_(),
        None,
        weight,
        bias,
        training=True,
        residual=residual,
        relu=True,
        momentum=0.1,
        eps=1e-5,
        detach_var=False,
        backend=backend,
    )
    assert squares is not None
    assert squares.dtype == accumulator(dtype)
    assert not squares.requires_grad
    assert_close(squares, z.double().square().sum(1, keepdim=True), {torch.float64: 1e-12, torch.float32: 1e-6})


def test_mixed_precision_parameters() -> None:
    """Under autocast the input is bfloat16 and the parameters are float32: the sums are float32, the output bfloat16."""
    x, weight, bias = inputs(torch.bfloat16)
    weight, bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    z = bk.batch_norm_uncentered2d(x, torch.ones(4), weight, bias, training=True)
    z.sum().backward()
    assert (z.dtype, x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (x.dtype, x.dtype, weight.dtype, bias.dtype)


def test_running_variance_is_biased() -> None:
    x = inputs()[0].detach()
    norm = bk.BatchNormUncentered2d(4, momentum=0.25).double()
    norm(x)
    expected = 0.75 + 0.25 * x.var((0, 2, 3), unbiased=False)
    assert_close(norm.running_var, expected, OUTPUT)
    assert int(norm.num_batches_tracked) == 1
    assert torch.equal(norm.running_mean, torch.zeros(4, dtype=torch.float64))


def test_cumulative_average() -> None:
    batches = [torch.randn(2, 3, 4, 4, dtype=torch.float64) * k for k in (1, 2, 3)]
    norm = bk.BatchNormUncentered2d(3, momentum=None).double()
    for x in batches:
        norm(x)
    expected = torch.stack([x.var((0, 2, 3), unbiased=False) for x in batches]).mean(0)
    assert_close(norm.running_var, expected, OUTPUT)


def test_without_running_statistics_it_uses_the_batch() -> None:
    x = inputs()[0].detach()
    norm = bk.BatchNormUncentered2d(4, track_running_stats=False, affine=False).double().eval()
    expected = x / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert_close(norm(x), expected, OUTPUT)
    assert norm.weight is None
    assert norm.running_var is None


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch_changes_nothing(training: bool) -> None:
    norm = bk.BatchNormUncentered2d(4).train(training)
    x = torch.zeros(0, 4, 3, 3, requires_grad=True)
    norm(x).sum().backward()
    assert torch.equal(norm.running_var, torch.ones(4))
    assert torch.equal(norm.weight.grad, torch.zeros(4))
    assert x.grad.shape == x.shape


def test_it_is_far_from_cancelling_where_the_mean_is_large() -> None:
    x = (torch.randn(8, 3, 16, 16, dtype=torch.float64) + 1000).float()
    norm = bk.BatchNormUncentered2d(3, momentum=1.0)
    norm(x)
    assert_close(norm.running_var, x.double().var((0, 2, 3), unbiased=False), {torch.float32: 1e-3})
