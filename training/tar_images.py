"""Images in tar files, as WebDataset and img2dataset write them, read one by one in any order."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from models.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png")


class TarImages(Dataset[tuple[Tensor, int]]):
    """The images of all `*.tar` in a folder, in the order of names and places; the class of each is 0.

    The headers of all files are read at the start, to know where each image lies; after that every image is one read.

    Args:
        folder: with `00000.tar`, `00001.tar`, ...
        transform: gets an RGB image.

    Raises:
        models.errors.UserError: no tar file, one that is damaged, or none with images (.jpg, .jpeg, .png) in it.
    """

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Tensor]) -> None:
        self.shards = sorted(folder.glob("*.tar"))
        if not self.shards:
            raise UserError(f"There are no tar files in {folder}.")
        self.transform = transform
        places = [_places(path) for path in self.shards]
        self.shard = np.repeat(np.arange(len(places)), [len(found) for found in places])
        self.place = np.concatenate(places)  # offset and size
        if not len(self.place):
            raise UserError(f"The tar files in {folder} hold no image ({', '.join(_SUFFIXES)}).")

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.shards[self.shard[index]]
        offset, size = (int(number) for number in self.place[index])
        # Opened for each image: an open file must not be shared between loading processes.
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        try:
            image = Image.open(io.BytesIO(content)).convert("RGB")
        # PIL reports damage as OSError, but for some formats as SyntaxError or ValueError.
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path}: the image at byte {offset} cannot be read: {error}") from error
        return self.transform(image), 0


def _places(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Offset and size of each image, `[N, 2]`."""
    try:
        with tarfile.open(path, "r:") as archive:
            found = [
                (member.offset_data, member.size)
                for member in archive
                if member.isfile() and member.name.lower().endswith(_SUFFIXES)
            ]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"The tar file {path} is damaged or cut short: {error}") from error
    return np.array(found, dtype=np.int64).reshape(-1, 2)
