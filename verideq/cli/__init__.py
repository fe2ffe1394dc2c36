"""The command line, one file a command. ``main`` is the entry point."""

from verideq.cli.main import main

__all__ = ["main"]
