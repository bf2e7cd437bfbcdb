"""The ViTs' part of the registry: the grammar of the names, their recipes, the networks, and one step of training."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import bcos_kernels as bk
import evaluate
import train
from models import create_model, experiments, load_checkpoint
from models.errors import CheckpointError, UnknownNameError, UserError
from models.experiments import DataRecipe, Experiment, ModelRecipe, OptimiserRecipe, TrainerRecipe
from models.factory import finish, starting_network
from models.standard import build
from models.vit import SIZES
from training.fit import check_same_recipe
from training.losses import bce_uniform_off_labels
from training.mixup import MixUp
from training.module import Classifier

NETWORK = "vit_bcosification"
README = "bcosifyv2_bcos_simple_vit_ti_patch16_224_0.001_gapReorder-seed=5"
TINY = "bcosifyv2_bcos_simple_vit_ti_patch16_224_random_0.001_gapReorder"


def _find(name: str, dataset: str = "ImageNet") -> Experiment:
    return experiments.find(dataset, NETWORK, name)


# Names


def test_every_name_of_the_public_code_is_found() -> None:
    rates = {"_0.01": 1e-2, "_0.001": 1e-3, "": 1e-4, "_1e-05": 1e-5}
    flags = [("", f"_{flag}") for flag in ("lrWarmup", "useBias", "noGelu", "gapReorder")]
    seen = set()
    for architecture, start, rate, *chosen in itertools.product(SIZES, ("", "_random"), rates, *flags):
        name = f"bcosifyv2_bcos_{architecture}{start}{rate}{''.join(chosen)}"
        experiment = _find(name)
        warmup, bias, no_gelu, reorder = map(bool, chosen)
        assert experiment.name == name
        assert experiment.model.architecture == architecture
        assert experiment.model.start == ("random" if start else "file")
        assert experiment.optimiser.lr == rates[rate]
        assert (experiment.optimiser.warmup_steps > 0) == warmup
        assert ("biases" in experiment.model.keep, "head_order" not in experiment.model.keep) == (bias, reorder)
        assert experiment.model.no_gelu == no_gelu
        seen.add(dataclasses.replace(experiment, name=""))
    assert len(seen) == 8 * 2 * 4 * 2**4


def test_the_readmes_names() -> None:
    for architecture in SIZES:
        short = _find(f"bcosifyv2_{architecture}_0.001_lrWarmup_gapReorder")
        assert short == _find(f"bcosifyv2_bcos_{architecture}_0.001_lrWarmup_gapReorder")
    seeded = _find(README)
    assert (seeded.name, seeded.seed) == (README, 5)
    assert seeded.directory("experiments") == Path("experiments/ImageNet/vit_bcosification") / README


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bcosifyv2_bcos_simple_vit_ti_patch16_224_gapReorder_0.001", "Did you mean 'bcosifyv2_bcos_simple_vit_ti"),
        ("bcosifyv2_bcos_vitc_x_patch1_14_0.001", "Did you mean 'bcosifyv2_bcos_vitc_"),
        ("bcosifyv2_bcos_vitc_s_patch1_14_0.002", "Did you mean 'bcosifyv2_bcos_vitc_s_patch1_14_0.0"),
        ("bcosifyv2_bcos_vitc_s_patch1_14_0x001", "Did you mean 'bcosifyv2_bcos_vitc_s_patch1_14_0.001'"),
        ("bcosifyv2_bcos_vitc_s_patch1_14_0.0001", "Unknown experiment_name"),
        ("bcosifyv2_bcos_vitc_s_patch1_14_lrwarmup", "Did you mean 'bcosifyv2_bcos_vitc_s_patch1_14_lrWarmup'"),
        ("bcosifyv2_bcos_vitc_s_patch1_14_", "Did you mean 'bcosifyv2_bcos_vitc_s_patch1_14'"),
        ("bcosifyv2_bcos_bcos_vitc_s_patch1_14", "Did you mean 'bcosifyv2_bcos_vitc_s_patch1_14'"),
        ("vitc_s_patch1_14", "Unknown experiment_name"),
        ("bcosifyv2_bcos_vitc_s_patch1_14-seed=", "must be followed by a number"),
        ("", "Known: bcosifyv2_[bcos_]simple_vit_ti_patch16_224[_random]"),
    ],
)
def test_nonsense_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        _find(name)
    assert sentence in str(caught.value)


def test_digits_have_no_vits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownNameError, match="Known: none"):
        _find(README, "Digits")
    with pytest.raises(UnknownNameError):
        experiments.find("Digits", "standard", "vitc_s_patch1_14")
    train.main(["--list"])
    assert "--dataset Digits --base_network vit" not in capsys.readouterr().out


# Recipes


def test_whole_recipe_of_a_small_network() -> None:
    assert _find(README) == Experiment(
        dataset="ImageNet",
        base_network=NETWORK,
        name=README,
        seed=5,
        model=ModelRecipe(
            "simple_vit_ti_patch16_224", 1000, converted=True, start="file", pretrained=None, keep=(), no_gelu=False
        ),
        data=DataRecipe(
            "ImageNet",
            image_size=224,
            six_channels=True,
            batch_size=128,
            num_workers=10,
            rand_augment=10,
            mixup=0.2,
        ),
        optimiser=OptimiserRecipe(
            "adam",
            lr=1e-3,
            weight_decay=0.0,
            schedule="cosine",
            interval="step",
            agc=0.01,
            warmup_steps=0,
            max_norm=None,
        ),
        trainer=TrainerRecipe(max_epochs=90, train_loss="bce_uniform_off_labels", eval_loss="bce"),
    )


def test_whole_recipe_of_a_big_network() -> None:
    name = "bcosifyv2_bcos_vitc_l_patch1_14_random_1e-05_lrWarmup_useBias_noGelu"
    assert _find(name, "CIFAR10") == Experiment(
        dataset="CIFAR10",
        base_network=NETWORK,
        name=name,
        seed=42,
        model=ModelRecipe(
            "vitc_l_patch1_14", 10, converted=True, start="random", keep=("biases", "head_order"), no_gelu=True
        ),
        data=DataRecipe(
            "CIFAR10", image_size=224, six_channels=True, batch_size=64, num_workers=8, rand_augment=10, mixup=0.2
        ),
        optimiser=OptimiserRecipe(
            "adam",
            lr=1e-5,
            weight_decay=0.0,
            schedule="cosine",
            interval="step",
            agc=0.01,
            warmup_steps=50_000,
        ),
        trainer=TrainerRecipe(max_epochs=90, train_loss="bce_uniform_off_labels", eval_loss="bce"),
    )


@pytest.mark.parametrize("architecture", SIZES)
def test_size_decides_batch_and_warmup(architecture: str) -> None:
    big = architecture in ("simple_vit_b_patch16_224", "simple_vit_l_patch16_224", "vitc_l_patch1_14")
    converted = _find(f"bcosifyv2_bcos_{architecture}_lrWarmup")
    for experiment in (converted, experiments.find("ImageNet", "standard", architecture)):
        assert experiment.data.batch_size == (64 if big else 128)
        assert experiment.optimiser.warmup_steps == (50_000 if big else 10_000)


def test_recipe_of_the_conventional_networks() -> None:
    experiment = experiments.find("ImageFolder", "standard", "vitc_s_patch1_14-seed=7")
    assert experiment.model == ModelRecipe("vitc_s_patch1_14", None, converted=False, start="random")
    assert (experiment.data.six_channels, experiment.data.rand_augment, experiment.data.mixup) == (False, 10, 0.2)
    assert dataclasses.asdict(experiment.optimiser) == {
        "name": "adamw",
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "schedule": "cosine",
        "interval": "step",
        "agc": None,
        "warmup_steps": 10_000,
        "max_norm": 1.0,
        "restart_every": None,
    }
    assert experiment.trainer == TrainerRecipe(90, "cross_entropy", "cross_entropy")


def test_recipe_is_printed_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dataset", "ImageNet", "--base_network", NETWORK, "--experiment_name", README]
    assert train.main([*options, "--batch_size", "3", "--print_config"]) is None
    printed = yaml.safe_load(capsys.readouterr().out)
    expected = _find(README).to_dict()
    assert isinstance(expected["data"], dict)
    assert isinstance(expected["model"], dict)
    expected["data"]["batch_size"] = 3
    expected["model"]["keep"] = []
    assert printed == expected


# Networks


@pytest.mark.parametrize("architecture", SIZES)
def test_architecture_is_built_by_name(architecture: str) -> None:
    with torch.device("meta"):
        standard = build(architecture, 10)
    experiment = _find(f"bcosifyv2_{architecture}_gapReorder")
    assert sum(p.numel() for p in standard.parameters()) > 5e6
    assert experiment.model.architecture == architecture
    assert standard.get_submodule("linear_head.linear").out_features == 10


@pytest.mark.parametrize("architecture", ["simple_vit_ti_patch16_224", "vitc_ti_patch1_14"])
def test_options_of_the_conversion(architecture: str) -> None:
    """Each against what `bcosify` makes of the same weights by hand."""
    x = torch.rand(1, 6, 32, 32)
    for suffix, keep, gelu in (
        ("_random_gapReorder", (), True),
        ("_random", ("head_order",), True),
        ("_random_useBias_gapReorder", ("biases",), True),
        ("_random_noGelu_gapReorder", (), False),
        ("_random_useBias_noGelu", ("biases", "head_order"), False),
    ):
        torch.manual_seed(0)
        model = create_model(f"bcosifyv2_bcos_{architecture}{suffix}", NETWORK, num_classes=5).eval()
        torch.manual_seed(0)
        standard = build(architecture, 5)
        if not gelu:
            for module in standard.modules():
                if hasattr(module, "act"):
                    module.act = nn.Identity()
            if architecture.startswith("vitc"):
                stem = standard.get_submodule("to_patch_embedding.conv_stem")
                for index in range(2, len(list(stem.children())), 3):
                    stem[index] = nn.Identity()
        expected = bk.bcosify(standard, keep=keep).eval()
        with torch.no_grad():
            assert torch.equal(model(x), expected(x)), suffix
        assert any("GELU" in type(module).__name__ for module in model.modules()) == gelu
        assert any(name.endswith("bias") for name, _ in model.named_parameters()) == ("biases" in keep)


def test_without_weights_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"B-cos v2 publishes those.*--init_weights PATH.*start=random"):
        starting_network(_find(README), 10, tmp_path)
    with pytest.raises(CheckpointError, match="no pretrained weights"):
        create_model(README, NETWORK, weights="pretrained")


def test_conventional_weights_are_read_and_converted(tmp_path: Path) -> None:
    """A file as B-cos v2 publishes it, a plain state dict; with another number of classes only the classifier is new."""
    torch.manual_seed(1)
    standard = build("simple_vit_ti_patch16_224", 10)
    path = tmp_path / "standard_simple_vit_ti.pth"
    torch.save(standard.state_dict(), path)
    x = torch.rand(1, 6, 32, 32)
    experiment = _find(README)
    with torch.no_grad():
        model = starting_network(experiment, 10, tmp_path, path).eval()
        assert torch.equal(model(x), bk.bcosify(standard).eval()(x))
        fewer = starting_network(experiment, 4, tmp_path, path).eval()
        assert fewer(x).shape == (1, 4)
    key = "model.transformer.encoder_0.attn.to_qkv.weight"
    assert torch.equal(fewer.state_dict()[key], standard.state_dict()[key.removeprefix("model.")])


# Training


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two images each."""
    rng = np.random.default_rng(0)
    for part, label in itertools.product(("train", "val"), ("cat", "dog")):
        (tmp_path / part / label).mkdir(parents=True)
        for index in range(2):
            image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            image.save(tmp_path / part / label / f"{index}.png")
    return tmp_path


