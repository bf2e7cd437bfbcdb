"""The plain layer inside a B-cos layer is a layer: what is done to it, and who listens to it, counts.

The right value is always :func:`expected`: what the inner layer gives, or would give, scaled as ``reference`` says.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import bcos_kernels as bk
from bcos_kernels import reference
from bcos_kernels.modules import AttentionPool2d, norm_relu_conv
from tests.lookalikes import PlainConv2d, Pool
from tests.tolerances import GRADIENT, OUTPUT, assert_close

modules = importlib.import_module("bcos.modules")

Layer = bk.BcosConv2d | bk.BcosLinear

CONV = {"b": 1.5, "max_out": 2, "bias": True, "groups": 2, "stride": (2, 1), "padding": 1}
LAYERS: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "conv": (lambda: bk.BcosConv2d(4, 6, 3, **CONV), (2, 4, 7, 8)),
    "conv_same": (lambda: bk.BcosConv2d(4, 6, (2, 3), padding="same", normalize_weight=True), (2, 4, 7, 8)),
    "conv_reflect": (lambda: bk.BcosConv2d(4, 6, 3, padding=1, padding_mode="reflect", dilation=2), (2, 4, 7, 8)),
    "linear": (lambda: bk.BcosLinear(4, 6, bias=True, max_out=2, normalize_weight=True), (2, 3, 4)),
    "b_1": (lambda: bk.BcosLinear(4, 6, b=1), (3, 4)),
    "b_learnt": (lambda: bk.BcosLinear(4, 6, b=nn.Parameter(torch.tensor(1.7))), (3, 4)),
}


def make(name: str, **more: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[name][0](), LAYERS[name][1]
    return layer.double(), torch.randn(shape, dtype=torch.float64)


def results(layer: nn.Module, x: Tensor, *, explained: bool = False) -> list[Tensor]:
    """Output, and gradients of the input and of every parameter."""
    leaf = x.clone().requires_grad_()
    with bk.explanation_mode(layer) if explained else warnings.catch_warnings():
        y = layer(leaf)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad(y, [leaf, *(p for p in layer.parameters() if p.requires_grad)], upstream)
    return [y.detach(), *grads]


def compare(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for i, (actual, expected) in enumerate(zip(a, b, strict=True)):
        if expected.abs().max() < 1e-12:  # of a weight whose length does not matter
            assert actual.abs().max() < 1e-12
            continue
        assert_close(actual, expected, GRADIENT if i else OUTPUT, f"result {i}")


@pytest.mark.parametrize("explained", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_called_is_the_same_as_not_called(name: str, explained: bool) -> None:
    layer, x = make(name)
    before = results(layer, x, explained=explained)
    heard: list[int] = []
    layer.linear.register_forward_hook(lambda m, i, o: heard.append(1))
    compare(results(layer, x, explained=explained), before)
    assert heard


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "pre backward"])
def test_hooks_are_heard(kind: str) -> None:
    layer, x = make("conv")
    before = results(layer, x)
    heard: list[nn.Module] = []
    register = {
        "forward": layer.linear.register_forward_hook,
        "pre": layer.linear.register_forward_pre_hook,
        "backward": layer.linear.register_full_backward_hook,
        "pre backward": layer.linear.register_full_backward_pre_hook,
    }[kind]
    handle = register(lambda module, *rest: heard.append(module))
    compare(results(layer, x), before)
    assert heard == [layer.linear]
    handle.remove()
    compare(results(layer, x), before)
    assert len(heard) == 1


def test_hooks_of_all_modules_are_heard() -> None:
    layer, x = make("linear")
    heard: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: heard.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert heard == [layer.linear, layer]


def test_a_hook_may_change_the_output() -> None:
    layer, x = make("b_learnt")
    layer.linear.register_forward_hook(lambda module, inputs, output: output + 1)
    u = F.linear(x, layer.weight) + 1
    assert_close(layer(x), reference.linear_scaled(u, x, b=layer.b, max_out=1, detach_scale=False), OUTPUT)


class OtherForward(nn.Linear):
    """loralib's way: a subclass that adds to what torch's layer gives."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, dtype=source.weight.dtype)
        self.weight = source.weight
        self.a = nn.Parameter(torch.randn(2, source.in_features, dtype=source.weight.dtype))
        self.b = nn.Parameter(torch.randn(source.out_features, 2, dtype=source.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


class Around(nn.Module):
    """peft's way: another module, with the layer inside."""

    def __init__(self, source: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = source
        self.a = nn.Conv2d(source.in_channels, 1, source.kernel_size, source.stride, source.padding, bias=False)
        self.b = nn.Conv2d(1, source.out_channels, 1, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


@pytest.mark.parametrize("explained", [False, True])
def test_low_rank_updates(explained: bool) -> None:
    layer, x = make("b_learnt")
    merged = copy.deepcopy(layer)
    layer.linear = OtherForward(layer.linear)
    merged.linear.weight.data += layer.linear.b @ layer.linear.a
    got, expected = results(layer, x, explained=explained), results(merged, x, explained=explained)
    compare(got[:3], expected[:3])
    assert all(g.abs().max() > 0 for g in got[3:])

    layer = bk.BcosConv2d(4, 6, 3, stride=2, padding=1).double()
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    merged = copy.deepcopy(layer)
    layer.linear = Around(layer.linear)
    merged.linear.weight.data += torch.einsum("or,rikl->oikl", layer.linear.b.weight[..., 0, 0], layer.linear.a.weight)
    got, expected = results(layer, x, explained=explained), results(merged, x, explained=explained)
    compare(got[:2], expected[:2])
    assert all(g.abs().max() > 0 for g in got[2:])


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    stack = [bk.BcosConv2d(6, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), bk.BcosLinear(8, 5, b=1.5)]
    model = nn.Sequential(*stack).double()
    x = torch.rand(2, 6, 9, 9, dtype=torch.float64)
    config = peft.LoraConfig(r=2, target_modules=["0.linear", "3.linear"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    before = adapted(x)
    before.sum().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if "lora" in n}
    assert len(grads) == 4
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())
    with bk.explanation_mode(adapted):
        explained = results(adapted, x)[1]
    merged = adapted.merge_and_unload()
    assert_close(merged(x), before, {torch.float64: 1e-5})  # they compute the update in float32
    assert type(merged[3].linear) is nn.Linear
    with bk.explanation_mode(merged):
        assert_close(results(merged, x)[1], explained, {torch.float64: 1e-5})


@pytest.mark.parametrize("name", ["conv", "conv_same", "linear"])
def test_pruning_twice_and_training(name: str) -> None:
    layer, x = make(name)
    plain = copy.deepcopy(layer)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    prune.l1_unstructured(layer.linear, "weight", amount=0.1)
    prune.l1_unstructured(layer.linear, "weight", amount=0.1)
    mask = layer.linear.weight_mask
    assert 0.1 < (mask == 0).double().mean() < 0.5
    for _ in range(2):  # training changes the weights: nothing may go stale
        plain.linear.weight.data, plain.linear.bias = layer.linear.weight_orig.detach() * mask, layer.linear.bias
        got, expected = layer(x), plain(x)
        assert_close(got, expected, OUTPUT)
        got.square().sum().backward()
        optimiser.step()
    assert not torch.equal(layer(x), got)
    prune.remove(layer.linear, "weight")
    plain.linear.weight.data, plain.linear.bias = layer.linear.weight.detach(), layer.linear.bias
    assert_close(layer(x), plain(x), OUTPUT)


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they prefer the parametrisation
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize("name", ["conv", "conv_same", "linear"])
@pytest.mark.parametrize(
    "put_on",
    [old_weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["old weight norm", "old spectral norm", "weight norm", "spectral norm"],
)
def test_reparametrised_weights(put_on: Callable[[nn.Module], None], name: str) -> None:
    """In training mode the spectral norm's vectors move with every reading."""
    layer, x = make(name)
    plain = copy.deepcopy(layer)
    put_on(layer.linear)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.eval().linear.weight.detach().clone()
    for _ in range(2):
        y = layer.train()(x)
        plain.linear.weight.data = layer.eval().linear.weight.detach()  # as it was in that call
        plain.linear.bias = layer.linear.bias
        assert_close(y, plain(x), OUTPUT)
        y.square().sum().backward()
        optimiser.step()
    assert not torch.allclose(before, plain.linear.weight)


def test_spectral_norm_is_read_once() -> None:
    layer, x = make("linear")
    parametrizations.spectral_norm(layer.linear)
    calls: list[int] = []
    layer.linear.parametrizations.weight[0].register_forward_hook(lambda *args: calls.append(1))
    layer(x)
    assert calls == [1]
    assert parametrize.is_parametrized(layer.linear)


def test_methods_that_are_put_onto_a_layer() -> None:
    layer, x = make("conv_reflect")
    before = layer(x)
    original = layer.linear._conv_forward
    layer.linear._conv_forward = lambda *args: 2 * original(*args)
    assert_close(layer(x), 4 * before, OUTPUT)
    layer, x = make("b_1")
    before = layer(x)
    layer.linear.forward = lambda x: F.linear(x, layer.weight) * 3
    assert_close(layer(x), 3 * before, OUTPUT)


def test_samples_of_the_gradient() -> None:
    """opacus' way: a hook keeps the input, another takes the gradient of the output."""
    layer, x = make("b_learnt")
    kept: dict[str, Tensor] = {}
    layer.linear.register_forward_hook(lambda m, i, o: kept.update(x=i[0].detach()))
    layer.linear.register_full_backward_hook(lambda m, i, o: kept.update(g=o[0]))
    layer(x).square().sum().backward()
    each = torch.einsum("no,ni->noi", kept["g"], kept["x"])
    assert_close(each.sum(0), layer.linear.weight.grad, GRADIENT)


def test_dynamic_quantisation() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(bk.BcosLinear(16, 6, b=1.5)), torch.randn(3, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it will move to another package
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert type(quantised[0].linear) is not nn.Linear
    u = quantised[0].linear(x)
    assert not torch.equal(u, model[0].linear(x))
    assert_close(quantised(x), reference.linear_scaled(u, x, b=1.5, max_out=1, detach_scale=False), OUTPUT)


class Scaled(Tensor):
    """Weights of a class that computes in its own way, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        return 3 * result.as_subclass(Tensor) if func is F.linear else result


class Static(Tensor):
    """The same by a static method."""

    @staticmethod
    def __torch_function__(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func is Tensor.detach:
            return result.as_subclass(Static)
        return 3 * result if func is F.linear else result


@pytest.mark.parametrize("kind", [Scaled, Static])
def test_weights_of_another_class(kind: type[Tensor]) -> None:
    layer, x = make("b_1")
    before = layer(x)
    layer.linear.weight = nn.Parameter(layer.weight.detach().as_subclass(kind))
    assert_close(layer(x), 3 * before, OUTPUT)


def test_geometry_is_that_of_the_inner_layer() -> None:
    x = make("conv_reflect")[1]
    conv = bk.BcosConv2d(4, 6, 3).double()
    conv.linear.stride, conv.linear.padding = (2, 2), (1, 1)
    expected = reference.conv2d(x, conv.weight, stride=(2, 2), padding=(1, 1))
    assert_close(conv(x), expected, OUTPUT)
    conv.linear = nn.Sequential(conv.linear)
    assert_close(conv(x), expected, OUTPUT)

    class Box(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, expected.new_ones(6, 4, 3, 3))

    conv.linear = Box()
    u = F.conv2d(x, expected.new_ones(6, 4, 3, 3))
    assert_close(conv(x), u * u.abs() / reference.patch_norm(x, (3, 3), (1, 1), (0, 0), (1, 1), 1), OUTPUT)


def test_sentences() -> None:
    layer, x = make("linear")
    layer.linear = nn.Sequential(layer.linear)
    with pytest.raises(ValueError, match="normalize_weight=True: linear is a Sequential, and it is not known"):
        layer(x)
    layer.normalize_weight = False
    layer.linear = nn.Linear(4, 5).double()
    layer.linear.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"linear: the layer inside must give \[2, 3, 12\] for x \[2, 3, 4\]; got"):
        layer(x)


def test_layers_in_one_pass_do_not_pass_over_it() -> None:
    norm, relu, conv = bk.BatchNormUncentered2d(4).double().eval(), nn.ReLU(), bk.BcosConv2d(4, 6, 3).double()
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    conv.linear = Around(conv.linear)
    u = conv.linear(relu(norm(x)))
    assert_close(
        norm_relu_conv(norm, relu, conv, x),
        u * u.abs() / reference.patch_norm(relu(norm(x)), (3, 3), (1, 1), (0, 0), (1, 1), 1),
        OUTPUT,
    )


@pytest.mark.parametrize("unpool", [False, True])
def test_attention_pool(unpool: bool) -> None:
    torch.manual_seed(0)
    source = Pool(3, 8, 2, 5)
    pool, x = AttentionPool2d(source).double(), torch.randn(2, 8, 3, 3, dtype=torch.float64)
    pool.unpool = unpool
    before = pool(x)
    inner = pool.c_proj
    pool.c_proj = bk.BcosLinear(8, 5).double()  # a B-cos layer in name
    pool.c_proj.linear = inner
    assert_close(pool(x), before, OUTPUT)
    inner.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_close(pool(x), 2 * before, OUTPUT)


# ---- layers of other packages


@pytest.mark.parametrize("explained", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: PlainConv2d(6, 4, 3), lambda: modules.BcosConv2d(6, 4, 3)], ids=["B-cosification", "B-cos v2"]
)
def test_what_is_done_to_a_swapped_layer_counts(make: Callable[[], nn.Module], explained: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)

    def hooked(layer: Any) -> None:
        layer.linear.register_forward_hook(lambda module, inputs, output: output * 2)

    def pruned(layer: Any) -> None:
        prune.l1_unstructured(layer.linear, "weight", amount=0.5)

    def replaced(layer: Any) -> None:
        torch.manual_seed(1)
        conv, layer.linear = layer.linear, Around(layer.linear)
        for name in ("kernel_size", "stride", "padding"):  # which theirs reads
            setattr(layer.linear, name, getattr(conv, name))

    def normed(layer: Any) -> None:
        parametrizations.weight_norm(layer.linear)
        layer.linear.parametrizations.weight.original1.data[0] *= -1

    for change in (hooked, pruned, replaced, normed):
        if change is replaced and isinstance(make(), modules.BcosConv2d):
            continue  # theirs reads the kernel size of what it calls
        theirs = nn.Sequential(make()).double()
        ours = bk.accelerate(copy.deepcopy(theirs))
        plain = ours(x)
        for model in (ours, theirs):
            change(model[0])
        compare(results(ours, x, explained=explained), results(theirs, x, explained=explained))
        assert not torch.allclose(ours(x), plain)
        assert not ours[0].source.detach


# ---- distributed


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(x).square().mean()
        losses.append(loss.detach())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


@pytest.mark.parametrize("how", ["fsdp1 inner", "fsdp1 layer", "fsdp2 inner", "fsdp2 layer", "ddp"])
def test_wrappers_of_distributed_training(how: str, one_process: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    layers = [bk.BcosConv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), bk.BcosLinear(8, 5, b=1.5)]
    model = nn.Sequential(*layers).double()
    x = torch.rand(2, 6, 7, 7, dtype=torch.float64)
    expected = _steps(copy.deepcopy(model), x)
    weights = bk.explain(copy.deepcopy(model), x, 1).weights
    mesh = dist.init_device_mesh("cpu", (1,))
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif "inner" in how:
        for layer in (model[0], model[3]):
            if "1" in how:
                layer.linear = FullyShardedDataParallel(layer.linear, device_id=torch.device("cpu"))
            else:
                fully_shard(layer.linear, mesh=mesh)
    elif "1" in how:
        model[0] = FullyShardedDataParallel(model[0], device_id=torch.device("cpu"))
    else:
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    assert_close(bk.explain(model, x, 1).weights, weights, GRADIENT)
    for loss, e in zip(_steps(model, x), expected, strict=True):
        assert_close(loss, e, GRADIENT)


class Adapter(nn.Module):
    """A low-rank convolution beside the base, registered before it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_the_window_is_that_of_the_layer_not_of_an_adapter() -> None:
    layer = bk.BcosConv2d(6, 8, 3, padding=1).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = layer(x)
    layer.linear = Adapter(layer.linear).double()
    nn.init.zeros_(layer.linear.up.weight)
    assert_close(layer(x), expected, OUTPUT)
