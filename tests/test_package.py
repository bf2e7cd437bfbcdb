"""The library alone: what it needs, what it imports, what it reports."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

import bcos_kernels as bk
from bcos_kernels import env_report, native

OPTIONAL = ("torchvision", "lightning", "matplotlib", "sklearn", "bcos", "timm", "triton.language")


def test_hard_dependencies_are_torch_and_numpy() -> None:
    required = [r for r in metadata.requires("bcos_kernels") or [] if "extra ==" not in r]
    assert sorted(r.split(">")[0].strip() for r in required) == ["numpy", "torch"]


def test_works_without_anything_else() -> None:
    """A network of our layers, forward, backward and explained, with every optional package hidden."""
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import torch, bcos_kernels as bk
model = torch.nn.Sequential(bk.BcosConv2d(6, 4, 3), bk.BatchNormUncentered2d(4), torch.nn.ReLU(),
                            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), bk.BcosLinear(4, 3))
model(torch.rand(2, 6, 8, 8)).sum().backward()
print(bk.explain(model, torch.rand(2, 3, 8, 8)).contributions.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([2, 8, 8])"


def test_import_is_light() -> None:
    code = f"import sys, bcos_kernels; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_flop_counter_knows_the_operators_whenever_it_is_imported() -> None:
    for order in (
        "import bcos_kernels; import torch.utils.flop_counter",
        "import torch.utils.flop_counter; import bcos_kernels",
        "import bcos_kernels; import importlib.util; importlib.util.find_spec('torch.utils.flop_counter');"
        "import torch.utils.flop_counter",
    ):
        code = f"{order}; print(sum('bcos' in str(op) for op in torch.utils.flop_counter.flop_registry))"
        done = subprocess.run(
            [sys.executable, "-c", f"import torch; {code}"], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "4", order


def test_environment_report() -> None:
    done = subprocess.run([sys.executable, "-m", "bcos_kernels.env_report"], capture_output=True, text=True, check=True)
    for part in (f"bcos_kernels  {bk.__version__}", "torch", "backends", "portable    ready", "reference   ready"):
        assert part in done.stdout, part
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if len(line.split()) > 1)
    for name in (
        "processor",
        "instructions",
        "threads",
        "kernels",
        "extension",
        "sources",
        "compiler",
        "nvcc",
        "driver",
    ):
        assert not lines[name].startswith("unknown ("), lines[name]


def test_environment_report_survives_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> str:
        raise OSError("out of order")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", fail)
    monkeypatch.setattr(env_report.metadata, "version", fail)
    monkeypatch.setattr(env_report, "available_backends", fail)
    monkeypatch.setattr(native, "build_info", fail)
    said = env_report.report()
    for name in ("instructions", "extension", "sources", "flags", "numpy", "backends"):
        assert f"{name:<14}unknown (OSError: out of order)" in said
    assert f"bcos_kernels  {bk.__version__}" in said


def test_environment_report_says_what_this_processor_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Operations:
        has_avx512 = staticmethod(lambda: False)
        fuses_pointwise = staticmethod(lambda: False)

    monkeypatch.setattr(native, "unavailable", lambda: None)
    monkeypatch.setattr(torch.ops, "bcos_native", Operations)
    said = env_report.report()
    assert "no AVX-512: the fused 1x1 convolution and linear layer are off" in said
    capability = torch.backends.cpu.get_cpu_capability()
    assert sum(capability in line for line in said.splitlines() if line.startswith(("instructions", "kernels"))) == 1


@pytest.mark.parametrize(("home", "said"), [("/", "/a/b"), ("", "/a/b"), ("/a", "~/b"), (None, "/a/b")])
def test_environment_report_hides_the_home_directory(
    home: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container it may be the root of all paths, or not exist."""
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)  # nobody's
    else:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(env_report, "_package", lambda: "/a/b")
    report = env_report.report()
    assert f"bcos_kernels  {said}" in report.splitlines()
    assert "~" not in report.replace(said, "")


def test_environment_report_asks_each_compiler_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def says(*command: str) -> str:
        asked.append(command)
        return ""

    monkeypatch.setattr(env_report, "_says", says)
    for given in ("", "g++", "'/a b/ccache' g++"):
        asked.clear()
        monkeypatch.setenv("CXX", given)
        assert env_report._compiler() == "none found"
        assert len(asked) == len(set(asked))
    assert asked[0] == ("/a b/ccache", "g++", "--version")


def test_every_public_name_is_documented() -> None:
    for name in bk.__all__:
        assert name == "__version__" or getattr(bk, name).__doc__, name
