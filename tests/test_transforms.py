"""What is made once and run often: ``torch.func``, traces, exported graphs. Against the reference, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import bcos_kernels as bk
from bcos_kernels import reference
from bcos_kernels.modules import Normalize, transforms
from tests.op_cases import LEARNABLE, SHAPES, Case
from tests.tolerances import GRADIENT, OUTPUT, assert_close

CONV, STRIDED, POINTWISE, GROUPS = SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[8]
LINEAR, ROW = SHAPES[11], SHAPES[13]
D = torch.float64

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """An operator without a rule for vmap is run member by member, with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield


def assert_same(actual: Any, expected: Any, what: str = "") -> None:
    if isinstance(expected, dict):
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, e, f"{what}[{i}]")
    else:
        assert_close(actual, expected, GRADIENT, what)


def agrees(function: Function, *args: Any) -> None:
    """The same as the reference's; the two run the same torch.func transforms."""
    found = function(*args)
    with bk.use_backend("reference"):
        assert_same(found, function(*args))


def layer(case: Case) -> tuple[Function, list[Tensor]]:
    """A scalar function of the layer's tensors, and these."""
    tensors = case.inputs()
    names = list(tensors)

    def loss(*values: Tensor) -> Tensor:
        return case.run(dict(zip(names, values, strict=True))).sin().sum()

    return loss, [t.detach() for t in tensors.values()]


def batch_norm(training: bool, relu: bool, residual: bool, detach_var: bool) -> tuple[Function, list[Tensor]]:
    rng = torch.Generator().manual_seed(0)
    x, r = torch.randn(2, 3, 4, 2, 3, dtype=D, generator=rng)
    weight, bias, var = torch.rand(3, 4, dtype=D, generator=rng) + 0.1
    more = [r] if residual else []

    def loss(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        z = bk.batch_norm_uncentered2d(
            x,
            None if training else var,
            weight,
            bias,
            training=training,
            residual=residual,
            relu=relu,
            detach_var=detach_var,
        )
        return z.sin().sum()

    return loss, [x, weight, bias, *more]


def layer_norm(shape: tuple[int, ...], detach_var: bool) -> tuple[Function, list[Tensor]]:
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, dtype=D, generator=rng) for s in (shape, shape[-1:], shape[-1:]))

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bk.layer_norm(x, x.shape[-1], weight, bias, detach_var=detach_var).sin().sum()

    return loss, [x, weight, bias]


def wide(case: Case, **options: Any) -> Case:
    rows = case.weight[0] * options.get("max_out", 1)
    return replace(case, weight=(rows, *case.weight[1:])).with_options(**options)


LAYERS = {
    case.name: layer(case)
    for case in (
        wide(CONV, b=2),
        wide(STRIDED, b=2, max_out=2),
        wide(GROUPS, b=1.5),
        wide(POINTWISE, b=LEARNABLE, detach_scale=True),
        wide(CONV, b=2, detach_scale=True, normalize_weight=True),
        wide(CONV, b=1, max_out=2),
        wide(LINEAR, b=2),
        wide(LINEAR, b=1.5, max_out=2, detach_scale=True),
        wide(ROW, b=2),
        wide(ROW, b=1, max_out=2),
        wide(LINEAR, b=LEARNABLE),
    )
}
NORMS = {
    "batch norm, training": batch_norm(True, False, False, False),
    "batch norm, training, residual, relu": batch_norm(True, True, True, False),
    "batch norm, evaluation, relu": batch_norm(False, True, False, False),
    "batch norm, evaluation, residual, explanation": batch_norm(False, False, True, True),
    "layer norm": layer_norm((2, 3, 5), False),
    "layer norm, explanation": layer_norm((2, 3, 5), True),
    "layer norm of a row": layer_norm((5,), False),
}
OPERATIONS = {**LAYERS, **NORMS}
#: In explanation mode even the definition has no derivative in forward mode.
EXPLAINING = {name for name in OPERATIONS if "detach_scale" in name or "explanation" in name}
each = pytest.mark.parametrize("operation", OPERATIONS)


@each
def test_gradient(operation: str) -> None:
    f, tensors = OPERATIONS[operation]
    everything = tuple(range(len(tensors)))
    agrees(grad(f, everything), *tensors)
    agrees(lambda *t: vjp(f, *t)[1](torch.ones((), dtype=D)), *tensors)  # called when the transform is over
    plain = [t.clone().requires_grad_() for t in tensors]
    assert_same(grad(f, everything)(*tensors), torch.autograd.grad(f(*plain), plain))


@each
def test_second_gradient(operation: str) -> None:
    f, (x, *others) = OPERATIONS[operation]
    agrees(grad(lambda x: grad(f, 1)(x, *others).sin().sum()), x)
    agrees(grad(lambda w: grad(f)(x, w, *others[1:]).sin().sum()), others[0])


