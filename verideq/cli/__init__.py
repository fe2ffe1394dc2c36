"""The command line, one file a command. ``main`` is the entry point."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from verideq.cli.main import run  # torch takes seconds to load, and Ctrl-C may come meanwhile
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))


__all__ = ["main"]
