"""The `clapsep` command."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..engines import usable_processors
from .audio import MAX_CHANNELS
from .audiofile import LIMITS, Limits, duration
from .batch import Batch, Summary
from .cli_stream import stream
from .commands import HINT, Command, debug_option
from .errors import InputError
from .jobs import Asked, check_name, into_folder, plan_jobs
from .log import NAME as LOG
from .log import Log
from .options import EXISTING, engine_options, open_separator, query_options, take_queries, window_options, windowing
from .query import Query

OFFLINE = "offline"


def _named(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Names become parts of file names."""
    targets: dict[str, str] = {}
    for value in values:
        name, _, text = value.partition("=")
        if check_name(f"--target {value}", name, text) in targets:
            raise click.UsageError(f"--target {name} was given twice; give each target a name of its own")
        targets[name] = text
    return targets


def _one(_ctx: click.Context, _parameter: click.Parameter, values: Sequence[Path]) -> Path:
    """click would keep the last of several in silence."""
    if len(values) > 1:
        raise click.UsageError(f"--output was given {len(values)} times; give one")
    return next(iter(values))


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@debug_option
def main() -> None:
    """Extract from recordings the sound that a text or an example describes."""


@main.command()
@click.argument("bundle", type=EXISTING)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@query_options
@click.option(
    "--target",
    "targets",
    metavar="NAME=TEXT",
    multiple=True,
    callback=_named,
    help="One of several things to extract, each into a file MIXTURE.NAME; the mixture is analysed once.",
)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=EXISTING,
    multiple=True,
    required=True,
    callback=_one,
    help="Output file; a directory if it exists as one, has no extension, or takes several results.",
)
@engine_options
@window_options(OFFLINE)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes, with an engine each.")
@click.option("--resume", is_flag=True, help="Leave out what an earlier run into the same directory finished.")
@click.option("--log", "log_file", metavar="FILE", type=EXISTING, help=f"Where to write what happens, .jsonl.  [default: OUT/{LOG}]")
@click.option("--max-seconds", type=click.FloatRange(0), default=LIMITS.seconds, show_default=True, help="Longest mixture.")
@click.option(
    "--max-channels", type=click.IntRange(1, MAX_CHANNELS), default=LIMITS.channels, show_default=True, help="Most channels of a file."
)
@click.option("--max-bytes", type=click.IntRange(1), default=LIMITS.bytes, show_default=True, help="Largest file.")
@click.option("--force", is_flag=True, help="Overwrite existing outputs.")
@debug_option
@click.pass_context
def separate(
    ctx: click.Context,
    bundle: Path,
    inputs: tuple[str, ...],
    targets: dict[str, str],
    output: Path,
    engine: str,
    preset: str | None,
    hop: float | None,
    overlap: float | None,
    jobs: int,
    resume: bool,
    log_file: Path | None,
    max_seconds: float,
    max_channels: int,
    max_bytes: int,
    force: bool,
    **options: Any,
) -> None:
    """Separate every INPUT with BUNDLE; rate, length and channels stay as they are.

    An INPUT is an audio file, a folder of them, a pattern in quotes, or a job list: a .jsonl or .csv file with one mixture per line
    (fields input, output, targets, alpha; positive, positive_audio, positive_vector and the same for negative). A long file needs no more
    memory than a short one. In a run over several files a broken one does not stop the others; the exit code is 1 then.
    """
    positive, negative = take_queries(options)
    if targets and not (positive.text is None and positive.empty):
        raise InputError("--target was given with another positive query; name that one too, or leave the others out")
    asked = Asked({name: Query(text) for name, text in targets.items()} or {"": positive}, negative)
    limits = Limits(bytes=max_bytes, channels=max_channels, seconds=max_seconds)
    arguments = {"bundle": bundle, "engine": engine, "limits": limits, **windowing(preset or OFFLINE, hop, overlap), **options}
    batch = _batch(arguments, preset, inputs, output, asked, jobs, force, log_file, resume)
    summary = _run(batch)
    if len(batch.jobs) == 1 and summary.failed:
        raise summary.failed[0][1]
    ctx.exit(1 if summary.failed else 0)


def _batch(
    arguments: dict[str, Any],
    preset: str | None,
    inputs: Sequence[str],
    output: Path,
    asked: Asked,
    workers: int,
    force: bool,
    log_file: Path | None,
    resume: bool,
) -> Batch:
    """The run that was asked for, once everything that can be refused has been looked at."""
    jobs = plan_jobs(inputs, output, asked)
    if log_file is not None and log_file.suffix.lower() != ".jsonl":
        raise InputError(f"--log {log_file} does not end in .jsonl; give it that extension")
    log_file = log_file or (output / LOG if into_folder(inputs, output, asked) else None)
    if resume and log_file is None:
        raise InputError("--resume needs the log of the run before; give a directory with -o, or --log")
    common = asked.questions if any(job.asked is asked for job in jobs) else ()
    workers = min(workers, len(jobs))
    if workers > 1 and arguments["threads"] is None:
        arguments["threads"] = max(1, len(usable_processors()) // workers)
    return Batch(
        open_separator(**arguments, preset=preset),
        arguments,
        jobs,
        common,
        workers,
        force,
        None if log_file is None else Log(log_file),
        resume,
    )


def _run(batch: Batch) -> Summary:
    """Run it under a progress bar, and say what became of it."""
    tasks = batch.tasks()
    total, begin = sum(duration(task.job.mixture) for task in tasks), time.perf_counter()
    with click.progressbar(length=max(1, round(1000 * total)), label="separating", file=sys.stderr, item_show_func=_rtf) as bar:
        done = 0.0

        def report(seconds: float) -> None:
            nonlocal done
            done += seconds
            bar.update(round(1000 * done) - bar.pos, (time.perf_counter() - begin) / done)

        if batch.log:
            click.get_current_context().meta[HINT] = "; --resume goes on from here"
        summary = batch.run(tasks, report, lambda job: click.echo("\n".join(map(str, job.outputs))))
    if len(batch.jobs) > 1 or summary.skipped:
        _tell(summary, time.perf_counter() - begin)
    return summary


def _tell(summary: Summary, took: float) -> None:
    for job, error in summary.failed:
        where = job.where or ("" if str(job.mixture) in str(error) else str(job.mixture))
        click.echo(f"error: {where}{': ' * bool(where)}{error}", err=True)
    rate = f", RTF {took / summary.seconds:.3f}" if summary.seconds else ""
    counts = f"{len(summary.done)} done, {len(summary.failed)} failed, {summary.skipped} skipped"
    click.echo(f"{counts}: {summary.seconds:.0f} s of audio in {took:.1f} s{rate}", err=True)


def _rtf(rtf: float | None) -> str | None:
    """Real-time factor so far: seconds of work per second of audio."""
    return None if rtf is None else f"RTF {rtf:.3f}"


main.add_command(stream)
