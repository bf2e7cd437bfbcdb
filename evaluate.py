"""Evaluates an experiment of the registry on its dataset's validation images."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from models import cli, clip_options, experiments, recipe_io, zeroshot
from models.checkpoints import chosen_checkpoint, load_weights
from models.class_names import in_sentences
from models.errors import UserError
from models.factory import as_trained, check_images, starting_network, untrained
from models.recipes import Experiment

if TYPE_CHECKING:
    from training.data import DataModule


def get_parser() -> argparse.ArgumentParser:
    """The options of evaluate.py."""
    parser = argparse.ArgumentParser(
        description="Evaluate a network. Without --reload or --weights: as its training starts, which for B-cosified "
        "networks means right after conversion."
    )
    cli.add_experiment(parser, dataset="ImageNet")
    cli.add_data(parser)
    source = cli.add_checkpoint(parser, reload=None)
    source.add_argument(
        "--init_weights", type=Path, metavar="PATH", help="conventional weights: the network right after conversion"
    )
    cli.add_changes(
        parser.add_argument_group("changes of the recipe, which comes from config.json beside the checkpoint")
    )
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU even where there is a GPU")

    clip = parser.add_argument_group("CLIP's image encoders")
    clip.add_argument("--task", choices=["classification", "zeroshot", "linear_probe"], default="classification")
    clip_options.add(clip)
    clip.add_argument("--probe_c", type=float, metavar="C", help="linear_probe: inverse of the penalty's weight")
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluates and prints.

    Args:
        argv: the options; default: the command line.

    Returns:
        "acc1" and "acc5", shares between 0 and 1; "images", how many; but for linear probes "loss", the mean of the
        recipe's evaluation loss, or of the cross-entropy of zero-shot logits.

    Raises:
        models.errors.UserError: options, data or weights that do not fit; the message says what to do.
    """
    args = get_parser().parse_args(argv)
    experiment = experiments.find(args.dataset, args.base_network, args.experiment_name)
    path, ema = _checkpoint(args, experiment)
    if path is not None:
        experiment = as_trained(experiment, path)
    experiment = recipe_io.override(experiment, cli.changes(args))
    _check_task(args, experiment)

    # Lightning takes seconds to import; --help and a misspelt name should not.
    from training.data import DataModule
    from training.losses import cross_entropy, get_loss

    data = DataModule(experiment.data, experiment.seed, args.data_path)
    data.setup("test")
    classes = data.classes_for(experiment.model)
    if path is None:
        torch.manual_seed(experiment.seed)
        model = starting_network(experiment, classes, args.base_directory, args.init_weights)
    else:
        model = untrained(experiment.model, classes)
        load_weights(model, path, ema=ema)
        print(f"Weights: {path}{' (moving average)' if ema else ''}")
    check_images(model, experiment.model, experiment.data, classes)
    loss = get_loss(experiment.trainer.eval_loss)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    if args.task == "zeroshot":
        names = in_sentences(args.dataset, data.classes)
        model, loss = clip_options.classifier(args, model, names, zeroshot.openai_templates, device), cross_entropy
    model.to(device)
    if args.task == "linear_probe":
        result = _linear_probe(args, model, data, device)
    else:
        result = evaluate(model, data.val_dataloader(), loss, device)
    print(f"{result['images']:.0f} images" + (f", loss {result['loss']:.5f}" if "loss" in result else ""))
    print(f"Acc@1 {result['acc1']:.3%} Acc@5 {result['acc5']:.3%}")
    return result


def _checkpoint(args: argparse.Namespace, experiment: Experiment) -> tuple[Path | None, bool]:
    """The file that is asked for, if one is, and whether its moving average is."""
    if args.reload is None and args.weights is None:
        if args.ema:
            raise UserError("--ema needs --reload or --weights.")
        return None, False
    return chosen_checkpoint(
        *(experiment, args.experiment_name, args.base_directory),
        reload=args.reload,
        weights=args.weights,
        ema=args.ema,
    )


def _check_task(args: argparse.Namespace, experiment: Experiment) -> None:
    clip = experiment.base_network == experiments.CONVERTED_CLIP
    if clip and args.task == "classification":
        raise UserError(f"'{experiment.name}' gives embeddings: choose --task zeroshot or linear_probe.")
    if not clip and args.task != "classification":
        raise UserError(f"--task {args.task} needs --base_network {experiments.CONVERTED_CLIP}.")
    if clip and experiment.dataset == "CC3M":
        raise UserError(
            "CC3M has no classes to evaluate: give the weights of another dataset's experiment with --weights."
        )
    if args.task != "zeroshot" and clip_options.given(args):
        raise UserError(f"{clip_options.given(args)[0]} needs --task zeroshot.")
    if args.task != "linear_probe" and args.probe_c is not None:
        raise UserError("--probe_c needs --task linear_probe.")
    if args.attn_unpool and not clip:
        raise UserError("--attn_unpool needs --task zeroshot or linear_probe.")
    clip_options.check(args)
    if args.probe_c is not None and not 0 < args.probe_c < math.inf:
        raise UserError(f"--probe_c must be a finite number above 0, got {args.probe_c}.")


def _linear_probe(
    args: argparse.Namespace, encoder: nn.Module, data: DataModule, device: torch.device
) -> dict[str, float]:
    from training.probe import DEFAULT_C, linear_probe

    zeroshot.set_unpooling(encoder, args.attn_unpool)
    c = DEFAULT_C if args.probe_c is None else args.probe_c
    return linear_probe(encoder, data.probe_dataloader(), data.val_dataloader(), device, c)


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
    cli.run(main)
