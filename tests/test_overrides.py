"""Fields of the recipe changed on the command line, and read back from config.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import train
from models import experiments, load_checkpoint
from models.errors import CheckpointError, UserError
from models.factory import conventional_network
from models.recipe_io import fields, override, recorded_experiment
from models.recipes import Experiment
from tests.tiny_run import TINY, options, train_tiny

RESNET = experiments.find("ImageNet", "bcosification", "resnet_50")


def _value(experiment: Experiment, path: str) -> Any:
    value: Any = experiment
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("optimiser.lr=3e-4", 3e-4),
        ("optimiser.lr = 1", 1.0),
        ("optimiser.agc=none", None),
        ("optimiser.agc=null", None),
        ("optimiser.name=adam", "adam"),
        ("data.batch_size=32", 32),
        ("data.mixup=0.2", 0.2),
        ("model.keep=biases,head_order", ("biases", "head_order")),
        ("model.keep=", ()),
        ('model.keep=["biases"]', ("biases",)),
        ("model.architecture=resnet18", "resnet18"),
        ("model.pretrained=1", "1"),
        ("model.no_gelu=True", True),
        ("model.b=1.5", 1.5),
        ("model.num_classes=none", None),
        ("seed=7", 7),
    ],
)
def test_values_have_the_type_of_their_field(assignment: str, expected: object) -> None:
    path = assignment.partition("=")[0].strip()
    changed = override(RESNET, [assignment])
    assert _value(changed, path) == expected
    assert type(_value(changed, path)) is type(expected)
    assert changed.to_dict() != RESNET.to_dict() or _value(RESNET, path) == expected


def test_every_other_field_stays_and_several_go_together() -> None:
    changed = override(RESNET, ["model.learn_b=true", "model.b=1.25", "optimiser.lr=1", "optimiser.lr=2"])
    model = dataclasses.replace(RESNET.model, learn_b=True, b=1.25)
    assert changed == dataclasses.replace(RESNET, model=model, optimiser=dataclasses.replace(RESNET.optimiser, lr=2.0))
    # each alone would contradict the others
    both = ["trainer.train_loss=siglip", "trainer.eval_loss=siglip"]
    assert override(RESNET, [*both, "model.num_classes=0"]).distils
    assert override(RESNET, []) == RESNET


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("optimizer.lr=1", "a recipe has no such field. Did you mean 'optimiser.lr'?"),
        ("batch_size=1", "Did you mean 'data.batch_size'?"),
        ("optimiser=1", "a recipe has no such field"),
        ("optimiser.lr", "must be FIELD=VALUE"),
        ("optimiser.lr=fast", "--set optimiser.lr=fast: must be a number"),
        ("optimiser.lr=inf", "must be a number"),
        ("optimiser.lr=NaN", "must be a number"),
        ("optimiser.lr=true", "must be a number"),
        ("optimiser.agc=0", "agc must be above 0, got 0"),
        ("optimiser.agc=x", "must be a number or none"),
        ("optimiser.name=sgd", "must be 'adamw' or 'adam'"),
        ("data.batch_size=1.5", "must be a whole number"),
        ("data.batch_size=true", "must be a whole number"),
        ("data.batch_size=0", "batch_size must be at least 1, got 0"),
        ("model.no_gelu=1", "must be true or false"),
        ("model.keep=bias", "must be a list, divided by commas, of 'biases' or 'head_order'"),
        ("model.b=0.9", "b must be at least 1, got 0.9"),
        ("model.converted=false", "use --base_network"),
        ("data.six_channels=false", "use --base_network"),
        ("trainer.eval_loss=siglip", 'trainer.eval_loss="siglip" compares embeddings, and the network gives classes'),
        ("trainer.train_loss=siglip", 'trainer.train_loss="siglip" compares embeddings'),
        ("model.num_classes=0", 'gives embeddings, so trainer.train_loss must be "siglip"'),
        ("data.rand_augment=31", "rand_augment must be at most 30, got 31"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("seed=4294967296", "seed must be at most 4294967295, got 4294967296"),
        ("name=other", "use --experiment_name"),
        ("data.dataset=CIFAR10", "use --dataset"),
    ],
)
def test_what_does_not_fit_is_refused(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        override(RESNET, [assignment])
    assert sentence in str(caught.value)


def test_what_needs_a_converted_network() -> None:
    standard = experiments.find("ImageNet", "standard", "resnet_50")
    changes = ("model.learn_b=true", "model.anneal_b=2", "model.b=1", "model.keep=biases", "model.start=standard")
    for change in ([change] for change in changes):
        with pytest.raises(UserError, match="needs a B-cosified network"):
            override(standard, change)
    with pytest.raises(UserError, match="exclude each other"):
        override(RESNET, ["model.learn_b=true", "model.anneal_b=2"])


@given(st.sampled_from(sorted(fields())), st.text(max_size=12))
def test_any_text_is_a_value_or_a_sentence(path: str, text: str) -> None:
    try:
        changed = override(RESNET, [f"{path}={text}"])
    except UserError:
        return
    assert override(RESNET, [f"{path}={json.dumps(_value(changed, path))}"]) == changed


@pytest.mark.parametrize(
    ("dataset", "base_network", "name"),
    [
        ("ImageNet", "bcosification", "resnet_50-seed=3"),
        ("ImageFolder", "standard", "vitc_s_patch1_14"),
        ("CIFAR10", "vit_bcosification", "bcosifyv2_bcos_vitc_s_patch1_14_useBias"),
        ("CC3M", "clip_bcosification", "resnet_50_clip_b2_noBias_randomResizedCrop_cyclicLR_sigLip_CC3M_bcosification"),
    ],
)
def test_every_recipe_is_read_back(tmp_path: Path, dataset: str, base_network: str, name: str) -> None:
    experiment = experiments.find(dataset, base_network, name)
    (tmp_path / "config.json").write_text(json.dumps(experiment.to_dict()))
    assert recorded_experiment(tmp_path) == experiment
    assert recorded_experiment(tmp_path / "nowhere") is None


def test_older_records_have_the_defaults_of_newer_fields(tmp_path: Path) -> None:
    recorded: dict[str, Any] = json.loads(json.dumps(RESNET.to_dict()))
    for part in ("model", "data", "optimiser", "trainer"):
        for field in dataclasses.fields(getattr(RESNET, part)):
            if field.default is not dataclasses.MISSING:
                del recorded[part][field.name]
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    pretrained = dataclasses.replace(RESNET.model, pretrained=None)
    assert recorded_experiment(tmp_path) == dataclasses.replace(RESNET, model=pretrained)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda recorded: "[]", "it must be an object, got []"),
        (lambda recorded: "{", "cannot be read"),
        (lambda recorded: recorded | {"seed": "x"}, "seed must be a whole number, got 'x'"),
        (lambda recorded: recorded | {"colour": 1}, "colour is no field of a recipe"),
        (lambda recorded: recorded | {"model": {"architecture": "resnet50"}}, "model.num_classes is missing"),
        (lambda recorded: {"dataset": "ImageNet"}, "base_network is missing"),
        (lambda recorded: recorded | {"model": recorded["model"] | {"b": 0}}, "b must be at least 1"),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, change: Any, sentence: str) -> None:
    changed = change(json.loads(json.dumps(RESNET.to_dict())))
    (tmp_path / "config.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(CheckpointError) as caught:
        recorded_experiment(tmp_path)
    assert sentence in str(caught.value)


def test_values_that_only_show_when_they_are_used(tmp_path: Path) -> None:
    for change, sentence in (
        ("model.num_classes=7", "model.num_classes is 7, but Digits has 10 classes"),
        ("model.architecture=resnet_18", "Unknown architecture 'resnet_18'"),
        ("model.architecture=resnet10_w0", "Unknown architecture 'resnet10_w0'"),
        ("model.architecture=resnet10_wide", "Unknown architecture 'resnet10_wide'"),
        ("model.architecture=clip_resnet10_w9", "its width must be even"),
        ("model.architecture=inception_v3", "Unknown architecture 'inception_v3'"),
        ("model.architecture=clip_resnet10_w8", r"with data\.image_size 32: the network does not take such images"),
        ("model.architecture=vit_b_16", r"with data\.image_size 32: the network does not take such images"),
        ("data.rand_augment=3", "not for Digits"),
    ):
        with pytest.raises(UserError, match=sentence):
            train_tiny(tmp_path, "standard", "--set", change)
    with pytest.raises(UserError, match=r"gives \[1, 128\] of an image, not \[1, 10\]"):
        train_tiny(tmp_path, "standard", "--set", "model.architecture=clip_resnet10_w8", "data.image_size=64")
    with pytest.raises(UserError, match=r"model\.no_gelu: resnet10_w8 has no GELU"):
        train_tiny(tmp_path, "bcosification", "--set", "model.start=random", "model.no_gelu=true")
    assert not list(tmp_path.iterdir())
    for change, sentence in (
        ("model.pretrained=V9", "torchvision has no weights 'V9' for resnet50. Known: IMAGENET1K_V1, IMAGENET1K_V2"),
        ("model.architecture=nothing", "There are no pretrained weights for 'nothing'"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            conventional_network(override(RESNET, [change]), 1000, tmp_path)


def test_a_run_with_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are printed, recorded, found again by evaluation, and asked for by a resumed run."""
    train_tiny(tmp_path)
    changes = ("--set", "model.b=1.5", "optimiser.lr=2e-3", "--set", "data.batch_size=128")
    capsys.readouterr()
    train.main([*options(tmp_path, "bcosification", *changes), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["b"], printed["optimiser"]["lr"], printed["data"]["batch_size"]) == (1.5, 2e-3, 128)
    directory = train_tiny(tmp_path, "bcosification", *changes)
    assert json.loads((directory / "config.json").read_text())["model"]["b"] == 1.5
    model = load_checkpoint("Digits", "bcosification", TINY, base_directory=tmp_path)
    assert model.model.conv1.b == 1.5
    result = evaluate.main(options(tmp_path, "bcosification", "--reload", "last"))
    rows = (directory / "metrics.csv").read_text().splitlines()
    assert f"{result['acc1']:.6g}" == dict(zip(rows[0].split(","), rows[1].split(","), strict=True))["val_acc1"]
    with pytest.raises(UserError, match=r"model\.b: 1\.5 then, 2\.0 now"):
        train_tiny(tmp_path, "bcosification", "--set", *changes[2:], epochs=2)
    # weights without a record are of the recipe as it is named, unless it is changed
    weights = tmp_path / "weights.ckpt"
    weights.write_bytes((directory / "last.ckpt").read_bytes())
    again = evaluate.main(options(tmp_path, "bcosification", "--weights", str(weights), "--set", "model.b=1.5"))
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)
    other = evaluate.main(options(tmp_path, "bcosification", "--weights", str(weights)))
    assert other["loss"] != pytest.approx(result["loss"], rel=1e-3)
