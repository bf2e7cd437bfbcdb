"""What classes are called: in tables, and in the sentences that a text encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torchvision.models

from models import open_clip_files
from models.errors import UserError
from models.recipes import Experiment

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def class_names(experiment: Experiment, data_path: Path | None) -> list[str]:
    """In tables: ImageNet's as torchvision has them, a folder's of images by its folders; numbers where neither is known.

    Raises:
        models.errors.UserError: it is not known how many there are, or the folders are not as many.
    """
    dataset, count = experiment.dataset, experiment.model.num_classes
    if data_path is not None and dataset != "ImageFolder":
        raise UserError(f"--data_path: the classes of {dataset} are known without it; it is for --dataset ImageFolder.")
    names = [str(number) for number in range(count or 0)]
    if dataset == "ImageNet":
        names = list(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    elif dataset == "CIFAR10":
        names = list(_CIFAR10)
    elif data_path is not None:
        folders = (data_path / "val").iterdir() if (data_path / "val").is_dir() else ()
        names = sorted(folder.name for folder in folders if folder.is_dir())
    if not names or (count and len(names) != count):
        known = f"the network has {count} classes" if count else "no config.json says how many classes"
        where = f", {data_path / 'val'} has {len(names)} folders" if data_path is not None else "; give --data_path"
        if count == 0:
            known, where = "the network gives embeddings", f"{where}, or texts with --text"
        raise UserError(f"The classes of '{experiment.name}' are not known: {known}{where}.")
    return names


def in_sentences(dataset: str, classes: Sequence[str]) -> list[str]:
    """In sentences: ImageNet's by OpenAI's list, which was made for them and gives the published accuracies.

    Args:
        classes: as the dataset has them: names of folders, or of CIFAR10's and Digits' classes.

    Raises:
        models.errors.UserError: of ImageNet, where open_clip, which has the list, is not installed.
    """
    if dataset == "ImageNet":
        open_clip_files.package()
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    return [name.replace("_", " ") for name in classes]
