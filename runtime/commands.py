"""What the two commands share: options, error reporting, exit codes."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click

from .errors import ClapsepError


class Command(click.Group):
    """A click group whose failures are one sentence on stderr and an exit code; `--debug` lets the traceback through."""

    def invoke(self, ctx: click.Context) -> Any:
        logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
        try:
            return super().invoke(ctx)
        except ClapsepError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted; every output is whole or absent", err=True)
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: unexpected {type(error).__name__}: {error}; run again with --debug and report it", err=True)
            ctx.exit(1)


debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
