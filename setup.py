"""Builds the compiled extension, where a C++ compiler and torch are found; everything else is said in pyproject.toml.

``_native.so`` holds the operations and a description of how it was built; it links torch, and no Python. How torch is found,
what is compiled for which GPU and how is in ``build_support/``.

torch is not imported and is no build requirement: the headers are taken from the torch that the package will run with, in
the environment that is installed into, also from inside of an isolated build (pip, uv). Install torch first.

Environment variables:
    BCOS_NO_EXTENSION=1     build nothing, on purpose: the package does not warn of it
    BCOS_NO_CUDA=1          leave the CUDA kernels out
    BCOS_REQUIRE_EXTENSION=1  fail where the extension, or its CUDA part beside an nvcc, cannot be built, instead of
                            leaving it out
    BCOS_WERROR=1           warnings in our own sources are errors (CI sets this and the one above)
    BCOS_SANITIZE=1         AddressSanitizer and UndefinedBehaviorSanitizer (make sanitize)
    CXX, MAX_JOBS           compiler and parallel jobs
    BCOS_BUILD_DIR          where object files are kept, build/ if not given
    TORCH_CUDA_ARCH_LIST    as for torch, "9.0a;10.0+PTX" or "Hopper"; what is below 8.0 is left out
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not look for modules here

from build_support import CannotBuildError, build_record, flag  # noqa: E402
from build_support.cuda import NoCudaError, Nvcc  # noqa: E402
from build_support.find_torch import Torch, find_torch  # noqa: E402
from build_support.native_build import Build, Tools, locked  # noqa: E402

SOURCES = ROOT / "csrc"


def scratch() -> Path:
    """A folder that goes when the build ends."""
    folder = Path(tempfile.mkdtemp(prefix="bcos_kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def say(message: str) -> None:
    """On stderr, and where an installer hides that (pip and uv do, of a build that succeeds), on the terminal as well."""
    message = f"bcos_kernels: {message}"
    print(message, file=sys.stderr, flush=True)
    if "setuptools.build_meta" in sys.modules and not sys.stderr.isatty():
        with suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{message}\n")


def leave_record(package: Path, missing: str | None, on_purpose: bool = False) -> None:
    """Tells the Python side which sources it belongs to, and why there is no extension."""
    package.mkdir(parents=True, exist_ok=True)
    if missing is not None and package != ROOT / "bcos_kernels":
        (package / build_record.LIBRARY).unlink(missing_ok=True)  # of an earlier build in this folder
    text = json.dumps({"sources": build_record.source_hash(SOURCES), "missing": missing, "on_purpose": on_purpose})
    (package / build_record.RECORD).write_text(text + "\n")


class BuildPython(build_py):
    """Writes `_build.json` when the extension is left out on purpose; build_ext does not run then."""

    def run(self) -> None:
        super().run()
        if flag("BCOS_NO_EXTENSION"):
            package = ROOT if self.editable_mode else Path(self.build_lib)
            leave_record(package / "bcos_kernels", "BCOS_NO_EXTENSION=1 was set", on_purpose=True)


class BuildNative(build_ext):
    """Puts the library beside the package's modules; what cannot be built is left out, and said."""

    def run(self) -> None:
        package = Path(self.get_ext_fullpath("bcos_kernels._native")).parent
        if self.inplace or getattr(self, "editable_mode", False):
            package = ROOT / "bcos_kernels"
        if flag("BCOS_NO_EXTENSION"):
            leave_record(package, "BCOS_NO_EXTENSION=1 was set", on_purpose=True)
            return
        try:
            self.build_into(package)
        except (CannotBuildError, OSError) as error:
            reason = self.as_reason(error)
            if flag("BCOS_REQUIRE_EXTENSION"):
                raise SystemExit(f"bcos_kernels: the compiled extension cannot be built: {reason.in_full()}") from None
            with suppress(OSError):
                leave_record(package, str(reason))
            say(f"installed without its compiled extension: {reason.in_full()}")

    @staticmethod
    def as_reason(error: CannotBuildError | OSError) -> CannotBuildError:
        if isinstance(error, CannotBuildError):
            return error
        return CannotBuildError(
            f"files could not be written or read ({error.strerror or error})",
            f": {error.filename}. BCOS_BUILD_DIR names another folder for object files, TMPDIR one for the compiler's.",
        )

    def build_into(self, package: Path) -> None:
        torch = find_torch()
        kept = os.environ.get("BCOS_BUILD_DIR")
        base = Path(kept) if kept else ROOT / "build" if os.access(ROOT, os.W_OK) else scratch()
        folder = base.resolve() / f"native-{torch.version}-{sys.implementation.cache_tag}"
        if flag("BCOS_SANITIZE"):
            folder = folder.with_name(folder.name + "-sanitize")
        with locked(folder):
            built = self.build(folder, torch)
            package.mkdir(parents=True, exist_ok=True)
            # A new file, not new bytes in the old one: a running process may have that one mapped.
            fresh = package / f".{built.name}.new"
            try:
                shutil.copy2(built, fresh)
                fresh.replace(package / built.name)
            finally:
                fresh.unlink(missing_ok=True)
            leave_record(package, None)

    def build(self, folder: Path, torch: Torch) -> Path:
        """With the CUDA kernels where that is possible, else for the CPU alone."""
        nvcc, no_cuda = self.find_nvcc(torch)
        tools = Tools.find()
        if nvcc:
            try:
                return Build(folder, SOURCES, torch, tools, nvcc).run()
            except CannotBuildError as reason:
                no_cuda = self.without_cuda(reason)
        return Build(folder, SOURCES, torch, tools, None).run(no_cuda)

    def find_nvcc(self, torch: Torch) -> tuple[Nvcc | None, str]:
        """nvcc, or why there will be no CUDA."""
        try:
            nvcc = Nvcc.find(torch)
        except NoCudaError as reason:
            return None, str(reason)
        except CannotBuildError as reason:
            return None, self.without_cuda(reason)
        if nvcc.left_out:
            say(nvcc.left_out)
        return nvcc, ""

    @staticmethod
    def without_cuda(reason: CannotBuildError) -> str:
        if flag("BCOS_REQUIRE_EXTENSION"):
            raise reason
        say(f"installed without its CUDA kernels: {reason.in_full()}")
        return str(reason)

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("bcos_kernels._native")).parent
        return [
            str(package / name) for name in (build_record.LIBRARY, build_record.RECORD) if (package / name).exists()
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# One extension is named, so that the package counts as one of this platform; BuildNative knows what it is made of.
EXTENSIONS = [] if flag("BCOS_NO_EXTENSION") else [Extension("bcos_kernels._native", [], optional=True)]

options: dict[str, dict[str, str]] = {}
if not os.access(ROOT, os.W_OK):  # setuptools would write here as well
    elsewhere = str(scratch())
    options = {"egg_info": {"egg_base": elsewhere}, "build": {"build_base": elsewhere}}

setup(ext_modules=EXTENSIONS, cmdclass={"build_py": BuildPython, "build_ext": BuildNative}, options=options)
