"""Finding, reading and writing checkpoints, and the sentence for each that cannot be used."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import create_model, load_checkpoint
from models.checkpoints import checkpoint_path, epoch_checkpoints, epoch_filename, load_weights, read_state_dict
from models.errors import CheckpointError, UserError
from training.checkpoint_io import AtomicCheckpointIO, link_atomically, remove_temporary
from training.fit import find_resumable


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def _save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def _lightning(network: nn.Module, prefix: str = "model.", **more: Any) -> dict[str, Any]:
    return {"state_dict": {f"{prefix}{key}": value for key, value in network.state_dict().items()}, **more}


def _touch(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()


# Finding


def test_best_is_by_accuracy_then_by_epoch(tmp_path: Path) -> None:
    _touch(tmp_path, *(epoch_filename(epoch, acc1) for epoch, acc1 in [(3, 0.98), (4, 0.97), (10, 0.98), (2, 0.5)]))
    _touch(tmp_path, "epoch=99-val_acc1=1.ckpt.part", "epoch=x-val_acc1=0.9.ckpt", "last.ckpt")
    assert [found.epoch for found in epoch_checkpoints(tmp_path)] == [10, 3, 4, 2]
    assert checkpoint_path(tmp_path, "best").name == "epoch=10-val_acc1=0.98000.ckpt"
    assert checkpoint_path(tmp_path, "epoch_4").name == "epoch=4-val_acc1=0.97000.ckpt"
    assert checkpoint_path(tmp_path, "last") == tmp_path / "last.ckpt"


def test_accuracies_one_image_in_fifty_thousand_apart_are_told_apart() -> None:
    assert epoch_filename(1, 0.70002) != epoch_filename(1, 0.70004)


def test_published_layout_with_one_more_folder(tmp_path: Path) -> None:
    _touch(tmp_path, "resnet_18/last.ckpt")
    assert checkpoint_path(tmp_path, "last") == tmp_path / "resnet_18" / "last.ckpt"
    _touch(tmp_path, "other/last.ckpt")
    with pytest.raises(CheckpointError, match=r"several last\.ckpt; choose one with --weights"):
        checkpoint_path(tmp_path, "last")
    _touch(tmp_path, "last.ckpt")
    assert checkpoint_path(tmp_path, "last") == tmp_path / "last.ckpt"


@pytest.mark.parametrize(
    ("reload", "sentence"),
    [
        ("last", r"no checkpoint .*last\.ckpt"),
        ("best", "to take the best of"),
        ("epoch_7", "no checkpoint of epoch 7 .* there are none"),
        ("epoch_", "must be 'last', 'best' or 'epoch_N'"),
        ("newest", "must be 'last', 'best' or 'epoch_N' with a number N, got 'newest'"),
    ],
)
def test_nothing_to_reload(tmp_path: Path, reload: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint_path(tmp_path, reload)


def test_missing_epoch_says_which_are_kept(tmp_path: Path) -> None:
    _touch(tmp_path, epoch_filename(3, 0.9))
    with pytest.raises(CheckpointError, match=r"kept are .*epoch=3-val_acc1=0\.90000\.ckpt"):
        checkpoint_path(tmp_path, "epoch_2")


# Reading


@pytest.mark.parametrize("form", ["lightning", "model_state_dict", "plain"])
def test_all_forms_are_read(tmp_path: Path, form: str) -> None:
    source, target = _network(), _network()
    content = {
        "lightning": _lightning(source, epoch=3, optimizer_states=[{"state": {}}]),
        "model_state_dict": {"model_state_dict": source.state_dict(), "epoch": 3},
        "plain": source.state_dict(),
    }[form]
    load_weights(target, _save(tmp_path / "x.ckpt", content))
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_moving_average_is_read_where_there_is_one(tmp_path: Path) -> None:
    model, average, target = _network(), _network(), _network()
    content = _lightning(model)
    content["state_dict"] |= _lightning(average, "ema.module.")["state_dict"]
    load_weights(target, _save(tmp_path / "x.ckpt", content), ema=True)
    assert torch.equal(target[0].weight, average[0].weight)
    with pytest.raises(CheckpointError, match=r"holds no moving average .* 'ema\.module\.'"):
        read_state_dict(_save(tmp_path / "y.ckpt", _lightning(model)), ema=True)
    with pytest.raises(CheckpointError, match=r"\(--ema\)"):
        read_state_dict(_save(tmp_path / "z.ckpt", model.state_dict()), ema=True)


def test_old_torchvision_names_are_understood(tmp_path: Path) -> None:
    state = {"features.denseblock1.denselayer2.norm.1.weight": torch.ones(1), "features.norm0.weight": torch.ones(1)}
    assert set(read_state_dict(_save(tmp_path / "x.pth", state))) == {
        "features.denseblock1.denselayer2.norm1.weight",
        "features.norm0.weight",
    }


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = _network().state_dict()
    del state["1.num_batches_tracked"]
    load_weights(_network(), _save(tmp_path / "x.pth", state))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"There is no checkpoint {tmp_path / 'x.ckpt'}"):
        load_weights(_network(), tmp_path / "x.ckpt")


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = _save(tmp_path / "x.ckpt", _lightning(_network()))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.ckpt cannot be read as a checkpoint; it is damaged or cut short"):
        load_weights(_network(), path)


class _Runs:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("harmless", [True, False])
def test_objects_are_refused_and_never_run(tmp_path: Path, harmless: bool) -> None:
    content = _lightning(_network(), hyper_parameters=Namespace(lr=1) if harmless else _Runs(tmp_path / "made"))
    with pytest.raises(CheckpointError, match="holds Python objects besides tensors"):
        load_weights(_network(), _save(tmp_path / "x.ckpt", content))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {}}, {"model_state_dict": {"a": 1}}])
def test_file_without_a_network(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"x\.ckpt holds no network"):
        load_weights(_network(), _save(tmp_path / "x.ckpt", content))
    with pytest.raises(CheckpointError, match="holds a list, not a dictionary"):
        load_weights(_network(), _save(tmp_path / "y.ckpt", [1]))


def test_weights_of_another_network_change_nothing(tmp_path: Path) -> None:
    target = _network()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = _network().state_dict()
    state["0.weight"] = torch.zeros(5, 3)
    state["2.extra"] = state.pop("0.bias")
    with pytest.raises(CheckpointError) as caught:
        load_weights(target, _save(tmp_path / "x.ckpt", state))
    for part in (
        "x.ckpt does not fit",
        "1 missing ('0.bias')",
        "1 unexpected ('2.extra')",
        "'0.weight' is (5, 3) in the file",
    ):
        assert part in str(caught.value)
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key])


def test_conventional_weights_do_not_pass_for_converted_ones(tmp_path: Path) -> None:
    path = _save(tmp_path / "x.ckpt", create_model("resnet_10_w8", "standard").state_dict())
    with pytest.raises(CheckpointError, match="does not fit the network"):
        create_model("resnet_10_w8", "bcosification", weights=path)


@pytest.mark.parametrize("base_network", ["standard", "bcosification"])
def test_load_checkpoint(tmp_path: Path, base_network: str) -> None:
    model = create_model("resnet_10_w8", base_network).eval()
    folder = tmp_path / "Digits" / base_network / "resnet_10_w8"
    _save(folder / "last.ckpt", _lightning(model, epoch=0))
    loaded = load_checkpoint("Digits", base_network, "resnet_10_w8", base_directory=tmp_path)
    assert not loaded.training
    images = torch.rand(2, 3 if base_network == "standard" else 6, 32, 32)
    assert torch.equal(loaded(images), model(images))
    other = load_checkpoint("Digits", base_network, "resnet_10_w8", weights=folder / "last.ckpt")
    assert torch.equal(other(images), model(images))


def test_load_checkpoint_of_a_folder_of_images_needs_its_classes(tmp_path: Path) -> None:
    model = create_model("resnet_18", "standard", num_classes=3)
    folder = tmp_path / "ImageFolder" / "standard" / "resnet_18"
    _save(folder / "last.ckpt", _lightning(model))
    with pytest.raises(UserError, match=r"num_classes: neither dataset 'ImageFolder' nor .*config\.json"):
        load_checkpoint("ImageFolder", "standard", "resnet_18", base_directory=tmp_path)
    (folder / "config.json").write_text('{"model": {"num_classes": 3}}')
    assert load_checkpoint("ImageFolder", "standard", "resnet_18", base_directory=tmp_path).fc.out_features == 3


# Writing


def test_written_checkpoint_is_read_back(tmp_path: Path) -> None:
    files = AtomicCheckpointIO()
    path = tmp_path / "deep" / "x.ckpt"
    files.save_checkpoint({"epoch": 3, "state_dict": {"model.a": torch.ones(2)}}, path)
    assert files.load_checkpoint(path)["epoch"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["x.ckpt"]
    files.remove_checkpoint(path)
    assert not path.exists()


@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    files = AtomicCheckpointIO()
    path = tmp_path / "x.ckpt"
    files.save_checkpoint({"epoch": 1}, path)

    def fail(*arguments: Any) -> None:
        if moment == "write":
            Path(arguments[1]).write_bytes(b"half")
        raise InterruptedError

    target = {"write": "torch.save", "sync": "training.checkpoint_io._sync", "rename": "os.replace"}[moment]
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(InterruptedError):
            files.save_checkpoint({"epoch": 2}, path)
    assert files.load_checkpoint(path) == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 2
    assert epoch_checkpoints(tmp_path) == []
    remove_temporary(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize("links", [True, False])
def test_second_name_survives_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError("no hard links here")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    source, last = tmp_path / "epoch.ckpt", tmp_path / "last.ckpt"
    for text in ("one", "two"):
        source.write_text(text)
        link_atomically(source, last)
        source.unlink()
        assert last.read_text() == text


# Resuming


def test_resume_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert find_resumable(tmp_path) is None
    for epoch in (3, 4):
        _save(tmp_path / epoch_filename(epoch, 0.9), {"epoch": epoch})
    _save(tmp_path / "last.ckpt", {"epoch": 4})
    found = find_resumable(tmp_path)
    assert found is not None
    assert (found.path.name, found.epoch) == ("last.ckpt", 4)
    # Killed after epoch 5's file was written, before it was named last.ckpt.
    newest = _save(tmp_path / epoch_filename(5, 0.8), {"epoch": 5})
    found = find_resumable(tmp_path)
    assert found is not None
    assert (found.path, found.epoch) == (newest, 5)


def test_damaged_last_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    for epoch in (3, 4):
        _save(tmp_path / epoch_filename(epoch, 0.9), {"epoch": epoch})
    (tmp_path / "last.ckpt").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"last\.ckpt cannot be read"):
        found = find_resumable(tmp_path)
    assert found is not None
    assert found.epoch == 4


def test_nothing_whole_to_resume_from(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"half")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="--force-no-resume begins anew"),
    ):
        find_resumable(tmp_path)


def test_published_weights_are_not_resumed(tmp_path: Path) -> None:
    _save(tmp_path / "last.ckpt", _network().state_dict())
    with pytest.raises(CheckpointError, match="holds weights but not the state of a training run"):
        find_resumable(tmp_path)
