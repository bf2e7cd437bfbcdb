"""``bcos_conv2d`` and ``bcos_linear``, portable backend, against the definition."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import bcos_kernels as bk
from bcos_kernels import reference
from tests.op_cases import LEARNABLE, SHAPES, Case, halves, matrix, modes
from tests.tolerances import GRADIENT, OUTPUT, assert_close

CASES = list(modes(matrix()))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def gradients(case: Case, tensors: dict[str, torch.Tensor], seed: int = 1, **more: object) -> list[torch.Tensor]:
    """Output, and the gradient of every input for a fixed random upstream gradient."""
    y = case.run(tensors, **more)
    rng = torch.Generator().manual_seed(seed)
    upstream = torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(tensors.values()), upstream, allow_unused=True, materialize_grads=True)
    return [y, *grads]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64_equals_reference(case: Case) -> None:
    tensors = case.inputs()
    actual = gradients(case, tensors, backend="portable")
    expected = gradients(case, tensors, backend="reference")
    for name, a, e in zip(("y", *tensors), actual, expected, strict=True):
        assert_close(a, e, OUTPUT if name == "y" else GRADIENT, name)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", halves()[0], ids=lambda c: c.name)
def test_lower_precision_is_near_float64(case: Case, dtype: torch.dtype) -> None:
    tensors = case.inputs(dtype)
    exact = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
    actual = gradients(case, tensors, backend="portable")
    expected = gradients(case, exact, backend="reference")
    for name, a, e in zip(("y", *tensors), actual, expected, strict=True):
        assert a.dtype == dtype
        if name == "b" or (case.options.get("max_out", 1) > 1 and dtype != torch.float32):
            continue  # a sum with cancellation; a tie that rounding makes goes to another row
        assert_close(a, e, OUTPUT if name == "y" else GRADIENT, name)


def frozen(case: Case, tensors: dict[str, torch.Tensor]) -> Case:
    """Explanation mode as a function whose derivative is its gradient: the scale computed once and kept."""
    with torch.no_grad():
        linear = case.run({k: t for k, t in tensors.items() if k != "b"}, b=1, detach_scale=False)
        scale = (case.run(tensors) / linear).nan_to_num(0)  # where the window sees nothing but padding: 0 / 0

    class Frozen(Case):
        def run(self, tensors: dict[str, torch.Tensor], **more: object) -> torch.Tensor:
            return case.run({k: t for k, t in tensors.items() if k != "b"}, b=1, detach_scale=False) * scale

    return Frozen(case.name, case.x, case.weight, case.options, case.bias)


GRADCHECK_CASES = [
    c
    for c in CASES
    if not c.options.get("normalize_weight") and c.options.get("max_out", 1) <= 2 and "7x7" not in c.name
]


@pytest.mark.parametrize(
    "case", [c for c in GRADCHECK_CASES if not c.options.get("detach_scale")], ids=lambda c: c.name
)
def test_gradcheck(case: Case) -> None:
    tensors = case.inputs(seed=3)
    names = list(tensors)
    assert gradcheck(lambda *v: case.run(dict(zip(names, v, strict=True))), list(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("case", [c for c in GRADCHECK_CASES if c.options.get("detach_scale")], ids=lambda c: c.name)
def test_explanation_mode_is_linear_with_the_scale_it_applied(case: Case) -> None:
    """Its gradient is that of the layer with the scale held constant; gradcheck would differentiate the scale too."""
    tensors = case.inputs(seed=3)
    fixed = frozen(case, tensors)
    linear_inputs = {k: t for k, t in tensors.items() if k != "b"}
    actual = gradients(case, tensors)
    expected = gradients(fixed, linear_inputs)
    for name, a, e in zip(("y", *linear_inputs), actual, expected, strict=False):
        assert_close(a, e, GRADIENT, name)


@pytest.mark.parametrize("case", GRADCHECK_CASES[::3], ids=lambda c: c.name)
def test_gradgradcheck(case: Case) -> None:
    """Both modes: a loss on the explanation needs the true derivative of the explanation."""
    tensors = case.inputs(seed=5)
    names = list(tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input #")
        assert gradgradcheck(
            lambda *v: case.run(dict(zip(names, v, strict=True))), list(tensors.values()), fast_mode=True
        )


def test_learnable_exponent_keeps_its_gradient_in_explanation_mode() -> None:
    case = SHAPES[0].with_options(b=LEARNABLE, detach_scale=True)
    tensors = case.inputs()
    y = case.run(tensors)
    linear = case.run({k: t for k, t in tensors.items() if k != "b"}, b=1)
    norm = reference.patch_norm(tensors["x"], (3, 3), (1, 1), (1, 1), (1, 1), 1)
    expected = (y * (linear.abs() / norm + reference.COS_EPS).log()).sum()
    (actual,) = torch.autograd.grad(y.sum(), tensors["b"])
    assert_close(actual, expected, GRADIENT)


@pytest.mark.parametrize("b", [1, 2, 1.5])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[11]], ids=lambda c: c.name)
def test_only_the_gradients_that_are_needed(shape: Case, b: float) -> None:
    case = shape.with_options(b=b)
    for wanted in ("x", "weight"):
        tensors = case.inputs()
        full = dict(zip(("y", *tensors), gradients(case, tensors), strict=True))
        only = {k: t.detach().requires_grad_(k == wanted) for k, t in tensors.items()}
        y = case.run(only)
        rng = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=rng, dtype=torch.float64))
        assert_close(only[wanted].grad, full[wanted], GRADIENT)
        assert all(t.grad is None for k, t in only.items() if k != wanted)


@pytest.mark.parametrize("case", [s.with_options(b=b) for s in SHAPES for b in (1, 2, 1.5)], ids=lambda c: c.name)
def test_incoming_gradient_is_not_overwritten(case: Case) -> None:
    tensors = case.inputs()
    y = case.run(tensors)
    upstream = torch.randn_like(y)
    before = upstream.clone()
    torch.autograd.grad(y, list(tensors.values()), upstream)
    assert torch.equal(upstream, before)


@pytest.mark.parametrize("b", [1, 2, 1.5])
def test_strided_and_expanded_gradients(b: float) -> None:
    case = SHAPES[0].with_options(b=b)
    tensors = case.inputs()
    dense = torch.randn(5, 2, 7, 8, dtype=torch.float64)
    for upstream in (
        dense.permute(1, 3, 2, 0),
        dense[:1, :1, :1, :1].expand(2, 8, 7, 5),
        dense.new_zeros(2, 8, 14, 5)[:, :, ::2],
    ):
        expected = torch.autograd.grad(case.run(tensors, backend="reference"), list(tensors.values()), upstream)
        actual = torch.autograd.grad(case.run(tensors), list(tensors.values()), upstream)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, GRADIENT)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.name)
def test_empty_batch(shape: Case) -> None:
    if len(shape.x) == 1:
        pytest.skip("has no batch")
    for b, max_out in ((1, 1), (2, 1), (1.5, 2)):
        rows = (shape.weight[0] * max_out, *shape.weight[1:])
        case = Case(shape.name, (0, *shape.x[1:]), rows, {**shape.options, "b": b, "max_out": max_out})
        tensors = case.inputs()
        y = case.run(tensors)
        y.sum().backward()
        assert y.shape[0] == 0
        assert tensors["x"].grad.shape == tensors["x"].shape
        assert torch.equal(tensors["weight"].grad, torch.zeros_like(tensors["weight"]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [s.with_options(b=b) for s in SHAPES[:4] for b in (1, 2, 1.5)], ids=lambda c: c.name)
def test_nan_and_inf_go_through_as_in_the_reference(case: Case, bad: float) -> None:
    tensors = case.inputs()
    with torch.no_grad():
        tensors["x"].view(-1)[7] = bad
    actual = case.run(tensors)
    expected = case.run(tensors, backend="reference")
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_ties_go_where_torch_max_sends_them() -> None:
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    half = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    weight = half.repeat_interleave(2, 0).requires_grad_()  # both rows of a pair are the same
    grads = [
        torch.autograd.grad(bk.bcos_conv2d(x, weight, max_out=2, backend=name).sum(), weight)[0]
        for name in ("portable", "reference")
    ]
    assert_close(grads[0], grads[1], GRADIENT)
    assert (grads[1][1::2] == 0).all() != (grads[1][::2] == 0).all()


def test_max_out_of_many_rows_needs_a_wide_index() -> None:
    case = Case("many", (3, 4), (600, 4), {"max_out": 300})
    tensors = case.inputs()
    for a, e in zip(gradients(case, tensors), gradients(case, tensors, backend="reference"), strict=True):
        assert_close(a, e, GRADIENT)


def test_zero_row_of_a_linear_layer() -> None:
    """The norm is not differentiable there; its gradient is zero, as for torch's own norm."""
    x = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64)
    for b in (2, 1.5):
        grads = [
            torch.autograd.grad(bk.bcos_linear(x, weight, b=b, backend=name).sum(), x)[0]
            for name in ("portable", "reference")
        ]
        assert_close(*grads, GRADIENT)
    assert bk.bcos_linear(x, weight, bias).isfinite().all()


