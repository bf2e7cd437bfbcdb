"""Shared by the scripts: errors meant for the user are printed as one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from models.errors import UserError


def run(main: Callable[[], object]) -> None:
    """Calls `main`; exits with code 2 and the sentence of a `UserError`, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
