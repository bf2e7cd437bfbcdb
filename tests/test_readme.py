"""Every Python block and every command of the README, run as a reader would; `make` runs the suite and the demo itself."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.transforms.functional import to_pil_image

from models.standard import build
from models.table import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
PROGRAMS = [c for c in COMMANDS if c.startswith("python ")]


def test_commands_are_known() -> None:
    """What is neither run here nor by CI may not stand in the README."""
    others = set(COMMANDS) - set(PROGRAMS)
    assert others == {"make demo", "make test", "export IMAGENET_PATH=/path/to/imagenet"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{c.split()[1]}:" in makefile for c in others if c.startswith("make"))


def test_table_of_networks() -> None:
    """What `python -m models.table` prints."""
    assert table() in README


@pytest.mark.parametrize("code", blocks("python"), ids=lambda c: c.splitlines()[0])
def test_python(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder to write into, which torch.hub takes for the repository."""
    (tmp_path / "hubconf.py").symlink_to(ROOT / "hubconf.py")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for ImageNet, three classes of a few images, and for its pretrained weights."""
    root = tmp_path_factory.mktemp("readme")
    rng = torch.Generator().manual_seed(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            (root / "imagenet" / part / name).mkdir(parents=True)
            for i in range(count):
                image = to_pil_image(torch.rand(3, 64, 80, generator=rng))
                image.save(root / "imagenet" / part / name / f"{i}.jpeg")
    for name in ("resnet18", "resnet50"):
        torch.save(getattr(torchvision.models, name)().state_dict(), root / f"{name}.pth")
    torch.save(build("clip_resnet10_w8", 0).state_dict(), root / "clip.pth")
    torch.save(torch.randn(128, 3, generator=rng), root / "texts.pt")
    torch.save(torch.randn(128, 1, generator=rng), root / "text.pt")
    for name in ("digit.png", "dog.jpeg"):
        to_pil_image(torch.rand(3, 32, 32, generator=rng)).save(root / name)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("command", PROGRAMS, ids=lambda c: c.split(maxsplit=1)[1])
def test_command(command: str, folder: Path) -> None:
    """In order: later commands use what earlier ones wrote. Options that make it small are added behind the command's own."""
    written = {name: str(folder / name) for name in ("digit.png", "dog.jpeg", "digits.safetensors", "explanations")}
    _, program, *options = [written.get(word, word) for word in shlex.split(command)]
    trains = program in ("train.py", "run_with_submitit.py")
    clip = "clip_bcosification" in options
    more: list[str] = []
    if "--list" not in options:
        more += ["--base_directory", str(folder / "experiments")]
        if trains or program == "evaluate.py":
            more += ["--num_workers", "0"]
        if "ImageNet" in options:  # which insists on 1,000 classes
            more += ["--dataset", "ImageFolder"]
        else:
            more += ["--experiment_name", "resnet_10_w8"]
    if clip:
        more += ["--experiment_name", "resnet_50_clip_b2_noBias_randomResizedCrop_sigLip_ImageFolder_bcosification"]
    if program == "run_with_submitit.py":
        more += ["--gpus", "1", "--cluster", "debug"]
    if "zeroshot" in options:
        more += ["--zeroshot_weights", str(folder / "texts.pt")]
    if "--text" in options:
        more += ["--zeroshot_weights", str(folder / "text.pt")]
    if more and trains:
        more += ["--max_epochs", "1", "--batch_size", "4" if "ImageNet" in options else "64", "--refresh_rate", "0"]
        if "ImageNet" in options:
            weights = "clip.pth" if clip else "resnet50.pth" if "resnet_50" in options else "resnet18.pth"
            more += ["--init_weights", str(folder / weights)]
        if clip:
            more += ["--set", "model.architecture=clip_resnet10_w8", "data.image_size=64"]
    environment = {**os.environ, "IMAGENET_PATH": str(folder / "imagenet"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, program, *options, *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
