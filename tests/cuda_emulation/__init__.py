"""Builds the emulator: the CUDA operators, with their kernels, compiled by g++ for CPU tensors (see ``emulation.h``)."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
OPERATIONS = ("conv2d", "conv2d_backward", "linear", "linear_backward", "batch_norm", "batch_norm_backward")

FLAGS = [
    *("-O2", "-std=c++20", "-fPIC", "-DBCOS_EMULATE", f"-I{HERE}", "-x", "c++"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"),
]


def why_not() -> str | None:
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    return f"the emulator is built with {missing[0]}" if missing else None


def build(folder: Path) -> Path:
    """The library, compiled again only where a source has changed."""
    installed = Path(torch.__file__).parent
    includes = [installed / "include", installed / "include" / "torch" / "csrc" / "api" / "include"]
    flags = [*FLAGS, *(f"-isystem {path}" for path in includes)]
    libraries = f"-L{installed / 'lib'} -ltorch -ltorch_cpu -lc10 -Wl,-rpath,{installed / 'lib'}"
    lines = [
        "rule compile",
        f"  command = g++ -MMD -MF $out.d {' '.join(flags)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared $in -o $out {libraries}",
    ]
    sources = [*SOURCES.glob("cuda/*.cpp"), *SOURCES.glob("cuda/*.cu"), SOURCES / "layer.cpp", *HERE.glob("*.cpp")]
    objects = []
    for source in sorted(sources):
        objects.append(f"{source.parent.name}_{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build emulation.so: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run(["ninja"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return folder / "emulation.so"


@functools.cache
def load() -> Any:
    """``torch.ops.bcos_emulated``, with the schemas of ``torch.ops.bcos_native``, which has to be loaded."""
    folder = Path(os.environ.get("BCOS_BUILD_DIR", SOURCES.parent / "build")).resolve()
    torch.ops.load_library(build(folder / f"emulation-{torch.__version__}"))
    library = torch.library.Library("bcos_emulated", "FRAGMENT")
    for name in OPERATIONS:
        schema = str(getattr(torch.ops.bcos_native, name).default._schema)
        library.define(schema.removeprefix("bcos_native::"))
    load.library = library  # type: ignore[attr-defined] # it takes its schemas with it when it goes
    return torch.ops.bcos_emulated
