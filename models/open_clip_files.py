"""Weights that open_clip knows by name. It finds and downloads the file; it is read here, see `models.checkpoints`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from models.errors import CheckpointError, UserError, suggestion


def package() -> ModuleType:
    """The package open_clip.

    Raises:
        models.errors.UserError: it is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError("CLIP's text side and weights need open_clip: pip install 'bcos_kernels[clip]'.") from error
    return open_clip  # type: ignore[no-any-return]


def weights(model: str, source: str | Path) -> Path:
    """The file with these weights of an open_clip model: `source` itself where that is a file.

    Args:
        model: such as "RN50-quickgelu".
        source: a path, or one of open_clip's tags for the model, such as "openai".

    Raises:
        models.errors.CheckpointError: neither a file nor a tag, or it could not be downloaded.
        models.errors.UserError: open_clip is not installed.
    """
    if Path(source).is_file():
        return Path(source)
    open_clip = package()
    tags = open_clip.list_pretrained_tags_by_model(model)
    if source not in tags:
        raise CheckpointError(
            f"'{source}' is neither a file nor one of open_clip's weights for {model}.{suggestion(str(source), tags)} "
            f"Known: {', '.join(tags) or 'none'}."
        )
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, source)))
    except Exception as error:  # of the network, the hub or the file system; open_clip adds its own
        raise CheckpointError(
            f"open_clip's weights '{source}' for {model} could not be downloaded: {error}. Give the path of a file "
            "instead: OpenAI's archive, or one that open_clip reads."
        ) from error
