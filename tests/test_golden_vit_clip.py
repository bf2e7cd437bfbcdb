"""Converted ViTs and CLIP's image encoder against vectors measured on the public code; as ``test_golden_models``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bcos_kernels as bk
from models.clip import clip_resnet50
from models.vit import simple_vit
from tests import golden_case
from tests.golden import fill
from tests.tolerances import relative_error
from training.losses import bce_uniform_off_labels


def check_state(model: nn.Module, arrays: Any, meta: Any) -> None:
    state = model.state_dict()
    assert list(state) == meta["state_keys"]
    assert [list(v.shape) for v in state.values()] == meta["state_shapes"]
    fingerprint = [[float(v.double().mean()), float(v.double().abs().mean())] for v in state.values()]
    np.testing.assert_allclose(fingerprint, arrays["conv_fp"], rtol=1e-12, atol=1e-15)


def check_logits(model: nn.Module, x: Tensor, arrays: Any) -> None:
    with torch.no_grad():
        assert relative_error(model.eval()(x), torch.tensor(arrays["logits"])) < 1e-9


def check_training(model: nn.Module, out: Tensor, loss: Tensor, arrays: Any, meta: Any) -> None:
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


@pytest.mark.parametrize("name", ["simple_vit_ti", "vitc_ti"])
def test_vit(name: str) -> None:
    arrays, meta = golden_case.load(name)
    model = bk.bcosify(golden_case.fill_standard(simple_vit(meta["name"]), meta["seed"]))
    x = golden_case.images(meta)
    check_state(model, arrays, meta)
    check_logits(model, x, arrays)

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
    check_training(model, out, bce_uniform_off_labels(out, torch.tensor(meta["targets"])), arrays, meta)


def test_clip() -> None:
    arrays, meta = golden_case.load("clip_rn50")
    standard = golden_case.fill_standard(clip_resnet50(), meta["seed"])
    model = bk.bcosify(standard, normalize="clip", logit_bias=None)
    check_state(model, arrays, meta)
    golden_case.load_running_variances(model, arrays)
    x = golden_case.images(meta)
    check_logits(model, x, arrays)
    out = model.train()(x)
    probe = torch.tensor(fill.probe("clip_out", tuple(out.shape), meta["seed"]))
    check_training(model, out, (out * probe).sum(), arrays, meta)
