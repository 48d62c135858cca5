"""What the two commands share: options, error reporting, exit codes."""

from __future__ import annotations

import io
import logging
import signal
import sys
from typing import Any

import click

from .errors import ClapsepError

DEBUG = "clapsep.debug"
HINT = "clapsep.hint"  # what is said after an interrupt


class Command(click.Group):
    """A click group whose failures are one sentence on stderr and an exit code; `--debug` lets the traceback through."""

    def invoke(self, ctx: click.Context) -> Any:
        logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
        signal.signal(signal.SIGTERM, _interrupt)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")  # names of files are printed as the bytes that they are
        try:
            return super().invoke(ctx)
        except ClapsepError as error:
            if ctx.meta.get(DEBUG):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo(f"\ninterrupted; every output is whole or absent{ctx.meta.get(HINT, '')}", err=True)
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.meta.get(DEBUG):
                raise
            if isinstance(error, ModuleNotFoundError):
                click.echo(f"error: {error.name} is not installed; run: pip install 'clapsep-export[cpu,export]'", err=True)
                ctx.exit(1)
            click.echo(f"error: unexpected {type(error).__name__}: {error}; run again with --debug and report it", err=True)
            ctx.exit(1)


def _interrupt(_signal: int, _frame: object) -> None:
    """SIGTERM cleans up like Ctrl-C."""
    raise KeyboardInterrupt


def _remember(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    ctx.meta[DEBUG] = ctx.meta.get(DEBUG, False) or value


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_remember, help="Show the traceback of an error."
)
device_option = click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where the engine runs.  [default: the engine's first]")
precision_option = click.option("--precision", type=click.Choice(["bf16"]), help="Compute in this.  [default: as the bundle's graphs]")
