"""GridPG on networks and maps whose score is known without running it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from interpretability.localisation import (
    Candidate,
    attribute_grids,
    default_confidence,
    default_smooth,
    draw_grids,
    localise,
    rank_by_confidence,
    score_grids,
    share_in_cells,
    sigmoid_confidence,
    softmax_confidence,
    tile,
)

CLASSES = 6


class ChannelSums(nn.Module):
    """Logit c is the sum of channel c: Input x Gradient for class c is exactly channel c of the input."""

    def forward(self, images: Tensor) -> Tensor:
        return images.sum((2, 3))


def channel_dataset(per_class: int = 5, size: int = 4) -> TensorDataset:
    """An image of class c is a constant plane in channel c; the brightness falls with the number in the class."""
    images = torch.zeros(CLASSES * per_class, CLASSES, size, size)
    targets = torch.arange(CLASSES * per_class) % CLASSES
    for index, target in enumerate(targets):
        images[index, target] = 1 - 0.1 * (index // CLASSES)
    return TensorDataset(images, targets)


def candidates(counts: dict[int, int]) -> dict[int, list[Candidate]]:
    return {c: [Candidate(100 * c + i, 0.99 - 0.01 * i) for i in range(count)] for c, count in counts.items()}


@pytest.mark.parametrize("n", [2, 3])
def test_attribution_inside_its_own_cell_scores_one(n: int) -> None:
    images = torch.eye(9).repeat(3, 1)[:, :, None, None].expand(-1, -1, 4, 4)
    dataset = TensorDataset(images, torch.arange(9).repeat(3))
    result = localise(ChannelSums(), dataset, n=n, smooth=1, progress=False)
    assert result.scores.eq(1).all()
    assert result.mean == 1
    assert result.scores.shape == result.indices.shape == result.targets.shape == (27 // (n * n), n * n)


def test_attribution_in_the_opposite_cell_scores_zero() -> None:
    def opposite(images: Tensor, targets: Tensor) -> Tensor:
        return images[range(len(images)), targets].flip(1, 2)

    assert localise(ChannelSums(), channel_dataset(), attribution=opposite, smooth=1, progress=False).mean == 0


@pytest.mark.parametrize(("n", "value"), [(2, 1.0), (3, 0.25)])
def test_uniform_attribution_scores_one_in_n_squared(n: int, value: float) -> None:
    images = torch.eye(9)[:, :, None, None].expand(-1, -1, 4, 4)
    dataset = TensorDataset(images, torch.arange(9))

    def uniform(images: Tensor, targets: Tensor) -> Tensor:
        return torch.full_like(images[:, 0], value)

    result = localise(ChannelSums(), dataset, attribution=uniform, n=n, smooth=1, progress=False)
    torch.testing.assert_close(result.scores, torch.full_like(result.scores, 1 / n**2))


def test_negative_attribution_does_not_count() -> None:
    maps = torch.tensor([[[3.0, -100.0], [1.0, -100.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    expected = torch.tensor([[0.75, 0, 0.25, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(share_in_cells(maps, 2, 1), expected)


def test_smoothing_spreads_by_hand() -> None:
    """A box of 3 puts ninths around one pixel: of its 3 x 3 neighbourhood, 6 pixels lie left of the middle, 3 right."""
    maps = torch.zeros(1, 8, 8)
    maps[0, 1, 3] = 9.0
    torch.testing.assert_close(share_in_cells(maps, 2, 3), torch.tensor([[6 / 9, 3 / 9, 0, 0]]))
    # smoothing comes before the cut at zero: a negative neighbour of the same size cancels a pixel
    maps[0, 1, 4] = -9.0
    torch.testing.assert_close(share_in_cells(maps, 2, 3), torch.tensor([[1.0, 0, 0, 0]]))


def test_smooth_scales_with_the_image() -> None:
    assert [default_smooth(size) for size in (224, 112, 64, 32, 8, 256)] == [15, 7, 5, 3, 1, 17]
    maps = torch.rand(4, 64, 64)

    def fixed(images: Tensor, targets: Tensor) -> Tensor:
        return maps

    images = torch.eye(4)[:, :, None, None].expand(-1, -1, 32, 32)
    dataset, grid = TensorDataset(images, torch.arange(4)), [[(i, i) for i in range(4)]]
    result = score_grids(fixed, dataset, grid, progress=False)
    torch.testing.assert_close(result.scores[0], share_in_cells(maps, 2, 3).diagonal())


def test_grids_have_distinct_classes_and_use_no_image_twice() -> None:
    grids = draw_grids(candidates({c: 7 + c for c in range(CLASSES)}), n=2)
    assert len(grids) > 10
    assert all(len({target for _, target in grid}) == 4 for grid in grids)
    used = [index for grid in grids for index, _ in grid]
    assert len(set(used)) == len(used)
    assert all(index // 100 == target for grid in grids for index, target in grid)
    for target in range(CLASSES):  # the most confident first
        mine = [index for index in used if index // 100 == target]
        assert mine == sorted(mine)


def test_classes_are_drawn_with_seed_42() -> None:
    """The first draw is that of NumPy's legacy generator with seed 42, which the public code uses."""
    ranked = candidates(dict.fromkeys(range(10), 8))
    grids = draw_grids(ranked, n=2)
    assert [target for _, target in grids[0]] == [8, 1, 5, 0]
    assert draw_grids(ranked, n=2) == grids
    assert draw_grids(ranked, n=2, seed=1) != grids
    assert draw_grids(ranked, n=2, max_grids=3) == grids[:3]
    assert draw_grids(dict(reversed(ranked.items())), n=2) == grids  # the order of the classes does not matter


