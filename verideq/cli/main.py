"""The application, and how errors become exit codes.

0 done; 1 an ERROR verdict or an inconsistency; 2 the call was wrong; 130 interrupted.
"""

from __future__ import annotations

import os

# Idle OpenMP threads that spin make a busy machine several times slower; this has to be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from rich.console import Console

import verideq
from verideq.cli.attack import attack
from verideq.cli.certify import certify
from verideq.cli.check import check
from verideq.cli.import_ import import_
from verideq.cli.inspect import inspect
from verideq.cli.options import Interrupted
from verideq.cli.report import report
from verideq.cli.train import train
from verideq.errors import InputError, VerideqError

app = typer.Typer(
    name="verideq",
    help="Formal verification of implicit layers: certify, train, inspect and report on deep equilibrium models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (certify, check, attack, inspect, train, report):
    app.command()(command)
app.command("import")(import_)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"verideq {verideq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Formal verification of implicit layers."""


def run(arguments: list[str]) -> int:
    """Run one command line; the exit code."""
    errors = Console(stderr=True, soft_wrap=True, emoji=False)

    def complain(message: object) -> None:
        # One line, whatever a library put into its message.
        errors.print("error:", *str(message).split(), style="red", markup=False, highlight=False)

    try:
        result = app(arguments, standalone_mode=False)
    except typer.Exit as stop:
        result = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except Interrupted as stop:
        errors.print(str(stop), style="yellow", markup=False, highlight=False)
        return 130
    except typer.TyperException as error:
        if message := error.format_message():  # none where help was printed
            complain(f"{message.rstrip('.')}; see verideq --help")
        return 2
    except InputError as error:
        complain(error)
        return 2
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}; give a path that can be read and written")
        return 2
    except VerideqError as error:
        complain(f"{type(error).__name__}: {error}")
        return 1
    if result == 130:  # typer makes this of an interruption inside a command
        errors.print("interrupted", style="yellow")
    return result if isinstance(result, int) else 0
