"""Random numbers that depend on their place in the training alone, so that a resumed run draws as one never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawn_by(*place: int) -> Iterator[None]:
    """Inside the block torch's generator of the CPU goes by these numbers; after it, it goes on as before."""
    with torch.random.fork_rng(devices=[]):
        # hash() of integers is the same in every process and version, unlike that of strings.
        torch.default_generator.manual_seed(hash(place) & 0x7FFF_FFFF_FFFF_FFFF)
        yield
