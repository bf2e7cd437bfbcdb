"""``batch_norm_uncentered2d`` and its module, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import bcos_kernels as bk
from tests.tolerances import GRADIENT, OUTPUT, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inputs(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (3, 4, 5, 7)) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng, dtype=torch.float64) * 2 + 1
    weight, bias = (torch.randn(shape[1], generator=rng, dtype=torch.float64) for _ in range(2))
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_reference(dtype: torch.dtype, detach: bool, training: bool, memory_format: torch.memory_format) -> None:
    tensors = inputs(dtype)
    tensors[0] = tensors[0].detach().to(memory_format=memory_format).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    running = torch.rand(4, dtype=torch.float64) + 0.5
    variances = [running.to(torch.float32 if dtype != torch.float64 else dtype), running.clone()]
    results = []
    for (x, weight, bias), var, backend in ((tensors, variances[0], "auto"), (exact, variances[1], "reference")):
        z = bk.batch_norm_uncentered2d(
            x, var, weight, bias, training=training, detach_var=detach, momentum=0.3, backend=backend
        )
        upstream = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view(z.shape).to(z.dtype)
        results.append([z, *torch.autograd.grad(z, (x, weight, bias), upstream)])
    for name, a, e in zip(("z", "dx", "dweight", "dbias"), *results, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, OUTPUT if name == "z" else GRADIENT, name)
    assert results[0][0].is_contiguous(memory_format=memory_format)
    assert_close(variances[0], variances[1], OUTPUT, "running_var")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [(False, False), (True, False), (True, True)])
def test_gradcheck(training: bool, affine: tuple[bool, bool]) -> None:
    x, weight, bias = inputs(shape=(2, 3, 2, 3))
    var = torch.rand(3, dtype=torch.float64) + 0.5

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        weight, bias = (*tensors[1:], None, None)[:2]
        return bk.batch_norm_uncentered2d(tensors[0], var.clone(), weight, bias, training=training)

    tensors = [t for t, wanted in zip((x, weight, bias), (True, *affine), strict=True) if wanted]
    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


def test_second_derivative_in_explanation_mode_is_the_true_one() -> None:
    x, weight, _ = inputs(shape=(2, 3, 2, 3))
    assert gradgradcheck(
        lambda x, w: bk.batch_norm_uncentered2d(x, None, w, training=True, detach_var=True), (x, weight)
    )


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
