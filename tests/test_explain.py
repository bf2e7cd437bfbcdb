"""Explanations: exactness, batching, and that the model is left as it was found."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torchvision
from torch import nn

import bcos_kernels as bk
from bcos_kernels.explain import quantile
from tests.tolerances import OUTPUT, assert_close


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return bk.bcosify(torchvision.models.resnet18(num_classes=6), normalize=None).double()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 6, 33, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_contributions_sum_to_the_logit(model: nn.Module, images: torch.Tensor) -> None:
    """The network without normalisation and biases is linear: W(x) x is the logit, to rounding."""
    explanation = bk.explain(model, images)
    chosen = explanation.logits.gather(1, explanation.targets[:, None])[:, 0] - model.logit_layer.logit_bias
    torch.testing.assert_close(explanation.contributions.sum((1, 2)), chosen, rtol=1e-10, atol=1e-12)


def test_a_batch_is_the_images_one_by_one(model: nn.Module, images: torch.Tensor) -> None:
    together = bk.explain(model, images, [0, 5, 2])
    for i, target in enumerate((0, 5, 2)):
        alone = bk.explain(model, images[i : i + 1], target)
        torch.testing.assert_close(together.weights[i], alone.weights[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.rgba()[i], alone.rgba()[0], rtol=1e-7, atol=1e-9)


def test_three_channels_get_their_inverse(model: nn.Module, images: torch.Tensor) -> None:
    rgb = images[:, :3]
    explanation = bk.explain(model, rgb)
    assert torch.equal(explanation.images, torch.cat([rgb, 1 - rgb], 1))
    torch.testing.assert_close(explanation.logits, bk.explain(model, explanation.images).logits)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found(images: torch.Tensor, training: bool) -> None:
    model = bk.bcosify(torchvision.models.resnet18(num_classes=6)).double().train(training)
    model.model.layer1.eval()
    model.model.layer2.requires_grad_(False)
    model.model.fc.weight.grad = torch.ones_like(model.model.fc.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [(m.training, getattr(m, "detach", None)) for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    mine = images.clone().requires_grad_()

    bk.explain(model, mine)

    assert [(m.training, getattr(m, "detach", None)) for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.model.fc.weight.grad, torch.ones_like(model.model.fc.weight))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert mine.grad is None


def test_the_model_is_left_as_found_after_an_error(model: nn.Module, images: torch.Tensor) -> None:
    model.train()
    with pytest.raises(ValueError, match="targets must be between 0 and 5; got"):
        bk.explain(model, images, 6)
    assert model.training
    assert not any(getattr(m, "detach", False) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_inside_no_grad_and_inference_mode(model: nn.Module, images: torch.Tensor) -> None:
    expected = bk.explain(model, images).weights
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(bk.explain(model, images).weights, expected)
            torch.testing.assert_close(bk.explain(model, images.clone()).weights, expected)


def test_explanation_mode_nests_and_comes_back(model: nn.Module) -> None:
    layer = model.model.conv1
    with bk.explanation_mode(model):
        with bk.explanation_mode(model):
            assert layer.detach
        assert layer.detach
    assert not layer.detach
    with pytest.raises(KeyError), bk.explanation_mode(model):
        raise KeyError
    assert not layer.detach


def test_training_on_the_explanation(images: torch.Tensor) -> None:
    """A loss on W(x) has gradients for the weights: the explanation can be trained."""
    layer = bk.BcosConv2d(6, 4, 3).double()
    x = images.clone().requires_grad_()
    with bk.explanation_mode(layer):
        (weights,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    weights.square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_empty_batch(model: nn.Module, images: torch.Tensor) -> None:
    explanation = bk.explain(model, images[:0])
    assert explanation.weights.shape == (0, 6, 33, 40)
    assert explanation.targets.shape == (0,)


def test_rgba_is_a_picture(model: nn.Module, images: torch.Tensor) -> None:
    explanation = bk.explain(model, images)
    picture = explanation.rgba()
    assert picture.shape == (3, 33, 40, 4)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert (picture[..., 3].amax((1, 2)) == 1).all()
    noise = torch.randn(2, 6, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mixed = bk.Explanation(images[:2, :, :9, :9], torch.zeros(2, 4), torch.zeros(2).long(), noise)
    opacity = mixed.rgba(smooth=1)[..., 3]
    assert (opacity[mixed.contributions < 0] < 1e-6).all()
    assert (opacity[mixed.contributions > 0] > 1e-3).all()
    for options, sentence in (
        ({"smooth": 4}, "smooth must be odd"),
        ({"percentile": 101}, "percentile must be between"),
    ):
        with pytest.raises(ValueError, match=sentence):
            explanation.rgba(**options)


def test_plot(model: nn.Module, images: torch.Tensor) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = bk.explain(model, images[:2], [1, 4]).plot(class_names=list("abcdef"))
    assert len(figure.axes) == 6
    assert [ax.get_title() for ax in figure.axes[::3]] == ["b", "e"]


def test_plot_without_matplotlib_says_how_to_get_it(
    model: nn.Module, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bcos_kernels\[plot\]'"):
        bk.explain(model, images[:1]).plot()


@pytest.mark.parametrize(
    ("images", "targets", "error", "sentence"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), None, TypeError, "images must be a tensor of a floating dtype"),
        ([1.0], None, TypeError, "got list"),
        (
            torch.rand(3, 32, 32),
            None,
            ValueError,
            r"images must be \[N, 6, H, W\] or \[N, 3, H, W\]; got \[3, 32, 32\]",
        ),
        (torch.rand(1, 4, 32, 32), None, ValueError, r"\[N, 6, H, W\] or \[N, 3, H, W\]; got \[1, 4, 32, 32\]"),
        (torch.rand(1, 3, 32, 32) * 255, None, ValueError, r"images must be in \[0, 1\]; they are in .*divide"),
        (torch.randn(1, 6, 32, 32), None, ValueError, r"images must be in \[0, 1\].*do not normalise"),
        (torch.full((1, 3, 32, 32), float("nan")), None, ValueError, "images must be finite"),
        (torch.full((1, 3, 32, 32), float("inf")), None, ValueError, "images must be finite"),
        (torch.rand(2, 3, 32, 32).double(), [1, 2, 3], ValueError, "one for each of the 2 images"),
        (torch.rand(2, 3, 32, 32).double(), [0.5, 1.0], TypeError, "targets must be integers"),
        (
            torch.rand(2, 3, 32, 32).double(),
            "cat",
            TypeError,
            "targets must be integers, the indices of classes; got 'cat'",
        ),
        (torch.rand(2, 3, 32, 32).double(), -1, ValueError, "targets must be between 0 and 5"),
    ],
)
def test_sentences(
    model: nn.Module, images: torch.Tensor, targets: object, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        bk.explain(model, images, targets)


def network(channels: int, *before: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (bk.BcosConv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*before, *layers).double()


@pytest.mark.parametrize("add_inverse", ["auto", True, False])
@pytest.mark.parametrize("seen", [1, 2, 3, 6, 12])
def test_networks_of_other_channels(seen: int, add_inverse: object) -> None:
    model = network(seen)
    for given in {seen, seen // 2} - {0}:
        images = torch.rand(2, given, 8, 8, dtype=torch.float64)
        adds = {"auto": 2 * given == seen}.get(add_inverse, add_inverse)
        if given * (1 + adds) != seen:
            with pytest.raises((ValueError, RuntimeError)):
                bk.explain(model, images, 0, add_inverse=add_inverse)
            continue
        explanation = bk.explain(model, images, 0, add_inverse=add_inverse)
        assert torch.equal(explanation.images, bk.AddInverse()(images) if adds else images)
        assert_close(explanation.contributions.sum((1, 2)), explanation.logits[:, 0], OUTPUT)
        if seen in (2, 6):
            assert explanation.rgba().shape == (2, 8, 8, 4)
        else:
            with pytest.raises(ValueError, match=rf"rgba\(\) needs 6 channels.*the network saw {seen}"):
                explanation.rgba()


def test_a_network_that_adds_the_inverse_itself() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, 1 - x], 1)

    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    expected = bk.explain(network(6), images, 1)
    for first in (bk.AddInverse(), Own()):
        explanation = bk.explain(network(6, first), images, 1)
        assert torch.equal(explanation.images, images)
        assert_close(explanation.logits, expected.logits, OUTPUT)
        assert_close(explanation.weights, expected.weights[:, :3] - expected.weights[:, 3:], OUTPUT)
    with pytest.raises(ValueError, match=r"expects 6 input channels, but x \[2, 12, 8, 8\]"):
        bk.explain(network(6, Own()), images, add_inverse=True)


def test_another_convolution_that_is_registered_first() -> None:
    """Its channels are not those that the network sees; the other layout is tried then."""

    class Auxiliary(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](x)

    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    expected = bk.explain(network(6), images, 1)
    explanation = bk.explain(Auxiliary(nn.Conv2d(3, 2, 1).double(), network(6)), images, 1)
    assert torch.equal(explanation.images, expected.images)
    assert torch.equal(explanation.weights, expected.weights)
    explanation = bk.explain(Auxiliary(nn.Conv2d(4, 2, 1).double(), network(6)), expected.images, 1)
    assert torch.equal(explanation.weights, expected.weights)


def test_a_network_with_add_inverse_is_run_once() -> None:
    model = network(6, bk.AddInverse())
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[1]))
    bk.explain(model, torch.rand(2, 3, 8, 8, dtype=torch.float64), 1)
    assert calls == [3]


def test_values_outside_of_zero_and_one() -> None:
    model, images = network(6), torch.rand(1, 6, 8, 8, dtype=torch.float64)
    bk.explain(model, images * 1.1 - 0.05)  # as resizing leaves them
    assert bk.explain(model, images * 255, add_inverse=False).weights.isfinite().all()
    with pytest.raises(ValueError, match='add_inverse must be True, False or "auto"; got 3'):
        bk.explain(model, images, add_inverse=3)


def made_up(weights: torch.Tensor, targets: list[int] | None = None) -> bk.Explanation:
    n = len(weights)
    images = torch.full_like(weights, 0.5)
    return bk.Explanation(images, torch.zeros(n, 9), torch.tensor(targets or [0] * n), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pictures_of_half_precision(dtype: torch.dtype) -> None:
    weights = torch.rand(2, 6, 9, 9, generator=torch.Generator().manual_seed(3)).to(dtype)
    picture = made_up(weights).rgba(smooth=3)
    assert picture.dtype == dtype
    torch.testing.assert_close(picture.float(), made_up(weights.float()).rgba(smooth=3), rtol=0, atol=5e-3)


def test_pictures_of_nothing() -> None:
    assert made_up(torch.zeros(0, 6, 9, 9)).rgba().shape == (0, 9, 9, 4)
    assert made_up(torch.zeros(2, 6, 0, 9)).rgba().shape == (2, 0, 9, 4)
    assert not made_up(torch.zeros(2, 6, 9, 9)).rgba().any()
    few = torch.zeros(1, 6, 9, 9)
    few[0, :, 4, 4] = 1  # one pixel, above the percentile
    assert made_up(few).rgba(smooth=1)[0, ..., 3].count_nonzero() == 1


def test_quantiles_of_any_length() -> None:
    x = torch.rand(3, 41, generator=torch.Generator().manual_seed(4))
    for q in (0, 0.3, 0.995, 1):
        torch.testing.assert_close(quantile(x, q), torch.quantile(x, q, dim=1))
    assert quantile(x.new_zeros(1, 16_000_001), 0.5) == 0


def test_representation_is_short(model: nn.Module, images: torch.Tensor) -> None:
    text = repr(bk.explain(model, images, [1, 2, 5]))
    assert text == "Explanation(images=[3, 6, 33, 40], logits=[3, 6], targets=[1, 2, 5], float64, cpu)"
    assert len(repr(made_up(torch.zeros(100, 6, 1, 1)))) < 150


def test_plots() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    for channels, pictures in ((6, 2), (2, 2), (3, 1), (1, 1), (12, 1)):
        figure = made_up(torch.rand(2, channels, 5, 5).bfloat16(), [0, 3]).plot(class_names={0: "$1", 3: r"a_$\frac"})
        assert len(figure.axes) == 2 * (pictures + 1)
        figure.canvas.draw()
        assert figure.axes[pictures + 1].get_title() == r"a_$\frac"
    assert made_up(torch.zeros(0, 6, 5, 5)).plot().axes == []
    with pytest.raises(ValueError, match="class_names has 2 names, and none for class 3"):
        made_up(torch.rand(1, 6, 5, 5), [3]).plot(class_names=["a", "b"])
    matplotlib.pyplot.close("all")


def test_relu_in_place_behind_a_layer() -> None:
    """The layer's backward pass needs its output: the ReLU must not overwrite what is kept."""
    torch.manual_seed(0)
    plain = nn.Sequential(bk.BcosConv2d(6, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    in_place = copy.deepcopy(plain)
    in_place[1].inplace = True
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert_close(bk.explain(in_place, images, 1).weights, bk.explain(plain, images, 1).weights, OUTPUT)


def test_other_networks_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="has no layer with an explanation mode; convert it with bcosify"):
        bk.explain(nn.Conv2d(6, 2, 1).double(), images)
    with pytest.raises(ValueError, match=r"model must return logits \[N, K\]; got \[3, 2, 33, 40\]"):
        bk.explain(bk.BcosConv2d(6, 2, 1).double(), images)
