"""From an experiment to a network: create, start training from, load."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import bcos_kernels as bk
from models import experiments
from models.checkpoints import CONFIG, chosen_checkpoint, find_checkpoint, load_weights, read_state_dict
from models.errors import CheckpointError, UserError
from models.experiments import CONVENTIONAL, CONVERTED
from models.recipe_io import recorded_experiment
from models.recipes import DataRecipe, Experiment, ModelRecipe
from models.standard import build, classifier_name, load_pretrained, resize_classifier


def create_model(
    name: str,
    base_network: str = CONVERTED,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    *,
    dataset: str | None = None,
) -> nn.Module:
    """A network of the registry, on the CPU, in training mode.

    Args:
        name: an experiment name, such as "resnet_50".
        base_network: "bcosification", "vit_bcosification" and "clip_bcosification" give a network that expects
            `[N, 6, H, W]` in [0, 1] (see `bcos_kernels.AddInverse`); "standard" gives one that expects `[N, 3, H, W]`
            normalised with ImageNet's mean and std.
        weights: None: random ones. "pretrained": the published weights of the recipe, B-cosified where the network is.
            Otherwise the path of a checkpoint of this very network.
        num_classes: default: those of the dataset. CLIP's encoders have none: they give embeddings.
        dataset: default: the first one that has the name, ImageNet before all others.

    Raises:
        models.errors.UnknownNameError: unknown name, base network or dataset.
        models.errors.CheckpointError: the weights cannot be found, read or fitted.
        ValueError: `num_classes` is missing or not positive.
    """
    if dataset is None:
        experiment = experiments.find_by_name(base_network, name)
    else:
        experiment = experiments.find(dataset, base_network, name)
    classes = experiment.model.num_classes if num_classes is None else num_classes
    if classes is None:
        raise ValueError(f"num_classes: dataset '{experiment.dataset}' has no fixed number of classes; say how many.")
    if experiment.model.num_classes == 0 and classes != 0:
        raise ValueError(f"num_classes: '{experiment.name}' gives embeddings and has no classes, got {classes}.")
    if classes < 1 and experiment.model.num_classes != 0:
        raise ValueError(f"num_classes must be at least 1, got {classes}.")
    if weights == "pretrained":
        return finish(load_pretrained(experiment.model, classes), experiment.model)
    model = untrained(experiment.model, classes)
    if weights is not None:
        load_weights(model, Path(weights))
    return model


def load_checkpoint(
    dataset: str,
    base_network: str,
    experiment_name: str,
    *,
    reload: str = "last",
    weights: str | Path | None = None,
    base_directory: str | Path = "./experiments",
    num_classes: int | None = None,
    ema: bool = False,
) -> nn.Module:
    """A trained network of the registry, on the CPU, in evaluation mode. The first three arguments are train.py's.

    Where a `config.json` lies beside the checkpoint, it says what was trained, overridden fields included.

    Args:
        reload: "last", "best", "best_any" or "epoch_N" of the experiment's own checkpoints, see
            `models.checkpoints.find_checkpoint`.
        weights: a file to read instead.
        ema: the moving average of the weights; "best_any" decides that by itself.
        num_classes: default: the dataset's, or those that the experiment was trained with.

    Raises:
        models.errors.UnknownNameError: unknown dataset, base network or name.
        models.errors.CheckpointError: the checkpoint cannot be found, read or fitted.
        models.errors.UserError: the number of classes is not known.
    """
    experiment = experiments.find(dataset, base_network, experiment_name)
    path, ema = chosen_checkpoint(experiment, experiment_name, base_directory, reload=reload, weights=weights, ema=ema)
    recipe = as_trained(experiment, path).model
    classes = recipe.num_classes if num_classes is None else num_classes
    if classes is None:
        raise UserError(
            f"num_classes: neither dataset '{dataset}' nor {path.parent / CONFIG} says how many classes there are."
        )
    model = untrained(recipe, classes)
    load_weights(model, path, ema=ema)
    return model.eval()


def as_trained(experiment: Experiment, checkpoint: Path) -> Experiment:
    """The experiment as it was trained, overridden fields included, where a record of it lies beside the checkpoint.

    A record of another experiment (`--weights` names any file) says nothing; one that differs in its seed does.

    Raises:
        models.errors.CheckpointError: the record is damaged.
    """
    recorded = recorded_experiment(checkpoint.parent)
    return experiment if recorded is None or _key(recorded) != _key(experiment) else recorded


def _key(experiment: Experiment) -> tuple[str, str, str]:
    return experiment.dataset, experiment.base_network, experiment.name.partition("-seed=")[0]


def untrained(recipe: ModelRecipe, num_classes: int) -> nn.Module:
    """The network of the recipe with random weights."""
    return finish(build(recipe.architecture, num_classes), recipe)


def starting_network(
    experiment: Experiment, num_classes: int, base_directory: str | Path, init_weights: Path | None = None
) -> nn.Module:
    """The network as training begins with it: `conventional_network`, converted where the recipe says so."""
    model = conventional_network(experiment, num_classes, base_directory, init_weights)
    return finish(model, experiment.model)


def conventional_network(
    experiment: Experiment, num_classes: int, base_directory: str | Path, init_weights: Path | None = None
) -> nn.Module:
    """The conventional network that training begins with, with weights where the recipe has some.

    Args:
        init_weights: a checkpoint of the *conventional* network, instead of the recipe's. Where it was trained with
            another number of classes, the classifier starts at random.

    Raises:
        models.errors.CheckpointError: the weights cannot be found, read or fitted.
        models.errors.UserError: the conventional experiment that this one starts from has not been trained, or its
            weights have to be given.
    """
    recipe = experiment.model
    if init_weights is not None:
        return _conventional_from_file(recipe, num_classes, init_weights)
    if recipe.start == "pretrained":
        return load_pretrained(recipe, num_classes)
    if recipe.start == "file":
        raise UserError(
            f"'{experiment.name}' starts from a conventional {recipe.architecture}, whose weights are not part of any "
            "package, and nothing is downloaded here; B-cos v2 publishes those of the simple ViTs. Give the file to "
            "train.py or evaluate.py with --init_weights PATH, or begin with random weights: --set model.start=random."
        )
    model = build(recipe.architecture, num_classes)
    if recipe.start == "standard":
        load_weights(model, _standard_checkpoint(experiment, Path(base_directory)))
    return model


def _conventional_from_file(recipe: ModelRecipe, num_classes: int, path: Path) -> nn.Module:
    model = build(recipe.architecture, num_classes)
    classifier = classifier_name(model)
    rows = None if classifier is None else read_state_dict(path).get(f"{classifier}.weight")
    if rows is not None and rows.ndim == 2:
        resize_classifier(model, rows.shape[0])
    load_weights(model, path)
    resize_classifier(model, num_classes)
    return model


def finish(model: nn.Module, recipe: ModelRecipe) -> nn.Module:
    """The network as the recipe wants it: B-cosified, or `model` itself."""
    if not recipe.converted:
        return model
    if recipe.no_gelu:
        if not any(isinstance(module, nn.GELU) for module in model.modules()):
            raise UserError(f"model.no_gelu: {recipe.architecture} has no GELU to take out; leave it at false.")
        model = copy.deepcopy(model)
        _remove_gelu(model)
    b = torch.tensor(recipe.b) if recipe.variable_b else recipe.b
    converted = bk.bcosify(model, keep=recipe.keep, b=b, normalize=recipe.normalize)
    if recipe.anneal_b:
        for exponent in exponents(converted):
            exponent.requires_grad_(False)
    return converted


def check_images(
    model: nn.Module, recipe: ModelRecipe, data: DataRecipe, num_classes: int, channels: int | None = None
) -> None:
    """Shows the network one black image, and looks at the shape of what it gives.

    Args:
        channels: default: those of the data's recipe.

    Raises:
        models.errors.UserError: it does not take images of this size, or does not give `num_classes` logits.
    """
    channels = channels or (6 if data.six_channels else 3)
    what = f"model.architecture '{recipe.architecture}' with data.image_size {data.image_size}"
    training = model.training
    try:
        with torch.no_grad():
            out = model.eval()(torch.zeros(1, channels, data.image_size, data.image_size))
    except (RuntimeError, ValueError, AssertionError) as error:  # torchvision asserts the size of a ViT's
        raise UserError(f"{what}: the network does not take such images ({str(error).splitlines()[0]}).") from error
    finally:
        model.train(training)
    if out.dim() != 2 or out.shape[1] != (num_classes or max(out.shape[1], 1)):
        raise UserError(f"{what}: the network gives {list(out.shape)} of an image, not {[1, num_classes or 'E']}.")


def exponents(model: nn.Module) -> list[nn.Parameter]:
    """The exponents that are kept in the state dict, learnt or annealed."""
    layers = (module for module in model.modules() if isinstance(module, (bk.BcosConv2d, bk.BcosLinear)))
    return [layer.b for layer in layers if isinstance(layer.b, nn.Parameter)]


def _remove_gelu(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.GELU):
                setattr(parent, name, nn.Identity())


def _standard_checkpoint(experiment: Experiment, base_directory: Path) -> Path:
    source = experiments.find(experiment.dataset, CONVENTIONAL, experiment.name)
    directory = source.directory(base_directory)
    try:
        return find_checkpoint(directory, "best")[0]
    except CheckpointError as error:
        raise UserError(
            f"'{experiment.name}' is converted from the conventional network of the same name, which has no "
            f"checkpoint in {directory}. Train that first: python train.py --dataset {experiment.dataset} "
            f"--base_network {CONVENTIONAL} --experiment_name {experiment.name} --base_directory {base_directory}"
        ) from error
