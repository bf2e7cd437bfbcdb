"""``bcosify`` on the networks of torchvision and timm: the same function at B = 1, or a refusal that names what prevents it.

``tests/sweep_networks.txt`` lists them; a share of them runs by default, all of them with ``pytest --sweep``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import bcos_kernels as bk
from tests.networks import CLASSES, filled
from tests.tolerances import relative_error

#: What became of each network with timm 1.0.31 and torchvision 0.29. One that is refused today may be converted one day.
OUTCOMES = dict(line.split() for line in Path(__file__).with_name("sweep_networks.txt").read_text().splitlines())
NAMES = list(OUTCOMES)
KEEP = ("biases", "max_pooling", "head_order")
REFUSALS = "^model: cannot convert a |^model must have one convolution with three input channels"


def build(name: str) -> tuple[nn.Module, int]:
    """The network with random weights, in float64, and a side of images that it takes."""
    torch.manual_seed(0)
    package, _, name = name.partition(":")
    if package == "torchvision":
        kinds = torchvision.models
        more = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model, side = kinds.get_model(name, weights=None, num_classes=CLASSES, **more), 96
        side = 224 if name.startswith(("vit", "swin", "maxvit")) else side
    else:
        model = timm.create_model(name, num_classes=CLASSES)
        side = model.pretrained_cfg["input_size"][1] if model.pretrained_cfg.get("fixed_input_size") else 96
    model = filled(model.double())
    settle(model, torch.rand(2, 3, side, side, dtype=torch.float64))
    return model, side


def settle(model: nn.Module, images: torch.Tensor) -> None:
    """Gives batch norms the statistics of the images, or else a deep network of random weights fades to its biases.

    Nothing else is in training mode: layers that are dropped at random would have a part in the statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, bk.BatchNormUncentered2d))]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(images)
    model.eval()


def test_the_list() -> None:
    assert len(NAMES) >= 250
    assert sum(outcome == "converted" for outcome in OUTCOMES.values()) >= 125


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_same_function_or_refused(name: str, sweep: bool) -> None:
    if not sweep and NAMES.index(name) % 6:
        pytest.skip("runs with --sweep")
    if name.startswith("timm:") and not timm.is_model(name.removeprefix("timm:")):
        pytest.skip("this timm has no such network")
    standard, side = build(name)
    model = converted_or_refused(standard, REFUSALS, b=1, keep=KEEP)
    if model is None:
        assert OUTCOMES[name] == "refused"
        return
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = standard(x), model(torch.cat([x, -x], 1))
    assert relative_error(expected[:1], expected[1:]) > 1e-4  # the image has a part in it
    assert relative_error(actual, expected) < 1e-6  # 1e-15 for most; deep networks of random weights enlarge rounding
    explained(standard, side)


def converted_or_refused(standard: nn.Module, refusals: str, **options: Any) -> bk.BcosNetwork | None:
    """The converted network, or None where it was refused by one of these sentences."""
    try:
        return bk.bcosify(standard, normalize=None, logit_bias=None, **options)
    except ValueError as refusal:
        if not re.search(refusals, str(refusal)):
            raise
    return None


def explained(standard: nn.Module, side: int) -> None:
    """The contributions of the default conversion make up the logit, or what is missing is named."""
    model = converted_or_refused(standard, "the constant .* that it adds")
    if model is None:
        return
    model.eval()
    images = torch.rand(2, 6, side, side, dtype=torch.float64)
    settle(model, images)
    explanation = bk.explain(model, images)
    logits = explanation.logits.gather(1, explanation.targets[:, None])[:, 0]
    missing = relative_error(explanation.contributions.sum((1, 2)), logits)
    assert explanation.weights.isfinite().all()
    assert missing < 1e-4 or model.constants, missing
