"""Weights for others: what is written has the names and the layout that the public code reads."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from models import create_model, export, load_checkpoint
from models.checkpoints import load_weights
from models.errors import CheckpointError, UserError
from models.experiments import find
from tests import golden_case
from tests.checkpoint_case import published, save
from tests.tiny_run import TINY, options

NAMES = {
    "resnet_18": ("bcosification", "resnet_18"),
    "densenet_121": ("bcosification", "densenet_121"),
    "simple_vit_ti": ("vit_bcosification", "bcosifyv2_bcos_simple_vit_ti_patch16_224_0.001_gapReorder"),
    "clip_rn50": (
        "clip_bcosification",
        "resnet_50_clip_b2_noBias_randomResizedCrop_sigLip_ImageNet_bcosification",
    ),
    "vitc_ti": ("vit_bcosification", "bcosifyv2_bcos_vitc_ti_patch1_14_0.001_gapReorder"),
}


@pytest.fixture(scope="module")
def public_loader() -> Any:
    """The code by which B-cos v2 and B-cosification read checkpoints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("bcos.experiments.utils.experiment_utils.loading_utils")


def _experiment(folder: Path) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model, average = (create_model(TINY, "bcosification").eval() for _ in range(2))
    save(folder / "Digits" / "bcosification" / TINY / "last.ckpt", published(model, average, epoch=11))
    return model, average


@pytest.mark.parametrize("golden", NAMES)
def test_public_code_finds_the_golden_names(tmp_path: Path, public_loader: Any, golden: str) -> None:
    _, meta = golden_case.load(golden)
    base_network, name = NAMES[golden]
    model = create_model(name, base_network)
    export.save_lightning(model, tmp_path / "last.ckpt", epoch=3, average=model)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for ema in (False, True):
        state = public_loader.load_model_state_dict_from_training_ckpt(content, ema=ema)
        assert list(state) == meta["state_keys"]
        assert [list(value.shape) for value in state.values()] == meta["state_shapes"]
    export.save_state_dict(model, tmp_path / "x.pth")
    assert list(torch.load(tmp_path / "x.pth", weights_only=True)) == meta["state_keys"]


def test_public_code_reads_a_whole_experiment(tmp_path: Path, public_loader: Any) -> None:
    model, average = _experiment(tmp_path)
    output = tmp_path / "public" / "last.ckpt"
    arguments = options(tmp_path, "bcosification", "--output", str(output))
    export.main(arguments)
    for ema, expected in ((False, model), (True, average)):
        state, content = public_loader.get_state_dict_and_training_ckpt_from_save_dir(output.parent, ema=ema)
        assert content["epoch"] == 11
        create_model(TINY, "bcosification").load_state_dict(state)
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".ckpt"])
@pytest.mark.parametrize("ema", [False, True])
def test_what_is_written_is_read_back(tmp_path: Path, ending: str, ema: bool) -> None:
    expected = _experiment(tmp_path)[ema]
    output = tmp_path / f"x{ending}"
    in_file = ema and ending == ".ckpt"  # beside the weights
    arguments = options(tmp_path, "bcosification", "--output", str(output))
    assert export.main(arguments + (["--ema"] if ema and not in_file else [])) == output
    loaded = load_checkpoint("Digits", "bcosification", TINY, weights=output, ema=in_file)
    images = torch.rand(2, 6, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), expected(images))


def test_safetensors_say_what_they_are(tmp_path: Path) -> None:
    _experiment(tmp_path)
    path = tmp_path / "x.safetensors"
    export.main(options(tmp_path, "bcosification", "--output", str(path)))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["experiment_name"] == TINY
    assert metadata["format"] == "pt"
    assert {"bcos_kernels", "torch", "dataset", "base_network"} <= set(metadata)


def test_classes_of_a_folder_of_images_are_those_that_were_trained(tmp_path: Path) -> None:
    model = create_model("resnet_18", num_classes=3)
    folder = tmp_path / "ImageFolder" / "bcosification" / "resnet_18"
    save(folder / "last.ckpt", published(model))
    arguments = ["--dataset", "ImageFolder", "--base_network", "bcosification", "--experiment_name", "resnet_18"]
    arguments += ["--base_directory", str(tmp_path), "--output", str(tmp_path / "x.pth")]
    with pytest.raises(UserError, match="num_classes"):
        export.main(arguments)
    recipe = find("ImageFolder", "bcosification", "resnet_18").to_dict()
    recipe["model"]["num_classes"] = 3  # type: ignore[index]
    (folder / "config.json").write_text(json.dumps(recipe))
    export.main(arguments)
    load_weights(model, tmp_path / "x.pth")


def test_errors(tmp_path: Path) -> None:
    _experiment(tmp_path)
    arguments = options(tmp_path, "bcosification")
    with pytest.raises(UserError, match=r"must end in one of \.safetensors, \.pth, \.ckpt"):
        export.main([*arguments, "--output", str(tmp_path / "x.onnx")])
    with pytest.raises(UserError, match="holds the weights and their moving average anyway"):
        export.main([*arguments, "--ema", "--output", str(tmp_path / "x.ckpt")])
    path = tmp_path / "Digits" / "bcosification" / TINY / "last.ckpt"
    with pytest.raises(CheckpointError, match="does not fit"):
        export.main([*options(tmp_path, "standard"), "--output", str(tmp_path / "x.pth"), "--weights", str(path)])
    assert not (tmp_path / "x.pth").exists()
    (tmp_path / "file").touch()
    for name in ("x.pth", "x.ckpt", "x.safetensors"):
        with pytest.raises(UserError, match=rf"--output: .*{name} cannot be written \(.*\); choose another place"):
            export.main([*arguments, "--output", str(tmp_path / "file" / name)])
