"""The registry: which experiments exist, and the recipe of each.

An experiment is found by dataset, base network and name. Names follow a grammar, so that `resnet_101-seed=5` needs no
entry of its own: every base network has a parser that turns a name into a recipe, and `-seed=N` is understood for all
of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.errors import UnknownNameError, suggestion
from models.vit import SIZES

LossName = Literal["cross_entropy", "bce", "bce_uniform_off_labels"]

Start = Literal["random", "pretrained", "standard", "file"]
Kept = Literal["biases", "head_order"]

DEFAULT_SEED = 42
WARMUP_START = 0.01
CONVERTED = "bcosification"
CONVERTED_VIT = "vit_bcosification"
CONVENTIONAL = "standard"


@dataclass(frozen=True)
class ModelRecipe:
    """Which network, and with what weights training starts.

    Attributes:
        architecture: a name that `models.standard.build` knows.
        num_classes: None where the data decide (`ImageFolder`).
        converted: the network is B-cosified.
        start: "random"; "pretrained" (torchvision's `pretrained` weights); "standard" (the best checkpoint of the
            `standard` experiment with the same dataset and name); or "file" (conventional weights that have to be
            given, because nothing here can fetch them).
        pretrained: name of torchvision's weights, for `start="pretrained"`.
        keep: steps of the conversion to leave out, see `bcos_kernels.bcosify`.
        no_gelu: every GELU is taken out before the conversion.
    """

    architecture: str
    num_classes: int | None
    converted: bool
    start: Start
    pretrained: str | None = None
    keep: tuple[Kept, ...] = ()
    no_gelu: bool = False


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
        rand_augment: magnitude of RandAugment on training images; None: none.
        mixup: alpha of mixup on training batches; None: none.
    """

    dataset: str
    image_size: int
    six_channels: bool
    batch_size: int
    num_workers: int
    rand_augment: int | None = None
    mixup: float | None = None


@dataclass(frozen=True)
class OptimiserRecipe:
    """Optimiser, schedule and gradient clipping.

    Attributes:
        name: "adamw" or "adam".
        schedule: "cosine": from `lr` to 0 over the whole training, or over what the warm-up leaves of it.
        interval: whether the schedule moves after every step or after every epoch.
        agc: factor of adaptive gradient clipping; None: none.
        warmup_steps: so many moves of the schedule lead from `WARMUP_START * lr` to `lr` in a straight line.
        max_norm: the whole gradient is made at most this long; None: it is not.
    """

    name: Literal["adamw", "adam"]
    lr: float
    weight_decay: float
    schedule: Literal["cosine"]
    interval: Literal["step", "epoch"]
    agc: float | None
    warmup_steps: int = 0
    max_norm: float | None = None


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
    start: Start = "pretrained"
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


# The public code's names: `bcos_` may be missing, a missing learning rate is 1e-4, and the order is fixed.
_VIT_RATES = {None: 1e-4, "0.001": 1e-3, "0.01": 1e-2, "1e-05": 1e-5}
_VIT_OPTIONS = "[_random][_0.001|_0.01|_1e-05][_lrWarmup][_useBias][_noGelu][_gapReorder]"
_VIT_NAME = re.compile(
    rf"bcosifyv2_(?:bcos_)?(?P<rest>(?P<architecture>{'|'.join(SIZES)})"
    r"(?P<random>_random)?(?:_(?P<rate>0\.001|0\.01|1e-05))?(?P<warmup>_lrWarmup)?(?P<bias>_useBias)?"
    r"(?P<no_gelu>_noGelu)?(?P<reorder>_gapReorder)?)"
)


def _vit_names(dataset: str) -> list[str]:
    """One pattern for each architecture; the networks want 224 x 224 images, so there are none of Digits."""
    return [] if dataset == "Digits" else [f"bcosifyv2_[bcos_]{name}{_VIT_OPTIONS}" for name in SIZES]


def _spelled_vit_names(dataset: str) -> list[str]:
    """Every single name that the patterns stand for."""
    if dataset == "Digits":
        return []
    rates = [f"_{rate}" if rate else "" for rate in _VIT_RATES]
    parts = (["", "_random"], rates, ["", "_lrWarmup"], ["", "_useBias"], ["", "_noGelu"], ["", "_gapReorder"])
    return [f"bcosifyv2_bcos_{name}{''.join(chosen)}" for name in SIZES for chosen in itertools.product(*parts)]


def _converted_vit(dataset: str, base_network: str, name: str) -> Experiment | None:
    """The recipe of a B-cosified simple ViT, or None where the name is not one."""
    match = _VIT_NAME.fullmatch(name)
    if match is None or dataset == "Digits":
        return None
    keep: list[Kept] = ["biases"] if match["bias"] else []
    if not match["reorder"]:
        keep.append("head_order")
    architecture = match["architecture"]
    data = _DATASETS[dataset]
    return Experiment(
        dataset=dataset,
        base_network=base_network,
        name=f"bcosifyv2_bcos_{match['rest']}",
        seed=DEFAULT_SEED,
        model=ModelRecipe(
            architecture=architecture,
            num_classes=data.num_classes,
            converted=True,
            start="random" if match["random"] else "file",
            keep=tuple(keep),
            no_gelu=match["no_gelu"] is not None,
        ),
        data=_vit_data(dataset, architecture, six_channels=True, num_workers=10),
        optimiser=OptimiserRecipe(
            name="adam",
            lr=_VIT_RATES[match["rate"]],
            weight_decay=0.0,
            schedule="cosine",
            interval="step",
            agc=0.01,
            warmup_steps=_vit_warmup(architecture) if match["warmup"] else 0,
        ),
        trainer=TrainerRecipe(max_epochs=90, train_loss="bce_uniform_off_labels", eval_loss="bce"),
    )


