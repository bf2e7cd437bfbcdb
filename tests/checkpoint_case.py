"""Small checkpoints to read: a network of two layers, in the forms that others write."""

from __future__ import annotations

import pathlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

MODEL_CHECKPOINT = "ModelCheckpoint{'monitor': 'val_acc1', 'mode': 'max', 'every_n_epochs': 1}"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def lightning(model: nn.Module, prefix: str = "model.", **more: Any) -> dict[str, Any]:
    return {"state_dict": {f"{prefix}{key}": value for key, value in model.state_dict().items()}, **more}


def published(model: nn.Module, average: nn.Module | None = None, epoch: int = 89) -> dict[str, Any]:
    """As Lightning 1.9.5 writes the public code's training: read off such a file, tensors and lists shortened.

    `ModelCheckpoint` stores the folder that it was given, which in the public code is a `pathlib.Path`.
    """
    state = lightning(model)["state_dict"]
    if average is not None:
        state["ema.n_averaged"] = torch.tensor(5)
        state |= lightning(average, "ema.module.")["state_dict"]
    folder = pathlib.PosixPath("experiments/ImageNet/bcosification/resnet_18")
    best = f"{folder}/epoch={epoch}-val_acc1=0.6800.ckpt"
    return {
        "epoch": epoch,
        "global_step": 10,
        "pytorch-lightning_version": "1.9.5",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1, "completed": 0}}}},
        "callbacks": {
            MODEL_CHECKPOINT: {
                "monitor": "val_acc1",
                "best_model_score": torch.tensor(0.68),
                "best_model_path": best,
                "current_score": torch.tensor(0.68),
                "dirpath": folder,
                "best_k_models": {best: torch.tensor(0.68)},
                "kth_value": torch.tensor(0.68),
                "last_model_path": "",
            },
            "MetricsTracker": {"eval_acc1": [(0, 0.1), (1, 0.2)]},
        },
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 1, "_last_lr": [1e-4]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"dataset": "ImageNet", "model": {"name": "resnet18", "weights": None}, "use_agc": True},
    }
