"""Evaluates an experiment of the registry on its dataset's validation images."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from models import experiments, recipe_io, zeroshot
from models.checkpoints import experiment_directory, find_checkpoint, load_weights
from models.errors import UserError
from models.factory import as_trained, starting_network, untrained
from models.recipes import Experiment

if TYPE_CHECKING:
    from training.data import DataModule


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
    source.add_argument("--reload", help="'last', 'best', 'best_any' or 'epoch_N' of the experiment's checkpoints")
    source.add_argument("--weights", type=Path, metavar="PATH", help="a checkpoint or state dict of this network")
    source.add_argument(
        "--init_weights", type=Path, metavar="PATH", help="conventional weights: the network right after conversion"
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights, where the file has one")
    parser.add_argument("--batch_size", type=int, help="default: the recipe's")
    parser.add_argument("--num_workers", type=int, help="processes that load images; default: the recipe's")
    parser.add_argument(
        "--set",
        dest="changes",
        metavar="FIELD=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="fields of the recipe, as for train.py, where no config.json lies beside the checkpoint",
    )
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU even where there is a GPU")

    clip = parser.add_argument_group("CLIP's image encoders")
    clip.add_argument("--task", choices=["classification", "zeroshot", "linear_probe"], default="classification")
    clip.add_argument(
        "--text_model", default=zeroshot.TEXT_MODEL, help="zeroshot: open_clip's name (default: %(default)s)"
    )
    clip.add_argument(
        "--text_weights",
        metavar="PATH_OR_TAG",
        help=f"zeroshot: a file, or open_clip's tag (default: {zeroshot.TEXT_WEIGHTS})",
    )
    clip.add_argument(
        "--zeroshot_weights",
        type=Path,
        metavar="PATH",
        help="zeroshot: the classes' embeddings instead of a text model",
    )
    clip.add_argument(
        "--attn_unpool", "--use_attn_unpool", action="store_true", help="every location by itself, without attention"
    )
    clip.add_argument(
        "--cosine_power",
        "--pool_cosine",
        type=float,
        default=1.0,
        metavar="P",
        help="zeroshot with --attn_unpool: the locations' cosines to this power (default: 1)",
    )
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
    experiment = _changed(args, experiment)
    _check_task(args, experiment)

    # Lightning takes seconds to import; --help and a misspelt name should not.
    from training.data import DataModule
    from training.losses import cross_entropy, get_loss

    data = DataModule(experiment.data, experiment.seed, args.data_path)
    data.setup("test")
    if path is None:
        torch.manual_seed(experiment.seed)
        model = starting_network(experiment, data.num_classes, args.base_directory, args.init_weights)
    else:
        model = untrained(experiment.model, data.num_classes)
        load_weights(model, path, ema=ema)
        print(f"Weights: {path}{' (moving average)' if ema else ''}")
    loss = get_loss(experiment.trainer.eval_loss)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    if args.task == "zeroshot":
        model, loss = _zeroshot_classifier(args, model, data.classes, device), cross_entropy
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
    if args.reload is not None:
        directory = experiment_directory(experiment, args.experiment_name, args.base_directory)
        return find_checkpoint(directory, args.reload, ema=args.ema)
    if args.ema and args.weights is None:
        raise UserError("--ema needs --reload or --weights.")
    return args.weights, args.ema


def _changed(args: argparse.Namespace, experiment: Experiment) -> Experiment:
    changes = []
    for option, least in (("batch_size", 1), ("num_workers", 0)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise UserError(f"--{option} must be at least {least}, got {value}.")
        if value is not None:
            changes.append(f"data.{option}={value}")
    return recipe_io.override(experiment, changes + args.changes)


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
    for option, given, task in (
        ("--text_weights", args.text_weights, "zeroshot"),
        ("--zeroshot_weights", args.zeroshot_weights, "zeroshot"),
        ("--probe_c", args.probe_c, "linear_probe"),
    ):
        if given is not None and args.task != task:
            raise UserError(f"{option} needs --task {task}.")
    if args.text_weights is not None and args.zeroshot_weights is not None:
        raise UserError("--zeroshot_weights takes the place of the text model: --text_weights has no use.")
    if args.attn_unpool and not clip:
        raise UserError("--attn_unpool needs --task zeroshot or linear_probe.")
    if args.cosine_power != 1 and not (args.task == "zeroshot" and args.attn_unpool):
        raise UserError("--cosine_power needs --task zeroshot and --attn_unpool.")
    if not args.cosine_power >= 1:
        raise UserError(f"--cosine_power must be at least 1, got {args.cosine_power}.")
    if args.probe_c is not None and not args.probe_c > 0:
        raise UserError(f"--probe_c must be above 0, got {args.probe_c}.")


def _zeroshot_classifier(
    args: argparse.Namespace, encoder: nn.Module, classes: list[str], device: torch.device
) -> nn.Module:
    if args.zeroshot_weights is not None:
        found = zeroshot.read_directions(args.zeroshot_weights, encoder)
        if len(found) != len(classes):
            raise UserError(f"{args.zeroshot_weights} is for {len(found)} classes, {args.dataset} has {len(classes)}.")
    else:
        encode = zeroshot.TextEncoder(args.text_model, args.text_weights or zeroshot.TEXT_WEIGHTS, device)
        names = zeroshot.class_names(args.dataset, classes)
        found = zeroshot.directions(encode, tqdm(names, desc="texts", leave=False), zeroshot.openai_templates())
    return zeroshot.classifier(encoder, found, unpool=args.attn_unpool, power=args.cosine_power)


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
    from training import cli

    cli.run(main)
