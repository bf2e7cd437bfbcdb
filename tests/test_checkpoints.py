"""Finding checkpoints, and reading what we and others write. Files that must be refused: test_hostile_files.py."""

from __future__ import annotations

import importlib
import pathlib
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import bcos_kernels as bk
from models import create_model, load_checkpoint
from models.atomic import link_atomically, remove_temporary
from models.checkpoint_files import read_checkpoint
from models.checkpoints import (
    epoch_checkpoints,
    epoch_filename,
    experiment_directory,
    find_checkpoint,
    load_weights,
    read_state_dict,
)
from models.clip import ClipResNet
from models.errors import CheckpointError, UserError
from models.experiments import find
from models.factory import starting_network
from tests.checkpoint_case import lightning, network, published, save
from training.checkpoint_io import AtomicCheckpointIO
from training.fit import find_resumable


def _touch(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()


def _name(epoch: int, acc1: float, ema: float | None = None) -> str:
    return epoch_filename(epoch, {"val_acc1": acc1} | ({} if ema is None else {"val_acc1_ema": ema}))


def _assert_same(model: nn.Module, other: nn.Module) -> None:
    assert list(model.state_dict()) == list(other.state_dict())
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


# Finding


def test_best_is_by_accuracy_then_by_epoch(tmp_path: Path) -> None:
    _touch(tmp_path, *(_name(epoch, acc1) for epoch, acc1 in [(3, 0.98), (4, 0.97), (10, 0.98), (2, 0.5)]))
    _touch(tmp_path, "epoch=99-val_acc1=1.ckpt.part", "epoch=x-val_acc1=0.9.ckpt", "epoch=99.ckpt", "last.ckpt")
    assert [found.epoch for found in epoch_checkpoints(tmp_path)] == [10, 3, 4, 2]
    assert find_checkpoint(tmp_path, "best") == (tmp_path / "epoch=10-val_acc1=0.98000.ckpt", False)
    assert find_checkpoint(tmp_path, "epoch_4") == (tmp_path / "epoch=4-val_acc1=0.97000.ckpt", False)
    assert find_checkpoint(tmp_path, "last") == (tmp_path / "last.ckpt", False)


def test_best_is_by_loss_where_there_are_no_classes(tmp_path: Path) -> None:
    _touch(tmp_path, *(epoch_filename(epoch, {"val_loss": loss}) for epoch, loss in [(0, 12.5), (1, 3.25), (2, 4)]))
    _touch(tmp_path, epoch_filename(3, {"val_loss": float("nan")}))
    assert [found.epoch for found in epoch_checkpoints(tmp_path)] == [1, 2, 0, 3]


def test_best_any_takes_the_weights_or_their_moving_average(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    _touch(ours, _name(1, 0.70, 0.60), _name(2, 0.68, 0.71), _name(3, 0.69, 0.65))
    # The public code writes a file for each of the two.
    _touch(theirs, "epoch=1-val_acc1=0.7000.ckpt", "epoch=2-val_acc1_ema=0.7100.ckpt", "epoch=2-val_acc1=0.6-v1.ckpt")
    for directory in (ours, theirs):
        found = [find_checkpoint(directory, "best", ema=ema) for ema in (False, True)]
        assert [path.name[:7] for path, _ in found] == ["epoch=1", "epoch=2"]
        assert find_checkpoint(directory, "best_any") == (found[1][0], True)
        assert find_checkpoint(directory, "epoch_2", ema=True)[1]
    _touch(ours, _name(4, 0.71, 0.1))
    assert find_checkpoint(ours, "best_any", ema=True) == (ours / _name(4, 0.71, 0.1), False)
    for path in theirs.glob("*ema*"):
        path.unlink()
    assert find_checkpoint(theirs, "best_any") == (theirs / "epoch=1-val_acc1=0.7000.ckpt", False)
    with pytest.raises(CheckpointError, match="no epoch=N-val_acc1_ema=X"):
        find_checkpoint(theirs, "best", ema=True)


def test_accuracies_one_image_in_fifty_thousand_apart_are_told_apart() -> None:
    assert _name(1, 0.70002) != _name(1, 0.70004)


def test_published_layout_with_one_more_folder(tmp_path: Path) -> None:
    _touch(tmp_path, "resnet_18/last.ckpt")
    assert find_checkpoint(tmp_path, "last")[0] == tmp_path / "resnet_18" / "last.ckpt"
    _touch(tmp_path, "other/last.ckpt")
    with pytest.raises(CheckpointError, match=r"several last\.ckpt; choose one with --weights"):
        find_checkpoint(tmp_path, "last")
    _touch(tmp_path, "last.ckpt")
    assert find_checkpoint(tmp_path, "last")[0] == tmp_path / "last.ckpt"


def test_folder_of_the_name_as_it_was_typed(tmp_path: Path) -> None:
    experiment = find("ImageNet", "bcosification", "resnet18")
    ours = tmp_path / "ImageNet" / "bcosification" / "resnet_18"
    assert experiment_directory(experiment, "resnet18", tmp_path) == ours
    ours.with_name("resnet18").mkdir(parents=True)
    assert experiment_directory(experiment, "resnet18", tmp_path) == ours.with_name("resnet18")
    ours.mkdir()
    assert experiment_directory(experiment, "resnet18", tmp_path) == ours


@pytest.mark.parametrize(
    ("reload", "sentence"),
    [
        ("last", r"no checkpoint .*last\.ckpt"),
        ("best", "to take the best of"),
        ("best_any", "to take the best of"),
        ("epoch_7", "no checkpoint of epoch 7 .* there are none"),
        ("epoch_", "must be 'last', 'best', 'best_any' or 'epoch_N'"),
        ("newest", "must be 'last', 'best', 'best_any' or 'epoch_N' with a number N, got 'newest'"),
    ],
)
def test_nothing_to_reload(tmp_path: Path, reload: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        find_checkpoint(tmp_path, reload)


def test_missing_epoch_says_which_are_kept(tmp_path: Path) -> None:
    _touch(tmp_path, _name(3, 0.9))
    with pytest.raises(CheckpointError, match=r"kept are .*epoch=3-val_acc1=0\.90000\.ckpt"):
        find_checkpoint(tmp_path, "epoch_2")


# Reading


@pytest.mark.parametrize(
    "form",
    ["lightning", "published", "model_state_dict", "state_dict", "model", "data_parallel", "plain", "before 2020"],
)
def test_all_forms_are_read(tmp_path: Path, form: str) -> None:
    source, target = network(), network()
    path = tmp_path / "x.ckpt"
    contents: dict[str, Any] = {
        "lightning": lightning(source, epoch=3, optimizer_states=[{"state": {}}]),
        "published": published(source),
        "model_state_dict": {"model_state_dict": source.state_dict(), "epoch": 3},
        "state_dict": {"state_dict": source.state_dict(), "epoch": 3},
        "model": {"model": source.state_dict(), "epoch": 3},
        "data_parallel": {"state_dict": lightning(source, "module.")["state_dict"]},
        "plain": source.state_dict(),
    }
    if form == "before 2020":
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        save(path, contents[form])
    load_weights(target, path)
    _assert_same(target, source)


def test_safetensors_by_content_and_not_by_name(tmp_path: Path) -> None:
    source = network()
    for name in ("x.safetensors", "x.ckpt"):
        target = network()
        save_file(source.state_dict(), tmp_path / name)
        load_weights(target, tmp_path / name)
        _assert_same(target, source)
    target = network()
    load_weights(target, save(tmp_path / "torch.safetensors", source.state_dict()))
    _assert_same(target, source)


def test_moving_average_is_read_where_there_is_one(tmp_path: Path) -> None:
    model, average, target = network(), network(), network()
    path = save(tmp_path / "x.ckpt", published(model, average))
    load_weights(target, path, ema=True)
    _assert_same(target, average)
    load_weights(target, path)
    _assert_same(target, model)
    with pytest.raises(CheckpointError, match=r"holds no moving average .* 'ema\.module\.'"):
        read_state_dict(save(tmp_path / "y.ckpt", published(model)), ema=True)
    with pytest.raises(CheckpointError, match=r"\(--ema\)"):
        read_state_dict(save(tmp_path / "z.ckpt", model.state_dict()), ema=True)


def test_what_lightning_stores_comes_as_plain_values(tmp_path: Path) -> None:
    given = {
        "path": pathlib.PosixPath("/a/b"),
        "lr": np.float64(0.1),
        "steps": np.int32(3),
        "big_endian": np.array(0.25, dtype=">f4")[()],
        "options": Namespace(a=1),
        "dtype": torch.float16,
    }
    content = read_checkpoint(save(tmp_path / "x.ckpt", published(network()) | {"hyper_parameters": given}))
    assert content["hyper_parameters"] == {
        "path": pathlib.PurePosixPath("/a/b"),
        "lr": 0.1,
        "steps": 3,
        "big_endian": 0.25,
        "options": Namespace(a=1),
        "dtype": torch.float16,
    }
    assert [type(content["hyper_parameters"][key]) for key in ("lr", "steps")] == [float, int]


def test_old_torchvision_names_are_understood(tmp_path: Path) -> None:
    state = {"features.denseblock1.denselayer2.norm.1.weight": torch.ones(1), "features.norm0.weight": torch.ones(1)}
    assert set(read_state_dict(save(tmp_path / "x.pth", state))) == {
        "features.denseblock1.denselayer2.norm1.weight",
        "features.norm0.weight",
    }


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = network().state_dict()
    del state["1.num_batches_tracked"]
    load_weights(network(), save(tmp_path / "x.pth", state))


def test_half_precision_is_converted(tmp_path: Path) -> None:
    source, target = network(), network()
    load_weights(target, save(tmp_path / "x.pth", network().half().state_dict() | source.half().state_dict()))
    assert target[0].weight.dtype == torch.float32
    assert torch.equal(target[0].weight, source[0].weight.float())


@pytest.mark.parametrize("name", ["resnet_18", "densenet_121"])
def test_timm_and_torchvision_call_the_layers_alike(tmp_path: Path, name: str) -> None:
    """So that conversion starts from either's weights."""
    torch.manual_seed(0)
    arch = name.replace("_", "")
    experiment = find("ImageNet", "bcosification", name)
    with torch.no_grad():
        for source in (timm.create_model(arch), getattr(torchvision.models, arch)()):
            path = tmp_path / "x.safetensors"
            save_file(source.state_dict(), path)
            model = starting_network(experiment, 1000, tmp_path, path)
            reference = getattr(torchvision.models, arch)()
            reference.load_state_dict(source.state_dict())
            _assert_same(model, bk.bcosify(reference))


class _Clip(nn.Module):
    """As OpenAI's archive is made up: the image encoder in float16, beside a text side and settings."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.token_embedding = nn.Embedding(4, 4)
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.register_buffer("input_resolution", torch.tensor(64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)


def _clip_archive(path: Path, output_dim: int = 8) -> nn.Module:
    torch.manual_seed(0)
    visual = ClipResNet((1, 1, 1, 1), output_dim, heads=4, resolution=64, width=8).eval().half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files are what they are
        torch.jit.trace(_Clip(visual), torch.rand(1, 3, 64, 64).half()).save(str(path))
    return visual


def test_image_encoder_of_a_clip_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visual = _clip_archive(tmp_path / "clip.pt")
    monkeypatch.setattr("torch.jit.load", lambda *_: pytest.fail("runs the archive's code"))
    model = ClipResNet((1, 1, 1, 1), output_dim=8, heads=4, resolution=64, width=8)
    load_weights(model, tmp_path / "clip.pt")
    for key, value in visual.state_dict().items():
        own = model.state_dict()[key]
        assert torch.equal(own, value.to(own.dtype)), key
    assert model.conv1.weight.dtype == torch.float32


def test_clip_archive_of_another_size_says_so(tmp_path: Path) -> None:
    _clip_archive(tmp_path / "clip.pt", output_dim=6)
    model = ClipResNet((1, 1, 1, 1), output_dim=8, heads=4, resolution=64, width=8)
    with pytest.raises(CheckpointError, match=r"'attnpool\.c_proj\.weight' is \(6, 256\) in the file and \(8, 256\)"):
        load_weights(model, tmp_path / "clip.pt")


@pytest.fixture(scope="module")
def b_cos_v2() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pretrained = importlib.import_module("bcos.models.pretrained")
        model: nn.Module = pretrained.resnet18(pretrained=False)
    return model


def test_b_cos_v2_files_belong_to_its_own_networks(tmp_path: Path, b_cos_v2: nn.Module) -> None:
    """Called alike but for the prefix, normalised otherwise: they must not pass for B-cosified ones."""
    path = save(tmp_path / "resnet_18.pth", b_cos_v2.state_dict())
    with pytest.raises(CheckpointError, match=r"B-cos network of B-cos v2.*build it with the package bcos"):
        create_model("resnet_18", weights=path)
    with torch.no_grad():
        for parameter in b_cos_v2.parameters():
            parameter.zero_()
    load_weights(bk.accelerate(b_cos_v2), path)
    assert b_cos_v2.fc.linear.weight.detach().abs().max() > 0


def test_weights_of_another_network_change_nothing(tmp_path: Path) -> None:
    target = network()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = network().state_dict()
    state["0.weight"] = torch.zeros(5, 3)
    state["2.extra"] = state.pop("0.bias")
    with pytest.raises(CheckpointError) as caught:
        load_weights(target, save(tmp_path / "x.ckpt", state))
    for part in (
        "x.ckpt does not fit",
        "1 missing ('0.bias')",
        "1 unexpected ('2.extra')",
        "'0.weight' is (5, 3) in the file",
    ):
        assert part in str(caught.value)
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key])


def test_conventional_and_converted_weights_do_not_pass_for_one_another(tmp_path: Path) -> None:
    for there, here, hint in (
        ("standard", "bcosification", "conventional network's: --init_weights"),
        ("bcosification", "standard", "B-cosified network's, this one is conventional"),
    ):
        path = save(tmp_path / "x.ckpt", create_model("resnet_10_w8", there).state_dict())
        with pytest.raises(CheckpointError, match=f"does not fit the network.*{hint}"):
            create_model("resnet_10_w8", here, weights=path)


@pytest.mark.parametrize("base_network", ["standard", "bcosification"])
def test_load_checkpoint(tmp_path: Path, base_network: str) -> None:
    model, average = (create_model("resnet_10_w8", base_network).eval() for _ in range(2))
    folder = tmp_path / "Digits" / base_network / "resnet_10_w8"
    save(folder / "resnet_10_w8" / "last.ckpt", published(model, average))
    loaded = load_checkpoint("Digits", base_network, "resnet_10_w8", base_directory=tmp_path)
    assert not loaded.training
    _assert_same(loaded, model)
    _assert_same(load_checkpoint("Digits", base_network, "resnet_10_w8", base_directory=tmp_path, ema=True), average)
    path = folder / "resnet_10_w8" / "last.ckpt"
    _assert_same(load_checkpoint("Digits", base_network, "resnet_10_w8", weights=path), model)
    save(folder / _name(3, 0.5, 0.75), published(model, average))
    best = load_checkpoint("Digits", base_network, "resnet_10_w8", reload="best_any", base_directory=tmp_path)
    _assert_same(best, average)


def test_load_checkpoint_from_the_folder_that_the_public_readme_names(tmp_path: Path) -> None:
    model = create_model("resnet_18", "bcosification", dataset="ImageNet")
    save(tmp_path / "ImageNet" / "bcosification" / "resnet18" / "resnet18" / "last.ckpt", published(model))
    _assert_same(load_checkpoint("ImageNet", "bcosification", "resnet18", base_directory=tmp_path), model)


def test_load_checkpoint_of_a_folder_of_images_needs_its_classes(tmp_path: Path) -> None:
    model = create_model("resnet_18", "standard", num_classes=3)
    folder = tmp_path / "ImageFolder" / "standard" / "resnet_18"
    save(folder / "last.ckpt", lightning(model))
    with pytest.raises(UserError, match=r"num_classes: neither dataset 'ImageFolder' nor .*config\.json"):
        load_checkpoint("ImageFolder", "standard", "resnet_18", base_directory=tmp_path)
    loaded = load_checkpoint("ImageFolder", "standard", "resnet_18", base_directory=tmp_path, num_classes=3)
    assert loaded.fc.out_features == 3


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

    target = {"write": "torch.save", "sync": "models.atomic._sync", "rename": "os.replace"}[moment]
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


def _run(epoch: int) -> dict[str, Any]:
    return lightning(network(), epoch=epoch, optimizer_states=[])


def test_resume_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert find_resumable(tmp_path) is None
    for epoch in (3, 4):
        save(tmp_path / _name(epoch, 0.9), _run(epoch))
    save(tmp_path / "last.ckpt", _run(4))
    found = find_resumable(tmp_path)
    assert found is not None
    assert (found.path.name, found.epoch) == ("last.ckpt", 4)
    # Killed after epoch 5's file was written, before it was named last.ckpt.
    newest = save(tmp_path / _name(5, 0.8), _run(5))
    found = find_resumable(tmp_path)
    assert found is not None
    assert (found.path, found.epoch) == (newest, 5)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _spoil(path: Path) -> None:
    content = _run(5)
    content["state_dict"]["model.0.bias"][1] = float("nan")
    save(path, content)


@pytest.mark.parametrize(("damage", "sentence"), [(_truncate, "cut short"), (_spoil, r"'model\.0\.bias': 1 of 2")])
def test_damaged_last_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    for epoch in (3, 4):
        save(tmp_path / _name(epoch, 0.9), _run(epoch))
    damage(save(tmp_path / "last.ckpt", _run(5)))
    with pytest.warns(UserWarning, match=rf"last\.ckpt .*{sentence}.*It is passed over"):
        found = find_resumable(tmp_path)
    assert found is not None
    assert found.epoch == 4


def test_nothing_whole_to_resume_from(tmp_path: Path) -> None:
    _truncate(save(tmp_path / "last.ckpt", _run(5)))
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="--force-no-resume begins anew"),
    ):
        find_resumable(tmp_path)


@pytest.mark.parametrize("content", [network().state_dict(), lightning(network(), epoch=3)])
def test_weights_alone_are_not_resumed(tmp_path: Path, content: dict[str, Any]) -> None:
    save(tmp_path / "last.ckpt", content)
    with pytest.raises(CheckpointError, match="holds weights but not the state of a training run"):
        find_resumable(tmp_path)
