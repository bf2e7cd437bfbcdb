"""Zero-shot classification: the names of classes become directions in CLIP's space by way of its text encoder.

The text encoders and OpenAI's 80 templates come from open_clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bcos_kernels as bk
from bcos_kernels.modules import AttentionPool2d
from models import open_clip_files
from models.checkpoint_files import read_checkpoint
from models.errors import CheckpointError, UserError

TEXT_MODEL = "RN50-quickgelu"
TEXT_WEIGHTS = "openai"


class TextEncoder:
    """Texts to embeddings `[N, E]` of length 1.

    Args:
        model: an open_clip model with the text side that belongs to the image encoder.
        weights: a file or one of open_clip's tags, see `models.open_clip_files.weights`.
        device: where to encode; the embeddings come back to the CPU.

    Raises:
        models.errors.CheckpointError: weights that cannot be found, read or fitted.
        models.errors.UserError: open_clip is not installed, or has no such model.
    """

    def __init__(
        self, model: str = TEXT_MODEL, weights: str | Path = TEXT_WEIGHTS, device: torch.device | None = None
    ) -> None:
        open_clip = open_clip_files.package()
        if model not in open_clip.list_models():
            raise UserError(
                f"open_clip has no model '{model}'; python -c 'import open_clip; print(open_clip.list_models())'"
            )
        path = open_clip_files.weights(model, weights)
        self.network = open_clip.create_model(model, load_weights=False).eval()
        self.tokenize = open_clip.get_tokenizer(model)
        content = read_checkpoint(path)
        state = content.get("state_dict", content)
        wanted = [key for key in self.network.state_dict() if not key.startswith("visual.")]
        missing = [key for key in wanted if key not in state]
        if missing:
            raise CheckpointError(f"{path} holds no text side of {model}: '{missing[0]}' is missing.")
        try:
            self.network.load_state_dict({key: state[key] for key in wanted}, strict=False)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit open_clip's {model}: {error}") from error
        self.device = torch.device("cpu") if device is None else device
        self.network.to(self.device)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenize(list(texts)).to(self.device)
        embeddings: Tensor = self.network.encode_text(tokens, normalize=True)
        return embeddings.cpu()


def openai_templates() -> list[Callable[[str], str]]:
    """OpenAI's 80 sentences to put the name of a class into."""
    open_clip_files.package()
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return list(OPENAI_IMAGENET_TEMPLATES)


def directions(
    encode: Callable[[Sequence[str]], Tensor], names: Iterable[str], templates: Sequence[Callable[[str], str]]
) -> Tensor:
    """One direction for each class: the mean over the templates.

    Args:
        encode: texts to embeddings `[N, E]` of length 1.
        names: of the K classes.

    Returns:
        `[K, E]`, of length 1.

    Source: CLIP (arXiv 2103.00020, section 3.1.4).
    """
    means = [encode([template(name) for template in templates]).mean(0) for name in names]
    return F.normalize(torch.stack(means), dim=1)


def read_directions(path: Path, encoder: nn.Module) -> Tensor:
    """Directions that were computed before, such as the public `[E, K]` zero-shot weights of ImageNet.

    Args:
        path: a file with one tensor, `[E, K]` or `[K, E]`; of a square one the columns are taken.
        encoder: the image encoder, whose embeddings have E entries.

    Returns:
        `[K, E]`, float32.

    Raises:
        models.errors.CheckpointError: no such file, not a tensor, or of another shape.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, UnpicklingError, ...
        raise CheckpointError(f"{path} is damaged, or no file that torch.save wrote of a tensor.") from error
    size = _pool(encoder).c_proj.weight.shape[0]
    if not isinstance(found, Tensor) or found.dim() != 2 or size not in found.shape or not found.isfinite().all():
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise CheckpointError(
            f"{path} must hold a finite tensor [{size}, classes], the classes' directions; got {what}."
        )
    return (found.T if found.shape[0] == size else found).float()


def classifier(encoder: nn.Module, directions: Tensor, *, unpool: bool = False, power: float = 1.0) -> nn.Sequential:
    """A classifier of the encoder's images: `[N, 6, H, W]` to 100 times the cosines, `[N, K]`.

    Args:
        directions: `[K, E]`.
        unpool: compare every location by itself, and take the mean.
        power: of the cosines of the locations; above 1 only with `unpool`.

    Raises:
        models.errors.UserError: the encoder has no attention pool, or directions that do not fit it.
    """
    pool = _pool(encoder)
    if directions.shape[1] != pool.c_proj.weight.shape[0]:
        raise UserError(
            f"The text embeddings have {directions.shape[1]} entries, the image embeddings "
            f"{pool.c_proj.weight.shape[0]}: they are not of the same CLIP."
        )
    set_unpooling(encoder, unpool)
    head = bk.CosineLogits(directions, power=power).to(pool.c_proj.weight)
    return nn.Sequential(encoder, head)


def set_unpooling(encoder: nn.Module, unpool: bool) -> None:
    """Whether the encoder gives `[N, L, E]`, an embedding for each location, instead of `[N, E]`.

    Raises:
        models.errors.UserError: the encoder has no attention pool.
    """
    _pool(encoder).unpool = unpool


def _pool(encoder: nn.Module) -> AttentionPool2d:
    pool = next((module for module in encoder.modules() if isinstance(module, AttentionPool2d)), None)
    if pool is None:
        raise UserError(f"A {type(encoder).__name__} has no attention pool: it is no image encoder of CLIP.")
    return pool
