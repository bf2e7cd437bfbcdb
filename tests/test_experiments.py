"""The registry: names, seeds, recipes, suggestions; and the networks that it builds."""

from __future__ import annotations

import dataclasses
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from torchvision.models.resnet import ResNet

import train
from models import create_model, experiments
from models.errors import CheckpointError, UnknownNameError
from models.factory import starting_network
from models.standard import build


@pytest.mark.parametrize("base_network", ["standard", "bcosification"])
@pytest.mark.parametrize("dataset", ["ImageNet", "ImageFolder", "CIFAR10", "Digits"])
def test_every_listed_name_is_found(dataset: str, base_network: str) -> None:
    for name in experiments.names(dataset, base_network):
        experiment = experiments.find(dataset, base_network, name.replace("{width}", "8"))
        assert experiment.name == name.replace("{width}", "8")
        assert experiment.model.converted == experiment.data.six_channels == (base_network == "bcosification")


@pytest.mark.parametrize(
    ("name", "architecture", "weights"),
    [
        ("resnet_18", "resnet18", "IMAGENET1K_V1"),
        ("resnet_50", "resnet50", "IMAGENET1K_V2"),
        ("resnet_50_V1", "resnet50", "IMAGENET1K_V1"),
        ("densenet_121", "densenet121", "IMAGENET1K_V1"),
    ],
)
def test_recipe_of_the_readmes_experiments(name: str, architecture: str, weights: str) -> None:
    experiment = experiments.find("ImageNet", "bcosification", name)
    assert (experiment.model.architecture, experiment.model.pretrained) == (architecture, weights)
    assert experiment.model.start == "pretrained"
    assert torchvision.models.get_model_weights(architecture)[weights] is not None
    assert dataclasses.asdict(experiment.optimiser) == {
        "name": "adamw",
        "lr": 1e-4,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "interval": "epoch",
        "agc": 0.01,
        "warmup_steps": 0,
        "max_norm": None,
        "restart_every": None,
    }
    assert dataclasses.asdict(experiment.trainer) == {
        "max_epochs": 90,
        "train_loss": "bce_uniform_off_labels",
        "eval_loss": "bce",
        "ema": None,
    }
    assert (experiment.seed, experiment.data.batch_size, experiment.data.image_size) == (42, 64, 224)


def test_the_readmes_other_spelling_is_the_same_experiment() -> None:
    one = experiments.find("ImageNet", "bcosification", "resnet18")
    assert one == experiments.find("ImageNet", "bcosification", "resnet_18")
    assert one.directory("experiments") == Path("experiments/ImageNet/bcosification/resnet_18")


def test_resnet_18_v1_starts_at_random_as_in_the_public_code() -> None:
    plain = experiments.find("ImageNet", "bcosification", "resnet_18")
    random = experiments.find("ImageNet", "bcosification", "resnet_18_V1")
    model = dataclasses.replace(plain.model, start="random", pretrained=None)
    assert random == dataclasses.replace(plain, name="resnet_18_V1", model=model)


