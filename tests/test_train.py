"""train.py: what a run writes, its options, and that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from models.checkpoints import epoch_checkpoints, read_checkpoint
from models.errors import CheckpointError, UserError
from tests.tiny_run import TINY, options, train_tiny

ROOT = Path(train.__file__).parent


def _rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a conventional network, trained for one epoch."""
    directory = tmp_path_factory.mktemp("experiments")
    train_tiny(directory)
    return directory


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A copy of `base` to write into."""
    shutil.copytree(base, tmp_path / "experiments")
    return tmp_path / "experiments"


# What a run writes


def test_files_of_a_run(tmp_path: Path) -> None:
    directory = train_tiny(tmp_path, epochs=5)
    assert directory == tmp_path / "Digits" / "standard" / TINY
    rows = _rows(directory)
    assert list(rows[0]) == ["epoch", "train_loss", "train_acc1", "val_loss", "val_acc1"]
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3", "4"]
    kept = epoch_checkpoints(directory)
    ranked = sorted(rows, key=lambda row: (float(row["val_acc1"]), int(row["epoch"])), reverse=True)
    assert [checkpoint.epoch for checkpoint in kept] == [int(row["epoch"]) for row in ranked[:3]]
    assert read_checkpoint(directory / "last.ckpt")["epoch"] == 4
    config = json.loads((directory / "config.json").read_text())
    assert (config["seed"], config["trainer"]["max_epochs"], config["model"]["num_classes"]) == (42, 5, 10)
    assert {path.name for path in directory.iterdir()} == {
        *("config.json", "metrics.csv", "last.ckpt"),
        *(checkpoint.path.name for checkpoint in kept),
    }


def test_conversion_starts_from_the_conventional_network(own_base: Path) -> None:
    arguments = ("--explanation_logging", "--csv_logger", "--track_grad_norm")
    directory = train_tiny(own_base, "bcosification", *arguments, epochs=2)
    rows = _rows(directory)
    assert all(float(row["grad_norm"]) > 0 for row in rows)
    assert sorted(path.name for path in (directory / "explanations").iterdir()) == ["epoch=0.png", "epoch=1.png"]
    assert (directory / "csv_logs" / "version_0" / "metrics.csv").is_file()
    keys = read_checkpoint(directory / "last.ckpt")["state_dict"].keys()
    assert "model.model.conv1.linear.weight" in keys


def test_conversion_without_the_conventional_network_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train_tiny(tmp_path, "bcosification")
    assert (
        f"python train.py --dataset Digits --base_network standard --experiment_name {TINY} --base_directory {tmp_path}"
    ) in str(caught.value)


def test_conversion_from_given_weights(base: Path, tmp_path: Path) -> None:
    weights = base / "Digits" / "standard" / TINY / "last.ckpt"
    directory = train_tiny(tmp_path, "bcosification", "--init_weights", str(weights))
    assert (directory / "last.ckpt").is_file()
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        train_tiny(tmp_path / "other", "bcosification", "--init_weights", str(tmp_path / "none.pth"))


def test_dev_run_writes_nothing(base: Path, tmp_path: Path) -> None:
    weights = base / "Digits" / "standard" / TINY / "last.ckpt"
    train_tiny(tmp_path, "bcosification", "--init_weights", str(weights), "--fast_dev_run", "--explanation_logging")
    assert list(tmp_path.rglob("*.*")) == []


def test_mixed_precision(tmp_path: Path) -> None:
    directory = train_tiny(tmp_path, "standard", "--amp", epochs=2)
    assert float(_rows(directory)[-1]["val_acc1"]) > 0.3
    state = read_checkpoint(directory / "last.ckpt")["state_dict"]
    assert state["model.conv1.weight"].dtype == torch.float32


def test_seed_decides_the_result(tmp_path: Path) -> None:
    one = _rows(train_tiny(tmp_path / "one"))
    assert one == _rows(train_tiny(tmp_path / "two"))
    seeded = train_tiny(tmp_path, "standard", "--experiment_name", f"{TINY}-seed=7")
    assert seeded == tmp_path / "Digits" / "standard" / f"{TINY}-seed=7"
    assert one != _rows(seeded)


# Resuming


def test_finished_run_is_left_alone(own_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = own_base / "Digits" / "standard" / TINY
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    train_tiny(own_base)
    assert "is trained" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_more_epochs_follow_the_new_schedule(own_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = train_tiny(own_base, epochs=2)
    assert "1 of 2 epochs are done" in capsys.readouterr().out
    assert [row["epoch"] for row in _rows(directory)] == ["0", "1"]
    content = read_checkpoint(directory / "last.ckpt")
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_another_recipe_is_not_mixed_in(own_base: Path) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size: 64 then, 32 now.*--force-no-resume"):
        train_tiny(own_base, "standard", "--batch_size", "32", epochs=2)


def test_a_damaged_record_is_a_sentence(own_base: Path) -> None:
    (own_base / "Digits" / "standard" / TINY / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        train_tiny(own_base, "standard", epochs=2)


def test_force_no_resume_keeps_the_old_run(own_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        directory = train_tiny(own_base, "standard", "--force-no-resume", "--batch_size", str(64 * number))
        aside = directory.with_name(f"{TINY}.old-{number}")
        assert f"kept as {aside}" in capsys.readouterr().out
        assert (aside / "last.ckpt").is_file()
        assert [row["epoch"] for row in _rows(directory)] == ["0"]
    with pytest.raises(UserError, match="There is no checkpoint"):
        train_tiny(own_base, "standard", "--force-no-resume", "--init_weights", "nowhere.pth")
    assert (directory / "last.ckpt").is_file()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--base_directory: .*file.* cannot be written \(Not a directory\)"):
        train_tiny(tmp_path / "file")


def test_damaged_last_checkpoint_costs_nothing(own_base: Path) -> None:
    last = own_base / "Digits" / "standard" / TINY / "last.ckpt"
    content = last.read_bytes()
    last.unlink()  # it shares its content with the epoch's file
    last.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="passed over"):
        directory = train_tiny(own_base, epochs=2)
    assert read_checkpoint(directory / "last.ckpt")["epoch"] == 1


# Being killed

EPOCHS = 4
KILL_IN_WRITE = """
import os, signal, sys
from pathlib import Path
import torch
whole, count = torch.save, 0