@each
def test_gradient_inside_autograd(operation: str) -> None:
    """Outside, the tensors are differentiated by the ordinary autograd."""
    f, (x, *others) = OPERATIONS[operation]

    def outer(x: Tensor) -> tuple[Tensor, ...]:
        weight = others[0].clone().requires_grad_()
        return torch.autograd.grad(grad(f)(x, weight, *others[1:]).sin().sum(), weight)

    agrees(outer, x)


@each
@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_of_samples(operation: str, axis: int) -> None:
    """One input a member, weights shared; the gradient of the input alone is computed for all members at once."""
    f, (x, *others) = OPERATIONS[operation]
    axis = min(axis, x.dim())
    xs = torch.stack([x, x + 1, x * 2], axis)
    shared = (axis, *[None] * len(others))
    agrees(vmap(grad(f), shared), xs, *others)
    agrees(vmap(grad(f, tuple(range(1 + len(others)))), shared), xs, *others)


@each
def test_ensemble(operation: str) -> None:
    f, (x, *others) = OPERATIONS[operation]
    stacked = [torch.stack([t, t + 0.5]) for t in others]
    members = (None, *[0] * len(others))
    agrees(vmap(f, members), x, *stacked)
    agrees(vmap(grad(f, tuple(range(1 + len(others)))), members), x, *stacked)
    agrees(grad(lambda *t: vmap(f, members)(x, *t).sum(), 0), *stacked)


@each
def test_nested_vmap(operation: str) -> None:
    f, (x, *others) = OPERATIONS[operation]
    inner = vmap(grad(f), (0, *[None] * len(others)))
    outer = vmap(inner, (None, 0, *[None] * (len(others) - 1)))
    agrees(outer, torch.stack([x, x + 1]), torch.stack([others[0], others[0] * 2]), *others[1:])
    nested = vmap(grad(lambda x: grad(f, 1)(x, *others).sin().sum()))
    agrees(nested, torch.stack([x, x + 1]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("max_out", [1, 2])
def test_jacobian(max_out: int, backend: str, memory_format: torch.memory_format) -> None:
    """vmap over the backward pass alone: nothing but the upstream gradient differs between members."""
    case = wide(CONV, b=2, max_out=max_out)
    x, weight = (t.detach().to(memory_format=memory_format) for t in case.inputs().values())

    def pooled(x: Tensor, weight: Tensor) -> Tensor:
        return case.run({"x": x, "weight": weight}).sum((2, 3))

    with bk.use_backend(backend):
        found = jacrev(pooled, (0, 1))(x, weight)
    with bk.use_backend("reference"):
        assert_same(found, jacrev(pooled, (0, 1))(x, weight))


@pytest.mark.parametrize("detach", [True, False])
def test_jacobian_of_the_other_operations(detach: bool) -> None:
    rows, weight, var = torch.randn(3, 2, 5, dtype=D), torch.randn(4, 5, dtype=D), torch.ones(2, dtype=D)
    agrees(jacrev(lambda x, w: bk.bcos_linear(x, w, detach_scale=detach), (0, 1)), rows, weight)
    agrees(jacrev(lambda x: bk.layer_norm(x, 5, detach_var=detach)), rows)
    maps = rows[:, :, :, None]
    agrees(jacrev(lambda x: bk.batch_norm_uncentered2d(x, var, training=False, detach_var=detach)), maps)
    agrees(jacrev(lambda x: bk.batch_norm_uncentered2d(x, None, training=True, detach_var=detach)), maps)


@each
def test_hessian_by_two_reverse_passes(operation: str) -> None:
    f, (x, *others) = OPERATIONS[operation]
    weight = others[0].flatten()[:4]

    def part(w: Tensor) -> Tensor:
        return f(x, torch.cat([w, others[0].flatten()[4:]]).view(others[0].shape), *others[1:])

    found = jacrev(jacrev(part))(weight)
    with bk.use_backend("reference"):
        assert_same(found, jacrev(jacrev(part))(weight))
        if operation not in EXPLAINING:
            assert_same(found, hessian(part)(weight))


@each
def test_forward_mode_is_refused_by_name(operation: str) -> None:
    f, tensors = OPERATIONS[operation]
    wrong = pytest.raises(
        NotImplementedError, match=r'torch\.ops\.bcos\.\w+ has no derivative in forward mode.*"reference"'
    )
    for i, t in enumerate(tensors):

        def one(t: Tensor, i: int = i) -> Tensor:
            return f(*tensors[:i], t, *tensors[i + 1 :])

        for transform in (lambda g, t: jvp(g, (t,), (t,)), lambda g, t: jacfwd(g)(t), lambda g, t: hessian(g)(t)):
            with wrong:
                transform(one, t)
        with forward_ad.dual_level(), wrong:
            one(forward_ad.make_dual(t, t))
    with forward_ad.dual_level():  # nothing here has a tangent
        assert_close(f(*tensors), OPERATIONS[operation][0](*tensors), OUTPUT)


@each
def test_forward_mode_of_the_reference(operation: str) -> None:
    """What the refusal recommends works."""
    f, tensors = OPERATIONS[operation]
    tangents = [t.cos() for t in tensors]
    with bk.use_backend("reference"):
        if operation in EXPLAINING:
            with pytest.raises(NotImplementedError, match="jvp"):
                jvp(f, tuple(tensors), tuple(tangents))
            return
        derivative = jvp(f, tuple(tensors), tuple(tangents))[1]
        gradients = grad(f, tuple(range(len(tensors))))(*tensors)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert_close(derivative, expected, GRADIENT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: reference.gelu(x, detach_gate=True),
        lambda x: reference.silu(x, detach_gate=True),
        lambda x: reference.attention(x, x, x, detach_weights=True),
        lambda x: reference.group_norm(x[None, :, :, None], 1, detach_var=True),
    ],
    ids=["gelu", "silu", "attention", "group norm"],
)
def test_functions_of_the_reference(function: Function) -> None:
    xs = torch.randn(2, 3, 4, dtype=D)

    def loss(x: Tensor) -> Tensor:
        return function(x).sin().sum()

    leaves = xs.clone().requires_grad_()
    expected = torch.autograd.grad(sum(loss(x) for x in leaves), leaves)[0]  # type: ignore[call-overload]
    assert_close(vmap(grad(loss))(xs), expected, GRADIENT)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(leaves[0]), leaves)[0][0], expected[0], GRADIENT)


