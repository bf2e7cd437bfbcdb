"""Trains an experiment of the registry; started again, it goes on where it stopped."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from models import cli, experiments, recipe_io
from models.errors import UserError
from models.recipes import Experiment


def get_parser() -> argparse.ArgumentParser:
    """The options of train.py."""
    parser = argparse.ArgumentParser(
        description="Train an experiment; started again, it resumes from its last checkpoint."
    )
    cli.add_experiment(parser, required=False)
    parser.add_argument("--list", action="store_true", help="list the experiments and stop")
    parser.add_argument("--print_config", action="store_true", help="print the whole recipe as YAML and stop")
    cli.add_data(parser)
    parser.add_argument(
        "--init_weights", type=Path, help="conventional weights to start from (instead of the recipe's)"
    )
    parser.add_argument(
        "--force-no-resume",
        dest="resume",
        action="store_false",
        help="begin anew; an earlier run's folder is renamed to NAME.old-N, not deleted",
    )

    changes = parser.add_argument_group("changes of the recipe")
    changes.add_argument("--max_epochs", type=cli.positive, help="train this many epochs")
    cli.add_changes(changes)

    how = parser.add_argument_group("how to run")
    how.add_argument("--distributed", action="store_true", help="train on several devices, one process for each")
    how.add_argument("--devices", type=cli.positive, help="how many devices on each machine (default: all GPUs)")
    how.add_argument("--num_nodes", type=cli.positive, default=1, help="how many machines")
    how.add_argument("--amp", action="store_true", help="mixed precision")
    how.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    how.add_argument("--jit", action="store_true", help="not supported; use --compile")
    how.add_argument(
        "--cache_dataset", choices=["onthefly", "shm"], help="not supported; see the error for what to do instead"
    )
    how.add_argument(
        "--refresh_rate", type=cli.not_negative, help="progress bar: refresh every so many steps; 0: no bar"
    )
    how.add_argument(
        "--fast_dev_run", action="store_true", help="one batch of training and validation, nothing is written"
    )
    how.add_argument("--debug", action="store_true", help="open the debugger where an error is raised")

    logs = parser.add_argument_group("loggers (metrics.csv is always written)")
    logs.add_argument("--csv_logger", action="store_true", help="every logged value by step, as CSV")
    logs.add_argument("--tensorboard_logger", action="store_true", help="TensorBoard")
    logs.add_argument("--wandb_logger", action="store_true", help="Weights & Biases")
    logs.add_argument("--wandb_project", help="default: the environment variable WANDB_PROJECT")
    logs.add_argument("--wandb_id", help="default: the environment variable WANDB_ID")
    logs.add_argument("--wandb_name", help="default: the experiment's name")
    logs.add_argument(
        "--track_grad_norm", action="store_true", help="log the norm of the gradient, also to metrics.csv"
    )
    logs.add_argument(
        "--explanation_logging", action="store_true", help="draw explanations to explanations/epoch=N.png"
    )
    logs.add_argument("--explanation_logging_every_n_epochs", type=cli.positive, help="default: 1")
    return parser


def main(argv: list[str] | None = None) -> Path | None:
    """Trains.

    Args:
        argv: the options; default: the command line.

    Returns:
        The experiment's folder; None after `--list` and `--print_config`.

    Raises:
        models.errors.UserError: options, data or weights that do not fit; the message says what to do.
    """
    args = get_parser().parse_args(argv)
    if args.list:
        print(experiments.table())
        return None
    experiment = chosen_experiment(args)
    if args.print_config:
        print(_yaml(experiment), end="")
        return None

    # Lightning takes seconds to import; --help, --list and a misspelt name should not.
    from training.fit import FitOptions, fit

    options = FitOptions(
        base_directory=args.base_directory,
        resume=args.resume,
        data_path=args.data_path,
        init_weights=args.init_weights,
        amp=args.amp,
        compile=args.compile,
        distributed=args.distributed,
        devices=args.devices,
        num_nodes=args.num_nodes,
        explain_every=(args.explanation_logging_every_n_epochs or 1) if args.explanation_logging else None,
        track_grad_norm=args.track_grad_norm,
        refresh_rate=args.refresh_rate,
        fast_dev_run=args.fast_dev_run,
        make_loggers=_logger_makers(args, experiment),
    )
    if not args.debug:
        return fit(experiment, options)
    try:
        return fit(experiment, options)
    except Exception:
        import pdb  # noqa: T100 - what --debug is for

        pdb.post_mortem()
        raise


def chosen_experiment(args: argparse.Namespace) -> Experiment:
    """The experiment that the options ask for, with their changes of its recipe.

    Raises:
        models.errors.UserError: options that do not fit.
    """
    _check(args)
    experiment = experiments.find(args.dataset, args.base_network, args.experiment_name)
    return recipe_io.override(experiment, cli.changes(args, max_epochs="trainer.max_epochs"))


def _yaml(experiment: Experiment) -> str:
    try:
        import yaml
    except ImportError as error:
        raise UserError("--print_config needs PyYAML: pip install pyyaml.") from error
    text: str = yaml.safe_dump(experiment.to_dict(), sort_keys=False)
    return text


def _check(args: argparse.Namespace) -> None:
    for option in ("dataset", "base_network", "experiment_name"):
        if getattr(args, option) is None:
            raise UserError(f"--{option} is required; --list shows what there is.")
    if args.jit:
        raise UserError(
            "--jit: TorchScript cannot express the B-cos operations. Use --compile, which torch replaced it with."
        )
    if args.cache_dataset is not None:
        raise UserError(
            "--cache_dataset is not supported. The operating system keeps files that were read in memory; to force "
            "it, copy the images to /dev/shm and point --data_path there."
        )
    if not args.wandb_logger:
        for option in ("wandb_project", "wandb_id", "wandb_name"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option} needs --wandb_logger.")
    if args.explanation_logging_every_n_epochs is not None and not args.explanation_logging:
        raise UserError("--explanation_logging_every_n_epochs needs --explanation_logging.")


def _logger_makers(args: argparse.Namespace, experiment: Experiment) -> list[Any]:
    from training import loggers

    makers: list[Any] = []
    if args.csv_logger:
        makers.append(loggers.csv_logger)
    if args.tensorboard_logger:
        makers.append(loggers.tensorboard_logger)
    if args.wandb_logger:
        name = args.wandb_name or experiment.name
        makers.append(
            functools.partial(loggers.wandb_logger, name=name, project=args.wandb_project, run_id=args.wandb_id)
        )
    return makers


if __name__ == "__main__":
    cli.run(main)