def test_seed_suffix_changes_seed_and_name_only() -> None:
    plain = experiments.find("ImageNet", "bcosification", "resnet_50")
    seeded = experiments.find("ImageNet", "bcosification", "resnet50-seed=420")
    assert (seeded.seed, seeded.name) == (420, "resnet_50-seed=420")
    assert dataclasses.replace(seeded, seed=plain.seed, name=plain.name) == plain
    assert experiments.find("Digits", "standard", "resnet_10-seed=0").seed == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ImageNet", "bcosification", "resnet_19"), "Did you mean 'resnet_1"),
        (("ImageNet", "bcosification", "densnet_121"), "Did you mean 'densenet_121'"),
        (("ImageNet", "bcosification", "resnet_34_V1"), "Did you mean 'resnet_"),
        (("ImageNet", "bcosification", "resnet_18-seed=x"), "must be followed by a number"),
        (("ImageNet", "bcosificaton", "resnet_18"), "Did you mean 'bcosification'"),
        (("Imagenet", "bcosification", "resnet_18"), "Did you mean 'ImageNet'"),
        (("Digits", "standard", "resnet_10_w0"), "Did you mean 'resnet_10"),
        (("ImageNet", "standard", "???"), "Known: resnet_18"),
    ],
)
def test_unknown_names_get_a_suggestion(arguments: tuple[str, str, str], sentence: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        experiments.find(*arguments)
    assert sentence in str(caught.value)


def test_list_prints_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--list"]) is None
    printed = capsys.readouterr().out
    vit = "bcosifyv2_[bcos_]vitc_l_patch1_14[_random][_0.001|_0.01|_1e-05][_lrWarmup][_useBias][_noGelu][_gapReorder]"
    for name in ("resnet_18", "resnet_50_V1", "densenet_121", "resnet_10", "-seed=N", vit):
        assert name in printed


def test_small_network_is_a_torchvision_resnet() -> None:
    model = build("resnet10_w8", 10).eval()
    assert type(model) is ResNet
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert model.fc.in_features == 64
    assert build("resnet10", 7).fc.out_features == 7


@pytest.mark.parametrize(("base_network", "channels"), [("standard", 3), ("bcosification", 6)])
def test_create_model_by_name(base_network: str, channels: int) -> None:
    model = create_model("resnet_10_w8", base_network).eval()
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 10)
    assert create_model("resnet_10_w8", base_network, num_classes=3).eval()(torch.rand(1, channels, 32, 32)).shape == (
        1,
        3,
    )


def test_create_model_defaults_to_imagenet() -> None:
    model = create_model("resnet_18", base_network="standard")
    assert model.fc.out_features == 1000
    assert create_model("resnet_18", "standard", dataset="CIFAR10").fc.out_features == 10


def test_create_model_says_what_is_wrong() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'resnet_18'"):
        create_model("resnet_118")
    with pytest.raises(ValueError, match="no fixed number of classes"):
        create_model("resnet_18", dataset="ImageFolder")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        create_model("resnet_18", num_classes=0)
    with pytest.raises(CheckpointError, match="no pretrained weights for 'resnet10'"):
        create_model("resnet_10", weights="pretrained")


def _fake_download(monkeypatch: pytest.MonkeyPatch, state: dict[str, Any] | Exception) -> list[str]:
    """Stands in for torchvision's download; returns the list of URLs that were asked for."""
    asked: list[str] = []

    def load(url: str, *args: object, **kwargs: object) -> dict[str, Any]:
        asked.append(url)
        if isinstance(state, Exception):
            raise state
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    return asked


def test_pretrained_weights_are_torchvisions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = torchvision.models.resnet18()
    asked = _fake_download(monkeypatch, source.state_dict())
    experiment = experiments.find("ImageNet", "standard", "resnet_18")
    model = starting_network(experiment, 1000, tmp_path)
    assert asked == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    fewer = starting_network(experiment, 10, tmp_path)
    assert fewer.fc.out_features == 10
    assert torch.equal(fewer.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_pretrained_weights_survive_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    source = torchvision.models.resnet18()
    _fake_download(monkeypatch, source.state_dict())
    converted = create_model("resnet_18", "bcosification", weights="pretrained").state_dict()
    (first,) = [value for key, value in converted.items() if key.endswith("model.conv1.linear.weight")]
    torch.testing.assert_close(first, torch.cat([source.conv1.weight, -source.conv1.weight], 1) / 2)


@pytest.mark.parametrize(
    "failure",
    [urllib.error.URLError("no route to host"), RuntimeError('invalid hash value (expected "f37072fd", got "0")')],
)
def test_failed_download_says_where_to_put_the_file(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    _fake_download(monkeypatch, failure)
    with pytest.raises(CheckpointError) as caught:
        create_model("resnet_18", weights="pretrained")
    sentence = str(caught.value)
    assert str(Path(torch.hub.get_dir()) / "checkpoints" / "resnet18-f37072fd.pth") in sentence
    for part in ("TORCH_HOME", "--init_weights", "https://download.pytorch.org/models/resnet18-f37072fd.pth"):
        assert part in sentence
