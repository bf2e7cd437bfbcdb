"""explain.py: its files against `bcos_kernels.explain`, its table, and its errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_pil_image

import bcos_kernels as bk
import explain
from models import create_model
from models.class_names import class_names
from models.errors import CheckpointError, UserError
from models.experiments import find
from tests.checkpoint_case import published, save
from tests.tiny_run import TINY, options
from training.data import Digits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model, average = (create_model(TINY, "bcosification") for _ in range(2))
    for network in (model, average):  # so that classes differ
        network.model.fc.linear.weight.data *= 30
    save(tmp_path / "Digits" / "bcosification" / TINY / "last.ckpt", published(model, average))
    return tmp_path


@pytest.fixture
def model(base: Path) -> nn.Module:
    return create_model(TINY, "bcosification", weights=base / "Digits" / "bcosification" / TINY / "last.ckpt")


def _digit(path: Path, index: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(Digits(train=False).images[index]).save(path)
    return path


def _image(path: Path) -> torch.Tensor:
    return torch.tensor(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None] / 255


def _run(base: Path, *more: str | Path) -> list[dict[str, Any]]:
    return explain.main(
        options(base, "bcosification", "--output", str(base / "out"), "--no-cuda", *(str(m) for m in more))
    )


def test_files_are_those_of_the_library(base: Path, model: nn.Module) -> None:
    paths = [_digit(base / "zero.png", 0), _digit(base / "one.png", 5)]
    rows = _run(base, *paths)
    assert sorted(path.name for path in (base / "out").iterdir()) == [
        "classes.csv",
        *("one.contributions.png", "one.explanation.png", "zero.contributions.png", "zero.explanation.png"),
    ]
    for number, path in enumerate(paths):
        expected = bk.explain(model, _image(path))
        picture = np.asarray(Image.open(base / "out" / f"{path.stem}.explanation.png")) / 255
        assert np.abs(picture - expected.rgba()[0].numpy()).max() < 1 / 255 + 1e-4
        own = rows[5 * number : 5 * number + 5]
        logits, classes = expected.logits[0].topk(5)
        assert [row["class"] for row in own] == classes.tolist()
        assert [row["logit"] for row in own] == pytest.approx(logits.tolist(), rel=1e-5)
        assert [row["confidence"] for row in own] == pytest.approx(logits.sigmoid().tolist(), rel=1e-5)
        colours = np.asarray(Image.open(base / "out" / f"{path.stem}.contributions.png")).astype(int)
        strongest = np.unravel_index(int(expected.contributions[0].abs().argmax()), (32, 32))
        red, _, blue, _ = colours[strongest]
        assert (red > blue) == bool(expected.contributions[0][strongest] > 0)
    with (base / "out" / "classes.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in rows]


def test_target_by_name_and_by_number(base: Path, model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    path = _digit(base / "zero.png", 0)
    _run(base, path, "--target", "7")
    assert "class 7, 7" in capsys.readouterr().out
    picture = np.asarray(Image.open(base / "out" / "zero.explanation.png")) / 255
    expected = bk.explain(model, _image(path), 7).rgba()[0].numpy()
    assert np.abs(picture - expected).max() < 1 / 255 + 1e-4


def test_moving_average_is_another_network(base: Path) -> None:
    path = _digit(base / "zero.png", 0)
    assert _run(base, path)[0]["logit"] != _run(base, path, "--ema")[0]["logit"]
    weights = base / "Digits" / "bcosification" / TINY / "last.ckpt"
    assert _run(base / "elsewhere", path, "--weights", weights)[0] == _run(base, path)[0]


def test_images_of_the_same_name_do_not_overwrite_each_other(base: Path) -> None:
    _run(base, _digit(base / "a" / "x.png", 0), _digit(base / "b" / "x.png", 5))
    names = {path.name for path in (base / "out").glob("*.explanation.png")}
    assert names == {"x.explanation.png", "x-2.explanation.png"}


def test_photographs_are_cut_as_for_evaluation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create_model("resnet_18", num_classes=3)
    folder = tmp_path / "ImageFolder" / "bcosification" / "resnet_18"
    save(folder / "last.ckpt", published(network))
    recipe: Any = find("ImageFolder", "bcosification", "resnet_18").to_dict()
    recipe["model"]["num_classes"] = 3
    (folder / "config.json").write_text(json.dumps(recipe))
    to_pil_image(torch.rand(3, 90, 120)).save(tmp_path / "x.jpeg")
    arguments = ["--dataset", "ImageFolder", "--base_network", "bcosification", "--experiment_name", "resnet_18"]
    arguments += ["--base_directory", str(tmp_path), "--output", str(tmp_path / "out"), str(tmp_path / "x.jpeg")]
    assert {row["name"] for row in explain.main(arguments)} == {"0", "1", "2"}
    assert Image.open(tmp_path / "out" / "x.explanation.png").size == (224, 224)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
    named = explain.main([*arguments, "--data_path", str(tmp_path / "data"), "--target", "bee"])
    assert {row["name"] for row in named} == {"ant", "bee", "cat"}
    with pytest.raises(UserError, match=r"--target be: no class has this name\. Did you mean 'bee'"):
        explain.main([*arguments, "--data_path", str(tmp_path / "data"), "--target", "be"])
    (tmp_path / "data" / "val" / "dog").mkdir()
    with pytest.raises(UserError, match=r"the network has 3 classes, .* has 4 folders"):
        explain.main([*arguments, "--data_path", str(tmp_path / "data")])


def test_imagenet_classes_have_their_names() -> None:
    names = class_names(find("ImageNet", "bcosification", "resnet_18"), None)
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")
    assert class_names(find("CIFAR10", "bcosification", "resnet_18"), None)[9] == "truck"


def test_errors(base: Path) -> None:
    path = _digit(base / "zero.png", 0)
    (base / "text.png").write_text("no image")
    for more, sentence in (
        ([base / "none.png"], r"The image file .*none\.png cannot be read"),
        ([path, base / "text.png"], r"The image file .*text\.png cannot be read"),
        ([path, "--target", "10"], "numbered from 0 to 9"),
        ([path, "--target", "ten"], "no class has this name"),
        ([path, "--reload", "best"], "to take the best of"),
        ([path, "--base_network", "standard"], "conventional: its networks have no explanation"),
        ([path, "--text", "a dog"], "--text needs --base_network clip_bcosification"),
        ([path, "--attn_unpool"], "--attn_unpool needs --base_network clip_bcosification"),
        ([path, "--text_model", "RN50"], "--text_model needs --base_network clip_bcosification"),
        ([path, "--data_path", base], "the classes of Digits are known without it"),
        ([path, "--output", path], r"--output: .*zero\.png cannot be written \(.*\); choose another place"),
    ):
        with pytest.raises(UserError, match=sentence):
            _run(base, *more)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        _run(base, path, "--weights", base / "none.ckpt")
    assert not (base / "out").exists()
