"""Names and recipes of the simple ViTs.

The B-cosified ones have the public code's names: `bcos_` may be missing, a missing learning rate is 1e-4, and the order is
fixed. The conventional ones have the names of their architectures.
"""

from __future__ import annotations

import itertools
import re

from models.experiments.datasets import CLASSIFICATION, DATASETS
from models.recipes import DEFAULT_SEED, DataRecipe, Experiment, Kept, ModelRecipe, OptimiserRecipe, TrainerRecipe
from models.vit import SIZES

CONVERTED = "vit_bcosification"

_RATES = {None: 1e-4, "0.001": 1e-3, "0.01": 1e-2, "1e-05": 1e-5}
_OPTIONS = "[_random][_0.001|_0.01|_1e-05][_lrWarmup][_useBias][_noGelu][_gapReorder]"
_NAME = re.compile(
    rf"bcosifyv2_(?:bcos_)?(?P<rest>(?P<architecture>{'|'.join(SIZES)})"
    r"(?P<random>_random)?(?:_(?P<rate>0\.001|0\.01|1e-05))?(?P<warmup>_lrWarmup)?(?P<bias>_useBias)?"
    r"(?P<no_gelu>_noGelu)?(?P<reorder>_gapReorder)?)"
)


def names(dataset: str) -> list[str]:
    """One pattern for each architecture; the networks want 224 x 224 images, so there are none of Digits."""
    return [f"bcosifyv2_[bcos_]{name}{_OPTIONS}" for name in SIZES] if dataset in CLASSIFICATION else []


def spelled(dataset: str) -> list[str]:
    """Every single name that the patterns stand for."""
    if dataset not in CLASSIFICATION:
        return []
    rates = [f"_{rate}" if rate else "" for rate in _RATES]
    parts = (["", "_random"], rates, ["", "_lrWarmup"], ["", "_useBias"], ["", "_noGelu"], ["", "_gapReorder"])
    return [f"bcosifyv2_bcos_{name}{''.join(chosen)}" for name in SIZES for chosen in itertools.product(*parts)]


def conventional_names(dataset: str) -> list[str]:
    """Names of the conventional ones."""
    return list(SIZES) if dataset in CLASSIFICATION else []


def find(dataset: str, base_network: str, name: str) -> Experiment | None:
    """The recipe of a B-cosified simple ViT, or None where the name is not one."""
    match = _NAME.fullmatch(name)
    if match is None or dataset not in CLASSIFICATION:
        return None
    keep: list[Kept] = ["biases"] if match["bias"] else []
    if not match["reorder"]:
        keep.append("head_order")
    architecture = match["architecture"]
    return Experiment(
        dataset=dataset,
        base_network=base_network,
        name=f"bcosifyv2_bcos_{match['rest']}",
        seed=DEFAULT_SEED,
        model=ModelRecipe(
            architecture=architecture,
            num_classes=DATASETS[dataset].num_classes,
            converted=True,
            start="random" if match["random"] else "file",
            keep=tuple(keep),
            no_gelu=match["no_gelu"] is not None,
        ),
        data=_data(dataset, architecture, six_channels=True, num_workers=10),
        optimiser=OptimiserRecipe(
            name="adam",
            lr=_RATES[match["rate"]],
            weight_decay=0.0,
            schedule="cosine",
            interval="step",
            agc=0.01,
            warmup_steps=_warmup(architecture) if match["warmup"] else 0,
        ),
        trainer=TrainerRecipe(max_epochs=90, train_loss="bce_uniform_off_labels", eval_loss="bce"),
    )


def find_conventional(dataset: str, base_network: str, name: str) -> Experiment | None:
    """The recipe by which B-cos v2 trains the conventional simple ViTs, or None where the name is not one."""
    if name not in conventional_names(dataset):
        return None
    return Experiment(
        dataset=dataset,
        base_network=base_network,
        name=name,
        seed=DEFAULT_SEED,
        model=ModelRecipe(name, DATASETS[dataset].num_classes, converted=False, start="random"),
        data=_data(dataset, name, six_channels=False, num_workers=16),
        optimiser=OptimiserRecipe(
            name="adamw",
            lr=1e-3,
            weight_decay=1e-4,
            schedule="cosine",
            interval="step",
            agc=None,
            warmup_steps=_warmup(name),
            max_norm=1.0,
        ),
        trainer=TrainerRecipe(max_epochs=90, train_loss="cross_entropy", eval_loss="cross_entropy"),
    )


def _data(dataset: str, architecture: str, six_channels: bool, num_workers: int) -> DataRecipe:
    data = DATASETS[dataset]
    return DataRecipe(
        dataset=dataset,
        image_size=data.image_size,
        six_channels=six_channels,
        batch_size=64 if _is_big(architecture) else 128,
        num_workers=min(num_workers, data.num_workers),
        rand_augment=10,
        mixup=0.2,
    )


def _warmup(architecture: str) -> int:
    return 50_000 if _is_big(architecture) else 10_000


def _is_big(architecture: str) -> bool:
    return "_l_" in architecture or architecture.startswith("simple_vit_b")