def network(*, training: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            bk.BcosConv2d(4, 6, 3, padding=1, max_out=2),
            bk.BatchNormUncentered2d(6),
            nn.ReLU(inplace=True),
            bk.BcosConv2d(6, 4, 1, b=1.5),
            nn.Flatten(),
            bk.BcosLinear(4 * 25, 3),
        )
        .double()
        .train(training)
    )


def test_ensemble_of_networks_is_trained() -> None:
    """The stacked weights need gradients, the tensors that the layers see inside vmap do not."""
    models = [network() for _ in range(2)]
    for p in models[1].parameters():
        p.data.mul_(1.5)
    x = torch.randn(2, 4, 5, 5, dtype=D)
    parameters, buffers = stack_module_state(models)
    y = vmap(lambda p, b: functional_call(models[0], (p, b), x))(parameters, buffers)
    y.square().sum().backward()
    for i, model in enumerate(models):
        expected = model(x)
        assert_close(y[i], expected, OUTPUT)
        expected.square().sum().backward()
        for name, p in model.named_parameters():
            assert_close(parameters[name].grad[i], p.grad, GRADIENT, name)


def test_gradients_of_samples_of_a_network() -> None:
    model = network()
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    xs = torch.randn(3, 4, 5, 5, dtype=D)
    loss = lambda p, x: functional_call(model, p, x[None]).square().sum()  # noqa: E731
    agrees(vmap(grad(loss), (None, 0)), parameters, xs)