def cut(content, path):
    global count
    count += 1
    whole(content, path)
    if count == 3:
        path.write_bytes(path.read_bytes()[:-1000])
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = cut
import train
train.main(sys.argv[1:])
"""


def _command(base_directory: Path, *python: str) -> list[str]:
    return [sys.executable, *python, *options(base_directory), "--max_epochs", str(EPOCHS), "--refresh_rate", "0"]


def _environment() -> dict[str, str]:
    # One thread: sums are then formed in the same order in every run, so results can be compared bit by bit.
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _finish(base_directory: Path) -> tuple[Path, str]:
    run = subprocess.run(
        _command(base_directory, "train.py"), cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return base_directory / "Digits" / "standard" / TINY, run.stdout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, printed = _finish(tmp_path_factory.mktemp("uninterrupted"))
    assert "Resuming" not in printed
    return directory


def _assert_same_run(directory: Path, reference: Path) -> None:
    assert (directory / "metrics.csv").read_text() == (reference / "metrics.csv").read_text()
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in reference.iterdir())
    ours, theirs = (read_checkpoint(path / "last.ckpt") for path in (directory, reference))
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key
    ours_state, theirs_state = (content["optimizer_states"][0]["state"] for content in (ours, theirs))
    for index, moments in theirs_state.items():
        assert torch.equal(ours_state[index]["exp_avg_sq"], moments["exp_avg_sq"])


@pytest.mark.slow
def test_killed_in_the_middle_goes_on_as_if_nothing_had_happened(uninterrupted: Path, tmp_path: Path) -> None:
    directory = tmp_path / "Digits" / "standard" / TINY
    process = subprocess.Popen(
        _command(tmp_path, "train.py"),
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        limit = time.monotonic() + 120
        while not (directory / "last.ckpt").exists():
            assert process.poll() is None, "training ended before it wrote a checkpoint"
            assert time.monotonic() < limit
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    done = read_checkpoint(directory / "last.ckpt")["epoch"] + 1
    assert done < EPOCHS, "the run was over before it could be killed"
    _, printed = _finish(tmp_path)
    assert "Resuming from" in printed
    _assert_same_run(directory, uninterrupted)


@pytest.mark.slow
def test_killed_during_a_checkpoint_write_goes_on_from_the_last_whole_one(uninterrupted: Path, tmp_path: Path) -> None:
    directory = tmp_path / "Digits" / "standard" / TINY
    killed = subprocess.run(
        _command(tmp_path, "-c", KILL_IN_WRITE), cwd=ROOT, env=_environment(), capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.suffix for path in directory.glob(".*")] == [".tmp"], "the half-written file"
    for checkpoint in epoch_checkpoints(directory):
        assert read_checkpoint(checkpoint.path)["epoch"] == checkpoint.epoch
    assert read_checkpoint(directory / "last.ckpt")["epoch"] == 1
    _, printed = _finish(tmp_path)
    assert f"2 of {EPOCHS} epochs are done" in printed
    _assert_same_run(directory, uninterrupted)


# Options


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--jit"], "TorchScript cannot express the B-cos operations. Use --compile"),
        (["--cache_dataset", "shm"], "--cache_dataset is not supported"),
        (["--wandb_name", "x"], "--wandb_name needs --wandb_logger"),
        (["--explanation_logging_every_n_epochs", "2"], "needs --explanation_logging"),
        (["--explanation_logging"], "base_network 'standard' is conventional"),
        (["--devices", "2"], "need --distributed"),
        (["--num_nodes", "2"], "need --distributed"),
    ],
)
def test_options_that_cannot_be_honoured_say_so(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        train_tiny(tmp_path, "standard", *arguments)
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_more_devices_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="--devices is 2, but this machine has 1 GPU"):
        train_tiny(tmp_path, "standard", "--distributed", "--devices", "2")


def test_distributed_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"--distributed found no GPU\. Give --devices N"):
        train_tiny(tmp_path, "standard", "--distributed")


@pytest.mark.parametrize(("option", "package"), [("--tensorboard_logger", "tensorboard"), ("--wandb_logger", "wandb")])
def test_loggers_name_the_package_that_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, package: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else real(name, *more))
    with pytest.raises(UserError, match=f"pip install {package}"):
        train_tiny(tmp_path, "standard", option)
    assert list(tmp_path.iterdir()) == []


def test_wandb_needs_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.loggers._require", lambda option, package: None)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    with pytest.raises(UserError, match="--wandb_project or set WANDB_PROJECT"):
        train_tiny(tmp_path, "standard", "--wandb_logger")


@pytest.mark.parametrize("missing", ["--dataset", "--base_network", "--experiment_name"])
def test_required_options(tmp_path: Path, missing: str) -> None:
    arguments = options(tmp_path)
    at = arguments.index(missing)
    with pytest.raises(UserError, match=f"{missing} is required; --list shows"):
        train.main(arguments[:at] + arguments[at + 2 :])


@pytest.mark.parametrize("arguments", [["--max_epochs", "0"], ["--batch_size", "x"], ["--num_workers", "-1"]])
def test_numbers_out_of_range(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        train.main([*options(tmp_path), *arguments])


def test_errors_on_the_command_line_are_one_sentence(tmp_path: Path) -> None:
    for script in ("train.py", "evaluate.py"):
        arguments = [*options(tmp_path), "--experiment_name", "resnet_11"]
        run = subprocess.run(
            [sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert run.returncode == 2
        assert run.stderr.startswith(f"{script}: error: Unknown experiment_name 'resnet_11'")
        assert "Traceback" not in run.stderr
