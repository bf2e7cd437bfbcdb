"""Losses, adaptive gradient clipping and the schedule, against their definitions written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models import experiments
from training.agc import adaptive_clip_grad_, unit_norm
from training.losses import bce, bce_uniform_off_labels, cross_entropy, get_loss, siglip
from training.mixup import MixUp
from training.optim import build_optimiser, build_schedule, cosine_factor, warmup_factor


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


def test_siglip_is_that_of_open_clip() -> None:
    from open_clip.loss import SigLipLoss

    torch.manual_seed(0)
    embeddings, targets = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    unit = [torch.nn.functional.normalize(t, dim=1) for t in (embeddings, targets)]
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    expected = SigLipLoss()(*unit, scale, bias)
    assert siglip(embeddings, targets).item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(loss, embeddings)[0] for loss in (siglip(embeddings, targets), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert get_loss("siglip") is siglip
    with pytest.raises(ValueError, match=r"must be \[N, E\] both, got shapes \(5, 7\) and \(5,\)"):
        siglip(embeddings, torch.zeros(5))


def test_soft_targets_are_shares_of_every_class() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.1], [-0.7, 0.0, 0.4, 1.1]], dtype=torch.float64)
    shares = torch.tensor([[0.0, 0.125, 0.875, 0.0], [0.5, 0.0, 0.0, 0.5]])
    lifted = [[0.25, 0.25, 0.875, 0.25], [0.5, 0.25, 0.25, 0.5]]
    assert bce(logits, shares).item() == pytest.approx(_mean_bce(logits, shares.tolist()), rel=1e-12)
    assert bce_uniform_off_labels(logits, shares).item() == pytest.approx(_mean_bce(logits, lifted), rel=1e-12)
    expected = -(shares * logits.log_softmax(1)).sum(1).mean().item()
    assert cross_entropy(logits, shares).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [bce, bce_uniform_off_labels, cross_entropy])
def test_certain_shares_are_class_indices(loss: Any) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64)
    targets = torch.tensor([4, 0, 2])
    shares = torch.nn.functional.one_hot(targets, 5).float()
    torch.testing.assert_close(loss(logits, shares), loss(logits, targets))
    assert loss(logits, shares).dtype == torch.float64


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
    with pytest.raises(ValueError, match=r"or \[2, 3\] shares in floating point, got shape \(2, 4\)"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"got shape \(2, 3\), dtype torch.int64"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))


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


def test_warmup_is_a_line_and_then_a_cosine() -> None:
    assert [warmup_factor(move, 110, 10) for move in (0, 5, 10)] == pytest.approx([0.01, 0.505, 1.0])
    assert [warmup_factor(move, 110, 10) for move in (60, 110, 200)] == pytest.approx([0.5, 0.0, 0.0], abs=1e-12)
    assert [warmup_factor(move, 7, 0) for move in range(9)] == [cosine_factor(move, 7) for move in range(9)]
    assert warmup_factor(4, 4, 10) == pytest.approx(0.01 + 0.99 * 0.4)  # shorter than its warm-up


def test_restarts_agree_with_torchs_schedule() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    ours, theirs = (torch.optim.Adam([parameter], lr=1e-3) for _ in range(2))
    schedule = build_schedule(ours, 90, restart_every=10)
    reference = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(theirs, T_0=10)
    for _ in range(25):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        for optimiser, step in ((ours, schedule), (theirs, reference)):
            optimiser.step()
            step.step()


def test_warmup_agrees_with_torchs_schedules() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    ours, theirs = (torch.optim.Adam([parameter], lr=1e-3) for _ in range(2))
    schedule = build_schedule(ours, 12, 4)
    line = torch.optim.lr_scheduler.LinearLR(theirs, start_factor=0.01, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=8)
    reference = torch.optim.lr_scheduler.SequentialLR(theirs, [line, cosine], milestones=[4])
    for _ in range(12):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        for optimiser, step in ((ours, schedule), (theirs, reference)):
            optimiser.step()
            step.step()


def test_optimiser_is_the_recipes() -> None:
    for base_network, name, kind, decay in (
        ("vit_bcosification", "bcosifyv2_bcos_vitc_s_patch1_14_0.01", torch.optim.Adam, 0.0),
        ("standard", "vitc_s_patch1_14", torch.optim.AdamW, 1e-4),
    ):
        recipe = experiments.find("ImageNet", base_network, name).optimiser
        optimiser = build_optimiser(recipe, [nn.Parameter(torch.zeros(1))])
        assert type(optimiser) is kind
        assert optimiser.param_groups[0]["lr"] == recipe.lr
        assert optimiser.param_groups[0]["weight_decay"] == decay


def test_mixup_mixes_images_and_targets_with_the_same_share() -> None:
    images, targets = torch.rand(3, 6, 4, 4), torch.tensor([2, 0, 1])
    mixed, shares = MixUp(0.2, 4, seed=42)(images, targets, (0, 0, 0))
    share = float(shares[0, 2])
    assert 0 <= share <= 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    one_hot = torch.nn.functional.one_hot(targets, 4).float()
    torch.testing.assert_close(shares, share * one_hot + (1 - share) * one_hot.roll(1, 0))


def test_mixup_depends_on_seed_and_position_alone() -> None:
    images, targets = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])

    def share(seed: int, *position: int) -> float:
        return float(MixUp(0.2, 2, seed)(images, targets, position)[1][0, 0])

    before = torch.get_rng_state()
    shares = [share(42, epoch, index, rank) for epoch in range(3) for index in range(20) for rank in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert shares[5] == share(42, 0, 2, 1)
    assert len(set(shares)) > 100
    assert share(43, 0, 2, 1) != shares[5]
    # Beta(0.2, 0.2): mean 1/2, variance 1 / (4 * 1.4)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.15)
    assert np.var(shares) == pytest.approx(1 / 5.6, abs=0.05)
