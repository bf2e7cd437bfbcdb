"""The benchmarks' own machinery, on layers small enough to be a test: no figure comes from here."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bcos_kernels as bk
from benchmarks import bench_layers, bench_networks, choice, gpu_check
from benchmarks.harness import PHASES, difference
from benchmarks.shapes import SETS, Layer, layers

FORWARD = {"conv2d", "linear"}


def test_what_is_measured() -> None:
    """Issue 3: the 25 distinct shapes of ResNet-50, DenseNet-121's, the linear layers of ViT-S and B; and relatives."""
    assert {network: len(layers(network)) for network in SETS} == {
        "resnet50": 25,
        "densenet121": 67,
        "vit_s": 4,  # its patch embedding has the shape of its MLP
        "vit_b": 5,
        "relatives": 8,
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Layer]:
    """One layer of every kind, with few pixels and channels."""
    found = [
        Layer("small", 16, 8, 3, size=6),
        Layer("small", 16, 8, size=6, max_out=2),
        Layer("small", 16, 16, 3, size=6, groups=4),
        Layer("small", 16, 8, 3, 2, size=6, b=1.5),
        Layer("small", 16, 8, tokens=5),
    ]
    monkeypatch.setitem(SETS, "small", lambda: iter(found))
    return found


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *more: str) -> int:
    arguments = [
        "--network",
        "small",
        "--batch",
        "1",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--output",
        str(output),
        *more,
    ]
    monkeypatch.setattr(sys, "argv", ["bench_layers", *arguments])
    return bench_layers.main()


def test_every_kind_of_layer(small: list[Layer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "layers.csv"
    contenders = [*bench_layers.backends("cpu"), "reference", "bcos"]
    assert run(monkeypatch, output, "--contenders", *contenders) == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(small) * (len(contenders) + 1) * len(PHASES)
    first = rows[0]
    assert first["device_class"] == "cpu"
    for column in ("median_ms", "q10_ms", "q90_ms", "peak_mib", "ratio", "error", "torch", "date"):
        assert first[column]
    table = choice.make([output])["cpu"]["float32"]
    assert {op.removesuffix("_backward") for op in table} == FORWARD
    assert set(table["conv2d"]) == {"3x3 s1", "max_out", "groups", "general b"}
    assert all(
        set(names) == set(bench_layers.backends("cpu")) for by_class in table.values() for names in by_class.values()
    )


def test_a_refusal_is_no_failure_and_a_wrong_result_is(
    small: list[Layer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "a.csv", "--contenders", "cudnn", "--only", "3x3 16-8") == 0
    assert "cudnn: " in capsys.readouterr().err
    right = bench_layers.bcos_layer

    def wrong(layer: Layer, backend: str, **options: Any) -> Any:
        return right(replace(layer, b=1.9) if backend == "portable" else layer, backend, **options)

    monkeypatch.setattr(bench_layers, "bcos_layer", wrong)
    assert run(monkeypatch, tmp_path / "b.csv", "--contenders", "portable", "--only", "3x3 16-8 at 6") == 1
    assert "WRONG" in capsys.readouterr().err


def test_nan_is_a_difference() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert difference([good, good], [good, good / 2]) == 1
    for results in ([good, bad], [bad, good]):
        assert not difference(results, [good, good]) <= 1


@pytest.mark.parametrize("dry", [True, False])
def test_gpu_check_says_what_its_steps_understand(dry: bool, tmp_path: Path) -> None:
    parsers = {"benchmarks.bench_layers": bench_layers.parser(), "benchmarks.bench_networks": bench_networks.parser()}
    steps = gpu_check.plan("gpu", tmp_path, dry)
    first = ["environment", "tests: kernels", "tests: native", "tests: networks", "layers: resnet50"]
    assert [s.name for s in steps][:5] == first
    measured = set()
    for step in steps:
        module = step.command[2]
        if module in parsers:
            arguments = parsers[module].parse_args(step.command[3:])
            assert arguments.device == ("cpu" if dry else "cuda")
            if module == "benchmarks.bench_layers":
                measured |= set(arguments.network)
                assert arguments.contenders is None  # all
    assert measured == set(SETS)


def test_contenders_are_the_backends_of_the_device() -> None:
    usable = [name for name, sentence in bk.available_backends().items() if sentence is None]
    assert set(bench_layers.backends("cpu")) == set(usable) & {"native", "portable"}
    if torch.cuda.is_available():
        assert {"triton", "portable"} <= set(bench_layers.backends("cuda"))
