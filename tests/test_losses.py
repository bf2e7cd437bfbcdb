"""Losses, adaptive gradient clipping and the schedule, against their definitions written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from training.agc import adaptive_clip_grad_, unit_norm
from training.losses import bce, bce_uniform_off_labels, cross_entropy, get_loss
from training.optim import build_schedule, cosine_factor


def _mean_bce(logits: torch.Tensor, labels: list[list[float]]) -> float:
    total = 0.0
    for row, wanted in zip(logits.tolist(), labels, strict=True):
        for logit, label in zip(row, wanted, strict=True):
            p = 1 / (1 + math.exp(-logit))
            total -= label * math.log(p) + (1 - label) * math.log(1 - p)
    return total / logits.numel()


def test_bce_is_the_mean_over_all_entries() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.1], [-0.7, 0.0, 0.4, 1.1]], dtype=torch.float64)
    targets = torch.tensor([2, 0])
    hard = [[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    soft = [[0.25, 0.25, 1.0, 0.25], [1.0, 0.25, 0.25, 0.25]]
    assert bce(logits, targets).item() == pytest.approx(_mean_bce(logits, hard), rel=1e-12)
    assert bce_uniform_off_labels(logits, targets).item() == pytest.approx(_mean_bce(logits, soft), rel=1e-12)


def test_losses_are_found_by_name() -> None:
    assert get_loss("bce") is bce
    assert get_loss("bce_uniform_off_labels") is bce_uniform_off_labels
    assert get_loss("cross_entropy") is cross_entropy


@pytest.mark.parametrize("loss", [bce, bce_uniform_off_labels, cross_entropy])
def test_wrong_shapes_are_named(loss: object) -> None:
    assert callable(loss)
    with pytest.raises(ValueError, match=r"logits must be \[N, K\], got shape \(2, 3, 1\)"):
        loss(torch.zeros(2, 3, 1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets must be \[2\] class indices .* got shape \(3,\)"):
        loss(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"float32"):
        loss(torch.zeros(2, 3), torch.zeros(2))


def test_unit_norm_is_per_output_and_whole_for_vectors() -> None:
    conv = torch.randn(4, 3, 2, 2)
    assert unit_norm(conv).shape == (4, 1, 1, 1)
    assert unit_norm(conv)[1].item() == pytest.approx(conv[1].norm().item())
    assert unit_norm(torch.randn(4, 3)).shape == (4, 1)
    for single in (torch.randn(5), torch.randn(5, 1, 1, 1), torch.randn(1, 5), torch.tensor(-2.0)):
        assert unit_norm(single).numel() == 1
        assert unit_norm(single).item() == pytest.approx(single.flatten().norm().item())


def test_clipping_shortens_long_gradients_unit_by_unit() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0]]))
    weight.grad = torch.tensor([[6.0, 8.0], [0.0, 2.0], [0.03, 0.04]])
    without = nn.Parameter(torch.ones(2))
    adaptive_clip_grad_([weight, without], factor=0.01, eps=1e-3)
    # 0.01 * 5 = 0.05 along (6, 8); 0.01 * eps along (0, 2); 0.05 is below 0.01 * 50 and stays.
    torch.testing.assert_close(weight.grad, torch.tensor([[0.03, 0.04], [0.0, 1e-5], [0.03, 0.04]]))
    assert without.grad is None


def test_clipping_leaves_a_zero_gradient_zero() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.zeros(2, 2)
    adaptive_clip_grad_([weight])
    assert torch.equal(weight.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("bad", [{"factor": 0.0}, {"eps": -1.0}, {"factor": float("nan")}])
def test_clipping_refuses_meaningless_numbers(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        adaptive_clip_grad_([], **bad)


def test_cosine_goes_from_one_to_zero_and_stays() -> None:
    assert cosine_factor(0, 90) == 1.0
    assert cosine_factor(45, 90) == pytest.approx(0.5)
    assert cosine_factor(90, 90) == pytest.approx(0.0, abs=1e-12)
    assert cosine_factor(200, 90) == pytest.approx(0.0, abs=1e-12)


def test_schedule_agrees_with_torchs_cosine() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    ours, theirs = (torch.optim.AdamW([parameter], lr=1e-4) for _ in range(2))
    schedule = build_schedule(ours, 7)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=7)
    for _ in range(7):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9, abs=1e-18)
        for optimiser, step in ((ours, schedule), (theirs, reference)):
            optimiser.step()
            step.step()
