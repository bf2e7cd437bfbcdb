"""``bcosify`` on what only looks like something known: it becomes the same function at B = 1, or it is refused by name."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.layers.attention import Attention
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.models import densenet, googlenet, mobilenet_v2, resnet, vgg
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation
from torchvision.transforms import Normalize, v2

import bcos_kernels as bk
from bcos_kernels.identity import class_name, known_class
from bcos_kernels.modules import BcosMapClassifier, DetachableActivation, FrozenBatchNormUncentered2d
from tests.networks import CLASSES, filled, make

KEEP = ("biases", "max_pooling", "head_order")
SIDE = 32


def converted(standard: nn.Module, **options: Any) -> bk.BcosNetwork:
    """At B = 1, without any step that changes the function; the image is taken as normalised already."""
    return bk.bcosify(standard, **{"b": 1, "normalize": None, "logit_bias": None, "keep": KEEP, **options})


def assert_same_function(standard: nn.Module, model: bk.BcosNetwork | None = None) -> None:
    model = converted(standard) if model is None else model
    x = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = standard(x)
        actual = model(torch.cat([x, -x], 1))
    assert (expected[0] - expected[1]).abs().max() > 1e-6  # the image has a part in it
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-10


def assert_refused(standard: nn.Module, sentence: str, **options: Any) -> None:
    before = repr(standard)
    with pytest.raises(ValueError, match=sentence):
        bk.bcosify(standard, **options)
    assert repr(standard) == before


def assert_complete(model: bk.BcosNetwork) -> None:
    """The contributions make up the whole of the logit."""
    images = torch.rand(2, 6, SIDE, SIDE, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, bk.BatchNormUncentered2d):
            module.momentum = 1.0  # statistics that fit, or else deep networks of random weights fade to zero
    model.train()(images)
    explanation = bk.explain(model, images)
    logits = explanation.logits.gather(1, explanation.targets[:, None])[:, 0]
    total = explanation.contributions.sum((1, 2))
    assert logits.abs().max() > 0
    torch.testing.assert_close(total, logits, rtol=1e-9, atol=1e-12)


class Small(nn.Module):
    """A convolution, something in the midst, and a classifier."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Identity() if middle is None else middle
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.middle(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


def small(middle: nn.Module | None = None) -> nn.Module:
    return filled(Small(middle).double())


# ---- backbones


class Softmax(resnet.ResNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Tripled(resnet.ResNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class OtherImplementation(resnet.ResNet):
    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


class SoftmaxDenseNet(densenet.DenseNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class WithoutReLU(densenet.DenseNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class SoftmaxVGG(vgg.VGG):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


def resnet_of(kind: type[resnet.ResNet], block: Any = resnet.BasicBlock) -> nn.Module:
    return filled(kind(block, [1, 1, 1, 1], num_classes=CLASSES).double())


class ScaledBlock(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * super().forward(x)


def test_backbones_with_another_forward_pass() -> None:
    assert_refused(resnet_of(Softmax), r"cannot convert a Softmax exactly.*softmax\(\)")
    assert_refused(filled(SoftmaxDenseNet(4, (1, 2), 8, num_classes=CLASSES).double()), r"softmax\(\)")
    assert_refused(SoftmaxVGG(make("vgg").features, num_classes=CLASSES), r"softmax\(\)")
    assert_refused(resnet_of(resnet.ResNet, ScaledBlock), r"ScaledBlock, in its forward: mul\(\)")
    for standard in (
        resnet_of(Tripled),
        resnet_of(OtherImplementation),
        filled(WithoutReLU(4, (1, 2), 8, num_classes=CLASSES).double()),
    ):
        assert_same_function(standard)
        assert isinstance(bk.bcosify(standard).model, type(standard))


class Skipping(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_containers_in_a_backbone_keep_their_class_and_hooks() -> None:
    standard = make("resnet")
    standard.layer1 = Skipping(*standard.layer1)
    standard.layer2.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_same_function(standard)
    assert_same_function(standard, converted(standard, keep=("biases", "max_pooling")))


def test_patched_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet.ResNet, "_forward_impl", lambda self, x: self.fc(self.avgpool(self.conv1(x)).flatten(1)))
    patched = make("resnet")
    patched.fc = filled(nn.Linear(64, CLASSES).double())
    assert_same_function(patched)
    monkeypatch.setattr(Attention, "forward", lambda self, x: x)
    assert_same_function(small(Tokens(Attention(8, 2))))
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: forward(self, x) * 2)
    assert_refused(Small(), "conv1: Conv2d")


def test_modules_of_our_names_in_other_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    """``models.vit`` is a name that any project may use."""
    for name in ("Attention", "SimpleViT"):
        kind = type(name, (nn.Module,), {"__module__": "models.vit", "forward": lambda self, x: x})
        assert class_name(kind) == f"models.vit.{name}"
        assert known_class(kind(), (f"bcos_kernels/{name}", "bcos_kernels/SimpleViTAttention")) is None
    assert known_class(make("simple_vit"), ("bcos_kernels/SimpleViT",)) is not None


def test_a_graph_module() -> None:
    traced = fx.symbolic_trace(make("resnet"))
    assert_same_function(traced)
    assert isinstance(bk.bcosify(traced).model.fc, BcosMapClassifier)


def test_backbones_with_another_pooling_or_classifier() -> None:
    standard = make("resnet")
    standard.avgpool = nn.AdaptiveAvgPool2d(2)
    standard.fc = filled(nn.Linear(4 * 512, CLASSES).double())
    assert_same_function(standard)
    assert_same_function(standard, converted(standard, keep=("biases", "max_pooling")))
    standard = make("resnet")
    standard.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, CLASSES).double()).eval()
    assert_same_function(standard)
    assert isinstance(bk.bcosify(standard).model.fc[1], BcosMapClassifier)


def test_forward_passes_on_the_instance() -> None:
    patched = make("resnet")
    patched.forward = lambda x: patched.fc(patched.avgpool(patched.conv1(x)).flatten(1))
    assert_refused(patched, "model: ResNet with a forward pass of its own that was put on the instance")
    patched = make("resnet")
    patched.layer1.forward = lambda x: x
    assert_refused(patched, "layer1: Sequential with a forward pass of its own")
    patched = make("resnet")
    patched.conv1.forward = types.MethodType(lambda self, x: nn.Conv2d.forward(self, x) * 2, patched.conv1)
    assert_refused(patched, "conv1: Conv2d")
    patched = make("resnet")
    patched._forward_impl = lambda x: x
    assert_refused(patched, "output, which does not depend on the image through the first layer")


# ---- layers


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class StandardisedInside(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Called(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class Conv2d(nn.Module):
    """Of the same name, in another module."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(sizes[1], sizes[0], 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.tanh(), padding=1)


class WithNorm(nn.Conv2d):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.norm, self.act = nn.BatchNorm2d(self.out_channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(super().forward(x)))


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class LowRank(nn.Linear):
    """As in loralib."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.lora_A = nn.Parameter(torch.randn(2, sizes[0]))
        self.lora_B = nn.Parameter(torch.randn(sizes[1], 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Faded(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class Named(nn.Conv2d):
    """With another constructor and method, but the same forward pass."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=1)

    def describe(self) -> str:
        return "a convolution"


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (lambda: Standardised(8, 8, 3, padding=1), "middle: Standardised"),
        (lambda: StandardisedInside(8, 8, 3, padding=1), "middle: StandardisedInside"),
        (lambda: Called(8, 8, 3, padding=1), "middle: Called"),
        (lambda: Conv2d(8, 8), r"middle: Conv2d, in its forward: "),
        (lambda: WithNorm(8, 8, 3, padding=1), r"middle: WithNorm, in its forward: conv2d\(\)"),
        (lambda: ActivatedNorm(8), "middle: ActivatedNorm"),
        (Faded, "middle: Faded"),
        (lambda: nn.MaxPool2d(2, return_indices=True), "return_indices=True"),
        (lambda: nn.ConstantPad2d(1, 0.5), "middle: ConstantPad2d with value=0.5"),
        (lambda: timm.layers.BlurPool2d(8), r"conv2d\(\)"),
        (lambda: weight_norm(nn.Conv2d(8, 8, 3, padding=1)), "middle: Conv2d with a hook"),
        (lambda: spectral_norm(nn.Conv2d(8, 8, 3, padding=1)), "middle: Conv2d with a hook"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)), "with parametrised weights"),
        (lambda: prune.l1_unstructured(nn.Conv2d(8, 8, 3, padding=1), "weight", 0.5), "prune.remove"),
        (lambda: torch.jit.trace(nn.Conv2d(8, 8, 1), torch.ones(1, 8, 2, 2)), "in TorchScript"),
    ],
)
def test_layers_that_are_others(layer: Callable[[], nn.Module], sentence: str) -> None:
    assert_refused(Small(layer()), sentence)


def test_linear_layers_that_are_others() -> None:
    for kind in (Cosine, LowRank):
        model = Small()
        model.fc = kind(8, CLASSES)
        assert_refused(model, f"fc: {kind.__name__}")
    patched = Small()
    del patched.fc.weight
    patched.fc.weight = torch.randn(CLASSES, 8)
    assert_refused(patched, "fc: Linear with a weight that is not an nn.Parameter")


def test_a_subclass_with_the_same_forward_pass_counts_as_its_base() -> None:
    standard = small(Named())
    assert_same_function(standard)
    assert isinstance(bk.bcosify(standard).model.middle, bk.BcosConv2d)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("path", ["conv1", "middle", "pool"])
def test_hooks(register: str, path: str) -> None:
    model = Small(nn.ReLU())
    getattr(model.get_submodule(path), register)(lambda *args: None)
    assert_refused(model, f"{path}: .* with a hook, which may change what it computes")


def test_hooks_of_containers_go_on_working() -> None:
    standard = small(nn.Sequential(nn.BatchNorm2d(8)))
    standard.middle.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_same_function(standard)


# ---- attention and gates


class Tokens(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x.flatten(2).mT)
        return (y[0] if isinstance(y, tuple) else y).mT.unflatten(2, (SIDE, SIDE))


def _split(self: Attention, x: Tensor) -> tuple[Tensor, ...]:
    return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class PerHead(Attention):
    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Causal(Attention):
    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x, is_causal=True)


class Sigmoid(Attention):
    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        q, k, v = _split(self, x)
        return self.proj(((q @ k.mT).sigmoid() @ v).transpose(1, 2).flatten(2))


class Residual(Attention):
    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        return x + super().forward(x)


class Pair(Attention):
    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> tuple[Tensor, None]:
        return super().forward(x), None


class ByMethod(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0] + x


@pytest.mark.parametrize("kind", [PerHead, Causal, Sigmoid, Residual, Pair])
def test_attention_that_is_another(kind: type[Attention]) -> None:
    refusal = f"middle.attention: {kind.__name__}, (in its forward: |whose forward pass cannot be followed)"
    assert_refused(Small(Tokens(kind(8, 2))), refusal)


def test_attention_of_the_same_name() -> None:
    for kind in (PerHead, Sigmoid):
        attention = Attention(8, 2)
        attention.__class__ = type("Attention", (nn.Module,), {"forward": kind.forward})
        refusal = "middle.attention: Attention, (in its forward: |whose forward pass cannot be followed)"
        assert_refused(Small(Tokens(attention)), refusal)


def test_attention_that_is_known_but_called_otherwise() -> None:
    class Masked(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x.flatten(2).mT, is_causal=True).mT.unflatten(2, (SIDE, SIDE))

    class Cross(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).mT
            return self.attention(x, x.flip(1), x)[0].mT.unflatten(2, (SIDE, SIDE))

    class Weights(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).mT
            y, weights = self.attention(x, x, x)
            return (y + weights.sum()).mT.unflatten(2, (SIDE, SIDE))

    assert_refused(Small(Masked(Attention(8, 2))), "Attention called with a mask")
    own = nn.MultiheadAttention(8, 2, batch_first=True)
    assert_refused(Small(Cross(own)), "MultiheadAttention called with another key or value than the query")
    assert_refused(Small(Weights(own)), "MultiheadAttention called with a use for its attention weights")
    assert_refused(
        Small(Tokens(ByMethod(8, 2, batch_first=True))), "middle.attention: ByMethod, whose forward pass cannot be"
    )
    assert_same_function(small(Tokens(Attention(8, 2))))


def test_inside_of_attention() -> None:
    attention = Attention(8, 2)
    attention.proj = LowRank(8, 8)
    assert_refused(Small(Tokens(attention)), "middle.attention.proj: LowRank")
    attention = Attention(8, 2)
    attention.attn_drop.register_forward_hook(lambda *args: None)
    assert_refused(Small(Tokens(attention)), "middle.attention.attn_drop: Dropout with a hook")


class Excited(SqueezeExcitation):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_squeeze_and_excitation_that_is_another() -> None:
    largest = SqueezeExcitation(8, 4)
    largest.avgpool = nn.AdaptiveMaxPool2d(1)
    assert_refused(Small(largest), "middle.avgpool: AdaptiveMaxPool2d")
    assert_refused(Small(Excited(8, 4)), "middle.scale_activation: Sigmoid")
    assert_same_function(small(SqueezeExcitation(8, 4)))


def test_visformer() -> None:
    assert_refused(timm.create_model("visformer_tiny"), r"attn: Attention, in its forward: ")


# ---- activations

THROUGH_ZERO = [
    nn.ReLU6(), nn.Hardtanh(-2, 0.5), nn.Mish(), nn.Tanh(), nn.ELU(), nn.CELU(0.5), nn.SELU(), nn.Softsign(),
    nn.Softshrink(0.01), nn.Hardshrink(0.01), nn.Tanhshrink(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.LeakyReLU(0.1),
]  # fmt: skip
NOT_THROUGH_ZERO = [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid(), nn.LogSigmoid(), nn.Softmax(1), nn.Hardtanh(0.1, 1)]


@pytest.mark.parametrize("act", THROUGH_ZERO, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a timm norm"])
def test_activations_are_gates(act: nn.Module, inside: bool) -> None:
    layer = BatchNormAct2d(8, act_layer=lambda inplace: copy.deepcopy(act), inplace=False) if inside else act
    standard = small(layer)
    assert_same_function(standard)
    assert_complete(bk.bcosify(standard, normalize=None, logit_bias=None))


@pytest.mark.parametrize("act", NOT_THROUGH_ZERO, ids=lambda a: type(a).__name__)
def test_activations_that_are_no_gates(act: nn.Module) -> None:
    assert_refused(Small(act), f"middle: {type(act).__name__}")
    inside = BatchNormAct2d(8, act_layer=lambda inplace: act, inplace=False)
    assert_refused(Small(inside), f"middle.act: {type(act).__name__}")


def test_the_gate_of_an_activation() -> None:
    x = torch.tensor([-3.0, -1, 0, 2, 12], dtype=torch.float64, requires_grad=True)
    for act, gates in ((nn.ReLU6(inplace=True), [0, 0, 0, 1, 0.5]), (nn.Hardtanh(-1, 1), [1 / 3, 1, 1, 0.5, 1 / 12])):
        layer = DetachableActivation(act)
        layer.set_explanation_mode(True)
        y = layer(x)
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == pytest.approx(gates)
        torch.testing.assert_close(y, copy.deepcopy(act)(x.detach().clone()))
    with pytest.raises(ValueError, match=r"act must be 0 at 0; a Sigmoid is 0\.5"):
        DetachableActivation(nn.Sigmoid())


@pytest.mark.parametrize(
    "make_model", [lambda: mobilenet_v2(num_classes=CLASSES), lambda: timm.create_model("efficientnet_lite0")]
)
def test_networks_with_relu6(make_model: Callable[[], nn.Module]) -> None:
    standard = filled(make_model().double())
    assert_same_function(standard)
    assert_complete(bk.bcosify(standard, normalize=None, logit_bias=None))


# ---- one layer, two names


class Twice(nn.Module):
    """``middle`` is called under two names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.first = layer
        self.second = layer
        self.both = nn.Sequential(layer, nn.ReLU(), layer)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv1(x))
        return self.fc(self.both(self.second(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "layer", [nn.GELU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), SqueezeExcitation(8, 4)], ids=str
)
def test_shared_layers_stay_shared(layer: nn.Module) -> None:
    standard = filled(Twice(copy.deepcopy(layer)).double())
    assert_same_function(standard)
    model = bk.bcosify(standard).model
    assert type(model.first) is not type(layer)
    assert model.first is model.second is model.both[0] is model.both[2]
    # under both names, as in the network that it was made of
    expected = {
        k.replace(".weight", ".linear.weight") if isinstance(layer, nn.Conv2d) else k for k in ("first.weight",)
    }
    assert not isinstance(layer, nn.Conv2d) or expected <= set(model.state_dict())


def test_the_classifier_under_two_names() -> None:
    standard = small()
    standard.head = standard.fc
    for keep in (KEEP, ("biases", "max_pooling")):
        assert_same_function(standard, converted(standard, keep=keep))
    model = bk.bcosify(standard, num_classes=3).model
    assert model.head is model.fc
    assert model.fc.out_channels == 3


def test_shared_weights_that_would_be_torn_apart() -> None:
    standard = Small()
    standard.other = nn.Linear(8, CLASSES)
    standard.other.weight = standard.fc.weight
    assert_refused(standard, "fc: Linear, which shares its weight with other")


class Hidden(Small):
    """``kept`` holds the layer under another name, where no conversion finds it."""

    def __init__(self, keep: Callable[[nn.Module], Any]) -> None:
        super().__init__(nn.GELU())
        self.kept = None
        self.__dict__["kept"] = keep(self.middle)


@pytest.mark.parametrize(
    "keep",
    [
        lambda layer: layer,
        lambda layer: {"g": [layer]},
        lambda layer: layer.forward,
        lambda layer: functools.partial(layer, None),
    ],
)
def test_layers_that_are_not_registered(keep: Callable[[nn.Module], Any]) -> None:
    assert_refused(Hidden(keep), "model: Hidden with a GELU in `kept`, where a conversion does not find it")


# ---- what a forward pass does between its layers


class Between(Small):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self.conv1(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x * x,
        lambda x: x.mul(x),
        lambda x: torch.mul(input=x, other=x),
        lambda x: torch.matmul(x, x),
        lambda x: torch.einsum("nchw,nchw->nchw", [x, x]),
        lambda x: F.relu(x) ** 2,
        lambda x: 1 / (x + 2),
        lambda x: torch.div(x, 0.1, rounding_mode="floor"),
        lambda x: x.to(torch.int64).double(),
        lambda x: x.detach(),
        lambda x: x.abs(),
        lambda x: torch.where(x > 0, x, 1.0),
        lambda x: torch.addcmul(x, x, x),
        lambda x: F.conv2d(x, torch.ones(8, 8, 1, 1).double()),
        lambda x: x.clamp(0, 1),
        lambda x: x.max(2, keepdim=True).values,
        lambda x: F.normalize(x),
    ],
)
def test_functions_that_are_not_linear(between: Callable[[Tensor], Tensor]) -> None:
    assert_refused(Between(between), r"forward of Between: \w+\(\)", keep=KEEP)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: torch.cat(x.chunk(2, 1), 1),
        lambda x: torch.stack(x.unbind(1), 1),
        lambda x: torch.cat(tensors=[x, x], dim=1)[:, :8],
        lambda x: torch.div(x, other=2.0),
        lambda x: torch.add(input=x, other=x),
        lambda x: x * torch.arange(8)[:, None, None],
        lambda x: x.roll(1, 2).flip(3).transpose(2, 3),
    ],
)
def test_functions_that_are_linear(between: Callable[[Tensor], Tensor]) -> None:
    standard = filled(Between(between).double())
    assert_same_function(standard)
    assert_complete(bk.bcosify(standard, normalize=None, logit_bias=None))


class WithoutGradient(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        with torch.no_grad():
            y = self.conv2(x)
        return self.fc((x + y).mean((2, 3)))


def test_no_grad_inside() -> None:
    assert_refused(WithoutGradient(), r"conv2\(\) under torch.no_grad\(\)")
    with torch.no_grad():  # around it, there is nothing wrong with it
        bk.bcosify(Small())


def test_networks_that_compute_layers_again() -> None:
    standard = filled(densenet.DenseNet(4, (1, 2), 8, num_classes=CLASSES, memory_efficient=True).double())
    assert_same_function(standard)
    model = bk.bcosify(standard)
    assert model.get_submodule("model.features.4.denselayer1").memory_efficient
    model(torch.rand(2, 6, SIDE, SIDE, dtype=torch.float64)).sum().backward()


# ---- constants


class Affine(nn.Module):
    def __init__(self, scale: str, shift: str, shape: tuple[int, ...] = (8, 1, 1)) -> None:
        super().__init__()
        self.names = scale, shift
        setattr(self, scale, nn.Parameter(torch.ones(shape)))
        setattr(self, shift, nn.Parameter(torch.ones(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(self, self.names[0]) + getattr(self, self.names[1])


class Minus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5


class Padded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1), value=2.0)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (lambda: Affine("alpha", "beta"), "the constant middle.beta that it adds"),
        (lambda: Affine("scale", "shift"), "the constant middle.shift that it adds"),
        (lambda: Affine("weight", "bias"), "the constant middle.bias that it adds"),
        (Minus, "the constant 0.5 that it adds"),
        (Padded, r"pad\(\) with a constant other than 0"),
    ],
)
def test_constants_are_biases_whatever_their_name(layer: Callable[[], nn.Module], sentence: str) -> None:
    assert_refused(Small(layer()), sentence)
    if layer is not Padded:
        standard = small(layer())
        assert_same_function(standard)
        assert len(converted(standard).constants) == 1
    scaled = small(layer())
    if isinstance(scaled.middle, Affine):  # without the addition, nothing is wrong with it
        scaled.middle.forward = types.MethodType(lambda self, x: x * getattr(self, self.names[0]), scaled.middle)
        assert_complete(bk.bcosify(scaled, normalize=None, logit_bias=None))


def test_positions_and_class_tokens_are_named() -> None:
    assert bk.bcosify(make("timm_vit")).constants == ("cls_token", "pos_embed")
    assert bk.bcosify(make("vit")).constants == ("class_token", "encoder.pos_embedding")
    assert bk.bcosify(make("simple_vit")).constants == ("positional_embedding",)
    assert bk.bcosify(make("resnet")).constants == ()
    with pytest.raises(
        ValueError, match=r"lab: LearnableAffineBlock, in its forward: the constant stem\.stem1\.lab\.bias"
    ):
        bk.bcosify(timm.create_model("hgnetv2_b0"))


def test_frozen_batch_norm() -> None:
    for layer in (FrozenBatchNorm2d(8), timm.layers.FrozenBatchNormAct2d(8)):
        standard = small(layer)
        for buffer in layer.buffers():
            buffer.uniform_(0.5, 1.5)
        assert_same_function(standard)
        model = bk.bcosify(standard, normalize=None, logit_bias=None)
        norm = model.model.middle
        assert isinstance(norm, FrozenBatchNormUncentered2d)
        assert norm.bias is None
        x = torch.rand(2, 8, 3, 3, dtype=torch.float64)
        expected = x * (layer.weight / (layer.running_var + layer.eps).sqrt())[:, None, None]
        assert torch.equal(norm.train()(x), norm.eval()(x))
        torch.testing.assert_close(norm(x), expected if norm.act is None else F.relu(expected))
        assert_complete(model)
        norm.load_state_dict(nn.BatchNorm2d(8, affine=True).double().state_dict(), strict=False)


# ---- what stands before the network, and around it


def test_normalisation_inside() -> None:
    body = make("resnet")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    for kind in (Normalize, v2.Normalize):
        standard = nn.Sequential(kind(mean, std), body).eval()
        x = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64)
        model = converted(standard, normalize="imagenet")
        torch.testing.assert_close(model(bk.AddInverse()(x)), standard(x), rtol=1e-10, atol=1e-12)
        assert len(standard) == 2
        assert isinstance(standard[0], kind)
        assert isinstance(bk.bcosify(standard).model[1].fc, BcosMapClassifier)


def test_hooks_of_what_is_unwrapped() -> None:
    for standard in (nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), Small()), nn.DataParallel(Small())):
        (standard[0] if isinstance(standard, nn.Sequential) else standard).register_forward_hook(lambda *args: None)
        assert_refused(standard, "has a hook that would be lost")


class Prepared(Small):
    def __init__(self, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.prepare = prepare

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.prepare(x))


@pytest.mark.parametrize("keep", [(), KEEP], ids=["nothing kept", "all kept"])
@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: (x - 0.5) / 0.5,
        lambda x: x * 2 - 1,
        lambda x: x.flip(1),
        lambda x: x[:, [2, 1, 0]],
        lambda x: x * torch.tensor([1.0, 2.0, 3.0])[:, None, None],
        lambda x: F.relu(x),
        lambda x: torch.cat([x[:, :1], x[:, 1:]], 1),
        lambda x: x - x.mean((2, 3), keepdim=True),
    ],
)
def test_preparations_of_the_image_are_refused(prepare: Callable[[Tensor], Tensor], keep: tuple[str, ...]) -> None:
    assert_refused(Prepared(prepare), "on the image itself", keep=keep)


