"""Builds the compiled extension, where a C++ compiler and torch are found; everything else is said in pyproject.toml.

Two files end up in the package: ``_native.so``, the operations, which links torch but no Python, and ``_build_info``, a
small Python module that says what they were built with. Ninja builds them, so only what changed is compiled again.

torch is not imported and is no build requirement: the headers are taken from the torch that the package will run with, in
the environment that is installed into. So ``pip install .`` works with and without build isolation, and does not download
a second torch only to build against the wrong one. Install torch first.

Environment variables:
    BCOS_NO_EXTENSION=1     build nothing
    BCOS_NO_CUDA=1          leave the CUDA kernels out
    BCOS_REQUIRE_EXTENSION=1  fail where the extension, or its CUDA part beside an nvcc, cannot be built, instead of
                            leaving it out
    BCOS_WERROR=1           warnings in our own sources are errors (the Makefile sets this and the one above)
    BCOS_SANITIZE=1         AddressSanitizer and UndefinedBehaviorSanitizer (make sanitize)
    CXX, MAX_JOBS           compiler and parallel jobs
    BCOS_BUILD_DIR          where object files are kept, build/ if not given
    TORCH_CUDA_ARCH_LIST    as for torch, "9.0a;10.0+PTX"; the kernels need 8.0 or higher
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
OPERATIONS = "bcos_kernels/_native.so"
CUDA_ARCHS = "8.0;9.0;10.0;12.0+PTX"
STANDARD = "-std=c++20"

# tile.cpp is compiled once for each of these, as ATen does with its own kernels.
INSTRUCTION_SETS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


class CannotBuildError(Exception):
    """Why there will be no extension, in a sentence."""


class Torch:
    """The torch of the environment that is installed into, found without importing it."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("torch")
        places = [Path(spec.origin).parent] if spec and spec.origin else []
        # An isolated build hides the environment's packages from the import system, not from the file system.
        places += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
        self.folder = next((p for p in places if (p / "include" / "ATen").is_dir()), None)
        if self.folder is None:
            raise CannotBuildError("torch is not installed yet: install it, then this package again")
        text = (self.folder / "version.py").read_text()
        found = re.search(r"^__version__\s*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
        if found is None:
            raise CannotBuildError(f"the version of torch in {self.folder} cannot be read")
        self.version = found.group(1)
        cuda = re.search(r"^cuda\b.*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
        self.cuda = cuda.group(1) if cuda else None

    @property
    def libraries(self) -> Path:
        return self.folder / "lib"

    @property
    def includes(self) -> list[str]:
        include = self.folder / "include"
        return ["-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise CannotBuildError("no C++ compiler is found: install g++ or clang++, or set CXX")


def find_ninja() -> str:
    ninja = shutil.which("ninja")
    if ninja is None and (spec := importlib.util.find_spec("ninja")):
        candidate = Path(spec.origin or "").parent / "data" / "bin" / "ninja"
        ninja = str(candidate) if candidate.exists() else None
    if ninja is None:
        raise CannotBuildError("ninja is not found: pip install ninja")
    return ninja


def find_nvcc(torch: Torch) -> str | None:
    """nvcc, where there is one and torch has a use for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None or torch.cuda is None or flag("BCOS_NO_CUDA") or flag("BCOS_SANITIZE"):
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", said)
    if release is None or release.group(1) != torch.cuda.split(".")[0]:
        version = release.group(1) if release else "unknown"
        raise CannotBuildError(f"nvcc is of CUDA {version}, and torch is built for CUDA {torch.cuda}")
    return nvcc


def gencode(archs: str) -> list[str]:
    """``"9.0a;10.0+PTX"`` as nvcc's options."""
    options = []
    for arch in re.split(r"[;, ]+", archs.strip()):
        number = arch.removesuffix("+PTX").replace(".", "")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


class Build:
    """Writes build.ninja and runs it."""

    def __init__(self, folder: Path, torch: Torch, nvcc: str | None) -> None:
        self.folder = folder
        self.torch = torch
        self.compiler = find_compiler()
        self.ninja = find_ninja()
        self.on_x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform == "linux"
        self.nvcc = nvcc
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS) if nvcc else ""

    def flags(self) -> list[str]:
        # -Wno-psabi: GCC's remark that vector arguments were passed differently before 4.6.
        # -Wno-maybe-uninitialized: GCC 12 takes the undefined registers of its own AVX-512 header for a mistake.
        flags = ["-O3", "-g1", STANDARD, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
        flags += ["-Wno-maybe-uninitialized", "-DNDEBUG"] if "clang" not in self.compiler else ["-DNDEBUG"]
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

    def write(self) -> tuple[Path, Path]:
        """build.ninja and the header that build_info reads; returns the two files that will be built."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = self.flags()
        config = "".join(
            f'#define {name} "{value}"\n'
            for name, value in (
                ("BCOS_TORCH_VERSION", self.torch.version),
                ("BCOS_FLAGS", " ".join(flags)),
                ("BCOS_CUDA_ARCHS", self.archs),
            )
        )
        header = self.folder / "build_config.h"
        if not header.exists() or header.read_text() != config:
            header.write_text(config)

        def quoted(parts: list[str]) -> str:
            return " ".join(p.replace("$", "$$").replace(" ", "\\ ") for p in parts)

        operations = self.folder / Path(OPERATIONS).name
        info = self.folder / f"_build_info{sysconfig.get_config_var('EXT_SUFFIX')}"
        # Not libcuda, the driver: the library loads where there is none, and serves the CPU.
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10"] + (["-ltorch_cuda", "-lc10_cuda"] if self.nvcc else [])
        sanitize = [f for f in flags if f.startswith("-fsanitize")]
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        linker = [self.nvcc, "-ccbin", self.compiler, "-cudart=shared"] if self.nvcc else [self.compiler]
        rpath = f"{'-Xlinker=' if self.nvcc else '-Wl,'}-rpath,{self.torch.libraries}"
        link = ["-shared", f"-L{self.torch.libraries}", *libraries, rpath, *sanitize]
        python = sysconfig.get_path("include")
        lines = [
            f"cxx = {self.compiler}",
            f"flags = {quoted([*flags, *self.torch.includes])}",
            # pybind11 warns about its own visibility unless this is hidden, which it is
            f"info_flags = {quoted([*flags, *self.torch.includes, '-isystem', python, f'-I{self.folder}'])}",
            f"link_flags = {quoted(link + undefined)}",
            f"info_link_flags = {quoted(['-shared', *undefined, *sanitize])}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule compile_info",
            "  command = $cxx -MMD -MF $out.d $info_flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {quoted(linker)} $in -o $out $link_flags",
            "rule link_info",
            "  command = $cxx $in -o $out $info_link_flags",
        ]
        objects = []

        def compile_one(source: Path, name: str, rule: str = "compile", extra: list[str] | None = None) -> None:
            target = self.folder / name
            lines.append(f"build {quoted([str(target)])}: {rule} {quoted([str(source)])}")
            if extra:
                lines.append(f"  extra = {quoted(extra)}")
            objects.append(str(target))

        sets = INSTRUCTION_SETS if self.on_x86 else {"DEFAULT": []}
        # The longest first: two cores are busy to the end.
        for name in reversed(sets):
            extra = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", *sets[name]]
            compile_one(SOURCES / "cpu" / "tile.cpp", f"tile_{name}.o", extra=extra)
        if self.nvcc:
            host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-psabi"
            nvcc = [self.nvcc, "-ccbin", self.compiler, "-O3", "-lineinfo", STANDARD, "-DNDEBUG", f"-Xcompiler={host}"]
            nvcc += [*gencode(self.archs), *self.torch.includes]
            nvcc += ["--Werror=all-warnings", "-Xcompiler=-Werror"] if flag("BCOS_WERROR") else []
            lines += [
                f"nvcc = {quoted(nvcc)}",
                "rule cuda",
                "  command = $nvcc -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            for source in [*sorted(SOURCES.glob("cuda/*.cu")), *sorted(SOURCES.glob("cuda/*.cpp"))]:
                compile_one(source, f"cuda_{source.name}.o", "cuda")
        for source in [*sorted(SOURCES.glob("*.cpp")), *sorted(SOURCES.glob("cpu/*.cpp"))]:
            if source.name not in ("tile.cpp", "bindings.cpp"):
                extra = ["-DBCOS_WITH_CUDA"] if self.nvcc and source.stem == "registration" else None
                compile_one(source, f"{source.parent.name}_{source.stem}.o", extra=extra)
        lines.append(f"build {quoted([str(operations)])}: link {quoted(objects)}")
        compile_one(SOURCES / "bindings.cpp", "bindings.o", "compile_info")
        lines.append(f"build {quoted([str(info)])}: link_info {quoted([objects.pop()])}")
        (self.folder / "build.ninja").write_text("\n".join(lines) + "\n")
        return operations, info

    def run(self) -> tuple[Path, Path]:
        targets = self.write()
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        done = subprocess.run([self.ninja, *jobs], cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise CannotBuildError(f"the compiler failed:\n{done.stdout}{done.stderr}")
        return targets


class BuildNative(build_ext):
    """Puts the two files beside the package's modules; what cannot be built is left out, and said."""

    def run(self) -> None:
        if flag("BCOS_NO_EXTENSION"):
            return
        package = Path(self.get_ext_fullpath("bcos_kernels._native")).parent
        if self.inplace or getattr(self, "editable_mode", False):
            package = ROOT / "bcos_kernels"
        package.mkdir(parents=True, exist_ok=True)
        try:
            torch = Torch()
            folder = Path(os.environ.get("BCOS_BUILD_DIR", ROOT / "build"))
            folder = folder.resolve() / f"native-{torch.version}-{sys.implementation.cache_tag}"
            if flag("BCOS_SANITIZE"):
                folder = folder.with_name(folder.name + "-sanitize")
            for built in self.build(folder, torch):
                # A new file, not new bytes in the old one: a running process may have that one mapped.
                fresh = package / f".{built.name}.new"
                shutil.copy2(built, fresh)
                fresh.replace(package / built.name)
        except CannotBuildError as reason:
            if flag("BCOS_REQUIRE_EXTENSION"):
                raise SystemExit(f"bcos_kernels: the compiled extension cannot be built: {reason}") from None
            self.warn(f"bcos_kernels is installed without its compiled extension: {reason}")

    def build(self, folder: Path, torch: Torch) -> tuple[Path, Path]:
        """With the CUDA kernels where that is possible, else for the CPU alone."""
        try:
            nvcc = find_nvcc(torch)
            if nvcc:
                return Build(folder, torch, nvcc).run()
        except CannotBuildError as reason:
            if flag("BCOS_REQUIRE_EXTENSION"):
                raise
            self.warn(f"bcos_kernels is installed without its CUDA kernels: {reason}")
        return Build(folder, torch, None).run()

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("bcos_kernels._native")).parent
        return [str(p) for pattern in ("_native*.so", "_build_info*.so") for p in package.glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# One extension is named, so that the package counts as one of this platform; BuildNative knows what it is made of.
EXTENSIONS = [] if flag("BCOS_NO_EXTENSION") else [Extension("bcos_kernels._native", [], optional=True)]

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildNative})
