"""Explains what a network of the registry sees in image files: pictures, contribution maps, and a table of classes."""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

import bcos_kernels as bk
from models import cli, clip_options, experiments, zeroshot
from models.atomic import writing
from models.checkpoints import chosen_checkpoint, load_weights
from models.class_names import class_names, in_sentences
from models.errors import UserError, suggestion
from models.factory import as_trained, untrained
from models.recipes import DataRecipe

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
    cli.add_experiment(parser, dataset="ImageNet")
    cli.add_checkpoint(parser)
    parser.add_argument("--target", help="explain this class, by name or number, instead of the predicted one")
    parser.add_argument("--data_path", type=Path, help="ImageFolder: where the images are, for the classes' names")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU even where there is a GPU")
    clip = parser.add_argument_group("CLIP's image encoders: the similarity of image and text is explained")
    clip.add_argument(
        "--text", nargs="+", help="these take the place of the classes (default: the dataset's, in OpenAI's sentences)"
    )
    clip_options.add(clip)
    return parser


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    """Explains, writes and prints.

    Args:
        argv: the options; default: the command line.

    Returns:
        The table: for every image and class "image", "rank", "class", "name", "logit" and "confidence", the sigmoid. Of
        CLIP's encoders the classes are texts, logits 100 times the cosines, and the confidence is the softmax over them.

    Raises:
        models.errors.UserError: options, images or weights that do not fit; the message says what to do.
    """
    args = get_parser().parse_args(argv)
    experiment = experiments.find(args.dataset, args.base_network, args.experiment_name)
    if not experiment.model.converted:
        raise UserError(f"base_network '{args.base_network}' is conventional: its networks have no explanation.")
    clip = experiment.base_network == experiments.CONVERTED_CLIP
    _check_text(args, clip)

    # Lightning takes seconds to import; --help and a misspelt name should not.
    from training.data import eval_transform, read_image

    path, ema = chosen_checkpoint(
        *(experiment, args.experiment_name, args.base_directory),
        reload=args.reload,
        weights=args.weights,
        ema=args.ema,
    )
    experiment = as_trained(experiment, path)
    names = args.text or class_names(experiment, args.data_path)
    target = None if args.target is None else _target(args.target, names)
    transform = eval_transform(_for_files(experiment.data))
    images = [transform(read_image(str(image))) for image in args.images]
    model = untrained(experiment.model, len(names))
    load_weights(model, path, ema=ema)
    print(f"Weights: {path}{' (moving average)' if ema else ''}")

    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    if clip:
        sentences = args.text or in_sentences(args.dataset, names)
        templates = (lambda: [str]) if args.text else zeroshot.openai_templates
        model = clip_options.classifier(args, model, sentences, templates, device)
    model.to(device)
    rows: list[dict[str, object]] = []
    for stem, file, image in zip(_stems(args.images), args.images, images, strict=True):
        explanation = bk.explain(model, image[None].to(device), target)
        with writing("--output", args.output):
            _write(explanation, args.output, stem)
        rows += _table(explanation, file, names, softmax=clip)
        explained = int(explanation.targets)
        print(f"{file}: class {explained}, {names[explained]} -> {args.output / stem}.*.png")
        for row in rows[-min(_SHOWN, len(names)) :]:
            print(f"    {row['confidence']:7.2%}  logit {row['logit']:7.2f}  {row['class']:>4}  {row['name']}")
    with writing("--output", args.output), (args.output / TABLE).open("w", newline="") as sheet:
        writer = csv.DictWriter(sheet, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _check_text(args: argparse.Namespace, clip: bool) -> None:
    given = (["--text"] if args.text else []) + clip_options.given(args) + (["--attn_unpool"] * args.attn_unpool)
    if given and not clip:
        raise UserError(f"{given[0]} needs --base_network {experiments.CONVERTED_CLIP}.")
    if args.text and args.data_path is not None:
        raise UserError(
            "--data_path: the texts of --text are explained, so no classes are looked up there; leave it out."
        )
    if clip and args.dataset == "CC3M" and not args.text:
        raise UserError("CC3M has no classes to explain: give texts with --text.")
    clip_options.check(args)


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


def _table(explanation: bk.Explanation, image: Path, names: Sequence[str], *, softmax: bool) -> list[dict[str, object]]:
    confidences = explanation.logits[0].softmax(0) if softmax else explanation.logits[0].sigmoid()
    logits, classes = explanation.logits[0].topk(min(_SHOWN, len(names)))
    return [
        {
            "image": str(image),
            "rank": rank,
            "class": index,
            "name": names[index],
            "logit": logit,
            "confidence": float(confidences[index]),
        }
        for rank, (logit, index) in enumerate(zip(logits.tolist(), classes.tolist(), strict=True), start=1)
    ]


if __name__ == "__main__":
    cli.run(main)
