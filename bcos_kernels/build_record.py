"""What the compiled extension was built from, whether that is still what lies here, and the command that builds it anew.

``_native.so`` carries its own description as text, so it can be judged before it is loaded and cannot be separated from it.
``_build.json`` beside it is the Python side: the hash of the sources that these modules belong to, and, where there is no
extension, why. In a checkout the sources themselves are beside the package and are hashed instead, so that a ``git pull``
without a build is noticed.

Standard library only: the build loads this file by its path, without importing the package (which imports torch).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PACKAGE = Path(__file__).resolve().parent
LIBRARY = "_native.so"
RECORD = "_build.json"
#: Comes directly before the JSON text in the library.
MARK = "bcos_kernels build info: "
#: What a build without isolation needs in the environment, as in pyproject.toml.
BUILD_TOOLS = ("setuptools>=77", "ninja")

#: The compute capability that the CUDA kernels need (mma.sync with bfloat16, cp.async).
LEAST_CAPABILITY = (8, 0)
#: Why there are no CUDA kernels where nothing else is known.
NO_NVCC = "no nvcc was found"

_SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}


def flag(name: str) -> bool:
    """Whether an environment variable is set, and not to 0."""
    return os.environ.get(name, "0") not in ("", "0")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH where one is set, or else that of PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def source_files(folder: Path) -> list[Path]:
    """The C++ and CUDA sources in ``folder``, by name."""
    found = [path for path in folder.rglob("*") if path.suffix in _SUFFIXES and not path.name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def source_hash(folder: Path) -> str:
    """One hash over names and contents of the sources; about 1 ms for the 40 files of ``csrc/``."""
    total = hashlib.sha256()
    for path in source_files(folder):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]


def info_of(library: Path) -> dict[str, str] | None:
    """The description that ``library`` carries; None if there is no such file, or none in it. Loads nothing."""
    try:
        content = library.read_bytes()
    except OSError:
        return None
    begin = content.find(MARK.encode() + b"{")
    if begin < 0:
        return None
    begin += len(MARK)
    info: dict[str, str] = json.loads(content[begin : content.index(b"\0", begin)])
    return info


def checkout() -> Path | None:
    """The checkout that the package is imported from, or None if it was installed."""
    root = PACKAGE.parent
    return root if (root / "setup.py").is_file() and (root / "csrc").is_dir() else None


@functools.cache
def record() -> dict[str, Any]:
    """What the build wrote beside the modules: ``sources``; ``missing``, ``on_purpose`` where it left the extension out."""
    try:
        found = json.loads((PACKAGE / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@functools.cache
def expected_sources() -> str | None:
    """The hash of the sources that these Python modules belong to; None if nobody wrote it down."""
    root = checkout()
    return source_hash(root / "csrc") if root else record().get("sources")


def _has_build_tools() -> bool:
    try:
        major = int(re.match(r"\d+", metadata.version("setuptools")).group())  # type: ignore[union-attr]
    except (metadata.PackageNotFoundError, AttributeError):
        return False
    return major >= 77 and (shutil.which("ninja") is not None or importlib.util.find_spec("ninja") is not None)


def _origin() -> tuple[str, str]:
    """Who installed the package, pip or uv, and from where, as a word of a command."""
    try:
        distribution = metadata.distribution("bcos_kernels")
        installer = (distribution.read_text("INSTALLER") or "pip").strip()
        direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return "pip", "bcos_kernels"
    url = direct.get("url", "")
    if url.startswith("file:"):
        return installer, shlex.quote(unquote(urlsplit(url).path))
    if "vcs_info" in direct:
        url = f"{direct['vcs_info'].get('vcs', 'git')}+{url}"
    return installer, shlex.quote(url) if url else "bcos_kernels"


def _python() -> str:
    """This interpreter, as a word of a command."""
    found = shutil.which("python")
    return "python" if found and Path(found).parent == Path(sys.executable).parent else shlex.quote(sys.executable)


def rebuild_command(environment: Sequence[str] = ()) -> str:
    """The command that builds the extension for this installation, with ``environment`` (``NAME=VALUE``) in front.

    In a checkout it builds in place. An installed package is built again from where it came from: pip and uv would otherwise
    take the same version for installed already, or take the wheel that they kept.
    """
    setting = "".join(
        f"{shlex.quote(name)}={shlex.quote(value)} " for name, value in (e.split("=", 1) for e in environment)
    )
    root = checkout()
    installer, source = _origin()
    if root is not None and _has_build_tools():
        return f"cd {shlex.quote(str(root))} && {setting}{_python()} setup.py build_ext --inplace"
    if root is not None:
        source = f"--editable {shlex.quote(str(root))}"
    isolation = "--no-build-isolation " if _has_build_tools() else ""
    if installer == "uv":
        target = "" if os.environ.get("VIRTUAL_ENV") == sys.prefix else f"--python {_python()} "
        return f"{setting}uv pip install {target}--no-deps --reinstall-package bcos_kernels {isolation}{source}"
    return f"{setting}{_python()} -m pip install --no-deps --force-reinstall --no-cache-dir {isolation}{source}"


def left_out() -> str:
    """Why there is no extension, as the build said it; the end of a sentence."""
    return record().get("missing") or "it was not built"


def left_out_on_purpose() -> bool:
    """Whether the package was built with BCOS_NO_EXTENSION=1, or runs with it."""
    return bool(record().get("on_purpose")) or flag("BCOS_NO_EXTENSION")
