"""Attribution methods: right values on networks whose gradient is known, nothing left behind, errors in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bcos_kernels as bk
from interpretability.attribution import bcos_contributions, default_attribution, input_x_gradient, is_bcos


class Conventional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(4, 5),
        )  # fmt: skip


class SmallBcos(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = bk.BcosConv2d(6, 8, 3, padding=1)
        self.head = bk.BcosConv2d(8, 5, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(images)).mean((2, 3))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_input_x_gradient_of_a_linear_network_is_input_times_weight() -> None:
    linear = nn.Linear(3 * 4 * 5, 7)
    images, targets = torch.randn(6, 3, 4, 5), torch.tensor([0, 6, 3, 3, 1, 2])
    maps = input_x_gradient(nn.Sequential(nn.Flatten(), linear))(images, targets)
    expected = (images * linear.weight[targets].view(6, 3, 4, 5)).sum(1)
    assert maps.shape == (6, 4, 5)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps.sum((1, 2)), linear(images.flatten(1))[range(6), targets] - linear.bias[targets])


def test_input_x_gradient_leaves_modes_gradients_and_images_alone() -> None:
    model = Conventional()
    model[1].eval()  # a frozen norm inside a training network has to stay frozen, the rest has to stay in training
    modes = [module.training for module in model.modules()]
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.no_grad():
        maps = input_x_gradient(model)(images, torch.tensor([1, 4]))
    assert [module.training for module in model.modules()] == modes
    assert model[0].weight.grad.eq(3).all()
    assert model[6].weight.grad is None
    assert images.grad is None
    assert not maps.requires_grad
    torch.testing.assert_close(maps, input_x_gradient(model)(images, torch.tensor([1, 4])))  # no dropout inside


def test_modes_come_back_after_an_error() -> None:
    model = Conventional()
    with pytest.raises(RuntimeError):
        input_x_gradient(model)(torch.randn(1, 7, 8, 8), torch.tensor([0]))
    assert all(module.training for module in model.modules())


def test_bcos_contributions_sum_to_the_logit() -> None:
    """A B-cos network without biases is linear in its input, so the map is a decomposition of the logit."""
    model = SmallBcos().double().eval()
    images, targets = torch.rand(3, 6, 8, 8, dtype=torch.float64), torch.tensor([0, 4, 2])
    maps = bcos_contributions(model)(images, targets)
    torch.testing.assert_close(maps.sum((1, 2)), model(images)[range(3), targets].detach())
    plain = input_x_gradient(model)(images, targets)
    assert not torch.allclose(maps, plain), "the scale has to be a constant in the explanation"


def test_the_default_follows_the_network() -> None:
    images, targets = torch.rand(2, 6, 8, 8), torch.tensor([1, 3])
    model = SmallBcos()
    assert is_bcos(model)
    assert not is_bcos(Conventional())
    torch.testing.assert_close(default_attribution(model)(images, targets), bcos_contributions(model)(images, targets))
    conventional, images = Conventional(), torch.randn(2, 3, 8, 8)
    expected = input_x_gradient(conventional)(images, targets)
    torch.testing.assert_close(default_attribution(conventional)(images, targets), expected)


def test_errors_name_the_argument() -> None:
    attribute = input_x_gradient(Conventional())
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images: expected \[N, C, H, W\], got shape \[3, 8, 8\]"):
        attribute(images[0], torch.tensor([0]))
    with pytest.raises(ValueError, match="targets: expected one class for each of 2 images"):
        attribute(images, torch.tensor([0]))
    with pytest.raises(ValueError, match="targets: expected class numbers of an integer type"):
        attribute(images, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="targets: classes -1 to 5 do not fit a model with 5 classes"):
        attribute(images, torch.tensor([-1, 5]))
    with pytest.raises(ValueError, match=r"model: expected logits \[N, K\]"):
        input_x_gradient(nn.Conv2d(3, 4, 1))(images, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"has no B-cos layer.*bcosify"):
        bcos_contributions(Conventional())
