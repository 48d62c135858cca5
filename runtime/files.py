"""From audio file to audio files, in memory that does not grow with their length."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from .audiofile import AudioFile, AudioSink, new_audio, output_format, scan
from .dsp import Float32
from .errors import InputError
from .separator import Question, Separator
from .stream import Stream

log = logging.getLogger(__name__)
Publish = Callable[[dict[Path, tuple[int, int]]], object]
Progress = Callable[[float], object]  # seconds of the mixture that have been read since the last call


@dataclass(frozen=True)
class Separated:
    """What became of one mixture.

    Attributes:
        seconds: of audio.
        took: seconds of work.
        notes: what its user should know: the file ended early, an output was lowered.
    """

    seconds: float
    took: float
    notes: tuple[str, ...] = ()

    @property
    def rtf(self) -> float:
        """Real-time factor: seconds of work per second of audio."""
        return self.took / self.seconds


def separate_file(
    separator: Separator,
    mixture: str | Path,
    outputs: Sequence[str | Path],
    conditions: Sequence[Question],
    *,
    force: bool = False,
    progress: Progress | None = None,
    publish: Publish | None = None,
) -> Separated:
    """Separate the file `mixture` into one file for each condition; each appears whole or not at all.

    Args:
        conditions: questions, as `Separator.separate_many` takes them.
        force: replace outputs that are there; never the mixture.
        progress: is told how many seconds of the mixture have been read since the last call.
        publish: is called when all outputs are on disk, just before they get their names, with the size in bytes and the time in ns that
            each has; what it raises discards them.

    The mixture is read twice: once to know its peak and that it is sound, once to separate it. Rate, length and channels stay as they are;
    the format follows the output's extension, the subtype the mixture where the format has it.

    Raises:
        AudioError: the mixture cannot be read.
        LimitError: it is longer or larger than the separator's limits.
        InputError: not as many outputs as conditions, or the mixture among them.
        QueryError: a question is empty.
        OutputExists, OutputError: an output is there without `force`, cannot hold this sound, or has no room.
        EngineError
    """
    begin = time.perf_counter()
    outputs = [Path(path) for path in outputs]
    if len(outputs) != len(conditions) or len(set(outputs)) < len(outputs):
        raise InputError(f"{len(conditions)} conditions and {len(outputs)} outputs were given; give each condition an output of its own")
    source = scan(mixture, separator.limits)
    if any(os.path.realpath(path) == os.path.realpath(source.path) for path in outputs):
        raise InputError(f"{mixture} would be overwritten by its result; choose another output")
    if source.complaint:
        log.warning("%s", source.complaint)
    stream = separator.stream_many(conditions, source.sample_rate, channels=source.channels, peak=source.peak, batch=separator.batch)
    with ExitStack() as stack:
        sinks = [stack.enter_context(_sink(path, source, force)) for path in outputs]
        _run(stream, source, sinks, progress)
        written = {sink.path: sink.encode() for sink in sinks}
        if publish:
            publish(written)
    notes = [source.complaint, *(f"{sink.path}: lowered by {sink.lowered:.2f} dB" for sink in sinks if sink.lowered > 0.005)]
    return Separated(source.seconds, time.perf_counter() - begin, tuple(filter(None, notes)))


def _sink(path: Path, source: AudioFile, force: bool):  # noqa: ANN202 (a context manager of AudioSink)
    kind, subtype = output_format(path, source)
    return new_audio(path, source.sample_rate, source.channels, kind, subtype, force=force)


def _run(stream: Stream, source: AudioFile, sinks: Sequence[AudioSink], progress: Progress | None) -> None:
    def write(ready: Float32) -> None:
        for sink, samples in zip(sinks, ready, strict=True):
            sink.write(samples)

    for block in source.blocks():
        write(stream.push(block))
        if progress:
            progress(block.shape[1] / source.sample_rate)
    write(stream.finish())
