"""Options that `clapsep separate` and `clapsep stream` share, and how a separator and its queries are made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..engines import KINDS
from .clap import CROPS
from .commands import device_option, precision_option
from .errors import QueryError
from .plans import AUTO
from .query import Query
from .separator import Separator
from .windows import PRESETS

log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])
EXISTING = click.Path(path_type=Path)


def single(_ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> str | None:
    """click would keep the last of several values in silence."""
    if len(values) > 1:
        raise click.UsageError(f"--{parameter.name} was given {len(values)} times; give one text (examples may be several)")
    if values and not values[0].strip():
        log.warning("--%s is blank and asks for nothing", parameter.name)
    return values[0] if values else None


def _all_of(*options: Callable[[Any], Any]) -> Callable[[Function], Function]:
    def decorate(command: Function) -> Function:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _text(name: str, words: str) -> Callable[[Any], Any]:
    return click.option(name, metavar="TEXT", multiple=True, callback=single, help=words)


def _clips(name: str, words: str) -> Callable[[Any], Any]:
    return click.option(name, metavar="FILE", type=EXISTING, multiple=True, help=f"Example of {words}; several are averaged.")


def _vector(name: str, words: str) -> Callable[[Any], Any]:
    return click.option(name, metavar="FILE", type=EXISTING, help=f"Embedding of {words}, .npy, in place of a text or examples.")


QUERY = ("positive", "negative", "positive_audio", "negative_audio", "positive_vector", "negative_vector", "alpha")
query_options = _all_of(
    _text("--positive", "What to extract."),
    _text("--negative", "What to leave out."),
    _clips("--positive-audio", "what to extract"),
    _clips("--negative-audio", "what to leave out"),
    _vector("--positive-vector", "what to extract"),
    _vector("--negative-vector", "what to leave out"),
    click.option("--alpha", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Weight of audio where a query has both."),
)
# Their names are the arguments of Separator.
engine_options = _all_of(
    click.option("--engine", type=click.Choice([*KINDS, AUTO]), default="onnxruntime", show_default=True),
    device_option,
    precision_option,
    click.option(
        "--cuda-graph/--no-cuda-graph", default=True, show_default=True, help="Capture the launches of TensorRT kinds and replay them."
    ),
    click.option("--threads", type=click.IntRange(1), help="Engine threads.  [default: one per physical core]"),
    click.option("--normalize/--no-normalize", default=None, help="Unit-norm condition vector or not.  [default: the bundle's rule]"),
    click.option("--crop", type=click.Choice(CROPS), help="Which part of a long audio query counts.  [default: the bundle's rule]"),
)


def window_options(preset: str) -> Callable[[Function], Function]:
    """`preset` is what is taken where nothing is given."""
    return _all_of(
        click.option("--preset", type=click.Choice(list(PRESETS)), help=f"Hop and overlap of models with windows.  [default: {preset}]"),
        click.option("--hop", type=float, metavar="SECONDS", help="From one window to the next.  [default: the preset's]"),
        click.option("--overlap", type=float, metavar="SECONDS", help="In which windows hand over.  [default: the preset's]"),
    )


def windowing(preset: str, hop: float | None, overlap: float | None) -> dict[str, float | None]:
    """`hop` and `overlap`, those of the preset where they were not given."""
    given = {"hop": hop, "overlap": overlap}
    return PRESETS[preset] | {name: seconds for name, seconds in given.items() if seconds is not None}


def take_queries(options: dict[str, Any]) -> tuple[Query, Query]:
    """The positive and the negative query of `query_options`, taken out of a command's options."""
    given = {name: options.pop(name) for name in QUERY}
    sides = ((given[side], given[f"{side}_audio"], given["alpha"], given[f"{side}_vector"]) for side in ("positive", "negative"))
    positive, negative = (Query(*side) for side in sides)
    return positive, negative


def open_separator(bundle: Path, engine: str, preset: str | None = None, **options: Any) -> Separator:
    """The separator of the options; what `--engine auto` took is said on stderr.

    Raises:
        QueryError: a preset for a causal model.
    """
    separator = Separator(bundle, engine, **options)
    if preset and separator.plan is None:
        raise QueryError(f"the preset {preset} is for models with windows and {bundle} has none; leave it out")
    if engine == AUTO:
        click.echo(separator.choice.why, err=True)
    return separator