def test_training_loss_is_that_of_the_mixed_batch() -> None:
    experiment = experiments.find("ImageNet", NETWORK, TINY)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6 * 4, 3))
    module = Classifier(model, experiment, 3)
    images, targets = torch.rand(4, 6, 2, 2), torch.tensor([0, 1, 2, 1])
    mixed, shares = MixUp(0.2, 3, 42)(images, targets, (0, 7, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning misses its trainer
        loss = module.training_step((images, targets), 7)
    torch.testing.assert_close(loss, bce_uniform_off_labels(model(mixed), shares))
    plain = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, mixup=None))
    assert Classifier(model, plain, 3).mixup is None


def test_conventional_networks_clip_the_whole_gradient() -> None:
    model = nn.Linear(3, 3)
    module = Classifier(model, experiments.find("ImageNet", "standard", "vitc_s_patch1_14"), 3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    module.configure_gradient_clipping(torch.optim.SGD(model.parameters(), lr=1.0))
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("change", [{}, {"keep": ["head_order"]}])
def test_recipes_recorded_before_there_were_vits_are_the_same(tmp_path: Path, change: dict[str, object]) -> None:
    experiment = experiments.find("ImageNet", "bcosification", "resnet_18")
    recorded = json.loads(json.dumps(experiment.to_dict()))
    for part, key in (("model", "no_gelu"), ("model", "keep"), ("data", "mixup"), ("optimiser", "warmup_steps")):
        del recorded[part][key]
    recorded["model"] |= change
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    if change:
        with pytest.raises(UserError, match=r"model\.keep: \['head_order'\] then, \[\] now"):
            check_same_recipe(experiment, tmp_path)
    else:
        check_same_recipe(experiment, tmp_path)
    vit = _find("bcosifyv2_bcos_vitc_s_patch1_14_useBias")
    (tmp_path / "config.json").write_text(json.dumps(vit.to_dict()))
    check_same_recipe(vit, tmp_path)


@pytest.mark.slow
def test_two_processes(folder: Path, tmp_path: Path) -> None:
    """The same step as one process with all images; without mixup, which draws for each process."""
    named = ["--dataset", "ImageFolder", "--base_network", NETWORK, "--experiment_name", TINY]
    paths = ["--data_path", str(folder), "--num_workers", "0", "--max_epochs", "1", "--refresh_rate", "0"]
    losses = []
    for count in (1, 2):
        base = tmp_path / str(count)
        changes = ["--set", "data.image_size=32", "data.mixup=none", f"data.batch_size={4 // count}"]
        devices = ["--distributed", "--devices", "2"] if count == 2 else []
        done = subprocess.run(
            [sys.executable, "train.py", *named, *paths, "--base_directory", str(base), *devices, *changes],
            cwd=Path(train.__file__).parent,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        directory = experiments.find("ImageFolder", NETWORK, TINY).directory(base)
        header, row = (directory / "metrics.csv").read_text().splitlines()
        losses.append(dict(zip(header.split(","), row.split(","), strict=True)))
    for loss in ("train_loss", "val_loss"):
        assert float(losses[1][loss]) == pytest.approx(float(losses[0][loss]), rel=1e-4)


@pytest.mark.parametrize(
    ("base_network", "name"),
    [(NETWORK, TINY), ("standard", "simple_vit_ti_patch16_224")],
    ids=["converted", "standard"],
)
def test_one_step(folder: Path, tmp_path: Path, base_network: str, name: str) -> None:
    more = ["--base_network", base_network, "--experiment_name", name, "--data_path", str(folder), "--num_workers", "0"]
    options = ["--dataset", "ImageFolder", "--base_directory", str(tmp_path / "out"), "--batch_size", "2", *more]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.main([*options, "--refresh_rate", "0", "--fast_dev_run"])
        assert not (tmp_path / "out").exists()
        experiment = experiments.find("ImageFolder", base_network, name)
        torch.manual_seed(0)
        model = finish(build(experiment.model.architecture, 2), experiment.model)
        directory = experiment.directory(tmp_path / "out")
        directory.mkdir(parents=True)
        torch.save(
            {"state_dict": {f"model.{key}": v for key, v in model.state_dict().items()}}, directory / "last.ckpt"
        )
        result = evaluate.main([*options, "--reload", "last"])
    finally:
        torch.set_num_threads(threads)
    assert result["images"] == 4
    loaded = load_checkpoint("ImageFolder", base_network, name, base_directory=tmp_path / "out", num_classes=2)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_evaluation_right_after_conversion(folder: Path, tmp_path: Path) -> None:
    """Of an experiment that starts from a file."""
    options = ["--dataset", "ImageFolder", "--base_network", NETWORK, "--experiment_name", TINY.replace("_random", "")]
    options += ["--base_directory", str(tmp_path), "--data_path", str(folder)]
    options += ["--num_workers", "0", "--batch_size", "2"]
    with pytest.raises(UserError, match=r"evaluate\.py with --init_weights PATH"):
        evaluate.main(options)
    torch.save(build("simple_vit_ti_patch16_224", 2).state_dict(), tmp_path / "standard.pth")
    assert evaluate.main([*options, "--init_weights", str(tmp_path / "standard.pth")])["images"] == 4
