"""The golden vectors: how a stored case is rebuilt. See tests/golden/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.golden import fill

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> tuple[Any, Any]:
    """``(arrays, meta)`` of one file."""
    arrays = np.load(FOLDER / f"{name}.npz")
    return arrays, json.loads(str(arrays["meta"]))


def fill_standard(model: nn.Module, seed: int) -> nn.Module:
    """A standard network with its golden weights, float64."""
    state = {k: torch.tensor(fill.fill_tensor(k, tuple(v.shape), seed)) for k, v in model.state_dict().items()}
    model = model.double()
    model.load_state_dict(state)
    return model


def load_running_variances(model: nn.Module, arrays: Any) -> None:
    state = model.state_dict()
    for key in arrays.files:
        if key.startswith("buf:"):
            state[key[4:]].copy_(torch.tensor(arrays[key]))


def images(meta: Any) -> Tensor:
    """``[N, 6, H, W]`` float64."""
    rgb = torch.tensor(fill.images(meta["n_images"], meta["size"], meta["seed"]))
    return torch.cat([rgb, 1 - rgb], dim=1)
