"""Converted networks against vectors measured on the public code: conversion, evaluation, explanation, training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

import bcos_kernels as bk
from models.clip import clip_resnet50
from models.vit import simple_vit
from tests import golden_case
from tests.golden import fill
from tests.tolerances import relative_error
from training.losses import bce_uniform_off_labels

CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "resnet_18": torchvision.models.resnet18,
    "densenet_121": torchvision.models.densenet121,
    "simple_vit_ti": lambda: simple_vit("simple_vit_ti_patch16_224"),
    "vitc_ti": lambda: simple_vit("vitc_ti_patch1_14"),
}


def check_state(model: nn.Module, arrays: Any, meta: Any) -> None:
    """Keys, in order, shapes and values of the state dict; then the running variances of the vectors are loaded."""
    state = model.state_dict()
    assert list(state) == meta["state_keys"]
    assert [list(v.shape) for v in state.values()] == meta["state_shapes"]
    fingerprint = [[float(v.double().mean()), float(v.double().abs().mean())] for v in state.values()]
    # the same values, summed in an order that depends on the number of threads
    np.testing.assert_allclose(fingerprint, arrays["conv_fp"], rtol=1e-12, atol=1e-15)
    golden_case.load_running_variances(model, arrays)


def check_logits(model: nn.Module, x: Tensor, arrays: Any) -> None:
    with torch.no_grad():
        assert relative_error(model.eval()(x), torch.tensor(arrays["logits"])) < 1e-9


def check_explanation(model: nn.Module, x: Tensor, arrays: Any) -> None:
    explanation = bk.explain(model, x[:1])
    assert int(explanation.targets) == arrays["explain_class"]
    for value, key in (
        (explanation.weights, "dynamic_linear_weights"),
        (explanation.contributions, "contribution_map"),
    ):
        assert relative_error(value[0], torch.tensor(arrays[key])) < 1e-7, key  # stored in float32
    picture = torch.tensor(arrays["explanation"].astype(np.float64))
    assert float((explanation.rgba()[0] - picture).abs().max()) < 5e-4  # stored in float16


def check_training(model: nn.Module, out: Tensor, loss: Tensor, arrays: Any, meta: Any) -> None:
    """Output and loss in training mode, and of each gradient its norm and its projection on a fixed direction."""
    assert relative_error(out, torch.tensor(arrays["train_out"])) < 1e-9
    assert abs(float(loss.detach()) / float(arrays["train_loss"]) - 1) < 1e-9
    loss.backward()
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(meta["grad_keys"])
    for key, (norm, projection) in zip(meta["grad_keys"], arrays["grad_fp"], strict=True):
        grad = parameters[key].grad
        assert grad is not None, key
        assert abs(float(grad.norm()) / norm - 1) < 1e-6, key
        probe = torch.tensor(fill.probe(key, tuple(grad.shape), meta["seed"]))
        assert abs(float((grad * probe).sum()) - projection) < 1e-6 * norm, key


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier(name: str) -> None:
    arrays, meta = golden_case.load(name)
    model = bk.bcosify(golden_case.fill_standard(CLASSIFIERS[name](), meta["seed"]))
    x = golden_case.images(meta)
    check_state(model, arrays, meta)
    check_logits(model, x, arrays)
    check_explanation(model, x, arrays)
    out = model.train()(x)
    check_training(model, out, bce_uniform_off_labels(out, torch.tensor(meta["targets"])), arrays, meta)


def test_clip() -> None:
    arrays, meta = golden_case.load("clip_rn50")
    standard = golden_case.fill_standard(clip_resnet50(), meta["seed"])
    model = bk.bcosify(standard, normalize="clip", logit_bias=None)
    x = golden_case.images(meta)
    check_state(model, arrays, meta)
    check_logits(model, x, arrays)
    out = model.train()(x)
    probe = torch.tensor(fill.probe("clip_out", tuple(out.shape), meta["seed"]))
    check_training(model, out, (out * probe).sum(), arrays, meta)
