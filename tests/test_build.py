"""How the package is built and installed: where torch is found, for which GPUs, at which paths, and what is said of it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
import venv
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import bcos_kernels as bk
from bcos_kernels import build_record, dispatch, native
from bcos_kernels.contract import Call
from build_support import CannotBuildError, cuda, find_torch, native_build
from build_support.cuda import Nvcc, choose_archs, gencode
from build_support.find_torch import Frontend, Torch
from build_support.native_build import Compiler, copy_sources, jobs, locked, shell

ROOT = Path(__file__).resolve().parent.parent
ODD = "a b:c $HOME 'q' \"d\" #ü"
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on this machine")
needs_extension = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---- the torch of the environment that is installed into


def fake_torch(site: Path, version: str = "9.9.9") -> Path:
    folder = site / "torch"
    (folder / "include" / "ATen").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('torch must not be imported')\n")
    (folder / "version.py").write_text(f"__version__ = '{version}'\ncuda: str | None = '13.0'\n")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An environment to install into, at an odd path; its site-packages are under ``lib``."""
    folder = tmp_path / "target env $x"
    venv.create(folder, symlinks=True, with_pip=False)
    return folder


def site_of(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of an isolated build: a hook of the backend runs, and torch is not seen."""
    monkeypatch.setitem(sys.modules, "setuptools.build_meta", sys)
    monkeypatch.setattr(find_torch, "find_spec", lambda name: None)
    for name in ("PIP_BUILD_TRACKER", "UV", "UV_INTERNAL__BUILD_DIR"):
        monkeypatch.delenv(name, raising=False)


def frontend(*args: str, folder: Path, **environment: str) -> Frontend:
    return Frontend(list(args), {"PATH": os.environ["PATH"], "HOME": str(folder), **environment}, str(folder))


def as_pip(monkeypatch: pytest.MonkeyPatch, environment: Path) -> None:
    monkeypatch.setenv("PIP_BUILD_TRACKER", "somewhere")
    monkeypatch.setattr(sys, "executable", str(python_of(environment)))


@pytest.mark.usefixtures("isolated")
def test_pip_builds_for_the_interpreter_that_runs_it(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_pip(monkeypatch, target)
    torch_folder = fake_torch(site_of(target))
    found = find_torch.find_torch(frontend("python", "pip", "install", ".", folder=target))
    assert found == Torch(torch_folder, "9.9.9", "13.0")


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("how", ["user", "PYTHONPATH", "pth", "system"])
def test_torch_is_where_the_interpreter_would_import_it_from(
    how: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_pip(monkeypatch, target)
    settings = {}
    elsewhere = tmp_path / "elsewhere"
    if how == "user":
        elsewhere = Path(sysconfig.get_path("purelib", "posix_user", vars={"userbase": str(tmp_path / "base")}))
        settings["PYTHONUSERBASE"] = str(tmp_path / "base")
        config = target / "pyvenv.cfg"  # as an interpreter without a virtual environment
        config.write_text(config.read_text().replace("packages = false", "packages = true"))
    elif how == "PYTHONPATH":
        settings["PYTHONPATH"] = str(elsewhere)
    elif how == "pth":
        (site_of(target) / "more.pth").write_text(f"{elsewhere}\n")
    else:
        python = script(tmp_path / "bin" / "python", f'PYTHONPATH="{elsewhere}" exec {sys._base_executable} "$@"')  # type: ignore[attr-defined]
        monkeypatch.setattr(sys, "executable", str(python))
    torch_folder = fake_torch(elsewhere)
    found = find_torch.find_torch(frontend("pip", "install", ".", folder=tmp_path, **settings))
    assert found.folder == torch_folder


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("option", ["--target", "-t", "--prefix", "PIP_TARGET"])
def test_a_folder_to_install_into(option: str, tmp_path: Path) -> None:
    site = site_of(tmp_path / "to") if option == "--prefix" else tmp_path / "to"
    torch_folder = fake_torch(site)
    args, settings = ["pip", "install", ".", option, "to"], {}
    if option == "PIP_TARGET":
        args, settings = args[:3], {"PIP_TARGET": "to"}
    assert find_torch.find_torch(frontend(*args, folder=tmp_path, **settings)).folder == torch_folder


@pytest.mark.usefixtures("isolated")
def test_uv_is_asked_for_its_target(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_folder = fake_torch(site_of(target))
    log = tmp_path / "log"
    uv = script(
        tmp_path / "uv", f'echo "$@" "$VIRTUAL_ENV" >> "{log}"; echo "{python_of(target)}"'.replace("$x", r"\$x")
    )
    monkeypatch.setenv("UV", str(uv))
    words = ("uv", "pip", "install", "--python", "3.x", ".")
    found = find_torch.find_torch(frontend(*words, folder=tmp_path, VIRTUAL_ENV="/the/target"))
    assert found.folder == torch_folder
    assert log.read_text() == "python find 3.x --no-project /the/target\n"


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("how", ["VIRTUAL_ENV", "CONDA_PREFIX", ".venv", "argv"])
def test_other_frontends(how: str, target: Path, tmp_path: Path) -> None:
    """Those that build in an environment of their own: python -m build, poetry."""
    torch_folder = fake_torch(site_of(target))
    settings = {how: str(target)} if how.isupper() else {}
    if how == ".venv":
        (tmp_path / ".venv").symlink_to(target)
    python = str(python_of(target)) if how == "argv" else "program"
    found = find_torch.find_torch(frontend(python, "-m", "build", folder=tmp_path, **settings))
    assert found.folder.resolve() == torch_folder.resolve()


@pytest.mark.usefixtures("isolated")
def test_no_torch_at_all(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is advised is not what was typed: pip would take a wheel that it kept, or the package for installed."""
    as_pip(monkeypatch, target)
    with pytest.raises(CannotBuildError) as raised:
        find_torch.find_torch(frontend("pip", "install", "--user", ".", folder=target))
    assert str(raised.value) == "torch was not installed when the package was built"
    assert "install torch first, then run\n    pip install --user . --no-deps --force-reinstall" in raised.value.detail
    monkeypatch.delenv("PIP_BUILD_TRACKER")
    monkeypatch.setenv("UV", str(script(target / "uv", "exit 2")))
    with pytest.raises(CannotBuildError) as raised:
        find_torch.find_torch(frontend("uv", "pip", "install", ".", folder=target))
    assert str(raised.value) == "torch was not found from the isolated build"
    assert raised.value.detail.endswith(
        "    uv pip install 'setuptools>=77' ninja && uv pip install . --no-build-isolation --reinstall-package bcos_kernels"
    )


def test_torch_without_headers_or_version(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    with pytest.raises(CannotBuildError, match="no C\\+\\+ headers"):
        Torch.read(tmp_path / "torch")
    shutil.rmtree(tmp_path / "torch")
    (fake_torch(tmp_path) / "version.py").write_text("")
    with pytest.raises(CannotBuildError, match="version of the installed torch"):
        Torch.read(tmp_path / "torch")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_the_frontend_is_read_from_its_process(tmp_path: Path) -> None:
    code = "import sys; print(1, flush=True); sys.stdin.read()"
    args = [sys.executable, "-c", code, "--target", "x y"]
    with subprocess.Popen(
        args, cwd=tmp_path, env={"A": "b=c"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = Frontend.of_process(process.pid)
        process.kill()
    assert found.args == args
    assert found.environment["A"] == "b=c"
    assert Path(found.folder) == tmp_path
    assert found.option("--target", "-t") == "x y"
    assert found.python == Path(sys.executable)


# ---- for which GPUs

# What nvcc 12.6, 13.0 compile for.
OLD = {"8.0", "8.6", "8.7", "8.9", "9.0", "9.0a", "7.5"}
NEW = OLD | {"10.0", "10.0a", "10.3", "11.0", "12.0", "12.1", "10.0f"}


@pytest.mark.parametrize(
    ("wanted", "known", "archs", "left_out"),
    [
        (None, NEW, "8.0;9.0;10.0;12.0+PTX", ""),
        ("", NEW, "8.0;9.0;10.0;12.0+PTX", ""),
        (" ; ", NEW, "8.0;9.0;10.0;12.0+PTX", ""),
        (None, OLD, "8.0;9.0+PTX", ""),
        ("Common", OLD, "8.0;9.0+PTX", ""),
        ("All", NEW, "8.0;8.6;8.7;8.9;9.0;10.0;10.3;11.0;12.0;12.1+PTX", ""),
        ("all", OLD, "8.0;8.6;8.7;8.9;9.0+PTX", ""),
        ("8.0", NEW, "8.0", ""),
        ("8.0 9.0a;10.0+PTX", NEW, "8.0;9.0a;10.0+PTX", ""),
        ("8.0, 9.0", NEW, "8.0;9.0", ""),
        ("8.0;8.0+PTX;8.0", NEW, "8.0+PTX", ""),
        ("Hopper", NEW, "9.0+PTX", ""),
        ("hopper", NEW, "9.0+PTX", ""),
        ("Ampere;Ada", NEW, "8.0;8.6+PTX;8.9+PTX", ""),
        ("Ampere+Tegra", NEW, "8.7", ""),
        ("Hopper+PTX", NEW, "9.0+PTX", ""),
        ("Blackwell", NEW, "10.0;10.3;12.0;12.1+PTX", ""),
        ("10.0f", NEW, "10.0f", ""),
        ("7.5 8.0", NEW, "8.0", "left out 7.5 (the kernels need 8.0)"),
        ("Turing Hopper", NEW, "9.0+PTX", "left out 7.5+PTX (the kernels need 8.0)"),
        (
            "5.2 6.0 6.1 7.0 7.2 7.5 8.0 8.6 8.7 9.0+PTX",  # NVIDIA's containers
            NEW,
            "8.0;8.6;8.7;9.0+PTX",
            "left out 5.2, 6.0, 6.1, 7.0, 7.2, 7.5 (the kernels need 8.0)",
        ),
        ("9.0;12.0", OLD, "9.0", "left out 12.0 (this nvcc does not know it)"),
        ("Blackwell", OLD, "", "left out 10.0, 10.3, 12.0, 12.1+PTX (this nvcc does not know it)"),
        ("7.5", NEW, "", "left out 7.5 (the kernels need 8.0)"),
        ("Hoper 9.0", NEW, "9.0", "left out 'Hoper' (no architecture)"),
        ("90 sm_90", NEW, "", "left out '90', 'sm_90' (no architecture)"),
        ("native", NEW, "8.9", ""),
        ("Auto", OLD, "8.9", ""),
    ],
)
def test_architectures(wanted: str | None, known: set[str], archs: str, left_out: str) -> None:
    found, sentence = choose_archs(wanted, lambda arch: arch.removesuffix("+PTX") in known, lambda: ["8.9"])
    assert ";".join(found) == archs
    assert sentence == (f"TORCH_CUDA_ARCH_LIST: {left_out}" if left_out else "")
    assert all(native.covers(archs, (int(a.split(".")[0]), int(a.split(".")[1][0]))) for a in found)


def test_names_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    for name in ("Ampere", "Ada", "Hopper", "Blackwell", "Ampere+Tegra"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", name)
        archs, _ = choose_archs(name, lambda arch: True, list)
        assert sorted(gencode(archs)) == _get_cuda_arch_flags()


def fake_nvcc(folder: Path, release: str, codes: str) -> None:
    case = f'case "$1" in --version) echo "release {release}, V{release}.1";; --list-gpu-code) echo "{codes}";;'
    text = f'{case} *) case "$*" in *120a*) echo "nvcc fatal : Unsupported gpu architecture"; exit 1;; esac;; esac'
    script(folder / "bin" / "nvcc", text)


def test_nvcc_says_what_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path, "13.0", "sm_75 sm_80 sm_90 sm_120")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("BCOS_NO_CUDA", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.6 9.0a 12.0a")
    there = Torch(tmp_path, "9.9.9", "13.0")
    found = Nvcc.find(there)
    assert found.archs == ["8.0", "9.0a"]
    assert "left out 8.6, 12.0a (this nvcc does not know it)" in found.left_out
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(CannotBuildError, match=r"left out 7\.5"):
        Nvcc.find(there)
    with pytest.raises(CannotBuildError, match=r"nvcc is of CUDA 13, and torch is built for CUDA 12\.8"):
        Nvcc.find(Torch(tmp_path, "9.9.9", "12.8"))
    with pytest.raises(cuda.NoCudaError, match="has no CUDA"):
        Nvcc.find(Torch(tmp_path, "9.9.9", None))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(cuda.NoCudaError, match=build_record.NO_NVCC):
        Nvcc.find(there)


# ---- compiler, ninja, files


@needs_compiler
def test_compiler_with_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = next(name for name in ("g++", "clang++", "c++") if shutil.which(name))
    ccache = script(tmp_path / "with space" / "ccache", 'exec "$@"')
    monkeypatch.setenv("CXX", f"'{ccache}' {real} -pipe")
    compiler = Compiler.find()
    assert compiler.command == [str(ccache), real, "-pipe"]
    assert compiler.version
    assert compiler.for_nvcc() == ["-ccbin", real, "-Xcompiler=-pipe"]


def test_compilers_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CannotBuildError, match="the compiler in CXX was not found"):
        Compiler.find()
    monkeypatch.setenv("CXX", 'g++ "')
    with pytest.raises(CannotBuildError, match="CXX cannot be read"):
        Compiler.find()
    old = script(tmp_path / "g++", "echo \"unrecognized option '-std=c++20'\" >&2; exit 1")
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(CannotBuildError, match="CXX cannot compile C\\+\\+20") as raised:
        Compiler.find()
    assert "unrecognized option" in raised.value.in_full()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotBuildError, match=r"cannot compile C\+\+20 \(g\+\+\)"):
        Compiler.find()
    (tmp_path / "g++").unlink()
    with pytest.raises(CannotBuildError, match=r"a C\+\+ compiler was not found"):
        Compiler.find()


@pytest.mark.parametrize(("given", "options"), [("", []), ("3", ["-j", "3"]), (" 1 ", ["-j", "1"])])
def test_jobs(given: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", given)
    assert jobs() == options


@pytest.mark.parametrize("given", ["many", "0", "-1", "1.5"])
def test_jobs_that_are_no_number(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", given)
    with pytest.raises(CannotBuildError, match="MAX_JOBS must be a whole number from 1"):
        jobs()


def test_words_survive_ninja_and_the_shell(tmp_path: Path) -> None:
    words = ["x", ODD, "$in", "a=b"]
    (tmp_path / "build.ninja").write_text(
        f"rule r\n  command = {shell([sys.executable, '-c', 'import sys; print(sys.argv[1:])', *words])}\nbuild out: r\n"
    )
    done = subprocess.run([native_build.find_ninja()], cwd=tmp_path, capture_output=True, text=True)
    assert str(words) in done.stdout


def test_files_are_written_where_they_differ(tmp_path: Path) -> None:
    """A file that did not change keeps its time, and one that went goes."""
    source, copy = tmp_path / ODD, tmp_path / "copy"
    (source / "cpu").mkdir(parents=True)
    for name in ("a.h", "cpu/b.cpp", "cpu/c.cu", "notes.md"):
        (source / name).write_text(name)
    copy_sources(source, copy)
    os.utime(copy / "a.h", (1, 1))
    (source / "cpu" / "b.cpp").write_text("other")
    os.utime(source / "cpu" / "b.cpp", (1, 1))  # as in an older checkout
    (source / "cpu" / "c.cu").unlink()
    copy_sources(source, copy)
    assert (copy / "a.h").stat().st_mtime == 1
    assert (copy / "cpu" / "b.cpp").read_text() == "other"
    assert (copy / "cpu" / "b.cpp").stat().st_mtime > 1
    assert [p.name for p in build_record.source_files(copy)] == ["a.h", "b.cpp"]


def test_builds_in_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with locked(tmp_path):
            order.append("second")

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_source_hash(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    folder = tmp_path / "csrc"
    begin = build_record.source_hash(folder)
    assert begin == build_record.source_hash(ROOT / "csrc")
    (folder / "README.txt").write_text("not compiled")
    assert build_record.source_hash(folder) == begin
    with (folder / "cpu" / "tile.h").open("a") as file:
        file.write("\n")
    changed = build_record.source_hash(folder)
    (folder / "cpu" / "tile.h").rename(folder / "cpu" / "tiles.h")
    assert len({begin, changed, build_record.source_hash(folder)}) == 3


# ---- setup.py


def setup_py(
    *command: str, folder: Path = ROOT, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "BCOS_NO_CUDA": "1", "BCOS_REQUIRE_EXTENSION": "0", **environment}
    return subprocess.run([python, "setup.py", *command], cwd=folder, env=settings, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"CXX": "no-such-compiler"}, "the compiler in CXX was not found (no-such-compiler)"),
        ({"CXX": "false"}, "CXX cannot compile C++20"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a whole number from 1; it is 'many'"),
        ({"BCOS_BUILD_DIR": "/dev/null/x"}, "files could not be written or read (Not a directory)"),
    ],
)
def test_what_cannot_be_built_is_a_sentence(settings: dict[str, str], sentence: str, tmp_path: Path) -> None:
    if "CXX" not in settings and not HAS_COMPILER:
        pytest.skip("no C++ compiler on this machine")
    settings = {"BCOS_BUILD_DIR": str(tmp_path / "objects"), **settings}
    (tmp_path / "lib" / "bcos_kernels").mkdir(parents=True)
    old = tmp_path / "lib" / "bcos_kernels" / "_native.so"
    old.write_text("of an earlier build")
    done = setup_py("build_ext", "--build-lib", str(tmp_path / "lib"), **settings)
    assert done.returncode == 0, done.stderr
    assert f"installed without its compiled extension: {sentence}" in done.stderr
    assert not old.exists()
    record = json.loads((old.parent / "_build.json").read_text())
    assert record["sources"] == build_record.source_hash(ROOT / "csrc")
    assert sentence.startswith(record["missing"])
    assert not record["on_purpose"]
    done = setup_py("build_ext", "--build-lib", str(tmp_path / "lib"), BCOS_REQUIRE_EXTENSION="1", **settings)
    assert done.returncode != 0
    assert f"the compiled extension cannot be built: {sentence}" in done.stderr
    assert "Traceback" not in done.stderr


def test_left_out_on_purpose_is_written_down(tmp_path: Path) -> None:
    for command in (["build_py"], ["build_ext"]):
        done = setup_py(*command, "--build-lib", str(tmp_path), BCOS_NO_EXTENSION="1")
        assert done.returncode == 0, done.stderr
        record = tmp_path / "bcos_kernels" / "_build.json"
        assert json.loads(record.read_text())["on_purpose"]
        record.unlink()


def test_a_killed_compiler_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    cxx = script(
        tmp_path / "g++",
        'case "$*" in *-fsyntax-only*|*--version*) exit 0;; esac\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo half > "$2"; shift; done; kill -9 $$',
    )
    done = setup_py(
        "build_ext", "--build-lib", str(tmp_path / "lib"), CXX=str(cxx), BCOS_BUILD_DIR=str(tmp_path / "objects")
    )
    assert "the compiler failed" in done.stderr
    assert "MAX_JOBS=1" in done.stderr
    assert list(tmp_path.glob("objects/*/*.o.new"))
    assert not list(tmp_path.glob("objects/*/*.o"))
    assert not list(tmp_path.glob("lib/**/*.so"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, made of a copy of the checkout: setuptools writes beside setup.py."""
    folder = tmp_path_factory.mktemp("sdist") / "checkout"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("bcos_kernels", "build_support", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    done = setup_py("-q", "sdist", folder=folder)
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "dist").glob("*.tar.gz")
    return made


def test_sdist_has_all_that_is_needed_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "build_support", "bcos_kernels"):
        wanted = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".typed") or path.name == "choices.json"
        }
        assert wanted
        assert wanted <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not {name for name in names if name.endswith(".so") or "_build.json" in name}


RUNS = """
import torch, bcos_kernels as bk
assert bk.available_backends()["native"] is None, bk.available_backends()
x, w = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3)
torch.testing.assert_close(bk.bcos_conv2d(x, w, backend="native"), bk.bcos_conv2d(x, w, backend="reference"))
"""


@needs_compiler
@pytest.mark.slow
def test_builds_from_the_sdist_at_an_odd_path(sdist: Path, tmp_path: Path) -> None:
    """Where this checkout was built, its objects are taken along: by their relative names ninja finds them done, but two.

    Elsewhere everything is compiled, without optimisation, which is what takes the time.
    """
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    folder = unpacked.rename(tmp_path / ODD)
    settings = {"BCOS_BUILD_DIR": "", "BCOS_REQUIRE_EXTENSION": "1"}
    build = f"native-{torch.__version__}-{sys.implementation.cache_tag}"
    kept = Path(os.environ.get("BCOS_BUILD_DIR") or ROOT / "build") / build
    built_from = (build_record.info_of(kept / build_record.LIBRARY) or {}).get("sources")
    if built_from == build_record.source_hash(ROOT / "csrc"):
        shutil.copytree(kept, folder / "build" / build, symlinks=True)
        for name in ("cpu_tile_table.o", "build_info.o", build_record.LIBRARY):
            (folder / "build" / build / name).unlink(missing_ok=True)
    else:
        quick = script(tmp_path / "bin" / "quick", f'exec {shlex.join(Compiler.find().command)} "$@" -O0 -g0')
        settings["CXX"] = shlex.quote(str(quick))
    done = setup_py("build_ext", "--inplace", folder=folder, **settings)
    assert done.returncode == 0, done.stderr
    assert (folder / "bcos_kernels" / build_record.LIBRARY).is_file()
    assert (folder / "build" / build / "cpu_tile_table.o").is_file()
    done = subprocess.run([sys.executable, "-c", RUNS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what is said where the extension is missing or stale


def test_record_and_library_are_read_without_loading(tmp_path: Path) -> None:
    assert build_record.info_of(tmp_path / "missing.so") is None
    library = tmp_path / "_native.so"
    library.write_bytes(b"\x7fELF without a description")
    assert build_record.info_of(library) is None
    library.write_bytes(b"\0\xff" + build_record.MARK.encode() + b'{"torch": "1.0"}\0\1')
    assert build_record.info_of(library) == {"torch": "1.0"}


@pytest.mark.parametrize(
    ("installer", "url", "command"),
    [
        ("pip", "file:///a%20b", "python -m pip install --no-deps --force-reinstall --no-cache-dir {}'/a b'"),
        ("uv", "file:///a", "uv pip install --no-deps --reinstall-package bcos_kernels {}/a"),
        ("pip", "", "python -m pip install --no-deps --force-reinstall --no-cache-dir {}bcos_kernels"),
    ],
)
def test_command_for_an_installed_package(
    installer: str, url: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Distribution:
        def read_text(self, name: str) -> str:
            return installer + "\n" if name == "INSTALLER" else json.dumps({"url": url})

    monkeypatch.setattr(build_record, "_python", lambda: "python")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.setattr(build_record.metadata, "distribution", lambda name: Distribution())
    monkeypatch.setattr(build_record, "checkout", lambda: None)
    monkeypatch.setattr(build_record, "_has_build_tools", lambda: True)
    assert build_record.rebuild_command() == command.format("--no-build-isolation ")
    monkeypatch.setattr(build_record, "_has_build_tools", lambda: False)
    assert build_record.rebuild_command(["A=b c"]) == "A='b c' " + command.format("")
    if installer == "uv":
        monkeypatch.setenv("VIRTUAL_ENV", "/another")
        assert build_record.rebuild_command().startswith("uv pip install --python python --no-deps")


def test_command_in_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_record, "_python", lambda: "python")
    monkeypatch.setattr(build_record, "checkout", lambda: Path("/a b"))
    monkeypatch.setattr(build_record, "_has_build_tools", lambda: True)
    assert build_record.rebuild_command() == "cd '/a b' && python setup.py build_ext --inplace"


FIRST_USE = """
import json, sys, warnings, torch, bcos_kernels as bk
from bcos_kernels import build_record, dispatch, native
x, w = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3)
for backend in map(str.strip, sys.stdin):
    for known in (build_record.record, build_record.expected_sources, native.build_info, native.unavailable):
        known.cache_clear()
    dispatch.forget()
    dispatch._warned = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for b in (2.0, 1.5):
            with bk.use_backend(backend):
                bk.bcos_conv2d(x, w, b=b)
                bk.bcos_linear(torch.ones(2, 3), torch.ones(4, 3), b=b)
    said = [f"{w.category.__name__} {w.message}" for w in caught]
    print(json.dumps([*said, f"native {bk.available_backends()['native']}"]), flush=True)
"""


@dataclass(frozen=True)
class Copy:
    """A copy of the package, without its record, and a process that imports it."""

    folder: Path
    process: subprocess.Popen[str]

    def first_use(self, backend: str = "auto") -> list[str]:
        """What a process warns of that uses the package for the first time, and why native cannot be used."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(backend + "\n")
        self.process.stdin.flush()
        said: list[str] = json.loads(self.process.stdout.readline())
        return said

    def write_record(self, **record: Any) -> None:
        (self.folder / "bcos_kernels" / build_record.RECORD).write_text(json.dumps(record))


@pytest.fixture(scope="module")
def one_copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", build_record.RECORD)
    shutil.copytree(ROOT / "bcos_kernels", folder / "bcos_kernels", ignore=ignored)
    settings = {name: value for name, value in os.environ.items() if name != "BCOS_NO_EXTENSION"}
    with subprocess.Popen(
        [sys.executable, "-c", FIRST_USE],
        cwd=folder,
        env=settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Copy(folder, process)


@pytest.fixture
def copied(one_copy: Copy) -> Iterator[Copy]:
    """One interpreter for all of these tests, since it imports torch; each leaves the copy as it was."""
    yield one_copy
    shutil.rmtree(one_copy.folder / "csrc", ignore_errors=True)
    for name in ("setup.py", f"bcos_kernels/{build_record.RECORD}"):
        (one_copy.folder / name).unlink(missing_ok=True)


@needs_extension
def test_stale_library_in_a_checkout(copied: Copy) -> None:
    """git pull without a build."""
    shutil.copytree(ROOT / "csrc", copied.folder / "csrc")
    (copied.folder / "setup.py").touch()
    assert copied.first_use() == ["native None"]
    with (copied.folder / "csrc" / "layer.cpp").open("a") as file:
        file.write("// newer\n")
    warning, native_line = copied.first_use()
    assert warning.startswith("SlowPathWarning bcos_kernels runs its slow path")
    assert "In our measurements (docs/performance.md)" in warning
    assert "1.65 times" in warning
    assert "built from other sources" in native_line
    assert native_line.split("; ")[1] in warning
    command = "setup.py build_ext --inplace`" if build_record._has_build_tools() else "--editable"
    assert str(copied.folder) in native_line
    assert command in native_line


@needs_extension
def test_stale_library_in_an_installed_package(copied: Copy) -> None:
    info = native.build_info()
    assert info is not None
    copied.write_record(sources=info["sources"], missing=None)
    assert copied.first_use() == ["native None"]
    copied.write_record(sources="0" * 16, missing=None)
    warning, native_line = copied.first_use()
    assert "built from other sources" in native_line
    assert "SlowPathWarning" in warning


def test_missing_library_is_said_once_and_not_where_it_was_meant(copied: Copy) -> None:
    library = copied.folder / "bcos_kernels" / build_record.LIBRARY
    if there := library.exists():
        library.rename(copied.folder / "aside")  # back as the same file: the process may have loaded it
    try:
        copied.write_record(sources="x", missing="no compiler", on_purpose=False)
        warning, native_line = copied.first_use()
        assert "SlowPathWarning" in warning
        assert "missing: no compiler; `" in warning
        assert "native: the compiled extension is missing: no compiler; `" in native_line
        assert copied.first_use("portable") == [native_line]
        copied.write_record(sources="x", missing="BCOS_NO_EXTENSION=1 was set", on_purpose=True)
        (native_line,) = copied.first_use()
        assert "BCOS_NO_EXTENSION=1 was set; `" in native_line
    finally:
        if there:
            (copied.folder / "aside").rename(library)


def test_no_warning_where_the_extension_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: "native: missing")
    monkeypatch.setattr(build_record, "left_out_on_purpose", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, w = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1)
    assert "native: missing" in str(native.slow_path(Call("conv2d", x, w)))
    assert native.slow_path(Call("conv2d", x.half(), w.half())) is None
    assert native.slow_path(Call("layer_norm", x)) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert native.slow_path(Call("conv2d", x, w)) is None


def test_the_warning_can_be_made_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "slow_path", lambda call: "the slow path")
    monkeypatch.setattr(dispatch, "_usable", lambda order: (dispatch.load("portable"),))
    monkeypatch.setattr(dispatch, "_orders", {})
    monkeypatch.setattr(dispatch, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", bk.SlowPathWarning)
        with pytest.raises(bk.SlowPathWarning, match="the slow path"):
            bk.bcos_linear(torch.ones(2, 3), torch.ones(4, 3))
