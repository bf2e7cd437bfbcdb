"""The datasets, what is done to their images, and the loaders.

Where the files are looked for:

- `Digits` comes with scikit-learn and needs no path.
- `ImageNet`: `IMAGENET_PATH`, a folder with `train/` and `val/`, in each a folder for every class.
- `ImageFolder`: any folder of the same layout: `DATA_ROOT`, or `IMAGENET_PATH` where `DATA_ROOT` is not set.
- `CIFAR10`: `DATA_ROOT`, the folder that holds `cifar-10-batches-py`.
- `CC3M`: `CC3M_PATH`, a folder with `training/` and `validation/`, in each the tar files that img2dataset writes. Only the
  images are read: nothing here learns from captions.

A path given to the data module (`--data_path`) comes before the environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, cast

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import bcos_kernels as bk
from models.errors import UserError
from models.recipes import DataRecipe, ModelRecipe
from training.randomness import drawn_by
from training.tar_images import TarImages

Sample = tuple[Tensor, int]
Transform = Callable[[Image.Image | Tensor], Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The usual ratio of ImageNet evaluation: the shorter side becomes 256 before 224 are cut out.
_RESIZE_RATIO = 256 / 224


class DataError(UserError, RuntimeError):
    """Data that are missing or cannot be read; the message names the path."""


class Digits(Dataset[Sample]):
    """scikit-learn's handwritten digits: 1,797 real 8x8 images in 10 classes, as 32x32 RGB in [0, 1], dark ink on white.

    The split is stratified and always the same: 1,437 images to train and 360 to test.

    Args:
        train: which part.
        transform: gets a `[3, 32, 32]` float32 tensor in [0, 1].

    Attributes:
        images: `[N, 3, 32, 32]`, float32, before the transform.
        targets: `[N]`, int64.
    """

    classes: ClassVar[list[str]] = [str(digit) for digit in range(10)]
    side: ClassVar[int] = 32

    def __init__(self, train: bool, transform: Transform | None = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
        indices = parts[0] if train else parts[1]
        paper = 1 - torch.from_numpy(digits.images[indices]).to(torch.float32)[:, None] / 16.0  # they count ink
        large = F.interpolate(paper, size=(self.side, self.side), mode="bilinear", align_corners=False)
        self.images = large.expand(-1, 3, -1, -1).contiguous()
        self.targets = torch.from_numpy(digits.target[indices]).to(torch.int64)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), int(self.targets[index])


def train_transform(recipe: DataRecipe) -> Transform:
    """Augmentation, then the form that the network expects (see `DataRecipe.six_channels`)."""
    size = recipe.image_size
    steps: list[nn.Module]
    if recipe.dataset == "Digits" and recipe.rand_augment is not None:
        raise DataError("data.rand_augment: it is made for photographs, not for Digits; leave it at none.")
    if recipe.dataset == "Digits":
        moved = {"degrees": 10, "translate": (0.06, 0.06), "fill": 1.0}
        steps = [v2.RandomAffine(**moved, interpolation=v2.InterpolationMode.BILINEAR), *_enlarge(recipe)]
    elif recipe.dataset == "CIFAR10":
        steps = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *_rand_augment(recipe)]
        steps += [_resize(size), *_to_tensor()]
    else:
        crop = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
        steps = [crop, v2.RandomHorizontalFlip(), *_rand_augment(recipe), *_to_tensor()]
    return _compose([*steps, _network_input(recipe)])


def eval_transform(recipe: DataRecipe) -> Transform:
    """The whole image (Digits, CIFAR10) or its centre (the others), in the form that the network expects."""
    size = recipe.image_size
    shorter = size if recipe.clip_crop else round(size * _RESIZE_RATIO)
    bicubic = recipe.clip_crop
    steps: list[nn.Module]
    if recipe.dataset == "Digits":
        steps = _enlarge(recipe, bicubic)
    elif recipe.dataset == "CIFAR10":
        steps = [_resize(size, bicubic), *_to_tensor()]
    else:
        steps = [_resize(shorter, bicubic), v2.CenterCrop(size), *_to_tensor()]
    return _compose([*steps, _network_input(recipe)])


class EpochSampler(DistributedSampler[Sample]):
    """Shuffles by seed and epoch alone, and says which epoch it is: gives pairs of epoch and index.

    Used on one device too. Lightning calls `set_epoch`, and leaves this kind of sampler as it is in distributed training.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        """Pairs of epoch and index, in this epoch's order."""
        epoch, indices = self.epoch, cast("Iterator[int]", super().__iter__())
        return ((epoch, index) for index in indices)