def test_float16_small_outputs_keep_their_gradient() -> None:
    """y = l|l|/n underflows in float16 where l does not: the gradient 2|l|/n must not vanish with it."""
    x = torch.full((1, 64), 0.5, dtype=torch.float16)
    weight = torch.full((1, 64), 1e-5, dtype=torch.float16)
    weight.requires_grad_()
    y = bk.bcos_linear(x, weight)
    y.backward(torch.ones_like(y))
    wide = weight.detach().double().requires_grad_()
    bk.bcos_linear(x.double(), wide, backend="reference").backward(torch.ones(1, 1, dtype=torch.float64))
    assert float(y) == 0 or float(y) < 1e-6
    assert_close(weight.grad, wide.grad, GRADIENT)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (4, 2)])
def test_padding_in_words(padding: str, kernel: tuple[int, int]) -> None:
    x = torch.randn(1, 3, 8, 7, dtype=torch.float64)
    weight = torch.randn(4, 3, *kernel, dtype=torch.float64)
    y = bk.bcos_conv2d(x, weight, b=1, padding=padding, dilation=(1, 2))
    assert_close(y, torch.nn.functional.conv2d(x, weight, padding=padding, dilation=(1, 2)), OUTPUT)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_that_of_a_convolution(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 6, 8, 8).to(memory_format=memory_format).requires_grad_()
    weight = torch.randn(8, 6, 3, 3, requires_grad=True)
    y = bk.bcos_conv2d(x, weight, padding=1)
    y.sum().backward()
    assert y.is_contiguous(memory_format=memory_format)
    assert x.grad.is_contiguous(memory_format=memory_format)
