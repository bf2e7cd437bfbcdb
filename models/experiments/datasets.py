"""What the recipes need to know of each dataset."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dataset:
    """Attributes:
    num_classes: None where the files decide; 0 where there are none.
    """

    num_classes: int | None
    image_size: int
    batch_size: int
    num_workers: int


DATASETS = {
    "CC3M": Dataset(num_classes=0, image_size=224, batch_size=64, num_workers=16),
    "CIFAR10": Dataset(num_classes=10, image_size=224, batch_size=64, num_workers=8),
    "Digits": Dataset(num_classes=10, image_size=32, batch_size=64, num_workers=0),
    "ImageFolder": Dataset(num_classes=None, image_size=224, batch_size=64, num_workers=16),
    "ImageNet": Dataset(num_classes=1000, image_size=224, batch_size=64, num_workers=16),
}

#: Datasets whose images are photographs with a class.
CLASSIFICATION = ("CIFAR10", "ImageFolder", "ImageNet")
