"""Finds the torch that the package will run with, without importing it, from inside of any kind of build.

An isolated build runs in an environment of its own. Which environment is installed into depends on who asked for the build:
pip isolates by hiding packages from the interpreter that it runs on; uv and ``build`` make a virtual environment elsewhere.
The interpreter of the target is found, and asked where its torch is: so a user's site-packages, PYTHONPATH, ``.pth`` files
and system-site-packages count exactly as they will when the package runs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from build_support import CannotBuildError, build_record

# The extension's suffix names version and kind of the interpreter: another one would not import what is built here.
_ASK = """
import importlib.util, sys, sysconfig
sys.path = [p for p in sys.path if p]
spec = importlib.util.find_spec("torch")
print(sysconfig.get_config_var("EXT_SUFFIX"), spec.origin if spec and spec.origin else "", sep="\\n")
"""
#: What pip sets for an isolated build; they do not hold where the package runs.
_OF_THE_BUILD = ("PYTHONPATH", "PYTHONNOUSERSITE", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Torch:
    """An installed torch, as its files describe it."""

    folder: Path
    version: str
    cuda: str | None

    @staticmethod
    def read(folder: Path) -> Torch:
        if not (folder / "include" / "ATen").is_dir():
            raise CannotBuildError("the installed torch has no C++ headers", f" (none in {folder})")
        text = (folder / "version.py").read_text()
        version = re.search(r"^__version__\s*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
        if version is None:
            raise CannotBuildError("the version of the installed torch cannot be read", f" (in {folder}/version.py)")
        cuda = re.search(r"^cuda\b.*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
        return Torch(folder, version.group(1), cuda.group(1) if cuda else None)


@dataclass(frozen=True)
class Frontend:
    """The program that asked for this build, such as pip or uv: its command, environment and working directory."""

    args: list[str]
    environment: dict[str, str]
    folder: str

    @staticmethod
    def of_process(pid: int) -> Frontend:
        proc = Path(f"/proc/{pid}")
        try:
            args = os.fsdecode((proc / "cmdline").read_bytes()).rstrip("\0").split("\0")
            settings = os.fsdecode((proc / "environ").read_bytes()).split("\0")
            return Frontend(args, dict(s.split("=", 1) for s in settings if "=" in s), os.readlink(proc / "cwd"))
        except OSError:  # macOS has no /proc
            return Frontend(_command_of(pid), _without_settings_of_the_build(), os.environ.get("PWD", os.getcwd()))

    @property
    def is_pip(self) -> bool:
        return "PIP_BUILD_TRACKER" in os.environ

    @property
    def is_uv(self) -> bool:
        return not self.is_pip and (Path(self.args[0]).name in ("uv", "uvx") or "UV_INTERNAL__BUILD_DIR" in os.environ)

    def option(self, *names: str) -> str | None:
        """The value of an option on the command line: ``--target DIR`` or ``--target=DIR``."""
        for i, word in enumerate(self.args[:-1]):
            if word in names:
                return self.args[i + 1]
        for word in self.args:
            name, equals, value = word.partition("=")
            if equals and name in names:
                return value
        return None

    def path(self, name: str) -> Path:
        return Path(self.folder, os.path.expanduser(name))

    @property
    def python(self) -> Path | None:
        """The interpreter that runs it, if it is a Python program; in a virtual environment, that environment's."""
        word = self.args[0]
        if not Path(word).name.startswith(("python", "pypy")):
            return None
        found = word if "/" in word else shutil.which(word, path=self.environment.get("PATH"))
        return self.path(found) if found else None

    def again(self, *options: str) -> str:
        """The command that was typed, with more options."""
        return shlex.join([*self.args, *(o for o in options if o not in self.args)])


def _command_of(pid: int) -> list[str]:
    try:
        said = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout
    except OSError:
        said = ""
    return said.split() or [""]


def _without_settings_of_the_build() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _OF_THE_BUILD}


def _folders_given(frontend: Frontend) -> Iterator[Path]:
    """``--target`` and ``--prefix``: folders that are installed into whatever the interpreter."""
    if "install" not in frontend.args:
        return
    tool = "UV" if frontend.is_uv else "PIP"
    if target := frontend.option("--target", "-t") or frontend.environment.get(f"{tool}_TARGET"):
        yield frontend.path(target)
    if prefix := frontend.option("--prefix") or frontend.environment.get(f"{tool}_PREFIX"):
        base = str(frontend.path(prefix))
        for kind in ("purelib", "platlib"):
            yield Path(sysconfig.get_path(kind, vars={"base": base, "platbase": base}))


