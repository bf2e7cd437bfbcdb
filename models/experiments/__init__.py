"""The registry: which experiments exist, and the recipe of each.

An experiment is found by dataset, base network and name. Names follow a grammar, so that `resnet_101-seed=5` needs no
entry of its own: every base network has a parser that turns a name into a recipe, and `-seed=N` is understood for all
of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.errors import UnknownNameError, suggestion
from models.experiments import clip, cnn, vit
from models.experiments.datasets import DATASETS
from models.recipes import (
    DEFAULT_SEED,
    WARMUP_START,
    DataRecipe,
    Experiment,
    LossName,
    ModelRecipe,
    OptimiserRecipe,
    TrainerRecipe,
)

__all__ = [
    "CONVENTIONAL",
    "CONVERTED",
    "CONVERTED_CLIP",
    "CONVERTED_VIT",
    "DEFAULT_SEED",
    "WARMUP_START",
    "DataRecipe",
    "Experiment",
    "LossName",
    "ModelRecipe",
    "OptimiserRecipe",
    "TrainerRecipe",
    "base_networks",
    "datasets",
    "find",
    "find_by_name",
    "names",
    "table",
]

CONVERTED = cnn.CONVERTED
CONVERTED_VIT = vit.CONVERTED
CONVERTED_CLIP = clip.CONVERTED
CONVENTIONAL = "standard"

_SEED_SUFFIX = re.compile(r"-seed=(?P<seed>\d{1,9})")


@dataclass(frozen=True)
class _Grammar:
    """A base network: how its names are read, the names or patterns that are worth listing, and those to suggest."""

    parse: Callable[[str, str, str], Experiment | None]
    names: Callable[[str], list[str]]
    spelled: Callable[[str], list[str]]


def _conventional(dataset: str, base_network: str, name: str) -> Experiment | None:
    return cnn.find(dataset, base_network, name) or vit.find_conventional(dataset, base_network, name)


def _conventional_names(dataset: str) -> list[str]:
    return cnn.names(dataset) + vit.conventional_names(dataset)


_BASE_NETWORKS = {
    CONVENTIONAL: _Grammar(_conventional, _conventional_names, _conventional_names),
    CONVERTED: _Grammar(cnn.find, cnn.names, cnn.names),
    CONVERTED_VIT: _Grammar(vit.find, vit.names, vit.spelled),
    CONVERTED_CLIP: _Grammar(clip.find, clip.names, clip.spelled),
}


def datasets() -> list[str]:
    """Names of all datasets."""
    return sorted(DATASETS)


def base_networks() -> list[str]:
    """Names of all base networks."""
    return sorted(_BASE_NETWORKS)


def names(dataset: str, base_network: str) -> list[str]:
    """Names to choose from, and every name may be followed by `-seed=N`.

    Parts in braces stand for numbers, and parts in brackets, divided by `|`, may be left out.

    Raises:
        UnknownNameError: unknown dataset or base network.
    """
    _check("dataset", dataset, DATASETS)
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


def _check(what: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise UnknownNameError(f"Unknown {what} '{name}'.{suggestion(name, known)} Known: {', '.join(sorted(known))}.")
