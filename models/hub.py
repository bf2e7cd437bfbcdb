"""Networks that know their own recipe: saved to a folder or a repository of the Hugging Face Hub, and read from there.

A folder holds `config.json`, the recipe as train.py records it, and `model.safetensors`.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from models import experiments
from models.checkpoints import CONFIG, chosen_checkpoint, load_weights
from models.errors import CheckpointError, UserError
from models.export import save_safetensors
from models.factory import as_trained, untrained
from models.recipe_io import record, recorded_experiment
from models.recipes import Experiment

WEIGHTS = "model.safetensors"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class HubNetwork(nn.Module):
    """A network of the registry and its recipe. `forward` is the network's.

    Args:
        experiment: the recipe; its number of classes is known.
        model: the network; default: with random weights.

    Attributes:
        model: the network itself.
        experiment: the recipe.

    Raises:
        models.errors.UserError: the recipe does not say how many classes there are.
    """

    def __init__(self, experiment: Experiment, model: nn.Module | None = None) -> None:
        super().__init__()
        classes = experiment.model.num_classes
        if classes is None:
            raise UserError(f"experiment: the recipe of '{experiment.name}' does not say how many classes there are.")
        self.experiment = experiment
        self.model = untrained(experiment.model, classes) if model is None else model

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, K]` of images in the form that the recipe's `six_channels` tells."""
        logits: Tensor = self.model(images)
        return logits

    @classmethod
    def from_checkpoint(
        cls,
        dataset: str,
        base_network: str,
        experiment_name: str,
        *,
        reload: str = "last",
        base_directory: str | Path = "./experiments",
        ema: bool = False,
    ) -> HubNetwork:
        """The network of an experiment that train.py trained, in evaluation mode; arguments as `load_checkpoint`.

        Raises:
            models.errors.UserError: as `load_checkpoint`.
        """
        experiment = experiments.find(dataset, base_network, experiment_name)
        path, ema = chosen_checkpoint(experiment, experiment_name, base_directory, reload=reload, ema=ema)
        network = cls(as_trained(experiment, path))
        load_weights(network.model, path, ema=ema)
        return network.eval()

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> HubNetwork:
        """The network out of a folder, or out of a repository `owner/name` of the hub; in evaluation mode.

        Args:
            source: a folder comes first, so that nothing is downloaded where one of this name exists.
            revision: branch, tag or commit of the repository.

        Raises:
            models.errors.CheckpointError: no such folder or repository, or a file in it that is missing, damaged, or
                does not fit the other.
            models.errors.UserError: a repository is asked for and huggingface_hub is not installed.
        """
        folder = Path(source) if Path(source).is_dir() else _download(str(source), revision)
        experiment = recorded_experiment(folder)
        if experiment is None:
            raise CheckpointError(f"There is no {CONFIG} in {folder}.")
        network = cls(experiment)
        load_weights(network.model, folder / WEIGHTS)
        return network.eval()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes `config.json` and `model.safetensors` into the folder, which is made where it does not exist.

        Raises:
            models.errors.UserError: safetensors is not installed.
        """
        folder = Path(folder)
        record(self.experiment, folder)
        save_safetensors(self.model, folder / WEIGHTS, self.experiment)
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Saves the network and uploads it to the repository `owner/name`, which is made where it does not exist.

        Args:
            token: of the Hugging Face account; default: the one that `hf auth login` stored.

        Returns:
            The address of the upload.

        Raises:
            models.errors.UserError: huggingface_hub is not installed.
        """
        hub = _package()
        hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, token=token))


def _download(repository: str, revision: str | None) -> Path:
    if _REPOSITORY.fullmatch(repository) is None:
        raise CheckpointError(f"{repository} is no folder, and no repository of the hub: those are called owner/name.")
    hub = _package()
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # of the network, of the hub, of its cache: huggingface_hub has a dozen kinds
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{repository} is no folder, and could not be had from the hub: {reason}") from error


def _package() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            "Repositories of the hub need huggingface_hub: pip install 'bcos_kernels[hub]'. Folders do not."
        ) from error
    return huggingface_hub
