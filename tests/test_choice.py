"""The table by which the automatic choice goes, and how benchmarks make it."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bcos_kernels as bk
from bcos_kernels import choice, dispatch
from bcos_kernels.contract import Call, Options
from benchmarks import choice as maker
from benchmarks.shapes import SETS, layers

X, W = torch.randn(1, 32, 4, 4), torch.randn(2, 32, 1, 1)
ONE = Call("conv2d", X, W)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dispatch.forget()
    yield
    dispatch.forget()


def with_table(monkeypatch: pytest.MonkeyPatch, *fastest: str) -> None:
    lists = {"conv2d": {"1x1 s1": list(fastest)}}
    monkeypatch.setattr(choice, "table", lambda: {"cpu": {"float32": lists}})


def chosen(call: Call = ONE) -> str:
    return dispatch.choose("auto", call).__name__.rsplit(".", 1)[1]


# ---- choosing


def test_the_fastest_measured_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with_table(monkeypatch, "portable", "native")
    assert chosen() == "portable"
    assert bk.bcos_conv2d(X, W).shape == (1, 2, 4, 4)


def test_without_an_entry_the_static_order_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    with_table(monkeypatch, "portable")
    names = ["triton", "native", "portable"]
    assert choice.order("conv2d", X.device, torch.float32, "1x1 s1", names) == ["portable", "triton", "native"]
    for other in (
        ("linear", torch.float32, "1x1 s1"),
        ("conv2d", torch.float64, "1x1 s1"),
        ("conv2d", torch.float32, "stem"),
    ):
        assert choice.order(other[0], X.device, other[1], other[2], names) == names


def test_a_table_may_name_what_is_not_there(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Neither a backend that nobody knows nor one that this machine has no use for."""
    monkeypatch.setattr(dispatch, "BACKENDS", {**dispatch.BACKENDS, "gone": "bcos_kernels.gone"})
    with_table(monkeypatch, "unheard of", "gone", "portable")
    with dispatch.forget_logged(), caplog.at_level(logging.INFO, "bcos_kernels"):
        assert [chosen() for _ in range(3)] == ["portable"] * 3
    assert len([m for m in caplog.messages if m.startswith("gone: cannot be imported")]) == 1


def test_use_backend_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    with_table(monkeypatch, "portable")
    with bk.use_backend("reference"):
        assert dispatch.requested(None) == "reference"
    if dispatch.unavailable("native") is None:
        assert dispatch.choose("native", ONE).__name__ == "bcos_kernels.native"


def test_what_can_be_used_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every call of a layer there is a look-up and the chosen backend's ``why_not``, and nothing else."""
    asked: list[str] = []
    unavailable = dispatch.unavailable
    monkeypatch.setattr(dispatch, "unavailable", lambda name: (asked.append(name), unavailable(name))[1])
    for _ in range(3):
        chosen()
    assert sorted(asked) == sorted(dispatch.BACKENDS)


CLASSES = {
    "1x1 s1": (W, {}),
    "1x1 s2": (W, {"stride": (2, 2)}),
    "3x3 s1": (torch.ones(2, 32, 3, 3), {}),
    "3x3 s2": (torch.ones(2, 32, 3, 3), {"stride": (2, 2)}),
    "stem": (torch.ones(2, 6, 7, 7), {"stride": (2, 2)}),
    "linear": (torch.ones(2, 32), {}),
    "depthwise": (torch.ones(32, 1, 3, 3), {"groups": 32}),
    "groups": (torch.ones(32, 8, 3, 3), {"groups": 4}),
    "max_out": (W, {"max_out": 2}),
    "general b": (W, {"b": torch.tensor(2.0)}),
    "linear part": (W, {"b": 1}),
    "other": (torch.ones(2, 32, 3, 3), {"dilation": (2, 2)}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_shapes(name: str) -> None:
    weight, options = CLASSES[name]
    assert choice.shape_class(Call("conv2d", X, weight, Options(**options))) == name


def test_class_of_a_norm() -> None:
    assert choice.shape_class(Call("batch_norm_uncentered2d", X, None)) == "norm"
    assert choice.shape_class(Call("layer_norm", X, torch.ones(4))) == "norm"
    assert choice.shape_class(Call("batch_norm_uncentered2d_backward", X, torch.ones(32))) == "norm"


# ---- making the table


def test_committed_table_is_what_the_committed_measurements_give() -> None:
    assert json.loads(choice.TABLE.read_text()) == maker.make(maker.committed())
    document = maker.DOCUMENT.read_text()
    assert document == maker.with_section(document, maker.markdown(maker.committed()))


def test_every_layer_that_is_measured_has_a_class_and_a_name_of_its_own() -> None:
    for network in SETS:
        found = layers(network)
        assert len({layer.name for layer in found}) == len(found)
        assert all(choice.shape_class(maker.call(layer, "conv2d")) for layer in found)


def test_order_is_by_time_over_the_fastest(tmp_path: Path) -> None:
    """A backend that ran in one layer only is judged by that one; contenders that are no backends do not count."""
    times = {
        "1x1 64-64 at 56": {"native": 1.0, "portable": 1.5, "compiled": 0.1},
        "1x1 64-256 at 56": {"native": 1.0, "portable": 1.5},
        "1x1 256-64 at 56": {"native": 3.0, "portable": 1.0, "triton": 1.1},
    }
    columns = ["network", "layer", "batch", "dtype", "format", "contender", "phase", "ratio", "gpu", "device_class"]
    path = tmp_path / "layers.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for layer, by_name in times.items():
            for name, time in by_name.items():
                for phase in ("forward", "both"):
                    row = ["resnet50", layer, 8, "bfloat16", "channels_last", name, phase, time, "a GPU", "sm90"]
                    writer.writerow(row)
    assert maker.make([path]) == {"sm90": {"bfloat16": {"conv2d": {"1x1 s1": ["triton", "portable", "native"]}}}}
    assert "`triton` 1.10, `portable` 1.31, `native` 1.44" in maker.markdown([path])
