"""CC3M: images in tar files, as img2dataset writes them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from models import experiments
from models.checkpoints import epoch_checkpoints
from models.errors import UserError
from models.standard import build
from training.data import DataError, DataModule
from training.tar_images import TarImages

NAME = "resnet_50_clip_b2_noBias_randomResizedCrop_sigLip_CC3M_bcosification"
RECIPE = experiments.find("CC3M", "clip_bcosification", NAME).data


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _image(value: int, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 3 * value)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five images in two training shards, with captions and statistics between them; two to validate."""
    for part, shards in (("training", ([10, 20, 30], [40, 50])), ("validation", ([60, 70],))):
        (tmp_path / part).mkdir()
        for shard, values in enumerate(shards):
            with tarfile.open(tmp_path / part / f"{shard:05}.tar", "w") as archive:
                for value in values:
                    _add(archive, f"{value:09}.png", _image(value))
                    _add(archive, f"{value:09}.txt", b"a caption")
                    _add(archive, f"{value:09}.json", b"{}")
        (tmp_path / part / "00000_stats.json").write_text("{}")
    return tmp_path


def _red(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))[0, 0, 0]


def test_images_in_any_order(root: Path) -> None:
    images = TarImages(root / "training", _red)
    assert len(images) == 5
    assert [int(images[index][0]) for index in (4, 0, 3, 1, 2)] == [50, 10, 40, 20, 30]
    assert {label for _, label in (images[index] for index in range(5))} == {0}


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders(root: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setenv("CC3M_PATH", str(root))
    recipe = type(RECIPE)(**{**vars(RECIPE), "batch_size": 2, "num_workers": workers})
    data = DataModule(recipe, seed=0)
    data.setup("fit")
    assert data.num_classes == 0
    assert [tuple(images.shape) for images, _ in data.train_dataloader()] == [(2, 6, 224, 224)] * 2
    ((images, _),) = data.val_dataloader()
    assert images[:, 0, 0, 0].mul(255).round().tolist() == [60, 70]


def test_training(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(build("clip_resnet10_w8", 0).state_dict(), tmp_path / "teacher.pth")
    named = ["--dataset", "CC3M", "--base_network", "clip_bcosification", "--experiment_name", NAME]
    paths = [
        "--data_path",
        str(root),
        "--base_directory",
        str(tmp_path),
        "--init_weights",
        str(tmp_path / "teacher.pth"),
    ]
    small = ["model.architecture=clip_resnet10_w8", "data.image_size=64", "data.batch_size=2", "data.num_workers=0"]
    directory = train.main([*named, *paths, "--max_epochs", "1", "--refresh_rate", "0", "--set", *small])
    assert directory == tmp_path / "CC3M" / "clip_bcosification" / NAME
    assert [len(found.scores) for found in epoch_checkpoints(directory)] == [1]


def test_paths_that_are_wrong(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC3M_PATH", raising=False)
    with pytest.raises(DataError, match="Set the environment variable CC3M_PATH or give --data_path"):
        DataModule(RECIPE, 0).setup()
    with pytest.raises(UserError, match=r"There are no tar files in .*training"):
        DataModule(RECIPE, 0, root / "validation").setup()


def test_damage_is_named(root: Path) -> None:
    path = root / "training" / "00001.tar"
    content = path.read_bytes()
    start = content.index(b"PNG")
    path.write_bytes(content[: start + 4] + b"x" * 40 + content[start + 44 :])
    with pytest.raises(UserError, match=r"00001\.tar: the image at byte 512 cannot be read"):
        TarImages(root / "training", _red)[3]
    path.write_bytes(content[:700])
    with pytest.raises(UserError, match=r"00001\.tar is damaged or cut short"):
        TarImages(root / "training", _red)
    with tarfile.open(path, "w") as archive:
        _add(archive, "1.txt", b"a caption")
    (root / "training" / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"hold no image"):
        TarImages(root / "training", _red)
