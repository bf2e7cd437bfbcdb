"""Shared by the scripts: options that mean the same in all of them, and errors that are printed as one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from models import experiments
from models.errors import UserError


def run(main: Callable[[], object]) -> None:
    """Calls `main`; exits with code 2 and the sentence of a `UserError`, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)


def _sentence(error: UserError) -> str:
    """The message; of an error in a process that loads images, to which torch adds the traceback there, its last line."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if "\nOriginal Traceback" in text else text


def add_experiment(parser: argparse.ArgumentParser, *, dataset: str | None = None, required: bool = True) -> None:
    """Options that find an experiment and its folder.

    Args:
        dataset: the default, if there is one.
        required: whether the parser insists on the others.
    """
    parser.add_argument(
        "--base_directory", type=Path, default=Path("./experiments"), help="where experiments are stored"
    )
    default = "" if dataset is None else "; default: %(default)s"
    parser.add_argument(
        "--dataset",
        default=dataset,
        required=required and dataset is None,
        help=f"one of {', '.join(experiments.datasets())}{default}",
    )
    parser.add_argument("--base_network", required=required, help=f"one of {', '.join(experiments.base_networks())}")
    parser.add_argument("--experiment_name", required=required, help="see train.py --list")


def add_checkpoint(parser: argparse.ArgumentParser, *, reload: str | None = "last") -> argparse._MutuallyExclusiveGroup:
    """Options that choose a checkpoint; `--reload` and `--weights` exclude each other and whatever joins their group.

    Args:
        reload: the default of `--reload`.
    """
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--reload",
        default=reload,
        help="'last', 'best', 'best_any' or 'epoch_N' of the experiment's checkpoints"
        + ("" if reload is None else "; default: %(default)s"),
    )
    source.add_argument("--weights", type=Path, metavar="PATH", help="a checkpoint or state dict of this network")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights, where the file has one")
    return source


def add_data(parser: argparse.ArgumentParser) -> None:
    """The option that says where images are."""
    parser.add_argument("--data_path", type=Path, help="where the images are (instead of IMAGENET_PATH or DATA_ROOT)")


def add_changes(options: argparse._ActionsContainer) -> None:
    """The options that change the recipe; `changes` makes them one list."""
    options.add_argument("--batch_size", type=positive, help="images a step, on each device; default: the recipe's")
    options.add_argument("--num_workers", type=not_negative, help="processes that load images; default: the recipe's")
    options.add_argument(
        "--set",
        dest="changes",
        metavar="FIELD=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="any field of what train.py --print_config shows, such as optimiser.lr=3e-4",
    )


def changes(args: argparse.Namespace, **options: str) -> list[str]:
    """What `models.recipe_io.override` takes: the options of `add_changes`, and other ones by the field that they set."""
    options = {"batch_size": "data.batch_size", "num_workers": "data.num_workers"} | options
    given = {field: getattr(args, option) for option, field in options.items()}
    return [f"{field}={value}" for field, value in given.items() if value is not None] + args.changes


def positive(text: str) -> int:
    """The type of an option: a whole number from 1 on."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """The type of an option: a whole number from 0 on."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got '{text}'") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value