def test_every_image_over_the_threshold_is_used_up() -> None:
    assert len(draw_grids(candidates(dict.fromkeys(range(4), 9)), n=2)) == 9
    ranked = {c: [Candidate(c, 0.51), Candidate(10 + c, 0.5)] for c in range(4)}
    (grid,) = draw_grids(ranked, n=2)
    assert sorted(grid) == [(c, c) for c in range(4)]
    assert len(draw_grids(ranked, n=2, threshold=0.4)) == 2


def test_ranking_keeps_the_correct_ones_most_confident_first() -> None:
    dataset = channel_dataset(per_class=3)
    images, targets = dataset.tensors
    targets = targets.clone()
    targets[0] = 5  # now wrongly classified
    ranked = rank_by_confidence(ChannelSums(), TensorDataset(images.flip(0), targets.flip(0)), batch_size=4)
    assert list(ranked) == list(range(CLASSES))
    assert [candidate.index for candidate in ranked[1]] == [16, 10, 4]
    assert [candidate.index for candidate in ranked[0]] == [11, 5]
    logits = images[1].sum((1, 2))
    assert ranked[1][0].confidence == pytest.approx(float(logits.softmax(0)[1]))
    sigmoid = rank_by_confidence(ChannelSums(), dataset, confidence=sigmoid_confidence, progress=False)
    assert sigmoid[1][0].confidence == pytest.approx(1 / (1 + math.exp(-16)))


def test_confidence_follows_the_network() -> None:
    import bcos_kernels as bk

    assert default_confidence(nn.Sequential(bk.BcosConv2d(6, 4, 1))) is sigmoid_confidence
    assert default_confidence(nn.Linear(3, 4)) is softmax_confidence


def test_too_little_to_build_a_grid_from() -> None:
    with pytest.raises(ValueError, match=r"a 3x3 grid needs 9 classes .* only 6 of 6"):
        draw_grids(candidates(dict.fromkeys(range(6), 4)), n=3)
    with pytest.raises(ValueError, match="only 3 of 4 have one"):
        draw_grids({**candidates({0: 2, 1: 2, 2: 2}), 3: [Candidate(9, 0.5)]}, n=2)
    with pytest.raises(ValueError, match="dataset: it is empty"):
        rank_by_confidence(ChannelSums(), TensorDataset(torch.zeros(0, 3, 4, 4), torch.zeros(0)))
    with pytest.raises(ValueError, match="only 0 of 0"):
        draw_grids({}, n=2)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="n: a grid needs at least 2 x 2 cells, got n=1"):
        draw_grids({}, n=1)
    with pytest.raises(ValueError, match="max_grids: expected at least 1, got 0"):
        draw_grids({}, max_grids=0)
    with pytest.raises(ValueError, match="smooth: expected a positive odd number of pixels, got 4"):
        share_in_cells(torch.ones(1, 4, 4), 2, 4)
    with pytest.raises(ValueError, match="maps: the attribution holds NaN"):
        share_in_cells(torch.full((1, 4, 4), torch.nan), 2, 1)
    with pytest.raises(ValueError, match=r"images: a 2x2 grid needs \[4, C, H, W\], got shape \[3, 1, 2, 2\]"):
        tile(torch.zeros(3, 1, 2, 2), 2)
    with pytest.raises(ValueError, match="grids: there are none"):
        score_grids(lambda images, targets: images[:, 0], channel_dataset(), [])
    for stride in (0, 3):
        with pytest.raises(
            ValueError, match=f"stride: expected a positive divisor of the image size 4x4, got {stride}"
        ):
            attribute_grids(
                lambda images, targets: images[:, 0], torch.ones(1, 1, 8, 8), torch.tensor([0]), (4, 4), stride
            )


def test_tile_is_row_by_row() -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 2, 1, 3)
    expected = torch.tensor([[0.0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]).expand(2, 2, 6)
    assert torch.equal(tile(images, 2), expected)


def test_striding_sums_the_windows() -> None:
    """For a linear model the windows' maps add up to the plain map, once for every window that covers a pixel."""
    seen = []

    def channel(images: Tensor, targets: Tensor) -> Tensor:
        seen.append(images.shape)
        return images[range(len(images)), targets]

    pictures, targets = torch.rand(4, 5, 8, 8), torch.tensor([0, 2, 4, 1])
    strided = attribute_grids(channel, pictures, targets, (4, 4), stride=2)
    assert seen == [torch.Size([4, 5, 4, 4])] * 25  # (2 * 4 + 2 * 2 - 4) / 2 + 1 = 5 windows each way
    torch.testing.assert_close(strided, 4 * channel(pictures, targets))
    result = localise(ChannelSums(), channel_dataset(), smooth=1, stride=2, progress=False)
    torch.testing.assert_close(result.scores, torch.ones_like(result.scores))


def test_the_score_is_reproducible_and_takes_nothing_from_the_global_generators() -> None:
    torch.manual_seed(3)
    images, targets = channel_dataset(per_class=9).tensors
    dataset = TensorDataset(images + 0.3 * torch.rand_like(images), targets)
    first = localise(ChannelSums(), dataset, max_grids=6, progress=False)
    torch.manual_seed(4)
    np.random.seed(4)
    before = np.random.get_state()[1].tolist()
    second = localise(ChannelSums(), dataset, max_grids=6, progress=False)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.indices, second.indices)
    assert np.random.get_state()[1].tolist() == before
    assert 0.25 < first.mean < 1
    other = localise(ChannelSums(), dataset, max_grids=6, seed=7, progress=False)
    assert not torch.equal(first.targets, other.targets)
