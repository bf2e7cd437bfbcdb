"""Evaluates an experiment of the registry on its dataset's validation images."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from models import experiments
from models.checkpoints import checkpoint_path, load_weights
from models.errors import UserError
from models.factory import finish, starting_network
from models.standard import build


def get_parser() -> argparse.ArgumentParser:
    """The options of evaluate.py."""
    parser = argparse.ArgumentParser(
        description="Evaluate a network. Without --reload or --weights: as its training starts, which for B-cosified "
        "networks means right after conversion."
    )
    parser.add_argument(
        "--base_directory", type=Path, default=Path("./experiments"), help="where experiments are stored"
    )
    parser.add_argument("--dataset", default="ImageNet", help=f"one of {', '.join(experiments.datasets())}")
    parser.add_argument("--base_network", required=True, help=f"one of {', '.join(experiments.base_networks())}")
    parser.add_argument("--experiment_name", required=True, help="see train.py --list")
    parser.add_argument("--data_path", type=Path, help="where the images are (instead of IMAGENET_PATH or DATA_ROOT)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--reload", help="'last', 'best' or 'epoch_N' of the experiment's checkpoints")
    source.add_argument("--weights", type=Path, metavar="PATH", help="a checkpoint or state dict of this network")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights, where the file has one")
    parser.add_argument("--batch_size", type=int, help="default: the recipe's")
    parser.add_argument("--num_workers", type=int, help="processes that load images; default: the recipe's")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU even where there is a GPU")
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluates and prints.

    Args:
        argv: the options; default: the command line.

    Returns:
        "acc1" and "acc5", shares between 0 and 1; "loss", the mean of the recipe's evaluation loss; "images", how many.

    Raises:
        models.errors.UserError: options, data or weights that do not fit; the message says what to do.
    """
    args = get_parser().parse_args(argv)
    experiment = experiments.find(args.dataset, args.base_network, args.experiment_name)
    for option in ("batch_size", "num_workers"):
        value, least = getattr(args, option), 1 if option == "batch_size" else 0
        if value is not None and value < least:
            raise UserError(f"--{option} must be at least {least}, got {value}.")
        if value is not None:
            experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **{option: value}))
    if args.ema and args.reload is None and args.weights is None:
        raise UserError("--ema needs --reload or --weights.")

    # Lightning takes seconds to import; --help and a misspelt name should not.
    from training.data import DataModule
    from training.losses import get_loss

    data = DataModule(experiment.data, experiment.seed, args.data_path)
    data.setup("test")
    if args.reload is None and args.weights is None:
        torch.manual_seed(experiment.seed)
        model = starting_network(experiment, data.num_classes, args.base_directory)
    else:
        directory = experiment.directory(args.base_directory)
        path = args.weights if args.reload is None else checkpoint_path(directory, args.reload)
        model = finish(build(experiment.model.architecture, data.num_classes), experiment.model)
        load_weights(model, path, ema=args.ema)
        print(f"Weights: {path}")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    result = evaluate(model.to(device), data.val_dataloader(), get_loss(experiment.trainer.eval_loss), device)
    print(f"{result['images']:.0f} images, loss {result['loss']:.5f}")
    print(f"Acc@1 {result['acc1']:.3%} Acc@5 {result['acc5']:.3%}")
    return result


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: object, device: torch.device
) -> dict[str, float]:
    """Accuracy and loss of the network in evaluation mode.

    Args:
        model: on `device`; gives logits `[N, K]`.
        batches: images and class indices `[N]`.
        loss: a mean over the batch, of logits and class indices.

    Returns:
        As `main`.
    """
    assert callable(loss)
    model.eval()
    images_seen, correct1, correct5, total_loss = 0, 0, 0, 0.0
    for images, targets in tqdm(batches, desc="evaluate", unit="batch", leave=False):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        logits = model(images)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        images_seen += len(targets)
        correct1 += int(hits[:, 0].sum())
        correct5 += int(hits.sum())
        total_loss += float(loss(logits, targets)) * len(targets)
    if images_seen == 0:
        raise UserError("There are no images to evaluate.")
    return {
        "acc1": correct1 / images_seen,
        "acc5": correct5 / images_seen,
        "loss": total_loss / images_seen,
        "images": float(images_seen),
    }


if __name__ == "__main__":
    from training import cli

    cli.run(main)
