"""The moving average of the weights: what it is, where it is stored, that it is validated, and that resuming keeps it."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import evaluate
from models import load_checkpoint
from models.checkpoint_files import read_checkpoint
from models.checkpoints import epoch_checkpoints, find_checkpoint
from models.errors import UserError
from tests.tiny_run import TINY, options, train_tiny
from tests.tolerances import OUTPUT, assert_close
from training.callbacks import MetricsFile
from training.ema import MovingAverage

DECAY = 0.9


def _train(base_directory: Path, *more: str, epochs: int = 3) -> Path:
    return train_tiny(base_directory, "standard", "--set", f"trainer.ema={DECAY}", *more, epochs=epochs)


def _rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A base directory with a trained network, and the average of its weights as the formula says, in float64."""
    expected: dict[str, Tensor] = {}
    update = MovingAverage.on_train_batch_end

    def record(self: MovingAverage, trainer: Any, module: Any, *arguments: Any) -> None:
        for key, value in module.model.state_dict().items():
            new = value.double()
            expected[key] = DECAY * expected[key] + (1 - DECAY) * new if key in expected else new
        update(self, trainer, module, *arguments)

    base = tmp_path_factory.mktemp("experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MovingAverage, "on_train_batch_end", record)
        _train(base)
    return base, expected


def test_average_is_what_the_formula_says(run: tuple[Path, dict[str, Tensor]]) -> None:
    base, expected = run
    average = load_checkpoint("Digits", "standard", TINY, base_directory=base, ema=True).state_dict()
    weights = load_checkpoint("Digits", "standard", TINY, base_directory=base).state_dict()
    for key, value in expected.items():
        if value.is_floating_point() and not key.endswith("num_batches_tracked"):
            assert_close(average[key], value, OUTPUT, key)
            assert not torch.equal(average[key], weights[key]), key


def test_layout_of_the_checkpoint_is_the_public_one(run: tuple[Path, dict[str, Tensor]]) -> None:
    content = read_checkpoint(run[0] / "Digits" / "standard" / TINY / "last.ckpt")
    assert {"epoch", "pytorch-lightning_version"} <= set(content)  # which the public code asks for
    state = content["state_dict"]
    groups = {prefix: [key for key in state if key.startswith(prefix)] for prefix in ("model.", "ema.module.")}
    assert list(state) == [*groups["model."], "ema.n_averaged", *groups["ema.module."]]
    assert [key.removeprefix("ema.module.") for key in groups["ema.module."]] == list(run[1])


def test_names_and_metrics_say_how_good_both_are(run: tuple[Path, dict[str, Tensor]]) -> None:
    base, _ = run
    directory = base / "Digits" / "standard" / TINY
    rows = _rows(directory)
    for checkpoint in epoch_checkpoints(directory):
        row = rows[checkpoint.epoch]
        for name in ("val_acc1", "val_acc1_ema"):
            assert float(row[name]) == pytest.approx(checkpoint.scores[name], abs=1e-5)
    for ema, suffix in ((False, ""), (True, "_ema")):
        more = ["--ema"] if ema else []
        result = evaluate.main(options(base, "standard", "--reload", "last", "--no-cuda", *more))
        assert result["acc1"] == pytest.approx(float(rows[-1][f"val_acc1{suffix}"]), abs=1e-5)
        assert result["loss"] == pytest.approx(float(rows[-1][f"val_loss{suffix}"]), rel=1e-4)
    assert rows[-1]["val_loss"] != rows[-1]["val_loss_ema"]


def test_best_of_both_stay(run: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: Any) -> None:
    directory = _train(tmp_path, epochs=5)
    rows = _rows(directory)
    kept = {checkpoint.epoch for checkpoint in epoch_checkpoints(directory)}
    expected = set()
    for name in ("val_acc1", "val_acc1_ema"):
        ranked = sorted(rows, key=lambda row: (float(row[name]), int(row["epoch"])), reverse=True)
        expected |= {int(row["epoch"]) for row in ranked[:3]}
    assert kept == expected
    path, ema = find_checkpoint(directory, "best_any")
    best = max(float(row[name]) for row in rows for name in ("val_acc1", "val_acc1_ema"))
    evaluate.main(options(tmp_path, "standard", "--reload", "best_any", "--no-cuda"))
    out = capsys.readouterr().out
    assert f"Weights: {path}{' (moving average)' if ema else ''}\n" in out
    assert f"Acc@1 {best:.3%}" in out


def test_resumed_run_is_the_same_bit_by_bit(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = MetricsFile.on_train_epoch_end

    def fail(self: MetricsFile, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 2:
            raise ConnectionError("pulled the plug")
        write(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_train_epoch_end", fail)
        with pytest.raises(ConnectionError):
            _train(tmp_path)
    directory = _train(tmp_path)
    whole = run[0] / "Digits" / "standard" / TINY
    assert (directory / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    ours, theirs = (read_checkpoint(path / "last.ckpt")["state_dict"] for path in (directory, whole))
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_another_decay_is_not_mixed_in(run: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises(UserError, match=re.escape(f"trainer.ema: {DECAY} then, None now")):
        train_tiny(run[0], epochs=4)


@pytest.mark.parametrize("decay", ["1", "-0.1", "often"])
def test_decay_out_of_range(tmp_path: Path, decay: str) -> None:
    with pytest.raises(UserError, match=r"ema"):
        train_tiny(tmp_path, "standard", "--set", f"trainer.ema={decay}")