def test_running_variance() -> None:
    """Of each member where it has one; a member cannot update one that it shares. That is torch's rule for batch norm too."""
    x = torch.randn(2, 3, 4, 2, 3, dtype=D)

    def run(x: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        return bk.batch_norm_uncentered2d(x, var, training=True).sum(), var

    ones = torch.ones(2, 4, dtype=D)
    expected = ones[0] * 0.9 + 0.1 * x.var((1, 3, 4), unbiased=False)
    assert_close(vmap(run)(x, ones.clone())[1], expected, OUTPUT)
    assert_close(vmap(grad(run, has_aux=True))(x, ones.clone())[1], expected, OUTPUT)
    assert_close(grad(run, has_aux=True)(x[0], ones[0].clone())[1], expected[0], OUTPUT)
    shared = ones[0].clone()
    for wrong in (
        lambda: vmap(lambda x: run(x, shared)[0])(x),
        lambda: vmap(grad(lambda x: run(x, shared)[0]))(x),
        lambda: grad(lambda x: run(x, shared)[0])(x[0]),
    ):
        with pytest.raises(RuntimeError, match=r"running_var cannot be updated.*model\.eval\(\)"):
            wrong()
    assert torch.equal(shared, ones[0])


def test_no_members() -> None:
    weight = torch.zeros(0, 4, 5)
    assert vmap(lambda x: bk.bcos_linear(x, torch.ones(4, 5)))(torch.zeros(0, 2, 5)).shape == (0, 2, 4)
    images, kernel = torch.zeros(0, 2, 4, 5, 5), torch.ones(3, 4, 1, 1)
    assert vmap(grad(lambda x: bk.bcos_conv2d(x, kernel).sum()))(images).shape == images.shape
    with pytest.raises(ValueError, match=r"vmap over no members.*weight"):
        vmap(lambda w: bk.bcos_linear(torch.zeros(2, 5), w))(weight)


def test_autocast_inside_vmap() -> None:
    xs, weight = torch.randn(3, 2, 5), torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = vmap(lambda x: bk.bcos_linear(x, weight))(xs)
        assert torch.equal(y, bk.bcos_linear(xs, weight))
    assert y.dtype == torch.bfloat16


def test_modified_in_place_inside_transforms() -> None:
    """As in test_inplace.py."""
    for case in (wide(CONV, b=2), wide(LINEAR, b=2)):
        tensors = [t.detach() for t in case.inputs().values()]
        names = list(case.inputs())

        def loss(*values: Tensor, case: Case = case, names: list[str] = names) -> Tensor:
            y = case.run(dict(zip(names, values, strict=True)))
            y += 1
            return torch.relu_(y).square().sum()

        everything = tuple(range(len(tensors)))
        agrees(grad(loss, everything), *tensors)
        agrees(vmap(grad(loss, everything)), *(torch.stack([t, t + 1]) for t in tensors))
        agrees(grad(lambda x, *o, loss=loss: grad(loss, 1)(x, *o).sin().sum()), *tensors)
        agrees(
            grad(
                lambda w, loss=loss, t=tensors: vmap(loss, (0, None, *[None] * len(t[2:])))(
                    torch.stack([t[0]] * 2), w, *t[2:]
                ).sum()
            ),
            tensors[1],
        )


# ---- traces and exported graphs


def trained(run: Function, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("gradients", [True, False], ids=["made with gradients", "made under no_grad"])
@pytest.mark.parametrize("made", ["jit.trace", "export", "decomposed", "compile"])
def test_trained_after_it_was_made(made: str, gradients: bool) -> None:
    """Whether a derivative follows is known when the graph runs, not when it is made."""
    torch._dynamo.reset()
    model, x = network(), torch.randn(2, 4, 5, 5, dtype=D)
    expected = trained(model, model, x)
    with torch.set_grad_enabled(gradients):
        if made == "jit.trace":
            graph: Any = torch.jit.trace(model, x)
        elif made == "compile":
            graph = torch.compile(model, fullgraph=True, backend="aot_eager")
            graph(x)
        else:
            program = torch.export.export(model, (x,))
            graph = (program.run_decompositions({}) if made == "decomposed" else program).module()
    assert_same(trained(graph, model if made == "compile" else graph, x), expected)
    with torch.no_grad():
        assert_close(graph(x), expected[0], OUTPUT)


def test_graph_of_a_step_with_an_output_modified_in_place() -> None:
    """make_fx sees the aliases that notice the modification."""
    from torch.fx.experimental.proxy_tensor import make_fx

    conv = network()[0]

    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = conv(x)
        y += 1
        return torch.autograd.grad(torch.relu_(y).sum(), x)[0]

    x, other = torch.randn(2, 2, 4, 5, 5, dtype=D)
    assert_close(make_fx(step)(x)(other), step(other), GRADIENT)


@pytest.mark.parametrize("transform", ["grad", "samples"])
def test_compiled_transforms(transform: str) -> None:
    torch._dynamo.reset()
    f, (x, weight) = OPERATIONS[wide(CONV, b=2).name]
    function = grad(f, (0, 1)) if transform == "grad" else vmap(grad(f, (0, 1)), (0, None))
    x = x if transform == "grad" else torch.stack([x, x + 1])
    assert_same(torch.compile(function, fullgraph=True, backend="aot_eager")(x, weight), function(x, weight))


@pytest.mark.parametrize("transform", ["functionalize", "grad", "vmap"])
def test_constants_made_inside_a_transform_do_not_stay(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "_constants", {})
    layer, x = Normalize((0.1, 0.7), (0.3, 0.9)), torch.rand(2, 2, 3, 3, dtype=D)
    mean, std = (torch.tensor(v, dtype=D)[:, None, None] for v in ((0.1, 0.7), (0.3, 0.9)))
    if transform == "grad":
        assert_close(grad(lambda x: layer(x).square().sum())(x), 2 * (x - mean) / std.square(), GRADIENT)
    else:
        inside = torch.func.functionalize(layer) if transform == "functionalize" else vmap(lambda x: layer(x[None])[0])
        assert_close(inside(x), (x - mean) / std, OUTPUT)
    y = layer(x)
    assert not torch._is_functional_tensor(y)
    assert_close(y, (x - mean) / std, OUTPUT)
    assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, transforms._constants.values()))
