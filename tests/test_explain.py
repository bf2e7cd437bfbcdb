"""Explanations: exactness, batching, and that the model is left as it was found."""

from __future__ import annotations

import sys

import pytest
import torch
import torchvision
from torch import nn

import bcos_kernels as bk


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
        (torch.rand(1, 4, 32, 32), None, ValueError, r"got \[1, 4, 32, 32\]"),
        (torch.rand(2, 3, 32, 32).double(), [1, 2, 3], ValueError, "one for each of the 2 images"),
        (torch.rand(2, 3, 32, 32).double(), [0.5, 1.0], TypeError, "targets must be integers"),
        (torch.rand(2, 3, 32, 32).double(), -1, ValueError, "targets must be between 0 and 5"),
    ],
)
def test_sentences(
    model: nn.Module, images: torch.Tensor, targets: object, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        bk.explain(model, images, targets)


def test_other_networks_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="has no layer with an explanation mode; convert it with bcosify"):
        bk.explain(nn.Conv2d(6, 2, 1).double(), images)
    with pytest.raises(ValueError, match=r"model must return logits \[N, K\]; got \[3, 2, 33, 40\]"):
        bk.explain(bk.BcosConv2d(6, 2, 1).double(), images)
