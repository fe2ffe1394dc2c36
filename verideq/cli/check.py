"""``verideq check``: the same as ``python -m verideq.checker``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verideq.checker.__main__ import main


def check(
    paths: Annotated[list[Path], typer.Argument(help="Certificates, a run's folder, or one above.", metavar="PATH...")],
    exact: Annotated[bool, typer.Option("--exact", help="Rational arithmetic: slow, for small models.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else.")] = False,
) -> int:
    """Check certificates with a small program that shares no code with what made them."""
    return main([*map(str, paths), *["--exact"] * exact, *["--json"] * as_json])
