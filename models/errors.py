"""Errors whose message is meant for the person at the keyboard; the command line prints it without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right; the message says what and how."""


class UnknownNameError(UserError, ValueError):
    """A dataset, base network or experiment that is not in the registry."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, cannot be read, or does not fit the network."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest of `known`, or the empty string where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
