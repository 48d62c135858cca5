"""The `clapsep` command."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..engines import KINDS
from . import audio
from .clap import CROPS
from .commands import Command, debug_option, device_option, precision_option
from .errors import InputError, OutputError, OutputExists
from .plans import AUTO
from .query import Query
from .separator import OVERLAP_SECONDS, Separator

EXISTING = click.Path(path_type=Path)
Job = tuple[Path, list[Path]]


def _single(_ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> str | None:
    """click would keep the last of several values in silence."""
    if len(values) > 1:
        raise click.UsageError(f"--{parameter.name} was given {len(values)} times; give one text (examples may be several)")
    return values[0] if values else None


def _named(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Names become parts of file names."""
    targets: dict[str, str] = {}
    for value in values:
        name, _, text = value.partition("=")
        if not re.fullmatch(r"[\w-]{1,64}", name) or not text.strip():
            raise click.UsageError(f"--target {value} is not NAME=TEXT with a name of letters, digits, - and _; give dog='a dog barking'")
        if name in targets:
            raise click.UsageError(f"--target {name} was given twice; give each target a name of its own")
        targets[name] = text
    return targets


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@debug_option
def main() -> None:
    """Extract from recordings the sound that a text or an example describes."""


@main.command()
@click.argument("bundle", type=EXISTING)
@click.argument("mixtures", metavar="MIXTURE...", type=EXISTING, nargs=-1, required=True)
@click.option("--positive", metavar="TEXT", multiple=True, callback=_single, help="What to extract.")
@click.option(
    "--target",
    "targets",
    metavar="NAME=TEXT",
    multiple=True,
    callback=_named,
    help="One of several things to extract, each into a file MIXTURE.NAME; the mixture is analysed once.",
)
@click.option("--negative", metavar="TEXT", multiple=True, callback=_single, help="What to leave out.")
@click.option(
    "--positive-audio",
    metavar="FILE",
    type=EXISTING,
    multiple=True,
    help="Example of what to extract; several are averaged.",
)
@click.option(
    "--negative-audio",
    metavar="FILE",
    type=EXISTING,
    multiple=True,
    help="Example of what to leave out; several are averaged.",
)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=EXISTING,
    required=True,
    help="Output file; a directory if it exists as one, has no extension, or takes several mixtures.",
)
@click.option("--engine", type=click.Choice([*KINDS, AUTO]), default="onnxruntime", show_default=True)
@device_option
@precision_option
@click.option(
    "--cuda-graph/--no-cuda-graph", default=True, show_default=True, help="Capture the launches of TensorRT kinds and replay them."
)
@click.option("--threads", type=click.IntRange(1), help="Engine threads.  [default: one per physical core]")
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Weight of audio where a query has both.",
)
@click.option("--overlap", type=float, default=OVERLAP_SECONDS, show_default=True, metavar="SECONDS", help="What windows share.")
@click.option("--normalize/--no-normalize", default=None, help="Unit-norm condition vector or not.  [default: the bundle's rule]")
@click.option("--crop", type=click.Choice(CROPS), help="Which part of a long audio query counts.  [default: the bundle's rule]")
@click.option("--force", is_flag=True, help="Overwrite existing outputs.")
@debug_option
def separate(
    bundle: Path,
    mixtures: tuple[Path, ...],
    positive: str | None,
    targets: dict[str, str],
    negative: str | None,
    positive_audio: tuple[Path, ...],
    negative_audio: tuple[Path, ...],
    output: Path,
    engine: str,
    device: str | None,
    precision: str | None,
    cuda_graph: bool,
    threads: int | None,
    alpha: float,
    overlap: float,
    normalize: bool | None,
    crop: str | None,
    force: bool,
) -> None:
    """Separate each MIXTURE with BUNDLE; rate, length and channels stay as they are."""
    if targets and (positive or positive_audio):
        raise InputError("--target was given with --positive or --positive-audio; name that one too, or leave the others out")
    jobs = _outputs(mixtures, output, tuple(targets), {path.resolve() for path in (*positive_audio, *negative_audio)}, force)
    options: dict[str, Any] = {"device": device, "precision": precision, "cuda_graph": cuda_graph, "threads": threads}
    separator = Separator(bundle, engine, **options, normalize=normalize, crop=crop, overlap=overlap)
    if engine == AUTO:
        click.echo(separator.choice.why, err=True)
    without = Query(negative, negative_audio, alpha)
    queries = [Query(text) for text in targets.values()] or [Query(positive, positive_audio, alpha)]
    conditions = [separator.condition(query, without) for query in queries]
    with click.progressbar(jobs, label="separating", file=sys.stderr, item_show_func=_name) as bar:
        for source, outputs in bar:
            mixture = audio.read_audio(source)
            formats = [audio.output_format(target, mixture) for target in outputs]
            separated = separator.separate_many(mixture.samples, mixture.sample_rate, conditions)
            for target, samples, (kind, subtype) in zip(outputs, separated, formats, strict=True):
                _make_directory(target.parent)
                audio.write_audio(target, samples, mixture.sample_rate, kind, subtype, force=force)
                click.echo(target)


def _name(job: Job | None) -> str | None:
    return None if job is None else str(job[0])


def _outputs(mixtures: tuple[Path, ...], output: Path, names: tuple[str, ...], clips: set[Path], force: bool) -> list[Job]:
    """Every mixture with the files of its targets; everything that can be refused is refused before anything is computed."""
    into = os.path.isdir(output) or len(mixtures) > 1 or bool(names) or not output.suffix
    if into and not os.path.isdir(output) and (os.path.exists(output) or str(output) == "-" or output.suffix.lower() in audio.FORMATS):
        raise InputError(f"{output} cannot be the directory for {len(mixtures) * max(len(names), 1)} outputs; give a directory")
    jobs = [(source, _files(source, names, output) if into else [output]) for source in mixtures]
    targets = [target for _, outputs in jobs for target in outputs]
    there = {source.resolve() for source in mixtures}
    for source, target in ((source, target) for source, outputs in jobs for target in outputs):
        if not os.path.isfile(source):
            raise InputError(f"{source} is not a file; check the path")
        if target.resolve() in there:
            raise InputError(f"{target} would overwrite a mixture; choose another output")
        if target.resolve() in clips:
            raise InputError(f"{target} would overwrite an example of a query; choose another output")
        if os.path.exists(target) and not force:
            raise OutputExists(f"{target} exists; choose another name or pass --force")
        if targets.count(target) > 1:
            raise InputError(f"two mixtures would both be written to {target}; separate them into different directories")
        if not into and not os.path.isdir(target.parent):
            raise InputError(f"{target.parent} is not a directory; create it first")
        if target.suffix.lower() not in audio.FORMATS:
            raise InputError(f"{target} has no known audio extension; use one of: {' '.join(audio.FORMATS)}")
    return jobs


def _files(source: Path, names: tuple[str, ...], folder: Path) -> list[Path]:
    """`street.wav` becomes `street.wav`, or `street.dog.wav` and so on for named targets."""
    return [folder / f"{source.stem}.{name}{source.suffix}" for name in names] or [folder / source.name]


def _make_directory(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be created ({error.strerror}); choose another place") from error
