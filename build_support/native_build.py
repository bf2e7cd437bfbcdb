"""Compiles ``csrc/`` into ``_native.so`` with ninja, so that only what changed is compiled again.

No path of this machine gets into ninja's file: sources are compiled from a copy in the build folder, and torch's headers are
reached by a link beside it, all by relative names. So a checkout may lie at any path (spaces, colons, quotes, ``$``), debug
information and error messages name ``csrc/...``, and what counts is what the sources say, not when a checkout wrote them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from build_support import CannotBuildError, build_record, flag
from build_support.cuda import Nvcc, gencode
from build_support.find_torch import Torch

STANDARD = "-std=c++20"

# tile.cpp is compiled once for each of these, as ATen does with its own kernels.
INSTRUCTION_SETS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}

#: Programs that stand before a compiler and are none.
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")

# Needs a compiler's C++20 and a library to match: GCC 10 has both.
_PROBE = """
#include <bit>
#include <concepts>
#include <span>
template <std::integral T> T twice(T a) { return a + a; }
int main() { return twice(static_cast<int>(std::bit_width(0u))); }
"""
_WANTED = "g++ 11, clang++ 14 or later compile them; CXX chooses the compiler"


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the words that run it, which may start with a launcher such as ccache."""

    command: list[str]
    version: str

    @staticmethod
    def find() -> Compiler:
        """CXX if it is set, or else the first of g++, clang++ and c++ that compiles C++20."""
        given = os.environ.get("CXX", "").strip()
        try:
            candidates = [shlex.split(given)] if given else [["g++"], ["clang++"], ["c++"]]
        except ValueError as error:
            raise CannotBuildError(f"CXX cannot be read as a command: {error}", f" ({given})") from None
        found = [words for words in candidates if shutil.which(words[0])]
        if not found:
            what = "the compiler in CXX" if given else "a C++ compiler"
            raise CannotBuildError(f"{what} was not found", f" ({given or 'g++, clang++, c++'}). {_WANTED}")
        for words in found:
            probe = [*words, STANDARD, "-fsyntax-only", "-x", "c++", "-"]
            done = subprocess.run(probe, input=_PROBE, capture_output=True, text=True)
            if done.returncode == 0:
                said = subprocess.run([*words, "--version"], capture_output=True, text=True).stdout
                return Compiler(words, said.partition("\n")[0].strip())
        names = ", ".join(shlex.join(words) for words in found)
        reason = f"the C++ compiler cannot compile C++20 ({names})" if not given else "CXX cannot compile C++20"
        raise CannotBuildError(reason, f": {_WANTED}\n{done.stderr[-2000:]}")

    @property
    def is_clang(self) -> bool:
        return "clang" in self.version.lower()

    def for_nvcc(self) -> list[str]:
        """nvcc's options: it takes the path of a compiler, and arguments one by one."""
        words = self.command[1:] if Path(self.command[0]).name in LAUNCHERS else self.command
        return ["-ccbin", words[0], *(f"-Xcompiler={word}" for word in words[1:])]


def find_ninja() -> str:
    ninja = shutil.which("ninja")
    if ninja is None and (spec := find_spec("ninja")):
        candidate = Path(spec.origin or "").parent / "data" / "bin" / "ninja"
        ninja = str(candidate) if candidate.exists() else None
    if ninja is None:
        raise CannotBuildError("ninja was not found", ": pip install ninja")
    return ninja


def jobs() -> list[str]:
    """ninja's option for MAX_JOBS."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if given and not (given.isdecimal() and int(given) > 0):
        raise CannotBuildError("MAX_JOBS must be a whole number from 1", f"; it is {given!r}")
    return ["-j", given] if given else []


def shell(words: list[str]) -> str:
    """Words as ninja and then the shell read them back."""
    return shlex.join(words).replace("$", "$$")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two builds in one folder come one after the other. The lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # no locks here, as on some network file systems
            pass
        yield


def write_if_changed(path: Path, content: bytes) -> None:
    """ninja goes by times: an unchanged file keeps its own."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def copy_sources(source: Path, target: Path) -> None:
    files = {path.relative_to(source): path for path in build_record.source_files(source)}
    for path in build_record.source_files(target):
        if path.relative_to(target) not in files:
            path.unlink()
    for name, path in files.items():
        write_if_changed(target / name, path.read_bytes())


@dataclass(frozen=True)
class Tools:
    """What builds, CUDA or not."""

    compiler: Compiler
    ninja: list[str]

    @staticmethod
    def find() -> Tools:
        return Tools(Compiler.find(), [find_ninja(), *jobs()])


