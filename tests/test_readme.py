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


@pytest.mark.parametrize("code", blocks("python"), ids=lambda c: c.splitlines()[0])
def test_python(code: str) -> None:
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
    return root


@pytest.mark.slow
@pytest.mark.parametrize("command", PROGRAMS, ids=lambda c: c.split(maxsplit=1)[1])
def test_command(command: str, folder: Path) -> None:
    """In order: later commands use what earlier ones wrote. Options that make it small are added behind the command's own."""
    _, program, *options = shlex.split(command)
    more: list[str] = []
    if "--list" not in options:
        more += ["--base_directory", str(folder / "experiments"), "--num_workers", "0"]
        if "ImageNet" in options:  # which insists on 1,000 classes
            more += ["--dataset", "ImageFolder"]
        else:
            more += ["--experiment_name", "resnet_10_w8"]
    if more and program == "train.py":
        more += ["--max_epochs", "1", "--batch_size", "4" if "ImageNet" in options else "64", "--refresh_rate", "0"]
        if "ImageNet" in options:
            weights = "resnet50.pth" if "resnet_50" in options else "resnet18.pth"
            more += ["--init_weights", str(folder / weights)]
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
