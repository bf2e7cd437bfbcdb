"""What decides the result of a training run, as typed values: recipes, and the experiment that holds them all."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LossName = Literal["cross_entropy", "bce", "bce_uniform_off_labels", "siglip"]
Start = Literal["random", "pretrained", "standard", "file"]
Kept = Literal["biases", "head_order"]

DEFAULT_SEED = 42
WARMUP_START = 0.01

# The largest seed that numpy's generator takes, and the strongest of torchvision's magnitudes.
_MAX_SEED, _MAX_MAGNITUDE = 2**32 - 1, 30


@dataclass(frozen=True)
class ModelRecipe:
    """Which network, and with what weights training starts.

    Attributes:
        architecture: a name that `models.standard.build` knows.
        num_classes: None where the data decide (`ImageFolder`); 0 where the network gives an embedding.
        converted: the network is B-cosified.
        start: "random"; "pretrained" (the published weights that `pretrained` names); "standard" (the best checkpoint of
            the `standard` experiment with the same dataset and name); or "file" (conventional weights that have to be
            given, because nothing here can fetch them).
        pretrained: for `start="pretrained"`: name of torchvision's weights, or of open_clip's for CLIP.
        keep: steps of the conversion to leave out, see `bcos_kernels.bcosify`.
        no_gelu: every GELU is taken out before the conversion.
        normalize: with whose mean and standard deviation the converted network normalises its input.
        b: exponent of the B-cos layers, at least 1.
        learn_b: every B-cos layer learns an exponent of its own, from `b` on; it stays at 1 or above.
        anneal_b: the exponent grows from 1 to `b` in a straight line over so many epochs of training; 0: it is `b`.
    """

    architecture: str
    num_classes: int | None
    converted: bool
    start: Start
    pretrained: str | None = None
    keep: tuple[Kept, ...] = ()
    no_gelu: bool = False
    normalize: Literal["imagenet", "clip"] = "imagenet"
    b: float = 2.0
    learn_b: bool = False
    anneal_b: int = 0

    def __post_init__(self) -> None:
        _at_least(self, num_classes=0, b=1, anneal_b=0)
        if self.anneal_b and self.learn_b:
            raise ValueError("anneal_b and learn_b exclude each other: the exponent is set or learnt")

    @property
    def variable_b(self) -> bool:
        """Every B-cos layer keeps an exponent of its own in the state dict, under its name with `.b`."""
        return self.learn_b or self.anneal_b > 0


@dataclass(frozen=True)
class DataRecipe:
    """Which images, and in what form the network gets them.

    Attributes:
        dataset: one of `models.experiments.datasets()`.
        image_size: height and width after cropping.
        six_channels: `[r, g, b, 1-r, 1-g, 1-b]` in [0, 1]; otherwise three channels, normalised with ImageNet's mean
            and std.
        batch_size: images a step, on each device.
        num_workers: processes that load images; 0 loads in the training process.
        rand_augment: magnitude of RandAugment on training images; None: none.
        mixup: alpha of mixup on training batches; None: none.
        clip_crop: evaluation images are scaled, bicubically, until their shorter side is `image_size`, as CLIP's are;
            otherwise until it is 256/224 of that, bilinearly.
    """

    dataset: str
    image_size: int
    six_channels: bool
    batch_size: int
    num_workers: int
    rand_augment: int | None = None
    mixup: float | None = None
    clip_crop: bool = False

    def __post_init__(self) -> None:
        _at_least(self, image_size=1, batch_size=1, num_workers=0, rand_augment=0)
        _at_most(self, rand_augment=_MAX_MAGNITUDE)
        _positive(self, "mixup")


@dataclass(frozen=True)
class OptimiserRecipe:
    """Optimiser, schedule and gradient clipping.

    Attributes:
        name: "adamw" or "adam".
        schedule: "cosine": from `lr` to 0 over the whole training, or over what the warm-up leaves of it.
        interval: whether the schedule moves after every step or after every epoch.
        agc: factor of adaptive gradient clipping; None: none.
        warmup_steps: so many moves of the schedule lead from `WARMUP_START * lr` to `lr` in a straight line.
        max_norm: the whole gradient is made at most this long; None: it is not.
        restart_every: the cosine ends, and begins again at `lr`, after every so many moves; None: once is all.
    """

    name: Literal["adamw", "adam"]
    lr: float
    weight_decay: float
    schedule: Literal["cosine"]
    interval: Literal["step", "epoch"]
    agc: float | None
    warmup_steps: int = 0
    max_norm: float | None = None
    restart_every: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, lr=0, weight_decay=0, warmup_steps=0, restart_every=1)
        _positive(self, "agc", "max_norm")


@dataclass(frozen=True)
class TrainerRecipe:
    """How long, and what is minimised.

    Attributes:
        train_loss: "siglip" pulls the embeddings of the converted network to those of the conventional one that it was
            made of; the others are losses of logits and classes.
        ema: decay, below 1, of the moving average of the weights that is kept and validated beside them; None: none.
    """

    max_epochs: int
    train_loss: LossName
    eval_loss: LossName
    ema: float | None = None

    def __post_init__(self) -> None:
        _at_least(self, max_epochs=1, ema=0)
        if self.ema is not None and self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the result of a training run."""

    dataset: str
    base_network: str
    name: str
    seed: int
    model: ModelRecipe
    data: DataRecipe
    optimiser: OptimiserRecipe
    trainer: TrainerRecipe

    def __post_init__(self) -> None:
        _at_least(self, seed=0)
        _at_most(self, seed=_MAX_SEED)
        if self.model.converted != self.data.six_channels:
            raise ValueError("model.converted and data.six_channels must agree: B-cos networks see six channels")
        embeds = self.model.num_classes == 0
        for option, loss in (("train_loss", self.trainer.train_loss), ("eval_loss", self.trainer.eval_loss)):
            if embeds and loss != "siglip":
                raise ValueError(f'the network gives embeddings, so trainer.{option} must be "siglip", got "{loss}"')
            if loss == "siglip" and not embeds:
                raise ValueError(f'trainer.{option}="siglip" compares embeddings, and the network gives classes')
        if embeds and self.data.mixup is not None:
            raise ValueError("data.mixup mixes classes, of which siglip knows none")
        for option, given in (
            ("model.keep", self.model.keep),
            ("model.no_gelu", self.model.no_gelu),
            ('model.normalize="clip"', self.model.normalize == "clip"),
            ("model.b", self.model.b != ModelRecipe.b),
            ("model.learn_b", self.model.learn_b),
            ("model.anneal_b", self.model.anneal_b),
            ('model.start="standard"', self.model.start == "standard"),
            ('trainer.train_loss="siglip"', embeds),
        ):
            if given and not self.model.converted:
                raise ValueError(f"{option} needs a B-cosified network")

    @property
    def distils(self) -> bool:
        """The network learns from the conventional one that it was made of."""
        return self.trainer.train_loss == "siglip"

    def directory(self, base_directory: str | Path) -> Path:
        """Where checkpoints, metrics and the recipe lie: `base_directory/dataset/base_network/name`."""
        return Path(base_directory) / self.dataset / self.base_network / self.name

    def to_dict(self) -> dict[str, object]:
        """The recipe as nested dictionaries of what JSON and YAML know: lists, no tuples."""
        plain: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


def _at_least(recipe: object, **bounds: float) -> None:
    for name, least in bounds.items():
        value = getattr(recipe, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _at_most(recipe: object, **bounds: float) -> None:
    for name, most in bounds.items():
        value = getattr(recipe, name)
        if value is not None and not value <= most:
            raise ValueError(f"{name} must be at most {most}, got {value}")


def _positive(recipe: object, *names: str) -> None:
    for name in names:
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
