"""The registry: which experiments exist, and the recipe of each.

An experiment is found by dataset, base network and name. Names follow a grammar, so that `resnet_101-seed=5` needs no
entry of its own: every base network has a parser that turns a name into a recipe, and `-seed=N` is understood for all
of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.errors import UnknownNameError, suggestion

LossName = Literal["cross_entropy", "bce", "bce_uniform_off_labels"]

DEFAULT_SEED = 42
CONVERTED = "bcosification"
CONVENTIONAL = "standard"


@dataclass(frozen=True)
class ModelRecipe:
    """Which network, and with what weights training starts.

    Attributes:
        architecture: a name that `models.standard.build` knows.
        num_classes: None where the data decide (`ImageFolder`).
        converted: the network is B-cosified.
        start: "random"; "pretrained" (torchvision's `pretrained` weights); or "standard" (the best checkpoint of the
            `standard` experiment with the same dataset and name).
        pretrained: name of torchvision's weights, for `start="pretrained"`.
    """

    architecture: str
    num_classes: int | None
    converted: bool
    start: Literal["random", "pretrained", "standard"]
    pretrained: str | None = None


@dataclass(frozen=True)
class DataRecipe:
    """Which images, and in what form the network gets them.

    Attributes:
        dataset: one of `datasets()`.
        image_size: height and width after cropping.
        six_channels: `[r, g, b, 1-r, 1-g, 1-b]` in [0, 1]; otherwise three channels, normalised with ImageNet's mean
            and std.
        batch_size: images a step, on each device.
        num_workers: processes that load images; 0 loads in the training process.
    """

    dataset: str
    image_size: int
    six_channels: bool
    batch_size: int
    num_workers: int


@dataclass(frozen=True)
class OptimiserRecipe:
    """Optimiser, schedule and gradient clipping.

    Attributes:
        name: "adamw" (the only one so far).
        schedule: "cosine": from `lr` to 0 over the whole training.
        interval: whether the schedule moves after every step or after every epoch.
        agc: factor of adaptive gradient clipping; None: no clipping.
    """

    name: Literal["adamw"]
    lr: float
    weight_decay: float
    schedule: Literal["cosine"]
    interval: Literal["step", "epoch"]
    agc: float | None


@dataclass(frozen=True)
class TrainerRecipe:
    """How long, and what is minimised."""

    max_epochs: int
    train_loss: LossName
    eval_loss: LossName


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the result of a training run."""

    dataset: str
    base_network: str
    name: str
    seed: int
    model: ModelRecipe
    data: DataRecipe
    optimiser: OptimiserRecipe
    trainer: TrainerRecipe

    def directory(self, base_directory: str | Path) -> Path:
        """Where checkpoints, metrics and the recipe lie: `base_directory/dataset/base_network/name`."""
        return Path(base_directory) / self.dataset / self.base_network / self.name

    def to_dict(self) -> dict[str, object]:
        """The recipe as nested dictionaries of plain values, for `config.json`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Dataset:
    """What the recipes need to know of a dataset, and its own variations of them."""

    num_classes: int | None
    image_size: int
    batch_size: int
    num_workers: int


_DATASETS = {
    "Digits": _Dataset(num_classes=10, image_size=32, batch_size=64, num_workers=0),
    "CIFAR10": _Dataset(num_classes=10, image_size=224, batch_size=64, num_workers=8),
    "ImageFolder": _Dataset(num_classes=None, image_size=224, batch_size=64, num_workers=16),
    "ImageNet": _Dataset(num_classes=1000, image_size=224, batch_size=64, num_workers=16),
}

# Depth -> torchvision's weights under the plain name. `_V1` picks IMAGENET1K_V1 where that is not the same file.
_RESNETS = {
    "18": "IMAGENET1K_V1",
    "34": "IMAGENET1K_V1",
    "50": "IMAGENET1K_V2",
    "101": "IMAGENET1K_V2",
    "152": "IMAGENET1K_V2",
}
_DENSENETS = dict.fromkeys(("121", "161", "169", "201"), "IMAGENET1K_V1")
_PRETRAINED_NAME = re.compile(r"(?P<family>resnet|densenet)_?(?P<depth>\d+)(?P<v1>_V1)?")
_SMALL_NAME = re.compile(r"resnet_?10(?:_w(?P<width>[1-9]\d{0,2}))?")
_SEED_SUFFIX = re.compile(r"-seed=(?P<seed>\d{1,9})")


@dataclass(frozen=True)
class _Parsed:
    """What a name says by itself, before dataset and base network are known."""

    canonical: str
    architecture: str
    pretrained: str | None


def _parse_pretrained_cnn(name: str) -> _Parsed | None:
    match = _PRETRAINED_NAME.fullmatch(name)
    if match is None:
        return None
    family, depth, v1 = match["family"], match["depth"], match["v1"] or ""
    weights = (_RESNETS if family == "resnet" else _DENSENETS).get(depth)
    if weights is None or (v1 and weights == "IMAGENET1K_V1"):
        return None
    return _Parsed(f"{family}_{depth}{v1}", f"{family}{depth}", "IMAGENET1K_V1" if v1 else weights)


def _parse_small_cnn(name: str) -> _Parsed | None:
    match = _SMALL_NAME.fullmatch(name)
    if match is None:
        return None
    suffix = f"_w{match['width']}" if match["width"] else ""
    return _Parsed(f"resnet_10{suffix}", f"resnet10{suffix}", None)


def _cnn_names(dataset: str) -> list[str]:
    if dataset == "Digits":
        return ["resnet_10", "resnet_10_w{width}"]
    resnets = [f"resnet_{d}{v}" for d, w in _RESNETS.items() for v in (["", "_V1"] if w == "IMAGENET1K_V2" else [""])]
    return resnets + [f"densenet_{d}" for d in _DENSENETS]


def _cnn_experiment(dataset: str, base_network: str, name: str) -> Experiment | None:
    """The recipe of a convolutional network on any of the datasets, or None where the name is not one."""
    small = dataset == "Digits"
    parsed = _parse_small_cnn(name) if small else _parse_pretrained_cnn(name)
    if parsed is None:
        return None
    data = _DATASETS[dataset]
    converted = base_network == CONVERTED
    start: Literal["random", "pretrained", "standard"] = "pretrained"
    if small:
        start = "standard" if converted else "random"
    return Experiment(
        dataset=dataset,
        base_network=base_network,
        name=parsed.canonical,
        seed=DEFAULT_SEED,
        model=ModelRecipe(
            architecture=parsed.architecture,
            num_classes=data.num_classes,
            converted=converted,
            start=start,
            pretrained=parsed.pretrained,
        ),
        data=DataRecipe(
            dataset=dataset,
            image_size=data.image_size,
            six_channels=converted,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
        ),
        optimiser=OptimiserRecipe(
            name="adamw",
            lr=1e-3 if small else 1e-4,
            weight_decay=0.0,
            schedule="cosine",
            interval="step" if small else "epoch",
            agc=0.01 if converted else None,
        ),
        trainer=TrainerRecipe(
            max_epochs=(12 if converted else 10) if small else 90,
            train_loss="bce_uniform_off_labels" if converted else "cross_entropy",
            eval_loss="bce" if converted else "cross_entropy",
        ),
    )


@dataclass(frozen=True)
class _Grammar:
    """A base network: how its names are read, and the names that are worth listing."""

    parse: Callable[[str, str, str], Experiment | None]
    names: Callable[[str], list[str]]


_BASE_NETWORKS = {
    CONVENTIONAL: _Grammar(_cnn_experiment, _cnn_names),
    CONVERTED: _Grammar(_cnn_experiment, _cnn_names),
}


def datasets() -> list[str]:
    """Names of all datasets."""
    return sorted(_DATASETS)


def base_networks() -> list[str]:
    """Names of all base networks."""
    return sorted(_BASE_NETWORKS)


def names(dataset: str, base_network: str) -> list[str]:
    """Names to choose from; parts in braces stand for numbers, and every name may be followed by `-seed=N`.

    Raises:
        UnknownNameError: unknown dataset or base network.
    """
    _check("dataset", dataset, _DATASETS)
    _check("base network", base_network, _BASE_NETWORKS)
    return _BASE_NETWORKS[base_network].names(dataset)


def find(dataset: str, base_network: str, name: str) -> Experiment:
    """The experiment of this name.

    `resnet18` and `resnet_18` are the same experiment; its `name` is always the second form.

    Raises:
        UnknownNameError: an unknown dataset, base network or name; the message suggests the nearest known one.
    """
    known = names(dataset, base_network)
    base, separator, _ = name.partition("-seed=")
    seed_match = _SEED_SUFFIX.fullmatch(name[len(base) :])
    if separator and seed_match is None:
        raise UnknownNameError(
            f"experiment_name '{name}': '-seed=' must be followed by a number, such as '{base}-seed=5'."
        )
    experiment = _BASE_NETWORKS[base_network].parse(dataset, base_network, base)
    if experiment is None:
        raise UnknownNameError(
            f"Unknown experiment_name '{base}' for dataset '{dataset}' and base_network '{base_network}'."
            f"{suggestion(base, known)} Known: {', '.join(known)}."
        )
    if seed_match is None:
        return experiment
    seed = int(seed_match["seed"])
    return dataclasses.replace(experiment, name=f"{experiment.name}-seed={seed}", seed=seed)


def find_by_name(base_network: str, name: str) -> Experiment:
    """As `find`, with the first dataset that has the name: ImageNet, then the others in alphabetical order.

    Raises:
        UnknownNameError: no dataset has the name.
    """
    order = sorted(datasets(), key=lambda dataset: dataset != "ImageNet")
    for dataset in order:
        try:
            return find(dataset, base_network, name)
        except UnknownNameError:
            continue
    _check("base network", base_network, _BASE_NETWORKS)
    known = [known for dataset in order for known in names(dataset, base_network)]
    raise UnknownNameError(
        f"Unknown model '{name}' for base_network '{base_network}'.{suggestion(name, known)} "
        f"Known: {', '.join(dict.fromkeys(known))}."
    )


def table() -> str:
    """All experiments, one line for each dataset and base network."""
    lines = []
    for dataset in datasets():
        for base_network in base_networks():
            lines.append(f"--dataset {dataset} --base_network {base_network} --experiment_name")
            lines += [f"    {name}" for name in names(dataset, base_network)]
    return "\n".join([*lines, "Every name may be followed by -seed=N, such as resnet_50-seed=5."])


def _check(what: str, name: str, known: dict[str, _Dataset] | dict[str, _Grammar]) -> None:
    if name not in known:
        raise UnknownNameError(f"Unknown {what} '{name}'.{suggestion(name, known)} Known: {', '.join(sorted(known))}.")