def _conventional_vit(dataset: str, base_network: str, name: str) -> Experiment | None:
    """The recipe by which B-cos v2 trains the conventional simple ViTs, or None where the name is not one."""
    if name not in SIZES or dataset == "Digits":
        return None
    return Experiment(
        dataset=dataset,
        base_network=base_network,
        name=name,
        seed=DEFAULT_SEED,
        model=ModelRecipe(name, _DATASETS[dataset].num_classes, converted=False, start="random"),
        data=_vit_data(dataset, name, six_channels=False, num_workers=16),
        optimiser=OptimiserRecipe(
            name="adamw",
            lr=1e-3,
            weight_decay=1e-4,
            schedule="cosine",
            interval="step",
            agc=None,
            warmup_steps=_vit_warmup(name),
            max_norm=1.0,
        ),
        trainer=TrainerRecipe(max_epochs=90, train_loss="cross_entropy", eval_loss="cross_entropy"),
    )


def _vit_data(dataset: str, architecture: str, six_channels: bool, num_workers: int) -> DataRecipe:
    data = _DATASETS[dataset]
    return DataRecipe(
        dataset=dataset,
        image_size=data.image_size,
        six_channels=six_channels,
        batch_size=64 if _is_big(architecture) else 128,
        num_workers=min(num_workers, data.num_workers),
        rand_augment=10,
        mixup=0.2,
    )


def _vit_warmup(architecture: str) -> int:
    return 50_000 if _is_big(architecture) else 10_000


def _is_big(architecture: str) -> bool:
    return "_l_" in architecture or architecture.startswith("simple_vit_b")


def _conventional(dataset: str, base_network: str, name: str) -> Experiment | None:
    return _cnn_experiment(dataset, base_network, name) or _conventional_vit(dataset, base_network, name)


def _conventional_names(dataset: str) -> list[str]:
    return _cnn_names(dataset) + ([] if dataset == "Digits" else list(SIZES))


@dataclass(frozen=True)
class _Grammar:
    """A base network: how its names are read, the names or patterns that are worth listing, and those to suggest."""

    parse: Callable[[str, str, str], Experiment | None]
    names: Callable[[str], list[str]]
    spelled: Callable[[str], list[str]]


_BASE_NETWORKS = {
    CONVENTIONAL: _Grammar(_conventional, _conventional_names, _conventional_names),
    CONVERTED: _Grammar(_cnn_experiment, _cnn_names, _cnn_names),
    CONVERTED_VIT: _Grammar(_converted_vit, _vit_names, _spelled_vit_names),
}


def datasets() -> list[str]:
    """Names of all datasets."""
    return sorted(_DATASETS)


def base_networks() -> list[str]:
    """Names of all base networks."""
    return sorted(_BASE_NETWORKS)


def names(dataset: str, base_network: str) -> list[str]:
    """Names to choose from, and every name may be followed by `-seed=N`.

    Parts in braces stand for numbers, and parts in brackets, divided by `|`, may be left out.

    Raises:
        UnknownNameError: unknown dataset or base network.
    """
    _check("dataset", dataset, _DATASETS)
    _check("base network", base_network, _BASE_NETWORKS)
    return _BASE_NETWORKS[base_network].names(dataset)


def find(dataset: str, base_network: str, name: str) -> Experiment:
    """The experiment of this name.

    `resnet18` and `resnet_18` are the same experiment; its `name` is always the second form. So is, of the ViTs, the
    one with `bcos_`.

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
            f"{suggestion(base, _BASE_NETWORKS[base_network].spelled(dataset))} "
            f"Known: {', '.join(known) or 'none'}."
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
    spelled = [known for dataset in order for known in _BASE_NETWORKS[base_network].spelled(dataset)]
    raise UnknownNameError(
        f"Unknown model '{name}' for base_network '{base_network}'.{suggestion(name, dict.fromkeys(spelled))} "
        f"Known: {', '.join(dict.fromkeys(known))}."
    )


def table() -> str:
    """All experiments, one line for each dataset and base network."""
    lines = []
    for dataset in datasets():
        for base_network in base_networks():
            if not names(dataset, base_network):
                continue
            lines.append(f"--dataset {dataset} --base_network {base_network} --experiment_name")
            lines += [f"    {name}" for name in names(dataset, base_network)]
    lines += [
        "Parts in brackets may be left out, in this order; without a number the learning rate of a ViT is 0.0001.",
        "Every name may be followed by -seed=N, such as resnet_50-seed=5.",
    ]
    return "\n".join(lines)


def _check(what: str, name: str, known: dict[str, _Dataset] | dict[str, _Grammar]) -> None:
    if name not in known:
        raise UnknownNameError(f"Unknown {what} '{name}'.{suggestion(name, known)} Known: {', '.join(sorted(known))}.")
