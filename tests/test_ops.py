"""The registered operators: schema, fake, autograd, ``torch.compile``, autocast, and what they keep for backward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import bcos_kernels as bk
from bcos_kernels import portable
from tests.op_cases import LEARNABLE, SHAPES, Case
from tests.tolerances import GRADIENT, OUTPUT, assert_close

CONV, STRIDED, LINEAR = SHAPES[0], SHAPES[1], SHAPES[11]


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()


VARIANTS: list[dict[str, Any]] = [
    {"b": 2},
    {"b": 1},
    {"b": 1.5},
    {"b": LEARNABLE},
    {"b": 2, "max_out": 2},
    {"b": 2, "detach_scale": True, "normalize_weight": True},
]


def variants(*shapes: Case) -> list[Case]:
    return [shape.with_options(**options) for shape in shapes for options in VARIANTS]


def operator_arguments(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    tensors = case.inputs(dtype)
    o = case.options

    def pair(name: str, default: int) -> list[int]:
        value = o.get(name, default)
        return [value, value] if isinstance(value, int) else list(value)

    b = o.get("b", 2.0)
    scalars: list[Any] = [2.0 if b == LEARNABLE else float(b)]
    if case.is_conv:
        scalars += [pair("stride", 1), pair("padding", 0), pair("dilation", 1), o.get("groups", 1)]
    scalars += [o.get("max_out", 1), o.get("normalize_weight", False), o.get("detach_scale", False), None, True, "auto"]
    return (tensors["x"], tensors["weight"], tensors.get("bias"), tensors.get("b"), *scalars)


@pytest.mark.parametrize("case", variants(CONV, STRIDED, LINEAR), ids=lambda c: c.name)
def test_opcheck(case: Case) -> None:
    op = torch.ops.bcos.conv2d if case.is_conv else torch.ops.bcos.linear
    torch.library.opcheck(op.default, operator_arguments(case))


#: PyTorch 2.11 cannot trace the second derivative of its own convolution with symbolic sizes; 2.15 can (between: not tried).
TRACEABLE = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    *(["test_aot_dispatch_dynamic"] if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15) else []),
)


@pytest.mark.parametrize("case", variants(CONV, LINEAR), ids=lambda c: c.name)
def test_opcheck_backward(case: Case) -> None:
    x, weight, bias, b_tensor, *scalars = operator_arguments(case)
    kind = "conv2d" if case.is_conv else "linear"
    y, norm, linear, winner = getattr(torch.ops.bcos, kind)(x, weight, bias, b_tensor, *scalars)
    kept = linear if linear.numel() else y
    needs = [True, True, bias is not None, b_tensor is not None]
    arguments = (
        torch.randn_like(y).requires_grad_(),
        x,
        weight,
        bias,
        b_tensor,
        kept.detach(),
        norm.detach(),
        winner,
        needs,
        *scalars[:-3],
        "auto",
    )
    operator = getattr(torch.ops.bcos, f"{kind}_backward").default
    torch.library.opcheck(operator, arguments, test_utils=TRACEABLE)


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("wanted", range(3))
def test_opcheck_of_one_gradient(wanted: int, backend: str) -> None:
    """What is not wanted is an empty tensor of its own: outputs must not share storage."""
    needs = [i == wanted for i in range(4)]
    checks = ("test_schema", "test_faketensor")
    for case in (CONV, LINEAR):
        op = torch.ops.bcos.conv2d if case.is_conv else torch.ops.bcos.linear
        x, weight, _, b, *scalars = operator_arguments(case)
        bias = torch.zeros(weight.shape[0], dtype=x.dtype)
        y, norm, _, winner = op(x, weight, bias, b, *scalars)
        arguments = (y.detach(), x, weight, bias, b, y.detach(), norm, winner, needs, *scalars[:-3], backend)
        backward = torch.ops.bcos.conv2d_backward if case.is_conv else torch.ops.bcos.linear_backward
        torch.library.opcheck(backward.default, arguments, test_utils=checks)
    x, weight, bias = (torch.ones(shape, dtype=torch.float64) for shape in ((2, 3, 4, 4), 3, 3))
    arguments = (x, x, None, weight[:0], weight, weight, bias, needs, 1e-5, True, False, backend)
    torch.library.opcheck(torch.ops.bcos.batch_norm_uncentered2d_backward.default, arguments, test_utils=checks)
    rows = torch.ones(2, 3, dtype=torch.float64)
    arguments = (rows, rows, rows[:, :1] + 0, rows[:, :1] + 0, weight, bias, needs[:3], 1, 1e-5, False, backend)
    torch.library.opcheck(torch.ops.bcos.layer_norm_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck_memory_formats(memory_format: torch.memory_format) -> None:
    arguments = list(operator_arguments(CONV, torch.float32))
    arguments[0] = arguments[0].detach().to(memory_format=memory_format).requires_grad_()
    torch.library.opcheck(torch.ops.bcos.conv2d.default, tuple(arguments))


@pytest.mark.parametrize(
    ("training", "detach", "add", "relu"),
    # any three of the four in every combination
    [four for four in itertools.product((True, False), repeat=4) if sum(four) % 2 == 0],
)
def test_opcheck_batch_norm(training: bool, detach: bool, add: bool, relu: bool) -> None:
    x, residual = (torch.randn(3, 4, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    var = None if training else torch.rand(4, dtype=torch.float64)
    op = torch.ops.bcos.batch_norm_uncentered2d
    arguments = (x, var, weight, bias, residual if add else None, 1e-5, relu, detach, training, "auto")
    torch.library.opcheck(op.default, arguments)
    z, mean, batch_var, _ = op(*arguments)
    known = batch_var if var is None else var
    masks = z.detach() if add and relu else None
    needs = [True, True, True, masks is not None]
    torch.library.opcheck(
        torch.ops.bcos.batch_norm_uncentered2d_backward.default,
        (torch.randn_like(z), x, masks, mean, known, weight, bias, needs, 1e-5, relu, detach, "auto"),
    )


@pytest.mark.parametrize("case", variants(CONV, LINEAR), ids=lambda c: c.name)
def test_compile_without_graph_breaks(case: Case) -> None:
    names = list(case.inputs())
    compiled = torch.compile(lambda *v: case.run(dict(zip(names, v, strict=True))), fullgraph=True, backend="aot_eager")
    tensors, again = case.inputs(), case.inputs()
    actual, expected = compiled(*tensors.values()), case.run(again)
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert_close(actual, expected, OUTPUT)
    for name, t in tensors.items():
        assert_close(t.grad, again[name].grad, GRADIENT, name)


@pytest.mark.slow
def test_compile_a_network_with_inductor() -> None:
    """Forward and backward, training mode, dynamic batch size."""

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            bk.BcosConv2d(6, 8, 3, padding=1, max_out=2),
            bk.BatchNormUncentered2d(8, bias=False),
            torch.nn.ReLU(inplace=True),
            bk.BcosConv2d(8, 5, 1),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            bk.BcosLinear(5, 3, b=1.5),
        )

    eager, compiled = network(), network()
    run = torch.compile(compiled, fullgraph=True, dynamic=True)
    for n in (2, 3):
        x = torch.rand(n, 6, 9, 9)
        expected, actual = eager(x), run(x)
        expected.square().sum().backward()
        actual.square().sum().backward()
        assert_close(actual, expected, OUTPUT)
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert_close(q.grad, p.grad, GRADIENT, name)
    for p, q in zip(eager.buffers(), compiled.buffers(), strict=True):
        assert_close(q.float(), p.float(), OUTPUT)


@pytest.mark.parametrize("case", variants(CONV, LINEAR), ids=lambda c: c.name)
def test_autocast_follows_convolution(case: Case) -> None:
    tensors = case.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.run(tensors)
        b = case.options["b"]
        if b == 2 and not case.options.get("normalize_weight") and not case.options.get("max_out"):
            assert case.run(tensors, b=1).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    # as if the tensors had been cast by hand, but B, which stays in float32
    cast = {k: t if k == "b" else t.detach().bfloat16().requires_grad_() for k, t in tensors.items()}
    assert torch.equal(y, case.run(cast))
    y.float().square().sum().backward()
    for name, t in tensors.items():
        assert t.grad is not None, name
        assert t.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
def test_autocast_of_the_other_half_precision(backend: str) -> None:
    """torch's own convolution casts float16 to bfloat16 too."""
    for case in (CONV, LINEAR):
        tensors = {k: t.detach().half() if k == "x" else t.detach() for k, t in case.inputs(torch.float32).items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = case.run(tensors, backend=backend)
        assert y.dtype == torch.bfloat16
        assert_close(y, case.run({k: t.bfloat16() for k, t in tensors.items()}, backend=backend), OUTPUT)


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("max_out", [1, 2])
def test_backward_inside_autocast_of_a_layer_outside(backend: str, max_out: int) -> None:
    """The gradients are those of the float32 layer that ran."""
    for shape in (CONV, LINEAR):
        case = shape.with_options(b=2, max_out=max_out)
        tensors = case.inputs(torch.float32)
        y = case.run(tensors, backend=backend)
        leaves, upstream = list(tensors.values()), torch.linspace(-1, 1, y.numel()).view(y.shape)
        expected = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.autograd.grad(y, leaves, upstream)
        for name, a, e in zip(tensors, found, expected, strict=True):
            assert torch.equal(a, e), name


@pytest.mark.parametrize("case", [CONV, LINEAR], ids=lambda c: c.name)
def test_squares_of_what_autocast_rounds_are_not_used(case: Case) -> None:
    """1.0039 becomes 1: its sum of squares would be off by 0.8 %."""
    tensors = case.inputs(torch.float32)
    tensors["x"] = torch.full_like(tensors["x"], 1 + 2**-8)
    squares = tensors["x"].square().sum(1 if case.is_conv else -1, keepdim=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.run(tensors, squares=squares), case.run(tensors))


def test_forward_mode_is_refused() -> None:
    """There is no such derivative: a tangent must not silently become zero."""
    tensors = {k: t.detach() for k, t in CONV.inputs().items()}
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        CONV.run({**tensors, "x": forward_ad.make_dual(tensors["x"], tensors["x"])})


def test_autocast_leaves_float64_alone() -> None:
    tensors = CONV.inputs(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert CONV.run(tensors).dtype == torch.float64


def saved_bytes(case: Case, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Bytes that forward keeps for backward, by what they are; storages that the caller holds anyway are named so."""
    seen: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.numel():
            seen[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = case.run(tensors)
    names = {t.untyped_storage().data_ptr(): k for k, t in (*tensors.items(), ("y", y))}
    kept: dict[str, int] = {}
    for pointer, t in seen.items():
        name = names.get(pointer, "norm" if t.dtype in (torch.float32, torch.float64) and t is not y else "other")
        if name == "norm" and t.shape == y.shape and t.dtype == y.dtype and t.dim() > 2 and t.shape[1] != 1:
            name = "linear"
        if t.dtype == torch.uint8:
            name = "winner"
        kept[name] = kept.get(name, 0) + t.numel() * t.element_size()
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_keeps_what_the_specification_names(dtype: torch.dtype) -> None:
    """x, w, one float32 norm an output pixel and group, and y, which the next layer keeps anyway: nothing else."""
    case = Case("memory", (2, 8, 10, 10), (16, 8, 3, 3), {"padding": 1, "b": 2})
    size = torch.empty(0, dtype=dtype).element_size()
    kept = saved_bytes(case, case.inputs(dtype))
    pixels = 2 * 10 * 10
    assert kept == {"x": 8 * pixels * size, "weight": 16 * 8 * 9 * size, "norm": pixels * 4, "y": 16 * pixels * size}


def test_forward_keeps_nothing_but_input_and_weight_where_there_is_no_scale() -> None:
    case = Case("memory", (2, 8, 10, 10), (16, 8, 3, 3), {"padding": 1, "b": 1})
    assert set(saved_bytes(case, case.inputs(torch.float32))) == {"x", "weight"}


def test_forward_keeps_the_linear_output_instead_of_y_where_it_must() -> None:
    pixels = 2 * 10 * 10
    for options, dtype in (({"b": 1.5}, torch.float32), ({"b": 2}, torch.float16)):
        case = Case("memory", (2, 8, 10, 10), (16, 8, 3, 3), {"padding": 1, **options})
        kept = saved_bytes(case, case.inputs(dtype))
        linear = kept.pop("linear" if dtype == torch.float32 else "other")
        assert linear == 16 * pixels * torch.empty(0, dtype=dtype).element_size()
        assert set(kept) == {"x", "weight", "norm"}


def test_max_out_keeps_one_byte_for_the_winner() -> None:
    case = Case("memory", (2, 8, 10, 10), (32, 8, 3, 3), {"padding": 1, "b": 2, "max_out": 2})
    kept = saved_bytes(case, case.inputs(torch.float32))
    assert kept["winner"] == 2 * 16 * 10 * 10
    assert set(kept) == {"x", "weight", "norm", "y", "winner"}


def test_normalized_weight_is_not_kept_twice() -> None:
    case = Case("memory", (2, 8, 10, 10), (16, 8, 3, 3), {"padding": 1, "normalize_weight": True})
    assert set(saved_bytes(case, case.inputs(torch.float32))) == {"x", "weight", "norm", "y"}


def test_no_grad_computes_nothing_for_backward() -> None:
    arguments = list(operator_arguments(CONV.with_options(b=1.5, max_out=2)))
    arguments[-2] = False
    with torch.no_grad():
        _, _, linear, winner = torch.ops.bcos.conv2d(*arguments)
    assert linear.numel() == winner.numel() == 0


@pytest.mark.parametrize("case", variants(CONV, LINEAR), ids=lambda c: c.name)
def test_operator_keeps_what_backward_needs_whatever_it_was_told(case: Case) -> None:
    """A graph that was made where no derivative followed has a constant for_backward=False."""
    arguments = list(operator_arguments(case))
    arguments[-2] = False
    y = (torch.ops.bcos.conv2d if case.is_conv else torch.ops.bcos.linear)(*arguments)[0]
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    again = case.inputs()
    expected = torch.autograd.grad(case.run(again, backend="reference").sum(), list(again.values()))
    for a, e in zip(torch.autograd.grad(y.sum(), tensors), expected, strict=True):
        assert_close(a, e, GRADIENT)


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("options", [{"b": 1.5}, {"b": 2, "max_out": 2}, {"b": 1, "max_out": 2}], ids=str)
def test_backward_without_what_forward_keeps_is_refused(options: dict[str, Any], backend: str) -> None:
    """Kernels would read memory that is not there."""
    for shape in (CONV, LINEAR):
        case = shape.with_options(**options)
        arguments = [t.detach() if isinstance(t, Tensor) else t for t in operator_arguments(case)]
        arguments[-2] = False
        x, weight, bias, b, *scalars = arguments
        kind = torch.ops.bcos.conv2d if case.is_conv else torch.ops.bcos.linear
        backward = torch.ops.bcos.conv2d_backward if case.is_conv else torch.ops.bcos.linear_backward
        y, norm, linear, winner = kind(*arguments)
        kept = y if options["b"] == 2 else linear
        with pytest.raises(ValueError, match="for_backward=True"):
            backward(y, x, weight, bias, b, kept, norm, winner, [True] * 2 + [False] * 2, *scalars[:-3], backend)


@pytest.mark.parametrize("compiled", [True, False])
def test_inference_computes_nothing_for_backward(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight needs a gradient, but not under no_grad; nor does a frozen one, with gradients on."""
    seen: list[bool] = []
    conv2d = portable.conv2d

    def spy(*arguments: Any) -> Any:
        seen.append(arguments[4])
        return conv2d(*arguments)

    monkeypatch.setattr(portable, "conv2d", spy)
    case = CONV.with_options(b=1.5, max_out=2)
    tensors = case.inputs()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return case.run({"x": x, "weight": weight}, backend="portable")

    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with torch.no_grad():
        run(*tensors.values())
    run(*(t.detach() for t in tensors.values()))
    run(*tensors.values())
    assert seen == [False, False, True]


def flops(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("max_out", [1, 2])
@pytest.mark.parametrize(
    ("layer", "conventional", "shape"),
    [
        (bk.BcosConv2d, torch.nn.Conv2d, (2, 4, 9, 8)),
        (bk.BcosLinear, torch.nn.Linear, (3, 5, 4)),
    ],
)
def test_flops_are_those_of_the_conventional_layer(layer: Any, conventional: Any, shape: Any, max_out: int) -> None:
    is_conv = layer is bk.BcosConv2d
    options: list[dict[str, Any]] = [{}]
    if is_conv:
        options = [{}, {"padding": 1}, {"stride": 2}, {"dilation": 2}, {"groups": 2}, {"groups": 4, "stride": (1, 2)}]

    def count(model: torch.nn.Module, needs_x: bool, needs_weight: bool) -> int:
        model.requires_grad_(needs_weight)
        y = lambda: model(torch.ones(shape, requires_grad=needs_x)).sum()  # noqa: E731
        return flops((lambda: y().backward()) if needs_x or needs_weight else y)

    for option in options:
        kernel = (3,) if is_conv else ()
        ours = layer(4, 8, *kernel, max_out=max_out, **option)
        theirs = conventional(4, 8 * max_out, *kernel, bias=False, **option)
        for needs in ((True, True), (True, False), (False, True), (False, False)):
            assert count(ours, *needs) == count(theirs, *needs) > 0, (option, needs)


def test_flops_of_a_network_are_those_of_the_definition() -> None:
    """The sums of a converted network, norms included, which count as none."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=10).eval()
    model, images = bk.bcosify(resnet).eval(), torch.rand(1, 6, 32, 32)
    step = lambda: model(images).sum().backward()  # noqa: E731
    with bk.use_backend("reference"):
        expected = flops(step)
    assert flops(step) == expected > 0
    # the conventional one has three input channels, and its classifier behind the pooling, which sees one pixel here as well
    resnet.conv1 = torch.nn.Conv2d(6, 64, 7, 2, 3, bias=False)
    assert flops(lambda: resnet(images).sum().backward()) == expected


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    tensors, again = CONV.inputs(), CONV.inputs()
    names = list(tensors)
    y = torch.utils.checkpoint.checkpoint(
        lambda *v: CONV.run(dict(zip(names, v, strict=True))), *tensors.values(), use_reentrant=reentrant
    )
    y.square().sum().backward()
    CONV.run(again).square().sum().backward()
    for name in names:
        assert_close(tensors[name].grad, again[name].grad, GRADIENT, name)


def test_third_derivative_exists() -> None:
    tensors = LINEAR.inputs()
    x = tensors["x"]
    value = LINEAR.run(tensors).pow(2).sum()
    for _ in range(3):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        value = (grad / 50).sin().sum()
    expected = LINEAR.run(tensors, backend="reference").pow(2).sum()
    for _ in range(3):
        (grad,) = torch.autograd.grad(expected, x, create_graph=True)
        expected = (grad / 50).sin().sum()
    assert_close(value, expected, GRADIENT)
