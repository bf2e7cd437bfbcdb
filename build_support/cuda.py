"""nvcc, and the GPUs that it compiles for: TORCH_CUDA_ARCH_LIST as torch reads it, less what cannot be built."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from build_support import CannotBuildError, build_record, flag
from build_support.find_torch import Torch

DEFAULT = "8.0;9.0;10.0;12.0+PTX"

# As in torch.utils.cpp_extension (2.14), longer names first; and the words of its CMake, Common and All.
NAMES = {
    "kepler+tesla": "3.7",
    "kepler": "3.5+PTX",
    "maxwell+tegra": "5.3",
    "maxwell": "5.0;5.2+PTX",
    "pascal": "6.0;6.1+PTX",
    "volta+tegra": "7.2",
    "volta": "7.0+PTX",
    "turing": "7.5+PTX",
    "ampere+tegra": "8.7",
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell+tegra": "11.0",
    "blackwell": "10.0;10.3;12.0;12.1+PTX",
    "rubin": "10.7+PTX",
    "common": DEFAULT,
    "all": "8.0;8.6;8.7;8.9;9.0;10.0;10.3;11.0;12.0;12.1+PTX",
}


def number(arch: str) -> str:
    """``"9.0a+PTX"`` as nvcc writes it, ``"90a"``."""
    return arch.removesuffix("+PTX").replace(".", "")


def gencode(archs: list[str]) -> list[str]:
    """``["9.0a", "10.0+PTX"]`` as nvcc's options."""
    options = []
    for arch in archs:
        options.append(f"-gencode=arch=compute_{number(arch)},code=sm_{number(arch)}")
        if arch.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number(arch)},code=compute_{number(arch)}")
    return options


def choose_archs(
    wanted: str | None, knows: Callable[[str], bool], visible: Callable[[], list[str]]
) -> tuple[list[str], str]:
    """``(architectures, what was left out)`` of ``wanted``, a TORCH_CUDA_ARCH_LIST; the second is a sentence or empty.

    ``knows`` tells whether nvcc compiles for one, ``visible`` the GPUs of this machine, for ``native``. Nothing wanted is
    ``DEFAULT``. Of our own lists, what nvcc does not know is left out without a word, and the newest that is left has PTX.
    """
    words = [word for word in re.split(r"[;,\s]+", wanted or "") if word]
    if [word.lower() for word in words] in (["native"], ["auto"]):
        words = visible()
    ours = not words or {word.lower() for word in words} <= {"common", "all"}
    archs: list[str] = []
    low: list[str] = []
    unknown: list[str] = []
    nonsense: list[str] = []
    for word in words or ["common"]:
        for arch in NAMES.get(word.lower(), NAMES.get(word.lower().removesuffix("+ptx"), word)).split(";"):
            match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
            if match is None:
                nonsense.append(word)
            elif (int(match.group(1)), int(match.group(2))) < build_record.LEAST_CAPABILITY:
                low.append(arch)
            elif not knows(arch):
                unknown.append(arch)
            else:
                archs.append(arch)
    if ours and archs and not any(arch.endswith("+PTX") for arch in archs):
        archs[-1] += "+PTX"
    # one that is wanted with PTX and without is wanted with
    archs = [arch for arch in dict.fromkeys(archs) if arch + "+PTX" not in archs]
    said = [f"{', '.join(dict.fromkeys(low))} (the kernels need 8.0)"] if low else []
    said += [f"{', '.join(dict.fromkeys(unknown))} (this nvcc does not know it)"] if unknown and not ours else []
    said += [f"{', '.join(map(repr, dict.fromkeys(nonsense)))} (no architecture)"] if nonsense else []
    return archs, "TORCH_CUDA_ARCH_LIST: left out " + ", ".join(said) if said else ""


def _output(command: list[str]) -> str:
    """All that a program says; nothing where it cannot be run."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _visible() -> list[str]:
    said = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return sorted(set(re.findall(r"^\s*(\d+\.\d)\s*$", said, re.MULTILINE)))


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler that can be used, and the architectures that it will compile for."""

    path: str
    archs: list[str]
    left_out: str = ""

    @staticmethod
    def find(torch: Torch) -> Nvcc:
        """Finds nvcc and the architectures to compile for.

        Raises:
            NoCudaError: nothing was to be expected: there is no nvcc, torch has no CUDA, or CUDA was declined.
            CannotBuildError: there is an nvcc, and something is wrong with it.
        """
        if flag("BCOS_NO_CUDA") or flag("BCOS_SANITIZE"):
            raise NoCudaError("BCOS_NO_CUDA=1 was set")
        if torch.cuda is None:
            raise NoCudaError("the installed torch has no CUDA")
        nvcc = build_record.find_nvcc()
        if nvcc is None:
            raise NoCudaError(build_record.NO_NVCC)
        release = re.search(r"release (\d+)", _output([nvcc, "--version"]))
        if release is None or release.group(1) != torch.cuda.split(".")[0]:
            version = release.group(1) if release else "unknown"
            raise CannotBuildError(f"nvcc is of CUDA {version}, and torch is built for CUDA {torch.cuda}")

        listed = set(re.findall(r"sm_(\d+)\b", _output([nvcc, "--list-gpu-code"])))

        def knows(arch: str) -> bool:
            digits = number(arch)
            if listed and digits.rstrip("af") not in listed:
                return False
            # The list leaves variants out, such as 90a: nvcc is asked for the very one.
            check = [nvcc, "--dryrun", *gencode([arch]), "-x", "cu", "-c", os.devnull, "-o", os.devnull]
            return digits.isdecimal() or "Unsupported gpu architecture" not in _output(check)

        archs, left_out = choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), knows, _visible)
        if not archs:
            raise CannotBuildError(left_out or "nvcc knows none of the architectures that the kernels are built for")
        return Nvcc(nvcc, archs, left_out)


class NoCudaError(CannotBuildError):
    """There is no CUDA to build for, and nothing is wrong with that."""
