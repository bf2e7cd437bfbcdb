"""Converted networks against vectors measured on the public code: conversion, evaluation, explanation, training step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import bcos_kernels as bk
from tests import golden_case
from tests.golden import fill
from tests.tolerances import relative_error
from training.losses import bce_uniform_off_labels

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet_18": torchvision.models.resnet18,
    "densenet_121": torchvision.models.densenet121,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_vectors(name: str) -> None:
    arrays, meta = golden_case.load(name)
    standard = golden_case.fill_standard(NETWORKS[name](), meta["seed"])
    model = bk.bcosify(standard)

    state = model.state_dict()
    assert list(state) == meta["state_keys"]
    assert [list(v.shape) for v in state.values()] == meta["state_shapes"]
    fingerprint = [[float(v.double().mean()), float(v.double().abs().mean())] for v in state.values()]
    np.testing.assert_array_equal(fingerprint, arrays["conv_fp"])

    golden_case.load_running_variances(model, arrays)
    x = golden_case.images(meta)
    with torch.no_grad():
        assert relative_error(model.eval()(x), torch.tensor(arrays["logits"])) < 1e-9

    explanation = bk.explain(model, x[:1])
    assert int(explanation.targets) == arrays["explain_class"]
    for value, key in (
        (explanation.weights, "dynamic_linear_weights"),
        (explanation.contributions, "contribution_map"),
    ):
        assert relative_error(value[0], torch.tensor(arrays[key])) < 1e-7, key  # stored in float32
    picture = torch.tensor(arrays["explanation"].astype(np.float64))
    assert float((explanation.rgba()[0] - picture).abs().max()) < 5e-4  # stored in float16

    out = model.train()(x)
    assert relative_error(out, torch.tensor(arrays["train_out"])) < 1e-9
    loss = bce_uniform_off_labels(out, torch.tensor(meta["targets"]))
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
