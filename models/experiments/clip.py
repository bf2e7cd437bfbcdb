"""Names and recipes of CLIP's image encoder: B-cosified, and taught by the conventional one that it was made of.

The public code's names: `_cyclicLR` begins the cosine again every ten epochs; the last part repeats the dataset.
"""

from __future__ import annotations

import re

from models.experiments.datasets import DATASETS
from models.recipes import DEFAULT_SEED, DataRecipe, Experiment, ModelRecipe, OptimiserRecipe, TrainerRecipe

CONVERTED = "clip_bcosification"

_HEAD = "resnet_50_clip_b2_noBias_randomResizedCrop"
_PHOTOGRAPHS = ("CC3M", "ImageFolder", "ImageNet")
_RESTART_EPOCHS = 10


def names(dataset: str) -> list[str]:
    """One pattern; of the datasets, those whose images are cut at random."""
    return [f"{_HEAD}[_cyclicLR]_sigLip_{dataset}_bcosification"] if dataset in _PHOTOGRAPHS else []


def spelled(dataset: str) -> list[str]:
    """Every single name that the pattern stands for."""
    return [name.replace("[_cyclicLR]", part) for name in names(dataset) for part in ("", "_cyclicLR")]


def find(dataset: str, base_network: str, name: str) -> Experiment | None:
    """The recipe, or None where the name is none of this dataset."""
    # The public code's files for CC3M have `kd_` in their names, its documentation has not.
    match = re.fullmatch(rf"{_HEAD}(?P<cyclic>_cyclicLR)?_sigLip_(?:kd_)?{dataset}_bcosification", name)
    if match is None or dataset not in _PHOTOGRAPHS:
        return None
    cyclic = match["cyclic"] or ""
    data = DATASETS[dataset]
    return Experiment(
        dataset=dataset,
        base_network=base_network,
        name=f"{_HEAD}{cyclic}_sigLip_{dataset}_bcosification",
        seed=DEFAULT_SEED,
        model=ModelRecipe(
            architecture="clip_resnet50",
            num_classes=0,
            converted=True,
            start="pretrained",
            pretrained="openai",
            normalize="clip",
        ),
        data=DataRecipe(
            dataset=dataset,
            image_size=data.image_size,
            six_channels=True,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            clip_crop=True,
        ),
        optimiser=OptimiserRecipe(
            name="adam",
            lr=1e-4,
            weight_decay=0.0,
            schedule="cosine",
            interval="epoch",
            agc=0.01,
            restart_every=_RESTART_EPOCHS if cyclic else None,
        ),
        trainer=TrainerRecipe(max_epochs=90, train_loss="siglip", eval_loss="siglip"),
    )
