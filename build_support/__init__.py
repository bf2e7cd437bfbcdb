"""What setup.py builds the compiled extension with. Part of the source distribution, not of the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


class CannotBuildError(Exception):
    """Why there will be no extension, in a sentence that goes into the package; it names no path of this machine.

    ``detail`` is only shown where the build runs: a compiler's output, the command that works.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail

    def in_full(self) -> str:
        return f"{self}{self.detail}"


def _load_record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_record", ROOT / "bcos_kernels" / "build_record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: ``bcos_kernels.build_record``, which the package reads with what is written with it here.
build_record = _load_record()
flag = build_record.flag
