"""Explains what a network of the registry sees in image files: pictures, contribution maps, and a table of classes."""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision

import bcos_kernels as bk
from models import experiments
from models.checkpoints import experiment_directory, find_checkpoint, load_weights
from models.errors import UserError, suggestion
from models.factory import as_trained, untrained
from models.recipes import DataRecipe, Experiment

TABLE = "classes.csv"
_SHOWN = 5


def get_parser() -> argparse.ArgumentParser:
    """The options of explain.py."""
    parser = argparse.ArgumentParser(
        description="Explain a B-cos network's decision for each image: IMAGE.explanation.png, the colour picture; "
        f"IMAGE.contributions.png, red for the class and blue against it; and {TABLE}, the five most confident classes."
    )
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument("--output", type=Path, default=Path("explanations"), help="a folder; default: %(default)s")
    parser.add_argument(
        "--base_directory", type=Path, default=Path("./experiments"), help="where experiments are stored"
    )
    parser.add_argument("--dataset", default="ImageNet", help=f"one of {', '.join(experiments.datasets())}")
    parser.add_argument("--base_network", required=True, help=f"one of {', '.join(experiments.base_networks())}")
    parser.add_argument("--experiment_name", required=True, help="see train.py --list")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--reload",
        default="last",
        help="'last', 'best', 'best_any' or 'epoch_N' of the experiment's checkpoints; default: %(default)s",
    )
    source.add_argument("--weights", type=Path, metavar="PATH", help="a checkpoint or state dict of this network")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights, where the file has one")
    parser.add_argument("--target", help="explain this class, by name or number, instead of the predicted one")
    parser.add_argument("--data_path", type=Path, help="ImageFolder: where the images are, for the classes' names")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU even where there is a GPU")
    return parser


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    """Explains, writes and prints.

    Args:
        argv: the options; default: the command line.

    Returns:
        The table: for every image and class "image", "rank", "class", "name", "logit" and "confidence", the sigmoid.

    Raises:
        models.errors.UserError: options, images or weights that do not fit; the message says what to do.
    """
    args = get_parser().parse_args(argv)
    experiment = experiments.find(args.dataset, args.base_network, args.experiment_name)
    if not experiment.model.converted:
        raise UserError(f"base_network '{args.base_network}' is conventional: its networks have no explanation.")
    if experiment.model.num_classes == 0:
        raise UserError(f"'{experiment.name}' gives embeddings, not classes that could be explained.")

    # Lightning takes seconds to import; --help and a misspelt name should not.
    from training.data import eval_transform, read_image

    path, ema = args.weights, args.ema
    if path is None:
        directory = experiment_directory(experiment, args.experiment_name, args.base_directory)
        path, ema = find_checkpoint(directory, args.reload, ema=ema)
    experiment = as_trained(experiment, path)
    names = class_names(experiment, args.data_path)
    target = None if args.target is None else _target(args.target, names)
    transform = eval_transform(_for_files(experiment.data))
    images = [transform(read_image(str(image))) for image in args.images]
    model = untrained(experiment.model, len(names))
    load_weights(model, path, ema=ema)
    print(f"Weights: {path}{' (moving average)' if ema else ''}")

    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    model.to(device)
    rows: list[dict[str, object]] = []
    for stem, file, image in zip(_stems(args.images), args.images, images, strict=True):
        explanation = bk.explain(model, image[None].to(device), target)
        _write(explanation, args.output, stem)
        rows += _table(explanation, file, names)
        explained = int(explanation.targets)
        print(f"{file}: class {explained}, {names[explained]} -> {args.output / stem}.*.png")
        for row in rows[-min(_SHOWN, len(names)) :]:
            print(f"    {row['confidence']:7.2%}  {row['class']:>4}  {row['name']}")
    with (args.output / TABLE).open("w", newline="") as sheet:
        writer = csv.DictWriter(sheet, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def class_names(experiment: Experiment, data_path: Path | None) -> list[str]:
    """What the dataset calls its classes; numbers where that is not known here."""
    dataset, count = experiment.dataset, experiment.model.num_classes
    names = [] if count is None else [str(number) for number in range(count)]
    if dataset == "ImageNet":
        names = list(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    elif dataset == "CIFAR10":
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    elif data_path is not None:
        folders = (data_path / "val").iterdir() if (data_path / "val").is_dir() else ()
        names = sorted(folder.name for folder in folders if folder.is_dir())
    if not names or (count is not None and len(names) != count):
        known = f"the network has {count} classes" if count is not None else "no config.json says how many classes"
        where = f", {data_path / 'val'} has {len(names)} folders" if data_path is not None else "; give --data_path"
        raise UserError(f"The classes of '{experiment.name}' are not known: {known}{where}.")
    return names


def _for_files(recipe: DataRecipe) -> DataRecipe:
    """The recipe by which files are cut. Small images are taken whole, as far as they are square."""
    if recipe.dataset in ("Digits", "CIFAR10"):
        return dataclasses.replace(recipe, dataset="ImageFolder", clip_crop=True)
    return recipe


def _target(text: str, names: Sequence[str]) -> int:
    if text in names:
        return names.index(text)
    if not text.isdecimal():
        raise UserError(f"--target {text}: no class has this name.{suggestion(text, names)}")
    if int(text) >= len(names):
        raise UserError(f"--target {text}: the classes are numbered from 0 to {len(names) - 1}.")
    return int(text)


def _stems(images: Sequence[Path]) -> list[str]:
    """A name for each image's files; those of the same name in different folders are numbered."""
    seen: dict[str, int] = {}
    stems = []
    for image in images:
        seen[image.stem] = seen.get(image.stem, 0) + 1
        stems.append(image.stem if seen[image.stem] == 1 else f"{image.stem}-{seen[image.stem]}")
    return stems


def _write(explanation: bk.Explanation, folder: Path, stem: str) -> None:
    from matplotlib.image import imsave

    from interpretability.figures import clip_range

    folder.mkdir(parents=True, exist_ok=True)
    imsave(folder / f"{stem}.explanation.png", explanation.rgba()[0].cpu().numpy())
    contributions = explanation.contributions[0].cpu()
    limit = clip_range(contributions)
    imsave(folder / f"{stem}.contributions.png", contributions.numpy(), cmap="bwr", vmin=-limit, vmax=limit)


def _table(explanation: bk.Explanation, image: Path, names: Sequence[str]) -> list[dict[str, object]]:
    logits, classes = explanation.logits[0].topk(min(_SHOWN, len(names)))
    return [
        {
            "image": str(image),
            "rank": rank,
            "class": index,
            "name": names[index],
            "logit": logit,
            "confidence": float(torch.tensor(logit).sigmoid()),
        }
        for rank, (logit, index) in enumerate(zip(logits.tolist(), classes.tolist(), strict=True), start=1)
    ]


if __name__ == "__main__":
    from training import cli

    cli.run(main)