def test_preparations_that_treat_all_channels_alike() -> None:
    assert_same_function(filled(Prepared(lambda x: F.interpolate(x / 2, (16, 16)).contiguous()).double()))
    assert_refused(googlenet(transform_input=True, aux_logits=False, init_weights=False), "on the image itself")
    assert_same_function(filled(googlenet(transform_input=False, aux_logits=False, init_weights=False).double()))
    assert_refused(
        googlenet(init_weights=False, aux_logits=True), "its output in training, which is not a single tensor"
    )


class Again(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv1(x) + self.conv1(x * 2)).mean((2, 3)))


class Skip(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean()


class TwoOutputs(Small):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": super().forward(x)}


class Branches(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class Data(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.conv1(x).data.sum()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Again, "the first layer, which is called 2 times"),
        (Skip, r"mean\(\) on the image itself"),
        (TwoOutputs, "its output, a (immutable_)?dict instead of a tensor"),
        (Branches, "cannot be followed without running it.*control flow"),
        (Data, r"forward of Data: getattr\(\)"),
    ],
)
def test_forward_passes(kind: type[nn.Module], sentence: str) -> None:
    assert_refused(kind(), sentence)


@fx.wrap
def relu(x: Tensor) -> Tensor:
    return x.tanh()


class Renamed(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(relu(self.conv1(x)).mean((2, 3)))


def test_a_function_of_a_known_name() -> None:
    assert_refused(Renamed(), r"forward of Renamed: relu\(\)")


def test_wrappers_are_left_out() -> None:
    body = make("resnet")
    for wrapped in (nn.DataParallel(body), torch.optim.swa_utils.AveragedModel(body), torch.compile(body)):
        model = converted(wrapped)
        assert list(model.model.state_dict()) == list(converted(body).model.state_dict())
        assert_same_function(body, model)


class Peeking(Small):
    """Its forward pass makes something of its layers, which no rule about layers can see."""

    def __init__(self, peek: Callable[[Small, Tensor], Tensor]) -> None:
        super().__init__()
        self.peek = peek

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.fc(self.peek(self, y).mean((2, 3)))


@pytest.mark.parametrize(
    "peek",
    [
        lambda self, y: y * self.conv1.weight.abs().mean(),
        lambda self, y: y / self.conv1.weight[0].numel() ** 0.5,
        lambda self, y: y * self.conv1.in_channels,
        lambda self, y: F.relu(y) if type(self.conv1) is nn.Conv2d else y,
        lambda self, y: y * 2 if hasattr(self.conv1, "kernel_size") else y,
        lambda self, y: y * self.conv1.kernel_size[0],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_only_the_numbers_show(peek: Callable[[Small, Tensor], Tensor], dtype: torch.dtype) -> None:
    assert_refused(
        Peeking(peek).to(dtype), "at B = 1, with everything kept, the converted network would not be the same"
    )


def test_verification_leaves_no_trace() -> None:
    class Counting(Small):
        def __init__(self) -> None:
            super().__init__(nn.BatchNorm2d(8))
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return super().forward(x)

        def train(self, mode: bool = True) -> Small:  # as layers that merge weights do
            with torch.no_grad():
                self.conv1.weight.mul_(2)
            return super().train(mode)

    standard = Counting()
    before, state = copy.deepcopy(standard.state_dict()), torch.get_rng_state()
    bk.bcosify(standard)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in standard.state_dict().items())
    assert all(p.grad is None for p in standard.parameters())


def test_modes_of_layers_are_kept() -> None:
    standard = make("resnet").train()
    frozen = [name for name, module in standard.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name in frozen:
        standard.get_submodule(name).eval()
    model = bk.bcosify(standard)
    norms = [m for m in model.modules() if isinstance(m, bk.BatchNormUncentered2d)]
    assert len(norms) == len(frozen)
    assert not any(norm.training for norm in norms)
    assert model.training
    assert model.model.fc.training


def test_layers_in_place_on_what_is_used_again() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(self.relu(x))  # both see the rectified x

    standard = small(PreActivation())
    assert_same_function(standard)
    model = bk.bcosify(standard, normalize=None, logit_bias=None)
    assert_complete(model)
    model(torch.rand(2, 6, SIDE, SIDE, dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"keep": None},
        {"keep": {"biases": False}},
        {"keep": 5},
        {"normalize": ["imagenet"]},
        {"num_classes": 2.5},
        {"logit_bias": float("nan")},
        {"logit_bias": True},
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(options))} must be "):
        bk.bcosify(Small(), **options)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        assert bk.bcosify(make("resnet"))(torch.rand(1, 6, SIDE, SIDE, dtype=torch.float64)).shape == (1, CLASSES)
    standard = make("resnet")
    with torch.inference_mode():
        bk.bcosify(standard)


def test_keep_may_be_any_iterable() -> None:
    assert bk.bcosify(Small(), keep=iter(["biases"])).model.conv1.bias is not None
