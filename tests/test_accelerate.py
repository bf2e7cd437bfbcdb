"""``accelerate`` on the public package ``bcos`` (B-cos v2) and on look-alikes: nothing that a user sees changes."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bcos_kernels as bk
from bcos_kernels.modules import DetachableModule
from tests.lookalikes import (
    FirstConv2d,
    FirstLogits,
    FlatConv2d,
    FlatNetwork,
    GateGELU,
    LostGradient,
    PlainConv2d,
    Pool,
    ScaledConv2d,
    first_explanation_mode,
)
from tests.tolerances import GRADIENT, OUTPUT, assert_close

modules = importlib.import_module("bcos.modules")
norms = importlib.import_module("bcos.modules.norms")
common = importlib.import_module("bcos.common")
SIDE = 32


def _small(package: str, build: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(importlib.import_module(f"bcos.models.{package}"))

    return make


def _vit(package: Any, **more: Any) -> nn.Module:
    return modules.BcosSequential(
        package.SimpleViT(
            image_size=SIDE // 16 if "conv_stem" in more else SIDE,
            patch_size=1 if "conv_stem" in more else 8,
            num_classes=7,
            dim=16,
            depth=2,
            heads=2,
            mlp_dim=32,
            linear_layer=modules.BcosLinear,
            conv2d_layer=modules.BcosConv2d,
            norm_layer=norms.NoBias(norms.DetachableLayerNorm),
            norm2d_layer=norms.NoBias(norms.DetachableGNLayerNorm2d),
            act_layer=nn.Identity,
            **more,
        ),
        modules.LogitLayer(logit_bias=-1.0),
    )


def _vgg(package: Any) -> nn.Module:
    with torch.device("meta"):  # the classifier alone has a hundred million weights
        model = package.BcosVGG(nn.Sequential(), num_classes=7, conv_layer=modules.BcosConv2d)
    model.features = package.make_layers([8, "M", 16, "M"], norm_layer=norms.NoBias(norms.BatchNormUncentered2d))
    model.classifier = nn.Sequential(modules.BcosConv2d(16, 12, 7, padding=3), modules.BcosConv2d(12, 7))
    return model


SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet": _small("resnet", lambda p: p.BcosResNet(p.Bottleneck, [1, 1, 1, 1], num_classes=7, inplanes=8)),
    "densenet": _small("densenet", lambda p: p.BcosDenseNet(4, (1, 2), 8, num_classes=7, small_inputs=False)),
    "convnext": _small(
        "convnext",
        lambda p: p.BcosConvNeXt(
            [p.CNBlockConfig(8, 16, 1), p.CNBlockConfig(16, None, 1)], layer_scale=0.5, num_classes=7
        ),
    ),
    "vgg": _small("vgg", _vgg),
    "simple_vit": _small("vit", _vit),
    "vitc": _small("vit", lambda p: _vit(p, conv_stem=[8, 16, 16, 16])),
}
FULL = ["resnet50", "densenet121", "convnext_tiny", "vgg11_bnu", "simple_vit_s_patch16_224"]


def pretrained(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module("bcos.models.pretrained"), name)(pretrained=False)


def image(n: int, side: int = SIDE, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rgb = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)
    return torch.cat([rgb, 1 - rgb], 1)


def compare(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """A training step and an evaluation: outputs, gradients and state."""
    for mode in (True, False):
        results = []
        for model in (ours, theirs):
            torch.manual_seed(3)  # stochastic depth
            leaf = x.clone().requires_grad_()
            y = model.train(mode)(leaf)
            model.zero_grad()
            upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).to(y).view(y.shape)
            y.backward(upstream)
            results.append((y, leaf.grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        (y, dx, grads), (y2, dx2, grads2) = results
        assert_close(y, y2, OUTPUT, "y")
        assert_close(dx, dx2, GRADIENT, "dx")
        assert grads.keys() == grads2.keys()
        for name, grad in grads.items():
            assert_close(grad, grads2[name], GRADIENT, name)
    for (name, value), (name2, value2) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == name2
        if not name.endswith("num_batches_tracked"):  # the single-file ResNet does not count
            assert_close(value, value2, OUTPUT, name)


def compare_explanations(ours: Any, theirs: Any, x: torch.Tensor) -> None:
    """Through their own ``explain``."""
    ours.eval(), theirs.eval()
    a, e = (m.explain(x[:1].clone().requires_grad_(), idx=2) for m in (ours, theirs))
    assert a["prediction"] == e["prediction"]
    assert e["dynamic_linear_weights"].abs().max() > 0
    for key in ("dynamic_linear_weights", "contribution_map"):
        assert_close(a[key], e[key], GRADIENT, key)
    assert abs(a["explanation"] - e["explanation"]).max() < 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_public_networks(name: str) -> None:
    torch.manual_seed(0)
    theirs = SMALL[name]().double()
    ours = bk.accelerate(copy.deepcopy(theirs))
    assert ours.acceleration.left == {}
    assert not any(type(m).__module__.startswith("bcos.modules.norms") for m in ours.modules())
    x = image(3)
    compare(ours, theirs, x)
    compare_explanations(ours, theirs, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_pretrained_entry_points(name: str) -> None:
    torch.manual_seed(0)
    theirs = pretrained(name).double()
    ours = bk.accelerate(copy.deepcopy(theirs))
    assert ours.acceleration.left == {}
    x = image(2, 224 if "vit" in name else 64)
    compare(ours, theirs, x)
    compare_explanations(ours, theirs, x)


def test_single_file_network() -> None:
    torch.manual_seed(0)
    theirs = FlatNetwork().double()
    ours = bk.accelerate(copy.deepcopy(theirs))
    assert ours.acceleration.left == {}
    assert isinstance(ours.conv1, bk.BcosConv2d)
    compare(ours, theirs, image(2))
    with ours.explanation_mode():
        assert all(m.detach for m in ours.modules() if isinstance(m, DetachableModule))
    # its layers read the keys of the big package, and still do
    state = {f"{k[:-6]}linear.weight" if "conv" in k or "fc" in k else k: v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state)


@pytest.mark.parametrize("b", [1, 2, 2.5])
def test_the_first_b_cos_code(b: float) -> None:
    torch.manual_seed(0)
    layers = [FirstConv2d(6, 8, 3, b=b, padding=1), FirstConv2d(8, 4, b=b, max_out=1), FirstLogits()]
    theirs = nn.Sequential(*layers).double()
    ours = bk.accelerate(copy.deepcopy(theirs))
    assert ours.acceleration.left == {}
    assert isinstance(ours[0], bk.BcosConv2d)
    x = image(2)
    compare(ours, theirs, x)
    for active in (True, False):  # by their switch
        for model in (ours, theirs):
            first_explanation_mode(model, active)
        compare(ours, theirs, x)
    results = [bk.explain(model, x[:, :3]) for model in (ours, theirs)]  # by ours
    assert_close(results[0].weights, results[1].weights, GRADIENT)
    assert not any(getattr(m, "detach", False) for model in (ours, theirs) for m in model.modules())
    chosen = results[0].logits.amax(1)
    assert_close(results[0].contributions.sum((1, 2)), chosen + 5, {torch.float64: 1e-4})  # 1e-6 beside |cos|
    assert bk.deaccelerate(ours)[0].explanation_mode


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: PlainConv2d(6, 8, 3, padding=1, bias=False), (2, 6, 9, 8)),
    "bias": (lambda: PlainConv2d(6, 8, 3, stride=2), (2, 6, 9, 8)),
    "max_out": (lambda: PlainConv2d(6, 8, 3, max_out=2), (2, 6, 9, 8)),
    "learnable": (lambda: PlainConv2d(6, 8, 3, b=nn.Parameter(torch.tensor(1.5))), (2, 6, 9, 8)),
    "offset": (lambda: PlainConv2d(6, 8, 3, b=nn.Parameter(torch.tensor(-0.2)), b_loss=True), (2, 6, 9, 8)),
    "bounded": (lambda: PlainConv2d(6, 8, 3, b=nn.Parameter(torch.tensor(0.9)), clamping=True), (2, 6, 9, 8)),
    "at_two": (lambda: PlainConv2d(6, 8, 3, b=nn.Parameter(torch.tensor(2.0))), (2, 6, 9, 8)),
    "v2_linear": (lambda: modules.BcosLinear(7, 5, max_out=2, b=2.5), (3, 4, 7)),
    "v2_dilated": (lambda: modules.BcosConv2d(6, 4, 3, dilation=2), (2, 6, 9, 8)),
    "position_norm": (lambda: norms.DetachablePositionNorm2d(6), (2, 6, 9, 8)),
    "pool": (lambda: Pool(3, 8, 2, 5), (2, 8, 3, 3)),
    "gelu": (GateGELU, (2, 6, 9, 8)),
}


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, detach: bool) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their dilation is slow
        theirs = nn.Sequential(make()).double()
    ours = bk.accelerate(copy.deepcopy(theirs))
    for model in (ours, theirs):
        model[0].set_explanation_mode(detach)
    x = torch.randn(shape, dtype=torch.float64)
    if name == "pool" and detach:
        for model in (ours, theirs):  # queries and keys are constants: only here their parameters have no gradient
            model[0].q_proj.requires_grad_(False), model[0].k_proj.requires_grad_(False)
    compare(ours, theirs, x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scale": (lambda: ScaledConv2d(3, 4, 3), "it does not compute what ours computes"),
    "gradient": (lambda: LostGradient(3, 4, 3), "it does not compute what ours computes"),
    "padding": (lambda: modules.BcosConv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    "all norm": (lambda: norms.AllNormUncentered2d(4), "one variance for all channels"),
    "centered": (lambda: norms.BatchNorm2d(4), "it has no `detach`"),
    "group norm": (lambda: norms.GroupNormUncentered2d(2, 4), "it does not compute what ours computes"),
    "position norm": (lambda: norms.PositionNormUncentered2d(4), "it does not compute what ours computes"),
    "unpooling": (lambda: Pool(3, 8, 2, 5, attn_unpool=True), "its output has another shape than ours"),
    "meta": (lambda: modules.BcosLinear(3, 4, device="meta"), "it is on the meta device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_and_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, sentence = REFUSED[name]
    model = nn.Sequential(modules.BcosConv2d(6, 4, 1), make())
    other = model[1]
    with caplog.at_level(logging.INFO, "bcos_kernels"):
        assert bk.accelerate(model) is model
    assert model[1] is other
    assert list(model.acceleration.swapped) == ["0"]
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(model.acceleration.left["1"])
    assert "accelerate: 1 stays as it is" in caplog.text
    assert "swapped 0: BcosConv2d -> BcosConv2d" in str(model.acceleration)


def test_everything_made_before_stays_valid() -> None:
    torch.manual_seed(0)
    model: Any = SMALL["resnet"]().double()
    theirs = copy.deepcopy(model)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, theirs)]
    parameters, state = dict(model.named_parameters()), model.state_dict()
    seen: list[nn.Module] = []
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(module))
    switch = common.explanation_mode(model)
    with switch:
        pass  # it remembers the layers of now
    bk.accelerate(model)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert list(model.state_dict()) == list(state)
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == {k: v.data_ptr() for k, v in state.items()}
    with switch:
        assert all(m.detach for m in model.modules() if hasattr(m, "set_explanation_mode"))
    assert not any(getattr(m, "detach", False) for m in model.modules())
    x = image(2)
    for network, optimiser in zip((model, theirs), optimisers, strict=True):
        network.train()(x).square().sum().backward()
        optimiser.step()
    assert seen == [model.conv1]
    compare(model, theirs, x)


def test_undone() -> None:
    torch.manual_seed(0)
    model: Any = SMALL["convnext"]()
    kinds, before = [type(m) for m in model.modules()], list(model.modules())
    bk.accelerate(model)
    assert [type(m) for m in model.modules()] != kinds
    model.double().eval()  # what happens in between reaches their layers
    x = image(1)
    expected = model(x)
    assert bk.deaccelerate(model) is model
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert not hasattr(model, "acceleration")
    assert not any(m.training for m in model.modules())
    assert_close(model(x), expected, OUTPUT)
    assert bk.deaccelerate(model) is model


def test_twice_is_once() -> None:
    model = bk.accelerate(SMALL["densenet"]())
    before, report = list(model.modules()), str(model.acceleration)
    bk.accelerate(model)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert str(model.acceleration) == report


def test_copies_and_files() -> None:
    torch.manual_seed(0)
    model: Any = bk.accelerate(FlatNetwork()).eval()
    twin = copy.deepcopy(model).double()
    assert next(model.parameters()).dtype == torch.float32
    x = image(1, dtype=torch.float32)
    file = io.BytesIO()
    torch.save(model, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(again(x), model(x))
    assert_close(twin(x.double()).float(), model(x), OUTPUT)
    for copied in (twin, again):
        bk.deaccelerate(copied)
        assert isinstance(copied.conv1, FlatConv2d)
    assert {p.dtype for p in twin.parameters()} == {torch.float64}


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(channels_last: bool) -> None:
    model: Any = bk.accelerate(SMALL["resnet"](), channels_last=channels_last)
    y = model.conv1(image(2, dtype=torch.float32))
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_a_layer_used_twice_stays_one() -> None:
    layer = modules.BcosLinear(6, 6)
    model = bk.accelerate(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2]
    assert bk.deaccelerate(model)[2] is layer
    assert model[0] is layer


def test_activations_behind_a_layer_no_longer_overwrite_its_output() -> None:
    model = bk.accelerate(nn.Sequential(PlainConv2d(6, 4, 3), nn.ReLU(inplace=True)))
    model(image(1, dtype=torch.float32)).sum().backward()
    assert model.acceleration.not_in_place == ["1"]
    assert bk.deaccelerate(model)[1].inplace


def test_comparing_leaves_no_trace() -> None:
    model = nn.Sequential(norms.BatchNormUncentered2d(4), norms.GroupNormUncentered2d(2, 4)).train()
    model[1].eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    bk.accelerate(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model] == [True, False]
    assert all(p.grad is None for p in model.parameters())


def test_sentences() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got str"):
        bk.accelerate("resnet50")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a Linear has no B-cos layer that could be swapped: no module has `b`"):
        bk.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"the model is a BcosLinear itself; put it into an nn.Sequential"):
        bk.accelerate(modules.BcosLinear(2, 2))
    with pytest.raises(ValueError, match="no B-cos layer that could be swapped: 0: ScaledConv2d: it does not compute"):
        bk.accelerate(nn.Sequential(ScaledConv2d(3, 4, 3)))


def test_flat_convolution_is_ours_and_theirs() -> None:
    layer = FlatConv2d(6, 4, 3, padding=1)
    model: Any = bk.accelerate(nn.Sequential(layer))
    assert model[0].weight is layer.weight
    model[0].b = 1.5
    assert layer.b == 1.5
    x = image(1, dtype=torch.float32)
    assert_close(model(x), layer(x), OUTPUT)