class Augmented(Dataset[Sample]):
    """A dataset whose transform draws its random numbers by seed, epoch and image alone.

    So a resumed run augments exactly as one that was never stopped, with any number of loading processes.

    Args:
        dataset: draws from torch's global generator.
        seed: of the experiment.
    """

    def __init__(self, dataset: Dataset[Sample], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> Sample:
        epoch, index = epoch_and_index
        with drawn_by(self.seed, epoch, index):
            return self.dataset[index]


class DataModule(pl.LightningDataModule):
    """Loaders for one experiment; training images are shuffled by seed and epoch, so a resumed run sees the same order.

    Args:
        recipe: which dataset, and in what form.
        seed: of the shuffling.
        data_path: where the files are, instead of the environment variables.

    Raises:
        DataError: from `setup`: a missing path, or one for Digits, an empty class folder, classes that differ between
            train and val; from the loaders: an image file that cannot be read.
    """

    def __init__(self, recipe: DataRecipe, seed: int, data_path: str | Path | None = None) -> None:
        super().__init__()
        self.recipe = recipe
        self.seed = seed
        self.data_path = data_path
        self.classes: list[str] = []
        self._train: Dataset[Sample] | None = None
        self._val: Dataset[Sample] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes, known after `setup`."""
        return len(self.classes)

    def classes_for(self, recipe: ModelRecipe) -> int:
        """How many classes a network of this recipe has on these data, 0 where it gives embeddings; after `setup`.

        Raises:
            DataError: the recipe has another number of classes than the dataset.
        """
        classes = self.num_classes if recipe.num_classes is None else recipe.num_classes
        if classes not in (0, self.num_classes):
            raise DataError(
                f"model.num_classes is {classes}, but {self.recipe.dataset} has {self.num_classes} classes."
            )
        return classes

    def setup(self, stage: str | None = None) -> None:
        """Opens the datasets: "validate" and "test" the validation images alone, anything else both parts."""
        recipe = self.recipe
        if stage in (None, "fit") and self._train is None:
            self._train, self.classes = _open(recipe, True, self.data_path, train_transform(recipe))
        if self._val is None:
            self._val, classes = _open(recipe, False, self.data_path, eval_transform(recipe))
            if self.classes and classes != self.classes:
                differing = sorted(set(classes) ^ set(self.classes))
                raise DataError(
                    f"{_root(recipe.dataset, self.data_path)}: train/ and val/ must have the same class folders; "
                    f"these are in one only: {', '.join(differing[:5])}."
                )
            self.classes = classes

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled and augmented; the last, smaller batch is left out where there is a whole one."""
        assert self._train is not None, "setup() comes first"
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        sampler = EpochSampler(self._train, ranks, rank, shuffle=True, seed=self.seed)
        augmented = Augmented(self._train, self.seed)
        return self._loader(augmented, sampler=sampler, drop_last=len(sampler) >= self.recipe.batch_size)

    def val_dataloader(self) -> DataLoader[Sample]:
        """All validation images, in order."""
        assert self._val is not None, "setup() comes first"
        return self._loader(self._val)

    def probe_dataloader(self) -> DataLoader[Sample]:
        """All training images, in order, as the validation images are: neither shuffled nor augmented."""
        images, _ = _open(self.recipe, True, self.data_path, eval_transform(self.recipe))
        return self._loader(images)

    def _loader(
        self, dataset: Dataset[Sample], sampler: EpochSampler | None = None, drop_last: bool = False
    ) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size=self.recipe.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.recipe.num_workers,
            persistent_workers=self.recipe.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _open(
    recipe: DataRecipe, train: bool, data_path: str | Path | None, transform: Transform
) -> tuple[Dataset[Sample], list[str]]:
    if recipe.dataset == "Digits":
        if data_path is not None:
            raise DataError("--data_path: Digits come with scikit-learn and are in no folder; leave it out.")
        return Digits(train, transform), Digits.classes
    root = _root(recipe.dataset, data_path)
    if recipe.dataset == "CIFAR10":
        try:
            cifar = CIFAR10(str(root), train=train, transform=transform, download=False)
        except RuntimeError as error:
            raise DataError(
                f"CIFAR10: {root / CIFAR10.base_folder} is missing or damaged. Nothing is downloaded without being "
                f'asked for; this fetches it: python -c "from torchvision.datasets import CIFAR10; '
                f"CIFAR10('{root}', download=True)\""
            ) from error
        return cifar, list(cifar.classes)
    if recipe.dataset == "CC3M":
        return TarImages(root / ("training" if train else "validation"), transform), []
    folder = root / ("train" if train else "val")
    _check_class_folders(folder)
    images = ImageFolder(str(folder), transform=transform, loader=read_image)
    if recipe.dataset == "ImageNet" and len(images.classes) != 1000:
        raise DataError(
            f"ImageNet has 1000 class folders, {folder} has {len(images.classes)}. For other images: --dataset "
            "ImageFolder."
        )
    return images, list(images.classes)


def _root(dataset: str, data_path: str | Path | None) -> Path:
    variables = {"ImageNet": ["IMAGENET_PATH"], "CIFAR10": ["DATA_ROOT"], "CC3M": ["CC3M_PATH"]}.get(
        dataset, ["DATA_ROOT", "IMAGENET_PATH"]
    )
    source = "--data_path"
    if data_path is None:
        source = next((name for name in variables if os.environ.get(name)), "")
        if not source:
            raise DataError(
                f"{dataset}: where the images are is not known. Set the environment variable {variables[0]} or give "
                "--data_path."
            )
        data_path = os.environ[source]
    root = Path(data_path).expanduser()
    if not root.is_dir():
        raise DataError(f"{dataset}: {source} is '{data_path}', which is not a folder.")
    return root


def _check_class_folders(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder}: {folder.parent} must hold train/ and val/, each with a folder for every "
            "class."
        )
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise DataError(f"{folder} holds no class folders.")
    for path in classes:
        if not any(file.suffix.lower() in IMG_EXTENSIONS for file in path.rglob("*")):
            raise DataError(f"The class folder {path} holds no image ({', '.join(IMG_EXTENSIONS)}).")


def read_image(path: str) -> Image.Image:
    """An image file, in RGB.

    Raises:
        DataError: it is missing or cannot be read; the message names it.
    """
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    # PIL reports damage as OSError, but for some formats as SyntaxError or ValueError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"The image file {path} cannot be read: {error}") from error


def _rand_augment(recipe: DataRecipe) -> list[nn.Module]:
    if recipe.rand_augment is None:
        return []
    return [v2.RandAugment(magnitude=recipe.rand_augment, interpolation=v2.InterpolationMode.BILINEAR)]


def _resize(size: int, bicubic: bool = False) -> nn.Module:
    interpolation = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
    return v2.Resize(size, interpolation=interpolation, antialias=True)


def _enlarge(recipe: DataRecipe, bicubic: bool = False) -> list[nn.Module]:
    return [] if recipe.image_size == Digits.side else [_resize(recipe.image_size, bicubic)]


def _to_tensor() -> list[nn.Module]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]


def _network_input(recipe: DataRecipe) -> nn.Module:
    return bk.AddInverse() if recipe.six_channels else v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)


def _compose(steps: list[nn.Module]) -> Transform:
    return nn.Sequential(*steps)
