"""torch.hub's entry points, and folders that hold a network with its recipe."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bcos_kernels as bk
import hubconf
from models import create_model
from models.errors import CheckpointError, UserError
from models.experiments import find
from models.hub import HubNetwork
from tests.checkpoint_case import published, save
from tests.tiny_run import TINY

ROOT = Path(hubconf.__file__).parent


@pytest.fixture(scope="module")
def network() -> HubNetwork:
    torch.manual_seed(0)
    return HubNetwork(find("Digits", "bcosification", TINY)).eval()


@pytest.fixture
def folder(network: HubNetwork, tmp_path: Path) -> Path:
    return network.save_pretrained(tmp_path / "deep" / "folder")


# Folders


def test_saved_network_is_the_same_again(network: HubNetwork, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = HubNetwork.from_pretrained(folder)
    assert not again.training
    assert again.experiment == network.experiment
    images = torch.rand(2, 6, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))
    explanations = [bk.explain(model, images) for model in (again, network)]
    assert torch.equal(explanations[0].weights, explanations[1].weights)


def test_checkpoint_of_a_run_becomes_a_folder(tmp_path: Path) -> None:
    model, average = (create_model(TINY, "bcosification") for _ in range(2))
    save(tmp_path / "Digits" / "bcosification" / TINY / "last.ckpt", published(model, average))
    for ema, expected in ((False, model), (True, average)):
        network = HubNetwork.from_checkpoint("Digits", "bcosification", TINY, base_directory=tmp_path, ema=ema)
        again = HubNetwork.from_pretrained(network.save_pretrained(tmp_path / f"folder-{ema}"))
        state = again.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def test_number_of_classes_must_be_known() -> None:
    with pytest.raises(UserError, match="does not say how many classes"):
        HubNetwork(find("ImageFolder", "bcosification", "resnet_18"))


def _change(folder: Path, field: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"][field] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    (no_config := copy("a")).joinpath("config.json").unlink()
    (no_weights := copy("b")).joinpath("model.safetensors").unlink()
    (text := copy("c")).joinpath("config.json").write_text("{")
    (cut := copy("d")).joinpath("model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])
    _change(classes := copy("e"), "num_classes", 7)
    _change(unknown := copy("f"), "architecture", "resnet9000")
    _change(strange := copy("g"), "depth", 3)
    _change(kind := copy("h"), "num_classes", "ten")
    for broken, sentence in (
        (no_config, r"There is no config\.json in"),
        (no_weights, r"There is no checkpoint .*model\.safetensors"),
        (text, r"config\.json cannot be read"),
        (cut, r"model\.safetensors .* damaged or cut short"),
        (classes, r"'model\.fc\.linear\.weight' is \(10, 64, 1, 1\) in the file and \(7, 64, 1, 1\)"),
        (unknown, "Unknown architecture 'resnet9000'"),
        (strange, r"model\.depth is no field of a recipe"),
        (kind, r"model\.num_classes must be a whole number"),
    ):
        with pytest.raises(UserError, match=sentence):
            HubNetwork.from_pretrained(broken)


# Repositories


class _Hub(SimpleNamespace):
    """Stands in for huggingface_hub."""

    def __init__(self, stored: Path) -> None:
        super().__init__(stored=stored, created=[])

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.created.append((repo_id, options))

    def upload_folder(self, *, repo_id: str, folder_path: str, token: str | None) -> str:
        shutil.copytree(folder_path, self.stored / repo_id)
        return f"https://hub/{repo_id}"

    def snapshot_download(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if not (self.stored / repository).is_dir():
            raise FileNotFoundError(f"404: {repository}@{revision}\nand a long story")
        assert sorted(path.name for path in (self.stored / repository).iterdir()) == sorted(allow_patterns)
        return str(self.stored / repository)


def test_there_and_back(network: HubNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert network.push_to_hub("somebody/digits", private=True) == "https://hub/somebody/digits"
    assert hub.created == [("somebody/digits", {"private": True, "token": None, "exist_ok": True})]
    again = HubNetwork.from_pretrained("somebody/digits")
    assert torch.equal(again.model.state_dict()["model.conv1.linear.weight"], network.model.model.conv1.linear.weight)
    with pytest.raises(CheckpointError, match=r"^nobody/x is no folder, and could not .* 404: nobody/x@main$"):
        HubNetwork.from_pretrained("nobody/x", revision="main")
    with pytest.raises(CheckpointError, match="called owner/name"):
        HubNetwork.from_pretrained("./no/such/folder")


def test_package_is_named_where_it_is_missing(network: HubNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'bcos_kernels\[hub\]'"):
        HubNetwork.from_pretrained("somebody/digits")
    with pytest.raises(UserError, match=r"pip install 'bcos_kernels\[hub\]'"):
        network.push_to_hub("somebody/digits")


# torch.hub


def _load(name: str, **options: Any) -> Any:
    return torch.hub.load(str(ROOT), name, source="local", **options)


def test_entry_points_are_the_networks_and_nothing_else() -> None:
    names = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert {"resnet_18", "resnet_50", "resnet_50_V1", "densenet_121", "resnet_50_clip"} <= names
    assert {"simple_vit_ti_patch16_224", "vitc_l_patch1_14"} <= names
    assert all("pretrained" in (getattr(hubconf, name).__doc__ or "") for name in names)
    assert all(name.split("_")[0] in ("resnet", "densenet", "simple", "vitc") for name in names)


def test_networks_out_of_torch_hub(tmp_path: Path) -> None:
    model = _load("resnet_18", num_classes=4)
    assert model(torch.rand(1, 6, 64, 64)).shape == (1, 4)
    path = save(tmp_path / "last.ckpt", published(model))
    again = _load("resnet_18", num_classes=4, pretrained=str(path))
    assert torch.equal(again.model.conv1.linear.weight, model.model.conv1.linear.weight)
    assert _load("simple_vit_ti_patch16_224", num_classes=2)(torch.rand(1, 6, 32, 32)).shape == (1, 2)
    with pytest.raises(CheckpointError, match="no pretrained weights for 'simple_vit_ti_patch16_224'"):
        _load("simple_vit_ti_patch16_224", pretrained=True)


def test_pretrained_is_where_fine_tuning_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("models.factory.create_model", lambda *arguments, **more: asked.append((arguments, more)))
    hubconf.resnet_50(pretrained=True)
    assert asked == [(("resnet_50", "bcosification", "pretrained", None), {"dataset": "ImageNet"})]