class Build:
    """Writes build.ninja and runs it, in ``folder``."""

    def __init__(self, folder: Path, sources: Path, torch: Torch, tools: Tools, nvcc: Nvcc | None) -> None:
        self.folder = folder
        self.sources = sources
        self.torch = torch
        self.compiler = tools.compiler
        self.ninja = tools.ninja
        self.nvcc = nvcc
        self.on_x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform == "linux"

    def flags(self) -> list[str]:
        # -Wno-psabi: GCC's remark that vector arguments were passed differently before 4.6.
        # -Wno-maybe-uninitialized: GCC 12 takes the undefined registers of its own AVX-512 header for a mistake.
        flags = ["-O3", "-g1", STANDARD, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
        flags += ["-DNDEBUG"] if self.compiler.is_clang else ["-Wno-maybe-uninitialized", "-DNDEBUG"]
        if sys.platform == "linux":
            # Compiled but not linked with: at::parallel_for must use the OpenMP that torch brings, or there are two pools.
            flags.append("-fopenmp")
        if self.on_x86:
            flags.append("-DBCOS_WITH_AVX")
        if flag("BCOS_WERROR"):
            flags.append("-Werror")
        if flag("BCOS_SANITIZE"):
            flags += [
                "-O1",
                "-fno-omit-frame-pointer",
                "-fsanitize=address,undefined",
                "-fno-sanitize-recover=undefined",
            ]
        return flags

    def info(self) -> dict[str, str]:
        """What the library says of itself; ``cuda_archs`` is empty without CUDA."""
        return {
            "torch": self.torch.version,
            "compiler": self.compiler.version,
            "flags": " ".join(self.flags()),
            "cuda_archs": ";".join(self.nvcc.archs) if self.nvcc else "",
            "sources": build_record.source_hash(self.folder / "csrc"),
        }

    def write(self, no_cuda: str = "") -> Path:
        """Everything that ninja needs; returns the library that will be built. ``no_cuda``: why there is no CUDA."""
        copy_sources(self.sources, self.folder / "csrc")
        link = self.folder / "torch"
        if not link.is_symlink() or link.readlink() != self.torch.folder:
            link.unlink(missing_ok=True)
            link.symlink_to(self.torch.folder)
        text = json.dumps(build_record.MARK + json.dumps({**self.info(), "no_cuda": no_cuda}))
        code = f"__attribute__((used)) static const char bcos_build_info[] = {text};\n"
        write_if_changed(self.folder / "build_info.cpp", code.encode())
        write_if_changed(self.folder / "build.ninja", self.ninja_file().encode())
        return self.folder / build_record.LIBRARY

    def ninja_file(self) -> str:
        flags = self.flags()
        includes = ["-isystem", "torch/include", "-isystem", "torch/include/torch/csrc/api/include"]
        # Not libcuda, the driver: the library loads where there is none, and serves the CPU. No rpath either: torch is
        # imported before the library is loaded, and with it come the libraries that this one names.
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10"] + (["-ltorch_cuda", "-lc10_cuda"] if self.nvcc else [])
        sanitize = [f for f in flags if f.startswith("-fsanitize")]
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        compiler = self.compiler.command
        linker = [self.nvcc.path, *self.compiler.for_nvcc(), "-cudart=shared"] if self.nvcc else compiler
        lines = [
            f"cxx = {shell(compiler)}",
            f"flags = {shell([*flags, *includes])}",
            f"link_flags = {shell(['-shared', '-Ltorch/lib', *libraries, *sanitize, *undefined])}",
            # Into another file first: a build that is killed leaves no half of one behind.
            "rule compile",
            "  command = $cxx -MMD -MT $out -MF $out.d $flags $extra -c $in -o $out.new && mv -f $out.new $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {shell(linker)} $in -o $out.new $link_flags && mv -f $out.new $out",
        ]
        objects = []

        def compile_one(source: Path, name: str, rule: str = "compile", extra: list[str] | None = None) -> None:
            lines.append(f"build {name}: {rule} {source.as_posix()}")
            if extra:
                lines.append(f"  extra = {shell(extra)}")
            objects.append(name)

        files = [path.relative_to(self.folder) for path in build_record.source_files(self.folder / "csrc")]
        tile = Path("csrc/cpu/tile.cpp")
        sets = INSTRUCTION_SETS if self.on_x86 else {"DEFAULT": []}
        # The longest first: two cores are busy to the end.
        for name in reversed(sets):
            capability = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", *sets[name]]
            compile_one(tile, f"tile_{name}.o", extra=capability)
        if self.nvcc:
            host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-psabi"
            nvcc = [self.nvcc.path, *self.compiler.for_nvcc(), "-O3", "-lineinfo", STANDARD, "-DNDEBUG"]
            nvcc += [f"-Xcompiler={host}", *gencode(self.nvcc.archs), *includes]
            nvcc += ["--Werror=all-warnings", "-Xcompiler=-Werror"] if flag("BCOS_WERROR") else []
            lines += [
                f"nvcc = {shell(nvcc)}",
                "rule cuda",
                "  command = $nvcc -MMD -MT $out -MF $out.d -c $in -o $out.new && mv -f $out.new $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            on_cuda = [path for path in files if path.parent.name == "cuda"]
            for source in sorted((p for p in on_cuda if p.suffix in (".cu", ".cpp")), key=lambda p: p.suffix != ".cu"):
                compile_one(source, f"cuda_{source.name}.o", "cuda")
        for source in files:
            if source.suffix == ".cpp" and source != tile and source.parent.name in ("csrc", "cpu"):
                extra = ["-DBCOS_WITH_CUDA"] if self.nvcc and source.stem == "registration" else None
                compile_one(source, f"{source.parent.name}_{source.stem}.o", extra=extra)
        compile_one(Path("build_info.cpp"), "build_info.o")
        lines.append(f"build {build_record.LIBRARY}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"

    def run(self, no_cuda: str = "") -> Path:
        target = self.write(no_cuda)
        done = subprocess.run(self.ninja, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            said = done.stdout + done.stderr
            if re.search(r"\bKilled\b|signal terminated", said):
                said += "\nThe compiler was killed, perhaps for want of memory: MAX_JOBS=1 needs the least."
            raise CannotBuildError("the compiler failed", f":\n{said}")
        return target