def _uv_target(frontend: Frontend) -> Path | None:
    """The interpreter that uv installs for: uv itself is asked."""
    uv = os.environ.get("UV") or frontend.args[0]
    request = frontend.option("--python", "-p")
    command = [uv, "python", "find", *([request] if request else [])]
    command += ["--system"] if "--system" in frontend.args else []
    command += ["--no-project"] if "pip" in frontend.args else []
    if "tool" in frontend.args[:3]:  # a new environment for a program: nothing is in it yet
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=frontend.folder, env=frontend.environment, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return Path(done.stdout.strip()) if done.returncode == 0 and done.stdout.strip() else None


def target_interpreters(frontend: Frontend) -> tuple[list[Path], bool]:
    """The interpreters that the package may be meant for, the likeliest first; whether the first is certainly the one."""
    if frontend.is_pip:
        return [Path(sys.executable)], True
    if frontend.is_uv and (python := _uv_target(frontend)):
        return [python], True
    environments = [frontend.environment.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    folders = [frontend.path(name) for name in (*environments, ".venv") if name]
    found = [frontend.python, *(folder / "bin" / "python" for folder in folders)]
    return [python for python in found if python and python.is_file()], False


def ask(python: Path, frontend: Frontend) -> Path | None:
    """Where ``python`` would import torch from; None if it has none, or is of another kind than this one."""
    try:
        # not where the frontend was started: a folder named torch may lie there
        done = subprocess.run(
            [python, "-c", _ASK], capture_output=True, text=True, cwd="/", env=frontend.environment, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    suffix, _, origin = done.stdout.partition("\n")
    same_kind = suffix == sysconfig.get_config_var("EXT_SUFFIX")
    return Path(origin.strip()).parent if done.returncode == 0 and same_kind and origin.strip() else None


def find_torch(frontend: Frontend | None = None) -> Torch:
    """The torch of the environment that is installed into.

    Raises:
        CannotBuildError: there is none, or it cannot be found from here; the detail has the command that works.
    """
    in_hook = "setuptools.build_meta" in sys.modules
    frontend = frontend or Frontend.of_process(os.getppid())
    if in_hook:
        for folder in _folders_given(frontend):
            if (folder / "torch" / "version.py").is_file():
                return Torch.read(folder / "torch")
    spec = find_spec("torch")
    if spec and spec.origin:
        return Torch.read(Path(spec.origin).parent)
    if not in_hook:
        detail = f" (for {sys.executable}): install torch first, then run this again"
        raise CannotBuildError("torch was not installed when the package was built", detail)
    pythons, certain = target_interpreters(frontend)
    for python in pythons:
        if found := ask(python, frontend):
            return Torch.read(found)
    raise _not_found(frontend, pythons, certain)


def _not_found(frontend: Frontend, pythons: list[Path], certain: bool) -> CannotBuildError:
    asked = ", ".join(map(str, pythons)) or "no interpreter was found to ask"
    pip_anew = ["--no-deps", "--force-reinstall", "--no-cache-dir"]
    anew = ["--reinstall-package", "bcos_kernels"] if frontend.is_uv else pip_anew
    if certain:
        reason = "torch was not installed when the package was built"
        return CannotBuildError(reason, f" (for {asked}): install torch first, then run\n    {frontend.again(*anew)}")
    reason = "torch was not found from the isolated build"
    # The tools go where the package goes: the same command up to its verb, with the same interpreter.
    if "install" in frontend.args:
        head = frontend.args[: frontend.args.index("install") + 1]
        request = frontend.option("--python", "-p") if frontend.is_uv else None
        head += ["--python", request] if request else []
        command = f"{shlex.join([*head, *build_record.BUILD_TOOLS])} && {frontend.again('--no-build-isolation', *anew)}"
    else:
        tools = shlex.join(build_record.BUILD_TOOLS)
        command = f"pip install {tools} && pip install --no-build-isolation {' '.join(anew)} ."
    return CannotBuildError(
        reason, f" (asked: {asked}). With torch installed, this builds without isolation:\n    {command}"
    )
