"""`clapsep stream`: raw PCM from stdin to stdout."""

from __future__ import annotations

import logging
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from .audio import MAX_CHANNELS
from .commands import debug_option
from .dsp import Float32
from .errors import InputError
from .options import EXISTING, engine_options, open_separator, query_options, take_queries, window_options, windowing
from .pcm import FORMATS, Pump, Reader, whole_frames, write_all
from .separator import Separator
from .stream import Stream
from .windows import PRESETS

log = logging.getLogger(__name__)
QUEUE = 10  # seconds of input that may wait
PRESET = "balanced"
LONG = sum(seconds or 0 for seconds in PRESETS[PRESET].values())  # seconds; shorter windows go by the longest hop that fits


@click.command()
@click.argument("bundle", type=EXISTING)
@query_options
@click.option("--format", "form", type=click.Choice(list(FORMATS)), default="f32le", show_default=True, help="Of input and output.")
@click.option("--rate", type=click.IntRange(1, 1_000_000), metavar="HZ", help="Of input and output.  [default: the model's]")
@click.option("--channels", type=click.IntRange(1, MAX_CHANNELS), default=1, show_default=True, help="Interleaved.")
@window_options(PRESET)
@click.option("--peak", type=float, default=1.0, show_default=True, help="Largest magnitude that will come, if above 1.")
@engine_options
@debug_option
def stream(
    bundle: Path,
    form: str,
    rate: int | None,
    channels: int,
    preset: str | None,
    hop: float | None,
    overlap: float | None,
    peak: float,
    **options: Any,
) -> None:
    """Separate raw PCM from stdin with BUNDLE as it comes, to stdout.

    \b
    ffmpeg -i street.mp3 -f f32le -ar 32000 -ac 1 - |
      clapsep stream BUNDLE --positive "rain" --rate 32000 |
      ffplay -f f32le -ar 32000 -

    The result has as many samples as the input. It comes later by hop and overlap, or a causal model's step, and the time of computing.
    A reader who closes stdout ends it.
    """
    _refuse_terminals()
    queries = take_queries(options)
    separator = open_separator(bundle, preset=preset, **options)
    condition = separator.condition(*queries)
    if separator.plan is not None:
        window = separator.plan.window / separator.family.sample_rate
        seconds = windowing(preset or PRESET, hop, overlap) if window > LONG or preset else {"hop": hop, "overlap": overlap}
        hop, overlap = seconds["hop"], seconds["overlap"]
    opened = separator.stream(condition=condition, sample_rate=rate, channels=channels, hop=hop, overlap=overlap, peak=peak)
    frame = FORMATS[form] * channels
    reader = Reader(sys.stdin.fileno(), QUEUE * opened.sample_rate * frame)
    _warm_up(separator, condition)
    click.echo(_beginning(opened, form, channels), err=True)
    pump = Pump(opened, form, channels, partial(write_all, sys.stdout.fileno()))
    most = max(1, round(opened.period * opened.sample_rate))  # one window's or step's results at a time
    stopped = _finish_on_interrupt(reader)
    try:
        pump.run(whole_frames(reader.read, frame, most))
    except BrokenPipeError:
        click.echo("the reader of the output has gone", err=True)
    except KeyboardInterrupt:
        click.echo("interrupted: what was not written yet is lost", err=True)
        click.get_current_context().exit(130)
    finally:
        _end(pump, form, channels, opened)
    if stopped:
        click.get_current_context().exit(130)


def _finish_on_interrupt(reader: Reader) -> list[int]:
    """The first Ctrl-C ends the input, so that what has come is still written; the second one ends everything. Filled by the first."""
    stopped: list[int] = []

    def stop(number: int, _frame: object) -> None:
        stopped.append(number)
        click.echo("interrupted: writing what has come in; once more to leave it", err=True)
        reader.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    return stopped


def _refuse_terminals() -> None:
    for name, file, way in (("stdin", sys.stdin, "into"), ("stdout", sys.stdout, "out of")):
        if file is None or file.closed or file.isatty():
            raise InputError(f"{name} is no pipe or file; raw PCM goes {way} this command, see: clapsep stream --help")


def _warm_up(separator: Separator, condition: Float32) -> None:
    """Load graphs now, and not while the first window's results are waited for."""
    separator.separate_windows(np.zeros((1, separator.family.window_samples), np.float32), condition[None])


def _beginning(opened: Stream, form: str, channels: int) -> str:
    sum_of = " + ".join(f"{name} {seconds:.3g} s" for name, seconds in opened.delays.items() if seconds > 5e-4)
    kind = f"{opened.sample_rate} Hz, {channels} channel{'s' * (channels > 1)}, {form}"
    return f"{kind}; latency {opened.latency:.3g} s ({sum_of}) and the time of computing"


def _end(pump: Pump, form: str, channels: int, opened: Stream) -> None:
    """What became of it, whatever ended it."""
    if not pump.received:
        log.warning("no samples came in")
        return
    if pump.clipped:
        share = pump.clipped / (pump.frames * channels)
        log.warning("%d samples (%.2g %%) were beyond full scale and clipped to %s; f32le would keep them", pump.clipped, 100 * share, form)
    rtf = pump.computing / pump.received
    remedy = "another engine or fewer channels" if opened.plan is None else "a longer --hop"
    slow = f"; this machine is slower than the sound: take {remedy}" if rtf > 1 and pump.received > opened.latency else ""
    click.echo(f"{pump.received:.1f} s of audio, RTF {rtf:.3f}, longest time in one push {pump.longest:.3f} s{slow}", err=True)
