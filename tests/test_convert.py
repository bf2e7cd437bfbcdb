"""``bcosify`` on torchvision's networks."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

import bcos_kernels as bk

tv = torchvision.models


@pytest.mark.parametrize(
    "make",
    [tv.resnet18, tv.resnet34, tv.resnet50, tv.resnext50_32x4d, tv.wide_resnet50_2, tv.densenet121, tv.densenet169],
    ids=lambda f: f.__name__,
)
def test_forward_backward_and_explanation(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = bk.bcosify(make(num_classes=7))
    images = torch.rand(2, 3, 64, 64)
    logits = model(bk.AddInverse()(images))
    logits.square().mean().backward()
    assert logits.shape == (2, 7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    explanation = bk.explain(model, images)
    assert explanation.contributions.shape == (2, 64, 64)
    # the explanation is exact, once the normalisation (an affine map) is taken into account
    mean = torch.cat([torch.tensor(m)[None] for m in model.normalize._values["mean"]])[:, None, None]
    total = ((explanation.images - mean) * explanation.weights).sum((1, 2, 3)) + model.logit_layer.logit_bias
    chosen = explanation.logits.gather(1, explanation.targets[:, None])[:, 0]
    torch.testing.assert_close(total, chosen, rtol=1e-3, atol=1e-4)


def test_nothing_of_the_standard_network_is_touched() -> None:
    standard = tv.resnet18(num_classes=5).eval()
    before = copy.deepcopy(standard.state_dict())
    model = bk.bcosify(standard)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert repr(standard) == repr(tv.resnet18(num_classes=5).eval())
    for key, value in standard.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("make", [tv.resnet18, tv.densenet121], ids=lambda f: f.__name__)
def test_every_layer_has_its_counterpart(make: Callable[..., nn.Module]) -> None:
    standard = make(num_classes=5)
    model = bk.bcosify(standard)
    modules = list(model.modules())
    plain = {id(m.linear) for m in modules if isinstance(m, (bk.BcosConv2d, bk.BcosLinear))}
    count = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in standard.modules())
    assert len(plain) == count
    assert all(id(m) in plain for m in modules if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert not any(type(m) in (nn.BatchNorm2d, nn.MaxPool2d) for m in modules)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


def test_first_layer_is_the_same_function() -> None:
    """cat(w, -w) / 2 on the normalised six channels is w on the normalised three, at B = 1."""
    standard = tv.resnet18().double()
    model = bk.bcosify(standard, b=1)
    image = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    expected = standard.conv1((image - mean) / std)
    actual = model.model.conv1(model.normalize(bk.AddInverse()(image)))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_classes() -> None:
    standard = tv.resnet18(num_classes=10)
    same = bk.bcosify(standard, num_classes=10)
    assert torch.equal(same.model.fc.weight[:, :, 0, 0], standard.fc.weight)
    other = bk.bcosify(standard, num_classes=3)
    assert other(torch.rand(1, 6, 40, 40)).shape == (1, 3)
    assert other.logit_layer.logit_bias == pytest.approx(-math.log(2))
    assert bk.bcosify(standard, logit_bias=None).logit_layer.logit_bias is None
    assert bk.bcosify(standard, logit_bias=0.5).logit_layer.logit_bias == 0.5


def test_learnable_exponent_is_each_layers_own() -> None:
    model = bk.bcosify(tv.resnet18(num_classes=4), b=torch.tensor(1.5))
    exponents = {name: p for name, p in model.named_parameters() if name.endswith(".b")}
    assert len(exponents) == 21
    assert len({id(p) for p in exponents.values()}) == 21
    model(torch.rand(2, 6, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in exponents.values())


@pytest.mark.parametrize("training", [True, False])
def test_mode_dtype_and_frozen_weights_are_kept(training: bool) -> None:
    standard = tv.resnet18(num_classes=4).to(torch.float64).train(training)
    standard.layer1.requires_grad_(False)
    model = bk.bcosify(standard)
    assert all(m.training == training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in model.model.layer1.parameters())
    assert all(p.requires_grad for p in model.model.layer2.parameters())


def test_state_travels_through_a_file() -> None:
    torch.manual_seed(0)
    model = bk.bcosify(tv.resnet18(num_classes=4)).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    again = bk.bcosify(tv.resnet18(num_classes=4)).eval()
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    x = torch.rand(1, 6, 32, 32)
    assert torch.equal(model(x), again(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_normalisation_is_exact_in_every_dtype() -> None:
    model = bk.bcosify(tv.resnet18(num_classes=4)).half().double()
    assert model.normalize.mean.flatten().tolist() == [0.485, 0.456, 0.406, 1 - 0.485, 1 - 0.456, 1 - 0.406]


def test_without_normalisation() -> None:
    model = bk.bcosify(tv.resnet18(num_classes=4), normalize=None)
    assert isinstance(model.normalize, nn.Identity)


def test_channels_last_goes_through_the_network() -> None:
    model = bk.bcosify(tv.resnet18(num_classes=4)).eval()
    x = torch.rand(2, 6, 32, 32)
    expected = model(x)
    actual = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_compiled_network_trains() -> None:
    model = bk.bcosify(tv.resnet18(num_classes=4))
    again = copy.deepcopy(model)
    x = torch.rand(2, 6, 32, 32)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    again(x).sum().backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * float(q.grad.abs().max()), msg=name)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: bk.bcosify("resnet18"), TypeError, "model must be a torch.nn.Module; got str"),
        (lambda: bk.bcosify(Unknown()), ValueError, "model: cannot convert a Unknown"),
        (lambda: bk.bcosify(bk.bcosify(tv.resnet18())), ValueError, "model is a B-cos network already"),
        (
            lambda: bk.bcosify(tv.resnet18(), normalize="cifar"),
            ValueError,
            'normalize must be "imagenet", "clip" or None',
        ),
        (lambda: bk.bcosify(tv.resnet18(), b=0.5), ValueError, "b must be a finite number of at least 1"),
        (lambda: bk.bcosify(tv.resnet18(), num_classes=1), ValueError, "num_classes must be at least 2; got 1"),
        (lambda: bk.bcosify(tv.resnet18(), logit_bias="none"), ValueError, "logit_bias must be a number"),
    ],
)
def test_sentences(call: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


def test_gray_input_is_refused_by_name() -> None:
    gray = tv.resnet18()
    gray.conv1 = nn.Conv2d(1, 64, 7)
    with pytest.raises(ValueError, match="one convolution with three input channels"):
        bk.bcosify(gray)


def test_three_channels_into_the_network_get_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"input must be \[N, 6, H, W\].*AddInverse"):
        bk.bcosify(tv.resnet18(num_classes=4))(torch.rand(1, 3, 32, 32))
