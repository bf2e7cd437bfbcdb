"""The options of evaluate.py and explain.py that compare images with texts, and the classifier that they ask for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from models import zeroshot
from models.errors import UserError


def add(group: argparse._ArgumentGroup) -> None:
    """Adds them; each is None, False or 1 where it is not given."""
    group.add_argument("--text_model", help=f"open_clip's name of the text model (default: {zeroshot.TEXT_MODEL})")
    group.add_argument(
        "--text_weights", metavar="PATH_OR_TAG", help=f"a file, or open_clip's tag (default: {zeroshot.TEXT_WEIGHTS})"
    )
    group.add_argument(
        "--zeroshot_weights", type=Path, metavar="PATH", help="the texts' embeddings instead of a text model"
    )
    group.add_argument(
        "--attn_unpool", "--use_attn_unpool", action="store_true", help="every location by itself, without attention"
    )
    group.add_argument(
        "--cosine_power",
        "--pool_cosine",
        type=float,
        default=1.0,
        metavar="P",
        help="with --attn_unpool: the locations' cosines to this power (default: 1)",
    )


def given(args: argparse.Namespace) -> list[str]:
    """Those that concern texts and were given."""
    found = [f"--{name}" for name in ("text_model", "text_weights", "zeroshot_weights") if getattr(args, name)]
    return found + (["--cosine_power"] if args.cosine_power != 1 else [])


def check(args: argparse.Namespace) -> None:
    """Refuses what contradicts itself.

    Raises:
        models.errors.UserError: the message names the option.
    """
    if args.zeroshot_weights is not None:
        for option, value in (("--text_model", args.text_model), ("--text_weights", args.text_weights)):
            if value is not None:
                raise UserError(f"--zeroshot_weights takes the place of the text model: {option} has no use.")
    if not 1 <= args.cosine_power < math.inf:
        raise UserError(f"--cosine_power must be a finite number of at least 1, got {args.cosine_power}.")
    if args.cosine_power != 1 and not args.attn_unpool:
        raise UserError("--cosine_power needs --attn_unpool.")


def classifier(
    args: argparse.Namespace,
    encoder: nn.Module,
    names: Sequence[str],
    templates: Callable[[], Sequence[Callable[[str], str]]],
    device: torch.device,
) -> nn.Module:
    """`models.zeroshot.classifier` of these names, one logit for each.

    Args:
        templates: called where there is a text model; gives the sentences to put each name into.
        device: where to encode the texts.

    Raises:
        models.errors.UserError: files that cannot be read or do not fit.
    """
    if args.zeroshot_weights is not None:
        found = zeroshot.read_directions(args.zeroshot_weights, encoder)
        if len(found) != len(names):
            raise UserError(f"--zeroshot_weights: {args.zeroshot_weights} has {len(found)} texts, not {len(names)}.")
    else:
        text_model, weights = args.text_model or zeroshot.TEXT_MODEL, args.text_weights or zeroshot.TEXT_WEIGHTS
        encode = zeroshot.TextEncoder(text_model, weights, device)
        found = zeroshot.directions(encode, tqdm(names, desc="texts", leave=False), templates())
    return zeroshot.classifier(encoder, found, unpool=args.attn_unpool, power=args.cosine_power)
