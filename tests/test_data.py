"""Datasets, transforms and loaders, and the sentence for everything that can be wrong with a folder of images."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from models import cli, experiments
from models.experiments import DataRecipe
from training.data import Augmented, DataError, DataModule, Digits, EpochSampler, eval_transform, train_transform


def _recipe(dataset: str, base_network: str = "bcosification", **changes: object) -> DataRecipe:
    name = "resnet_10" if dataset == "Digits" else "resnet_18"
    recipe = experiments.find(dataset, base_network, name).data
    return dataclasses.replace(recipe, **{"num_workers": 0, **changes})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET_PATH", raising=False)
    monkeypatch.delenv("DATA_ROOT", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three images each in train/ and val/, of different sizes and modes."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for index, (width, height) in enumerate([(40, 30), (300, 280), (64, 64)]):
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert("L" if index == 2 else "RGB")
                image.save(tmp_path / part / label / f"{index}.png")
    return tmp_path


def test_digits_split_is_fixed_and_stratified() -> None:
    train, test = Digits(train=True), Digits(train=False)
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 3, 32, 32)
    assert torch.equal(test.images, Digits(train=False).images)
    for targets in (train.targets, test.targets):
        share = torch.bincount(targets, minlength=10) / len(targets)
        assert share.min() > 0.09
        assert share.max() < 0.11
    seen = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in seen for image in test.images) == 0


def test_digits_are_the_original_images_enlarged() -> None:
    images = Digits(train=True).images
    assert images.min() >= 0
    assert 0.9 < images.max() <= 1
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("dataset", ["ImageNet", "CIFAR10"])
@pytest.mark.parametrize("base_network", ["vit_bcosification", "standard"])
def test_vits_train_on_rand_augment(dataset: str, base_network: str) -> None:
    name = "vitc_ti_patch1_14" if base_network == "standard" else "bcosifyv2_bcos_vitc_ti_patch1_14"
    recipe = experiments.find(dataset, base_network, name).data
    transform = train_transform(recipe)
    (augment,) = [step for step in transform.modules() if isinstance(step, v2.RandAugment)]  # type: ignore[attr-defined]
    assert (augment.magnitude, augment.num_ops) == (10, 2)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(transform(image))
    assert outs[0].shape == ((3 if base_network == "standard" else 6), 224, 224)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    plain = train_transform(dataclasses.replace(recipe, rand_augment=None))
    assert not any(isinstance(step, v2.RandAugment) for step in plain.modules())  # type: ignore[attr-defined]
    assert not any(isinstance(step, v2.RandAugment) for step in eval_transform(recipe).modules())  # type: ignore[attr-defined]


def test_six_channels_are_the_image_and_its_inverse() -> None:
    transform = eval_transform(_recipe("Digits"))
    image = Digits(train=False).images[0]
    out = transform(image)
    assert out.shape == (6, 32, 32)
    assert torch.equal(out[:3], image)
    assert torch.equal(out[3:], 1 - image)


def test_conventional_networks_get_normalised_channels() -> None:
    image = Digits(train=False).images[0]
    out = eval_transform(_recipe("Digits", "standard"))(image)
    expected = (image - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("make", [train_transform, eval_transform])
@pytest.mark.parametrize(("dataset", "size"), [("ImageNet", 224), ("ImageFolder", 224), ("CIFAR10", 224)])
def test_photographs_become_six_channels_of_the_right_size(make: object, dataset: str, size: int) -> None:
    assert callable(make)
    shape = (32, 32) if dataset == "CIFAR10" else (500, 333)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    out = make(_recipe(dataset))(image)
    assert out.shape == (6, size, size)
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1


def test_augmentation_differs_from_image_to_image() -> None:
    transform = train_transform(_recipe("Digits"))
    image = Digits(train=True).images[0]
    assert not torch.equal(transform(image), transform(image))


def test_transforms_travel_to_worker_processes() -> None:
    for dataset in set(experiments.datasets()) - {"CC3M"}:
        pickle.loads(pickle.dumps(train_transform(_recipe(dataset))))


@pytest.mark.parametrize("make", [train_transform, eval_transform])
def test_digits_of_another_size(make: object) -> None:
    assert callable(make)
    assert make(_recipe("Digits", image_size=64))(Digits(train=False).images[0]).shape == (6, 64, 64)


def test_clip_sees_the_whole_shorter_side() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    out = eval_transform(_recipe("ImageNet", image_size=30, clip_crop=True))(image)
    small = image.resize((50, 30), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(small)).permute(2, 0, 1)[:, :, 10:40] / 255
    assert float((out[:3] - expected).abs().max()) < 1.5 / 255
    plain = eval_transform(_recipe("ImageNet", image_size=30))(image)
    assert not torch.allclose(out, plain, atol=0.1)


def test_probe_sees_the_training_images_as_they_are() -> None:
    data = DataModule(_recipe("Digits", batch_size=1000), seed=0)
    data.setup("test")
    images = torch.cat([images for images, _ in data.probe_dataloader()])
    assert torch.equal(images[:, :3], Digits(train=True).images)


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        data = DataModule(_recipe("Digits"), seed)
        data.setup("fit")
        sampler = data.train_dataloader().sampler
        assert isinstance(sampler, EpochSampler)
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert {told for told, _ in pairs} == {epoch}
        return [index for _, index in pairs]

    assert order(1, 3) == order(1, 3)
    assert order(1, 3) != order(1, 4)
    assert order(1, 3) != order(2, 3)
    assert sorted(order(1, 3)) == list(range(1437))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_augmentation_depends_on_seed_epoch_and_image_only(workers: int) -> None:
    def second_batch(seed: int, epoch: int, num_workers: int) -> torch.Tensor:
        torch.manual_seed(workers)  # must not matter
        data = DataModule(_recipe("Digits", num_workers=num_workers, batch_size=16), seed)
        data.setup("fit")
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, EpochSampler)
        loader.sampler.set_epoch(epoch)
        batches = iter(loader)
        next(batches)
        return next(batches)[0]

    reference = second_batch(1, 3, 0)
    assert torch.equal(reference, second_batch(1, 3, workers))
    assert not torch.equal(reference, second_batch(1, 4, workers))
    data = Digits(train=True, transform=train_transform(_recipe("Digits")))
    state = torch.get_rng_state()
    one, same, other = (Augmented(data, seed=1)[pair][0] for pair in [(0, 5), (0, 5), (1, 5)])
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_loaders_cover_the_data() -> None:
    data = DataModule(_recipe("Digits", batch_size=100), seed=0)
    data.setup()
    assert data.num_classes == 10
    assert [len(targets) for _, targets in data.val_dataloader()] == [100, 100, 100, 60]
    assert [len(targets) for _, targets in data.train_dataloader()] == [100] * 14


@pytest.mark.parametrize(
    ("variables", "argument"),
    [({"DATA_ROOT": "."}, False), ({"IMAGENET_PATH": "."}, False), ({"DATA_ROOT": "elsewhere"}, True)],
)
def test_image_folder_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], argument: bool
) -> None:
    for name, relative in variables.items():
        monkeypatch.setenv(name, str(folder / relative))
    data = DataModule(_recipe("ImageFolder", batch_size=4, num_workers=1), 0, folder if argument else None)
    data.setup("fit")
    assert data.classes == ["cat", "dog"]
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (4, 6, 224, 224)
    assert targets.dtype == torch.int64
    assert sum(len(targets) for _, targets in data.val_dataloader()) == 6


def test_fewer_images_than_a_batch_still_make_one(folder: Path) -> None:
    data = DataModule(_recipe("ImageFolder", batch_size=64), 0, folder)
    data.setup("fit")
    assert [len(targets) for _, targets in data.train_dataloader()] == [6]


@pytest.mark.parametrize(
    ("dataset", "variable"), [("ImageNet", "IMAGENET_PATH"), ("ImageFolder", "DATA_ROOT"), ("CIFAR10", "DATA_ROOT")]
)
def test_path_that_is_not_set_or_not_there(
    dataset: str, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"{dataset}: .*Set the environment variable {variable} or give --data_path"):
        DataModule(_recipe(dataset), 0).setup()
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=f"{variable} is '{tmp_path / 'nowhere'}', which is not a folder"):
        DataModule(_recipe(dataset), 0).setup()


def test_cifar10_is_not_downloaded_silently(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        DataModule(_recipe("CIFAR10"), 0, tmp_path).setup()
    assert str(tmp_path / "cifar-10-batches-py") in str(caught.value)
    assert "download=True" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_folder_without_val(folder: Path) -> None:
    (folder / "val").rename(folder / "validation")
    with pytest.raises(DataError, match=f"no folder {folder / 'val'}"):
        DataModule(_recipe("ImageFolder"), 0, folder).setup()


def test_folder_without_classes(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path / 'train'} holds no class folders"):
        DataModule(_recipe("ImageFolder"), 0, tmp_path).setup()


def test_empty_class_folder_is_named(folder: Path) -> None:
    (folder / "train" / "emu").mkdir()
    (folder / "train" / "emu" / "readme.txt").write_text("no image")
    with pytest.raises(DataError, match=f"{folder / 'train' / 'emu'} holds no image"):
        DataModule(_recipe("ImageFolder"), 0, folder).setup()


def test_classes_that_differ_are_named(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(DataError, match="dog, wolf"):
        DataModule(_recipe("ImageFolder"), 0, folder).setup()


def test_imagenet_with_another_number_of_classes(folder: Path) -> None:
    with pytest.raises(DataError, match=r"1000 class folders, .* has 2\. For other images: --dataset ImageFolder"):
        DataModule(_recipe("ImageNet"), 0, folder).setup()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_broken_image_file_is_named(
    folder: Path, workers: int, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "val" / "dog" / "1.png"
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "text": b"not an image", "empty": b""}[damage])
    data = DataModule(_recipe("ImageFolder", num_workers=workers), 0, folder)
    data.setup("test")
    with pytest.raises(DataError, match=r"dog/1\.png cannot be read"):
        list(data.val_dataloader())
    with pytest.raises(SystemExit):
        cli.run(lambda: list(data.val_dataloader()))
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: The image file {path} cannot be read" in line
