"""Options of the suite."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=2000, metavar="N", help="run N random configurations (default 2000)")
    parser.addoption("--fuzz-seed", type=int, metavar="SEED", help="run this one configuration of the fuzzer alone")
    parser.addoption(
        "--sweep", action="store_true", help="convert every network of tests/sweep_networks.txt, not a sixth"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests come first, so that all processes end at about the same time."""
    items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.fixture(autouse=True)
def give_memory_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """The slow tests make large networks, whose memory the C library would keep: several processes share the machine's."""
    yield
    if "slow" in request.keywords:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@pytest.fixture
def sweep(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--sweep"))
