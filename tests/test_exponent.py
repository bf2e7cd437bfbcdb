"""B that is learnt or annealed: training, bounds, resuming, and the way back from a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bcos_kernels as bk
import evaluate
from models import experiments, load_checkpoint
from models.checkpoints import read_run
from models.factory import exponents, finish, untrained
from models.recipe_io import override
from models.standard import build
from tests.tiny_run import TINY, options, train_tiny
from training.exponent import VariableExponent, annealed
from training.module import Classifier

EXPERIMENT = experiments.find("Digits", "bcosification", TINY)


def _column(directory: Path, name: str) -> list[float]:
    header, *rows = (directory / "metrics.csv").read_text().splitlines()
    return [float(row.split(",")[header.split(",").index(name)]) for row in rows]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a conventional network."""
    directory = tmp_path_factory.mktemp("experiments")
    train_tiny(directory)
    return directory


def test_one_exponent_a_layer_in_the_state_dict() -> None:
    recipe = override(EXPERIMENT, ["model.learn_b=true", "model.b=1.5"]).model
    torch.manual_seed(0)
    model = untrained(recipe, 10)
    layers = [name for name, m in model.named_modules() if isinstance(m, (bk.BcosConv2d, bk.BcosLinear))]
    assert [name for name in model.state_dict() if name.endswith(".b")] == [f"{name}.b" for name in layers]
    assert all(b.item() == 1.5 and b.requires_grad for b in exponents(model))
    frozen = untrained(override(EXPERIMENT, ["model.anneal_b=3"]).model, 10)
    assert len(exponents(frozen)) == len(layers)
    assert not any(b.requires_grad for b in exponents(frozen))
    assert exponents(untrained(EXPERIMENT.model, 10)) == []


def test_attention_pool_has_none() -> None:
    """Its output layer is a B-cos layer in name only: an exponent of it would never get a gradient."""
    name = "resnet_50_clip_b2_noBias_randomResizedCrop_sigLip_ImageNet_bcosification"
    recipe = experiments.find("ImageNet", "clip_bcosification", name).model
    recipe = dataclasses.replace(recipe, architecture="clip_resnet10_w8", learn_b=True)
    model = finish(build(recipe.architecture, 0), recipe)
    model(torch.rand(2, 6, 64, 64)).square().sum().backward()
    assert all(b.grad is not None for b in exponents(model))
    assert not isinstance(model.model.attnpool.c_proj.b, torch.Tensor)


def test_learnt_exponents(base: Path) -> None:
    changes = ("--set", "model.learn_b=true", "model.b=1.5", "optimiser.lr=0.01")
    directory = train_tiny(base, "bcosification", *changes)
    state = read_run(directory / "last.ckpt")["state_dict"]
    learnt = torch.stack([value for key, value in state.items() if key.endswith(".b")])
    assert learnt.min() >= 1
    assert learnt.unique().numel() == len(learnt)
    assert (learnt - 1.5).abs().max() > 0.01
    assert 1 < _column(directory, "b")[0] < 3
    loaded = load_checkpoint("Digits", "bcosification", TINY, base_directory=base)
    assert torch.equal(torch.stack(exponents(loaded)), learnt)
    found = options(base, "bcosification", "--reload", "best")
    assert evaluate.main(found)["acc1"] == pytest.approx(_column(directory, "val_acc1")[0], abs=1e-5)
    more = train_tiny(base, "bcosification", *changes, epochs=2)
    assert read_run(more / "last.ckpt")["epoch"] == 1


def test_annealed_exponents_grow_in_a_line(base: Path, tmp_path: Path) -> None:
    weights = str(base / "Digits" / "standard" / TINY / "last.ckpt")
    changes = ("--set", "model.anneal_b=2", "data.batch_size=128", "--init_weights", weights)
    steps = 1437 // 128
    directory = train_tiny(tmp_path, "bcosification", *changes, epochs=1)
    state = read_run(directory / "last.ckpt")["state_dict"]
    values = {value.item() for key, value in state.items() if key.endswith(".b")}
    assert values == {torch.tensor(1 + (steps - 1) / (2 * steps)).item()}
    train_tiny(tmp_path, "bcosification", *changes, epochs=3)
    means = _column(directory, "b")
    assert means == pytest.approx([1 + (steps - 1) / (4 * steps), 1.5 + (steps - 1) / (4 * steps), 2.0], rel=1e-5)
    loaded = load_checkpoint("Digits", "bcosification", TINY, base_directory=tmp_path)
    assert {b.item() for b in exponents(loaded)} == {2.0}
    halfway = load_checkpoint("Digits", "bcosification", TINY, reload="epoch_0", base_directory=tmp_path)
    assert {b.item() for b in exponents(halfway)} == values


def test_annealing_is_a_function_of_the_step() -> None:
    assert [annealed(step, 4, 2.0) for step in (0, 1, 2, 4, 9)] == [1.0, 1.25, 1.5, 2.0, 2.0]
    assert annealed(3, 4, 1.0) == 1.0


def test_learnt_exponents_stay_at_one_or_above_and_do_not_decay() -> None:
    experiment = override(EXPERIMENT, ["model.learn_b=true", "optimiser.weight_decay=0.1"])
    module: Any = Classifier(untrained(experiment.model, 10), experiment, 10)
    module.trainer = SimpleNamespace(estimated_stepping_batches=10)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {id(p) for p in groups[1]["params"]} == {id(b) for b in exponents(module.model)}
    assert sum(len(group["params"]) for group in groups) == len(list(module.model.parameters()))
    with torch.no_grad():
        exponents(module.model)[0].fill_(0.5)
    VariableExponent(experiment.model).on_train_batch_end(Any, module, None, None, 0)  # type: ignore[arg-type]
    assert exponents(module.model)[0].item() == 1.0
