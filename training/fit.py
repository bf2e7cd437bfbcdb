"""One training run: opens the experiment's folder, resumes or starts, trains."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

import bcos_kernels as bk
from models.atomic import remove_temporary, writing
from models.checkpoints import ACCURACY, EMA, LAST, LOSS, epoch_checkpoints, read_run
from models.errors import CheckpointError, UserError
from models.factory import check_images, conventional_network, finish
from models.recipe_io import record, recorded_experiment
from models.recipes import Experiment
from models.standard import build
from training.callbacks import METRICS, ExplanationLogger, KeepCheckpoints, MetricsFile
from training.checkpoint_io import AtomicCheckpointIO
from training.data import DataModule
from training.ema import MovingAverage
from training.exponent import MEAN_EXPONENT, VariableExponent
from training.module import Classifier, Distillation, Trained

# What may differ between a run and the one that it resumes: it does not change what an epoch computes.
_MAY_CHANGE = {"trainer.max_epochs", "data.num_workers"}


@dataclass(frozen=True)
class FitOptions:
    """What train.py's options decide besides the recipe.

    Attributes:
        base_directory: of all experiments.
        resume: go on from the last whole checkpoint; otherwise an earlier run's folder is renamed and training starts
            anew.
        data_path: where the images are, instead of the environment variables.
        init_weights: conventional weights to start from, instead of the recipe's.
        amp: mixed precision: float16 on CUDA, bfloat16 elsewhere.
        distributed: one process for each device.
        devices: number of devices; None: all GPUs when distributed, otherwise one device.
        num_nodes: number of machines.
        explain_every: draw explanations every so many epochs; None: never.
        make_loggers: the loggers to use, called with the experiment's folder.
    """

    base_directory: Path
    resume: bool = True
    data_path: Path | None = None
    init_weights: Path | None = None
    amp: bool = False
    compile: bool = False
    distributed: bool = False
    devices: int | None = None
    num_nodes: int = 1
    explain_every: int | None = None
    track_grad_norm: bool = False
    refresh_rate: int | None = None
    fast_dev_run: bool = False
    make_loggers: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Resumable:
    """A whole checkpoint to go on from, and the epoch that it was written after."""

    path: Path
    epoch: int


def fit(experiment: Experiment, options: FitOptions) -> Path:
    """Trains the experiment, or what is left of it.

    Returns:
        The experiment's folder, with `config.json`, `metrics.csv`, `last.ckpt` and the best three epochs' checkpoints.

    Raises:
        models.errors.UserError: an option that does not fit, data or weights that are missing or damaged, a recipe
            that differs from the one that the resumed run began with.
    """
    _check_options(experiment, options)
    directory = experiment.directory(options.base_directory)
    data = DataModule(experiment.data, experiment.seed, options.data_path)
    data.setup("fit")
    classes = data.classes_for(experiment.model)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, num_classes=classes))

    last = find_resumable(directory) if options.resume and not options.fast_dev_run else None
    epochs = experiment.trainer.max_epochs
    if last is not None:
        check_same_recipe(experiment, directory)
        if last.epoch + 1 >= epochs:
            _say(
                f"{directory} is trained: {last.path.name} was written after epoch {last.epoch} of 0 to {epochs - 1}. "
                "For more give --max_epochs, to begin anew --force-no-resume."
            )
            return directory
        _say(f"Resuming from {last.path}: {last.epoch + 1} of {epochs} epochs are done.")

    pl.seed_everything(experiment.seed, workers=True, verbose=False)
    if last is not None:  # the checkpoint holds the weights
        conventional = build(experiment.model.architecture, classes)
    else:
        conventional = conventional_network(experiment, classes, options.base_directory, options.init_weights)
    model = finish(conventional, experiment.model)
    check_images(model, experiment.model, experiment.data, classes)
    teacher = conventional if experiment.distils else None
    if teacher is not None:
        check_images(teacher, experiment.model, experiment.data, classes, channels=3)
    del conventional  # the other networks do not need its memory
    if options.compile:
        model.compile()
    loggers: list[Logger] = [make(directory) for make in options.make_loggers]
    # From here on the folder is written to: whatever the options could have wrong has been found.
    if not options.fast_dev_run:
        with writing("--base_directory", directory):
            if not options.resume:
                _set_aside(directory)
            _prepare(directory, experiment)
    module: Trained
    if teacher is not None:
        assert isinstance(model, bk.BcosNetwork)
        module = Distillation(model, teacher, experiment, options.track_grad_norm)
    else:
        module = Classifier(model, experiment, classes, options.track_grad_norm)
    with _quiet():
        trainer = _trainer(experiment, options, directory, loggers)
        trainer.fit(module, data, ckpt_path=None if last is None else str(last.path), weights_only=True)
    return directory


def find_resumable(directory: Path) -> Resumable | None:
    """The newest checkpoint in the folder that can be read; None where there is none at all.

    That is `last.ckpt`, but for a run that was killed between writing an epoch's file and naming it `last.ckpt`, or
    whose `last.ckpt` was damaged by something else.

    Raises:
        models.errors.CheckpointError: there are checkpoints, but none can be read.
    """
    found = epoch_checkpoints(directory)
    newest_first = [c.path for c in sorted(found, key=lambda c: (c.epoch, c.path.stat().st_mtime_ns), reverse=True)]
    candidates = ([directory / LAST] if (directory / LAST).is_file() else []) + newest_first
    last: Resumable | None = None
    damage: CheckpointError | None = None
    for path in candidates:
        if last is not None and path.name.startswith(f"epoch={last.epoch}-"):
            break
        if last is not None and not any(c.path == path and c.epoch > last.epoch for c in found):
            break
        try:
            content = read_run(path)
            epoch, _ = content["epoch"], content["optimizer_states"]
        except CheckpointError as error:
            damage = error
            warnings.warn(f"{error} It is passed over.", stacklevel=2)
            continue
        except KeyError:
            raise CheckpointError(
                f"{path} holds weights but not the state of a training run, so nothing can resume from it. "
                "Evaluate it with evaluate.py, or begin anew with --force-no-resume."
            ) from None
        if last is None or epoch > last.epoch:
            last = Resumable(path, int(epoch))
    if last is None and damage is not None:
        raise CheckpointError(f"No checkpoint in {directory} can be read; --force-no-resume begins anew. ({damage})")
    return last


def check_same_recipe(experiment: Experiment, directory: Path) -> None:
    """Compares the recipe with the recorded one, apart from the number of epochs and of loading processes.

    Raises:
        models.errors.UserError: they differ, the message says in what; or the record is damaged.
    """
    before = recorded_experiment(directory)
    if before is None:
        return
    recorded, current = _flat(before.to_dict()), _flat(experiment.to_dict())
    differing = [
        f"{key}: {recorded[key]} then, {current[key]} now"
        for key in sorted(current)
        if key not in _MAY_CHANGE and recorded[key] != current[key]
    ]
    if differing:
        raise UserError(
            f"{directory} was trained with another recipe ({'; '.join(differing)}). Give the same options to "
            "resume it, or --force-no-resume to begin anew."
        )


def _check_options(experiment: Experiment, options: FitOptions) -> None:
    if options.explain_every is not None and not experiment.model.converted:
        raise UserError(
            f"--explanation_logging needs a B-cos network; base_network '{experiment.base_network}' is conventional."
        )
    if options.distributed and options.devices is None and not torch.cuda.is_available():
        raise UserError("--distributed found no GPU. Give --devices N to train with N processes on the CPU.")
    if torch.cuda.is_available() and (options.devices or 0) > torch.cuda.device_count():
        raise UserError(f"--devices is {options.devices}, but this machine has {torch.cuda.device_count()} GPU(s).")
    if not options.distributed and (options.num_nodes > 1 or (options.devices or 1) > 1):
        raise UserError("--devices and --num_nodes above 1 need --distributed.")


@rank_zero_only
def _set_aside(directory: Path) -> None:
    if not directory.exists():
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}.old-{number}")).exists():
        number += 1
    os.replace(directory, aside)
    _say(f"The earlier run was kept as {aside}.")


@rank_zero_only
def _prepare(directory: Path, experiment: Experiment) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    remove_temporary(directory)
    record(experiment, directory)
    _say(
        f"{experiment.dataset} {experiment.base_network} {experiment.name}: {METRICS} and checkpoints go to {directory}"
    )


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


def _trainer(experiment: Experiment, options: FitOptions, directory: Path, loggers: list[Logger]) -> pl.Trainer:
    extra = ["grad_norm"] if options.track_grad_norm else []
    if experiment.model.variable_b:
        extra.append(MEAN_EXPONENT)
    decay = experiment.trainer.ema
    if decay is not None:
        extra += [LOSS + EMA, ACCURACY + EMA]
    callbacks: list[Callback] = [
        MetricsFile(directory, extra),
        KeepCheckpoints(directory),
        TQDMProgressBar(refresh_rate=_refresh_rate() if options.refresh_rate is None else options.refresh_rate),
    ]
    if experiment.model.variable_b:
        callbacks.append(VariableExponent(experiment.model))
    if decay is not None:
        callbacks.append(MovingAverage(decay))
    if options.explain_every is not None:
        callbacks.append(ExplanationLogger(directory, options.explain_every))
    precision: Literal["16-mixed", "bf16-mixed", "32-true"] = "32-true"
    if options.amp:
        precision = "16-mixed" if torch.cuda.is_available() else "bf16-mixed"
    devices: int | str = 1 if options.devices is None else options.devices
    if options.distributed and options.devices is None:
        devices = "auto"
    return pl.Trainer(
        accelerator="auto",
        devices=devices,
        num_nodes=options.num_nodes,
        strategy="ddp" if options.distributed else "auto",
        precision=precision,
        logger=loggers or False,
        callbacks=callbacks,
        plugins=_plugins(),
        max_epochs=experiment.trainer.max_epochs,
        fast_dev_run=options.fast_dev_run,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_model_summary=False,
        default_root_dir=directory,
    )


def _plugins() -> list[Any]:
    plugins: list[Any] = [AtomicCheckpointIO()]
    if "SUBMITIT_EXECUTOR" in os.environ and SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # submitit does
    return plugins


def _refresh_rate() -> int:
    """Every step on a terminal; in a log file, where every refresh is a line, every fiftieth."""
    return 1 if sys.stdout.isatty() else 50


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what Lightning says about choices that are made on purpose here, and its advertisements."""
    notices = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = notices.level
    notices.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Digits are in memory: worker processes would only cost time.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
            # The teacher of a distillation stays in evaluation mode.
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
            # Lightning 2.6 calls what torch 2.12 deprecated.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")
            yield
    finally:
        notices.setLevel(level)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
