"""Options of pytest for the fuzzer, ``test_fuzz.py``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=2000, metavar="N", help="run N random configurations (default 2000)")
    parser.addoption("--fuzz-seed", type=int, metavar="SEED", help="run this one configuration of the fuzzer alone")
