"""Names and recipes of the convolutional networks, conventional or B-cosified.

`resnet_50`, or `resnet50`; `_V1` behind it takes the older of torchvision's two weights. `resnet_18`, which has one, starts
from random weights as `resnet_18_V1`, as in the public code. On Digits: `resnet_10`, `resnet_10_w{width}`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from models.experiments.datasets import CLASSIFICATION, DATASETS
from models.recipes import DEFAULT_SEED, DataRecipe, Experiment, ModelRecipe, OptimiserRecipe, Start, TrainerRecipe

CONVERTED = "bcosification"

# Depth -> torchvision's weights under the plain name.
_RESNETS = {
    "18": "IMAGENET1K_V1",
    "34": "IMAGENET1K_V1",
    "50": "IMAGENET1K_V2",
    "101": "IMAGENET1K_V2",
    "152": "IMAGENET1K_V2",
}
_DENSENETS = dict.fromkeys(("121", "161", "169", "201"), "IMAGENET1K_V1")
# What `_V1` stands for.
_V1: dict[str, str | None] = {"18": None} | dict.fromkeys(("50", "101", "152"), "IMAGENET1K_V1")
_PRETRAINED_NAME = re.compile(r"(?P<family>resnet|densenet)_?(?P<depth>\d+)(?P<v1>_V1)?")
_SMALL_NAME = re.compile(r"resnet_?10(?:_w(?P<width>[1-9]\d{0,2}))?")


@dataclass(frozen=True)
class _Parsed:
    """What a name says by itself, before dataset and base network are known."""

    canonical: str
    architecture: str
    pretrained: str | None


def names(dataset: str) -> list[str]:
    """Names to choose from; parts in braces stand for numbers."""
    if dataset == "Digits":
        return ["resnet_10", "resnet_10_w{width}"]
    if dataset not in CLASSIFICATION:
        return []
    resnets = [f"resnet_{depth}{v1}" for depth in _RESNETS for v1 in (["", "_V1"] if depth in _V1 else [""])]
    return resnets + [f"densenet_{depth}" for depth in _DENSENETS]


def find(dataset: str, base_network: str, name: str) -> Experiment | None:
    """The recipe of a convolutional network, or None where the name is not one."""
    small = dataset == "Digits"
    parsed = _parse_small(name) if small else _parse_pretrained(name) if dataset in CLASSIFICATION else None
    if parsed is None:
        return None
    data = DATASETS[dataset]
    converted = base_network == CONVERTED
    start: Start = "random" if parsed.pretrained is None else "pretrained"
    if small and converted:
        start = "standard"
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


def _parse_pretrained(name: str) -> _Parsed | None:
    match = _PRETRAINED_NAME.fullmatch(name)
    if match is None:
        return None
    family, depth, v1 = match["family"], match["depth"], match["v1"] or ""
    if depth not in (_RESNETS if family == "resnet" else _DENSENETS) or (v1 and depth not in _V1):
        return None
    weights = _V1[depth] if v1 else {**_RESNETS, **_DENSENETS}[depth]
    return _Parsed(f"{family}_{depth}{v1}", f"{family}{depth}", weights)


def _parse_small(name: str) -> _Parsed | None:
    match = _SMALL_NAME.fullmatch(name)
    if match is None:
        return None
    suffix = f"_w{match['width']}" if match["width"] else ""
    return _Parsed(f"resnet_10{suffix}", f"resnet10{suffix}", None)
