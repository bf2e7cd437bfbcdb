"""``bcosify`` on every family of networks: the same function where nothing is lost, and an exact explanation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import nn

import bcos_kernels as bk
from bcos_kernels.modules import BcosMapClassifier, DetachableAttention, DetachableSqueezeExcitation
from models.vit import SIZES, simple_vit
from tests.networks import CLASSES, NETWORKS, SIDE, make
from tests.tolerances import OUTPUT, assert_close

#: In these, something that is no bias is added to the image's contributions: positions, a class token.
POSITIONS = {"vit", "simple_vit", "vitc", "bcos_simple_vit", "bcos_vitc", "timm_vit", "timm_deit3"}
#: The classifier of these stands behind a global average pooling that is no part of a backbone's own forward pass.
MAPS = {
    "convnext",
    "efficientnet",
    "regnet_x",
    "regnet_y",
    *(name for name in NETWORKS if name.startswith("timm") and name not in POSITIONS),
}


def image(n: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_lost_at_b_1_without_the_lossy_steps(name: str) -> None:
    standard = make(name)
    statistics = "clip" if name == "clip_resnet" else "imagenet"
    model = bk.bcosify(
        standard, b=1, normalize=statistics, logit_bias=None, keep=("biases", "max_pooling", "head_order")
    )
    x = bk.AddInverse()(image(2))
    with torch.no_grad():
        expected = standard(model.normalize(x)[:, :3])
        actual = model(x)
    assert expected.abs().max() > 1e-3
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_trains_and_explains(name: str) -> None:
    standard = make(name)
    before = copy.deepcopy(standard.state_dict())
    model = bk.bcosify(standard)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, bk.BatchNormUncentered2d)):
            module.momentum = 1.0  # statistics that fit, or else deep networks of random weights fade to zero
    out = model.train()(bk.AddInverse()(image(3)))
    out.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    gates = [n for n, m in model.named_modules() if isinstance(m, DetachableSqueezeExcitation)]
    biases = [n for n, _ in model.named_parameters() if n.endswith("bias") and not n.startswith(tuple(gates))]
    assert biases == []
    assert all(torch.equal(value, before[key]) for key, value in standard.state_dict().items())

    explanation = bk.explain(model, image())
    assert explanation.weights.isfinite().all()
    assert explanation.weights.abs().max() > 0
    if name not in POSITIONS:
        # every factor of the network is in the weights, so they make up the whole of the logit
        total = ((explanation.images - model.normalize.mean) * explanation.weights).sum()
        logit = explanation.logits.max() - (model.logit_layer.logit_bias or 0)
        assert_close(total / logit, torch.ones((), dtype=torch.float64), {torch.float64: 1e-9})


@pytest.mark.parametrize("name", NETWORKS)
def test_classifier_moves_before_the_pooling(name: str) -> None:
    model = bk.bcosify(make(name), num_classes=None if name == "clip_resnet" else 3)
    heads = [m for m in model.modules() if isinstance(m, BcosMapClassifier)]
    assert len(heads) == (name in MAPS)
    assert model(torch.rand(2, 6, SIDE, SIDE, dtype=torch.float64)).shape == (2, 8 if name == "clip_resnet" else 3)
    kept = bk.bcosify(make(name), keep=["head_order"])
    assert not any(isinstance(m, BcosMapClassifier) for m in kept.modules())


def test_a_network_without_a_name() -> None:
    torch.manual_seed(0)
    standard = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    model = bk.bcosify(standard)
    assert isinstance(model.model[4], BcosMapClassifier)
    model(torch.rand(2, 6, 9, 9)).sum().backward()
    assert list(model.state_dict()) == ["model.0.linear.weight", "model.4.linear.weight"]
    assert standard[1].inplace


def test_logits_are_the_mean_of_those_of_every_location() -> None:
    model = bk.bcosify(make("convnext"), logit_bias=None).eval()
    features: list[torch.Tensor] = []
    classifier = next(m for m in model.modules() if isinstance(m, BcosMapClassifier))
    classifier.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    x = bk.AddInverse()(image())
    logits = model(x)
    maps = features[0].unflatten(1, (classifier.in_channels, -1))  # N, C, locations
    each = [bk.bcos_conv2d(maps[:, :, i, None, None], classifier.weight).flatten(1) for i in range(maps.shape[2])]
    assert len(each) == (SIDE // 8) ** 2
    assert_close(logits, torch.stack(each).mean(0), OUTPUT)


@pytest.mark.parametrize("name", ["vit", "simple_vit", "clip_resnet", "timm_vit", "timm_deit3"])
def test_queries_and_keys_are_constants_of_an_explanation(name: str) -> None:
    model = bk.bcosify(make(name))
    attention = next(m for m in model.modules() if isinstance(m, DetachableAttention))
    seen: list[torch.Tensor] = []
    attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model(bk.AddInverse()(image()))
    x = torch.randn_like(seen[0]).requires_grad_()

    def run() -> torch.Tensor:
        y = attention(x, x, x) if isinstance(attention, bk.modules.attention.MultiheadSelfAttention) else attention(x)
        return y[0] if isinstance(y, tuple) else y

    plain = run()
    with bk.explanation_mode(attention):
        explained = run()
    assert_close(explained, plain, OUTPUT)
    upstream = torch.randn_like(plain)
    weights = torch.autograd.grad(explained, x, upstream)[0]
    assert not torch.allclose(weights, torch.autograd.grad(plain, x, upstream)[0])
    if name != "simple_vit":  # which normalises its own input: centred, so not the whole of it
        assert_close((weights * x).sum(), (upstream * plain).sum(), {torch.float64: 1e-9})


def test_gradient_of_an_explanation_sees_the_attention_weights() -> None:
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(4))

    def explanation(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        out = bk.reference.attention(q, k, v, detach_weights=True)
        return torch.autograd.grad(out, v, g, create_graph=True)[0]

    assert torch.autograd.gradcheck(explanation, (q, k, g))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.fc((x * torch.tanh(x)).mean((2, 3)))


def _with_sigmoid() -> nn.Module:
    model = torchvision.models.resnet18()
    model.layer2[0].relu = nn.Sigmoid()
    return model


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (Gated, r"forward of Gated: tanh\(\); forward of Gated: mul\(\)"),
        (_with_sigmoid, "cannot convert a ResNet exactly.*layer2.0.relu: Sigmoid"),
        (
            lambda: torchvision.models.swin_t(),
            r"features.1.0.attn: ShiftedWindowAttention, in its forward: shifted_window",
        ),
        (lambda: timm.create_model("tf_efficientnet_b0"), "conv_stem: Conv2dSame; blocks.1.0.conv_dw: Conv2dSame"),
        (lambda: timm.create_model("convnextv2_atto"), "stages.0.blocks.0.mlp.grn: GlobalResponseNorm"),
        (
            lambda: torchvision.models.resnet34(norm_layer=lambda n: nn.InstanceNorm2d(n)),
            r"bn1: InstanceNorm2d; .*and \d+ more",
        ),
    ],
    ids=["function", "layer", "attention", "padding", "norm", "many"],
)
def test_what_cannot_be_converted_is_named(build: Callable[[], nn.Module], sentence: str) -> None:
    model = build()
    before = repr(model)
    with pytest.raises(ValueError, match=sentence):
        bk.bcosify(model)
    assert repr(model) == before


def test_batch_norm_without_statistics_has_no_bias_to_keep() -> None:
    model = torchvision.models.resnet18(norm_layer=lambda n: nn.BatchNorm2d(n, track_running_stats=False))
    bk.bcosify(model)
    with pytest.raises(ValueError, match="bn1: BatchNorm2d with no running statistics"):
        bk.bcosify(model, keep=["biases"])


def test_sentences() -> None:
    with pytest.raises(ValueError, match="keep must be a collection of names out of biases, max_pooling, head_order"):
        bk.bcosify(make("resnet"), keep=["bias"])
    with pytest.raises(ValueError, match="has no classifier that could be replaced"):
        bk.bcosify(make("clip_resnet"), num_classes=4)
    attention = next(m for m in bk.bcosify(make("vit")).modules() if isinstance(m, DetachableAttention))
    x = torch.rand(1, 4, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="only self-attention was converted"):
        attention(x, x + 1, x)
    with pytest.raises(ValueError, match="masks are not supported"):
        attention(x, x, x, attn_mask=x)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SIZES, "resnet50"])
def test_full_size(name: str) -> None:
    torch.manual_seed(0)
    model = bk.bcosify(torchvision.models.resnet50() if name == "resnet50" else simple_vit(name))
    x = torch.rand(1, 3, 224, 224)
    out = model.train()(torch.cat([bk.AddInverse()(x)] * 2))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert bk.explain(model, x).weights.isfinite().all()
