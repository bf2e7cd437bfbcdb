"""Attribution libraries on converted networks: they hear every layer, and find what the definition says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum import attr
from torch import Tensor, nn

import bcos_kernels as bk
from tests.networks import SIDE, make
from tests.tolerances import GRADIENT, assert_close


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return bk.bcosify(make("resnet"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return bk.AddInverse()(
        torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )


def cam(model: Any, layer: nn.Module, images: Tensor) -> Tensor:
    """Grad-CAM (arXiv 1610.02391) of class 1, before any scaling."""
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logit = model(images)[:, 1].sum()
    hook.remove()
    (grad,) = torch.autograd.grad(logit, kept[0])
    return (grad.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True).relu()


def test_captum(model: Any, images: Tensor) -> None:
    with bk.explanation_mode(model):
        maps = attr.InputXGradient(model).attribute(images.clone().requires_grad_(), target=1).sum(1)
    assert_close(maps, bk.explain(model, images, 1).contributions, GRADIENT)
    for layer in (model.model.layer4, model.model.layer4[0].conv2, model.model.layer4[0].conv2.linear):
        got = attr.LayerGradCam(model, layer).attribute(images, target=1, relu_attributions=True)
        assert_close(got, cam(model, layer, images), GRADIENT)


# grad-cam is not in the test extra (nor is peft, for test_inner_layers): it brings OpenCV, and peft transformers
def test_grad_cam(model: Any, images: Tensor) -> None:
    package = pytest.importorskip("pytorch_grad_cam")
    for layer in (model.model.layer4, model.model.layer4[0].conv2.linear):
        tool = package.GradCAM(model, [layer])
        tool(input_tensor=images, targets=class_one())
        heard = tool.activations_and_grads
        weights = torch.from_numpy(tool.get_cam_weights(None, None, None, None, heard.gradients[0].numpy()))
        got = (weights[:, :, None, None] * heard.activations[0]).sum(1, keepdim=True).relu()
        assert_close(got, cam(model, layer, images), GRADIENT)


def class_one() -> list[Any]:
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    return [ClassifierOutputTarget(1)] * 2
