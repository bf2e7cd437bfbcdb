"""evaluate.py against a loop of its own, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import evaluate
from models import load_checkpoint
from models.checkpoints import find_checkpoint
from models.errors import CheckpointError, UnknownNameError, UserError
from tests.tiny_run import TINY, options, train_tiny
from training.data import IMAGENET_MEAN, IMAGENET_STD, Digits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a trained conventional network and a B-cosified one, two epochs each."""
    directory = tmp_path_factory.mktemp("experiments")
    train_tiny(directory, "standard", epochs=2)
    train_tiny(directory, "bcosification", epochs=2)
    return directory


@pytest.mark.parametrize("base_network", ["standard", "bcosification"])
@pytest.mark.parametrize("reload", ["last", "best", "epoch_0"])
def test_figures_are_those_of_the_checkpoint(
    base: Path, base_network: str, reload: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate.main(options(base, base_network, "--reload", reload, "--batch_size", "77", "--no-cuda"))
    model = load_checkpoint("Digits", base_network, TINY, reload=reload, base_directory=base)
    digits = Digits(train=False)
    if base_network == "standard":
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        images = (digits.images - mean) / std
    else:
        images = torch.cat([digits.images, 1 - digits.images], 1)
    with torch.no_grad():
        logits = model(images)
    if base_network == "standard":
        loss = F.cross_entropy(logits, digits.targets)
    else:
        loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(digits.targets, 10).float())
    right = (logits.argsort(1, descending=True)[:, :5] == digits.targets[:, None]).float().sum(0) / 360
    assert result["acc1"] == pytest.approx(right[0].item(), abs=1.5 / 360)
    assert result["acc5"] == pytest.approx(right.sum().item(), abs=1.5 / 360)
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert result["images"] == 360
    assert f"Acc@1 {result['acc1']:.3%} Acc@5 {result['acc5']:.3%}" in capsys.readouterr().out


def test_the_trained_network_is_better_than_right_after_conversion(base: Path) -> None:
    before = evaluate.main(options(base, "bcosification"))
    after = evaluate.main(options(base, "bcosification", "--reload", "last"))
    assert after["acc1"] > before["acc1"] + 0.1
    assert after["loss"] < before["loss"]


def test_validation_during_training_and_evaluation_agree(base: Path) -> None:
    folder = base / "Digits" / "bcosification" / TINY
    result = evaluate.main(options(base, "bcosification", "--reload", "epoch_1"))
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    last = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    assert result["acc1"] == pytest.approx(float(last["val_acc1"]), abs=1e-5)
    assert result["loss"] == pytest.approx(float(last["val_loss"]), rel=1e-4)


def test_weights_from_a_path(base: Path, tmp_path: Path) -> None:
    model = load_checkpoint("Digits", "standard", TINY, base_directory=base)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    of_path = evaluate.main(options(tmp_path, "standard", "--weights", str(path)))
    assert of_path == evaluate.main(options(base, "standard", "--reload", "last"))


def test_right_after_the_conversion_of_given_weights(base: Path, tmp_path: Path) -> None:
    best, _ = find_checkpoint(base / "Digits" / "standard" / TINY, "best")
    given = evaluate.main(options(tmp_path, "bcosification", "--init_weights", str(best)))
    assert given == evaluate.main(options(base, "bcosification"))


def test_fewer_than_five_classes() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    batches = [(logits, torch.tensor([0, 1]))]
    result = evaluate.evaluate(torch.nn.Identity(), batches, F.cross_entropy, torch.device("cpu"))
    assert (result["acc1"], result["acc5"]) == (0.5, 1.0)


def test_loss_weights_batches_by_their_size() -> None:
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    batches = [(logits[:4], targets[:4]), (logits[4:], targets[4:])]
    result = evaluate.evaluate(torch.nn.Identity(), batches, F.cross_entropy, torch.device("cpu"))
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


def test_errors(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*last\.ckpt"):
        evaluate.main(options(tmp_path, "standard", "--reload", "last"))
    with pytest.raises(CheckpointError, match=r"no checkpoint of epoch 9 .* kept are"):
        evaluate.main(options(base, "standard", "--reload", "epoch_9"))
    wrong = base / "Digits" / "standard" / TINY / "last.ckpt"
    with pytest.raises(CheckpointError, match="does not fit"):
        evaluate.main(options(base, "bcosification", "--weights", str(wrong)))
    with pytest.raises(CheckpointError, match="no moving average"):
        evaluate.main(options(base, "standard", "--reload", "last", "--ema"))
    with pytest.raises(UserError, match="--ema needs --reload or --weights"):
        evaluate.main(options(base, "standard", "--ema"))
    with pytest.raises(SystemExit):
        evaluate.main(options(base, "standard", "--batch_size", "0"))
    assert "argument --batch_size: must be at least 1, got 0" in capsys.readouterr().err
    for more, sentence in (
        (["--set", "trainer.eval_loss=siglip"], "compares embeddings, and the network gives classes"),
        (["--set", "model.num_classes=5"], "model.num_classes is 5, but Digits has 10 classes"),
        (["--data_path", str(base)], "--data_path: Digits come with scikit-learn"),
        (["--text_model", "RN50"], "--text_model needs --task zeroshot"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate.main(options(base, "standard", "--reload", "last", *more))
    with pytest.raises(UnknownNameError, match="Did you mean 'standard'"):
        evaluate.main(options(base, "standart"))
    with pytest.raises(SystemExit):
        evaluate.main(options(base, "standard", "--reload", "last", "--weights", "x"))
