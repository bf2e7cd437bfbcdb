"""Writes the weights of a checkpoint for others, without the state of its training: `python -m models.export --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import bcos_kernels as bk
from models import cli, experiments
from models.atomic import replace_atomically, writing
from models.checkpoint_files import read_checkpoint
from models.checkpoints import EMA_PREFIX, PREFIX, chosen_checkpoint, has_average
from models.errors import UserError
from models.factory import load_checkpoint
from models.recipes import Experiment

SUFFIXES = (".safetensors", ".pth", ".ckpt")

# The version of Lightning whose layout a .ckpt has; the public code takes only files that name one.
_LAYOUT = "1.9.5"


def save_safetensors(model: nn.Module, path: Path, experiment: Experiment) -> None:
    """The network's state dict as safetensors; the metadata say what it is and what wrote it.

    Raises:
        models.errors.UserError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError(f"{path} needs safetensors: pip install 'bcos_kernels[train]'.") from error
    metadata = {
        "format": "pt",
        "dataset": experiment.dataset,
        "base_network": experiment.base_network,
        "experiment_name": experiment.name,
        "bcos_kernels": bk.__version__,
        "torch": str(torch.__version__),
    }
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    replace_atomically(path, lambda temporary: save_file(state, temporary, metadata))


def save_state_dict(model: nn.Module, path: Path) -> None:
    """The network's state dict by itself, as `torch.save` writes it: what the public code's `--weights` reads."""
    replace_atomically(path, lambda temporary: torch.save(model.state_dict(), temporary))


def save_lightning(model: nn.Module, path: Path, epoch: int, average: nn.Module | None = None) -> None:
    """A Lightning checkpoint that the public code's `--reload` and `--ema` read: weights, and their moving average."""
    state = {f"{PREFIX}{key}": value for key, value in model.state_dict().items()}
    if average is not None:
        state |= {f"{EMA_PREFIX}{key}": value for key, value in average.state_dict().items()}
    content = {
        "epoch": epoch,
        "global_step": 0,
        "pytorch-lightning_version": _LAYOUT,
        "state_dict": state,
    }
    replace_atomically(path, lambda temporary: torch.save(content, temporary))


def get_parser() -> argparse.ArgumentParser:
    """The options of `python -m models.export`."""
    parser = argparse.ArgumentParser(
        prog="python -m models.export",
        description="Write a trained network's weights: .safetensors, .pth (a state dict), or .ckpt (a Lightning "
        "checkpoint with the moving average beside the weights, for the public B-cosification code).",
    )
    cli.add_experiment(parser)
    cli.add_checkpoint(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="its ending decides the format")
    return parser


def main(argv: list[str] | None = None) -> Path:
    """Reads a checkpoint, checks it and writes it.

    Args:
        argv: the options; default: the command line.

    Returns:
        The file.

    Raises:
        models.errors.UserError: options or a checkpoint that do not fit; the message says what to do.
    """
    args = get_parser().parse_args(argv)
    output: Path = args.output
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output {output}: must end in one of {', '.join(SUFFIXES)}.")
    if output.suffix == ".ckpt" and args.ema:
        raise UserError("--ema: a .ckpt holds the weights and their moving average anyway.")
    experiment = experiments.find(args.dataset, args.base_network, args.experiment_name)
    path, ema = chosen_checkpoint(
        *(experiment, args.experiment_name, args.base_directory),
        reload=args.reload,
        weights=args.weights,
        ema=args.ema,
    )

    def network(averaged: bool) -> nn.Module:
        return load_checkpoint(*(args.dataset, args.base_network, args.experiment_name), weights=path, ema=averaged)

    if output.suffix == ".ckpt":
        content = read_checkpoint(path)
        average = network(True) if has_average(content) else None
        epoch = content.get("epoch")
        model = network(False)
        with writing("--output", output):
            save_lightning(model, output, epoch if isinstance(epoch, int) else 0, average)
    else:
        model = network(ema)
        with writing("--output", output):
            save_state_dict(model, output) if output.suffix == ".pth" else save_safetensors(model, output, experiment)
    print(f"{path} -> {output}{' (moving average)' if ema and output.suffix != '.ckpt' else ''}")
    return output


if __name__ == "__main__":
    cli.run(main)
