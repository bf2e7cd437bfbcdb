"""The smallest training runs that there are: a ResNet of width 8 on Digits, one epoch of a second or two."""

from __future__ import annotations

from pathlib import Path

import torch

import train

TINY = "resnet_10_w8"


def options(base_directory: Path, base_network: str = "standard", *more: str) -> list[str]:
    """Options that train.py and evaluate.py share, and `more`."""
    return [
        *("--base_directory", str(base_directory)),
        *("--dataset", "Digits"),
        *("--base_network", base_network),
        *("--experiment_name", TINY),
        *more,
    ]


def train_tiny(base_directory: Path, base_network: str = "standard", *more: str, epochs: int = 1) -> Path:
    """Runs train.main; returns the experiment's folder."""
    # So small that a second thread only waits for the first; where other work fills the cores, for very long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        directory = train.main(
            options(base_directory, base_network, "--max_epochs", str(epochs), "--refresh_rate", "0", *more)
        )
    finally:
        torch.set_num_threads(threads)
    assert directory is not None
    return directory
