"""The CUDA kernels compile for Ampere and Hopper, without warnings or spills, and use the tensor cores. Needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bcos_kernels import native
from bcos_kernels.native import covers

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")

#: What the launch bounds leave a thread: 65536 registers for the threads of two blocks of 256, or of three.
REGISTERS = {"conv2d": 128, "": 80}


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    spilled: int


def compile_one(source: Path, arch: str, target: Path) -> str:
    """ptxas's report."""
    assert NVCC is not None
    include = Path(torch.__file__).parent / "include"
    options = ["-O3", "-std=c++20", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v"]
    warnings = ["--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    command = [NVCC, *options, *warnings, "-isystem", str(include), "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def kernels(report: str) -> Iterator[Kernel]:
    for entry in report.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", entry)
        spilled = re.search(r"(\d+) bytes spill stores", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert name is not None, entry
        assert spilled is not None, entry
        assert registers is not None, entry
        yield Kernel(name.group(1), int(registers.group(1)), int(spilled.group(1)))


def find_cuobjdump() -> str | None:
    """NVIDIA's, or the one that comes with Triton."""
    spec = find_spec("triton")
    inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(inside))


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc on this machine")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    targets = [tmp_path / f"{source.stem}.o" for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(compile_one, SOURCES, [arch] * len(SOURCES), targets))
    wrong, seen = [], 0
    for source, report in zip(SOURCES, reports, strict=True):
        limit = REGISTERS["conv2d" if source.stem.startswith("conv2d") else ""]
        for kernel in kernels(report):
            seen += 1
            if kernel.spilled or kernel.registers > limit:
                wrong.append(f"{kernel}, {limit} registers at most")
    assert seen > 100
    assert not wrong, "\n".join(wrong)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump: registers and spills were checked, instructions not")
    for target in targets:
        if target.stem.startswith("conv2d"):
            dump = subprocess.run([cuobjdump, "-sass", target], capture_output=True, text=True, check=True).stdout
            for code in dump.split("Function :")[1:]:
                # the tensor cores, their loads from shared memory, the copies in the background; no local memory
                for instruction in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"):
                    assert instruction in code, f"{target.stem}: no {instruction}"
                assert not re.search(r"\b(STL|LDL)\b", code), target.stem


def build(environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "temp")],
        cwd=ROOT,
        env={**os.environ, "BCOS_BUILD_DIR": str(folder / "objects"), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
@pytest.mark.parametrize("required", ["0", "1"])
def test_another_cuda_is_refused_in_a_sentence(required: str, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 1.5, V1.5.0"\n')
    nvcc.chmod(0o755)
    # without a C++ compiler, so that the rest of the build is short
    environment = {"CUDA_HOME": str(tmp_path), "CXX": "false", "BCOS_REQUIRE_EXTENSION": required, "BCOS_NO_CUDA": "0"}
    done = build(environment, tmp_path)
    assert f"nvcc is of CUDA 1, and torch is built for CUDA {torch.version.cuda}" in done.stdout + done.stderr
    assert (done.returncode != 0) == (required == "1")
    if required == "0":
        assert "installed without its CUDA kernels" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("archs", "capability", "sentence"),
    [
        ("", (8, 0), "native: built without CUDA: no nvcc was found; with nvcc, `COMMAND` builds the kernels"),
        (
            "9.0a",
            (8, 0),
            "native: compiled for 9.0a, this GPU is sm_80; `TORCH_CUDA_ARCH_LIST=9.0a;8.0 COMMAND` adds it",
        ),
        ("8.0", (8, 0), None),
        ("8.0", (7, 5), "native: kernels need compute capability 8.0 or higher; this GPU has 7.5"),
    ],
)
def test_a_gpu_without_code_is_refused_in_a_sentence(
    archs: str, capability: tuple[int, int], sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_archs": archs})
    monkeypatch.setattr(native.build_record, "rebuild_command", lambda more=(): " ".join([*more, "COMMAND"]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert native._gpu_not_covered.__wrapped__(0) == sentence


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0;9.0;10.0;12.0+PTX", (8, 0), True),
        ("8.0;9.0;10.0;12.0+PTX", (8, 9), True),
        ("8.0;9.0;10.0;12.0+PTX", (7, 5), False),
        ("8.0;9.0;10.0;12.0+PTX", (12, 1), True),
        ("8.0;9.0;10.0;12.0+PTX", (13, 0), True),
        ("8.6", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("9.0a+PTX", (10, 0), False),
        ("8.0 8.6", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("10.0f", (10, 3), True),
    ],
)
def test_which_gpus_are_covered(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert covers(archs, capability) == runs
