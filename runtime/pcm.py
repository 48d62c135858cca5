"""Raw PCM that comes and goes through pipes: samples as bytes, a reader that holds nobody up, and a stream between two pipes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from threading import Condition, Thread

import numpy as np

from .dsp import Float32
from .errors import AudioError, OutputError
from .stream import Stream

log = logging.getLogger(__name__)
FORMATS = {"f32le": 4, "s16le": 2, "s24le": 3, "s32le": 4}  # ffmpeg's names, bytes of a sample
MAGIC = {b"RIFF": "a WAV file", b"fLaC": "a FLAC file", b"OggS": "an OGG file", b"FORM": "an AIFF file", b"ID3": "an MP3 file"}
PIECE = 1 << 16  # bytes read at once; as many as a pipe of Linux holds


def decode(data: bytes, form: str, channels: int) -> Float32:
    """Whole interleaved frames → [channels, n]; integers are scaled by their full range to [-1, 1)."""
    if form == "f32le":
        return np.frombuffer(data, "<f4").reshape(-1, channels).T
    size = FORMATS[form]
    high = np.zeros((len(data) // size, 4), np.uint8)  # every integer in the high bytes of 32 bits
    high[:, 4 - size :] = np.frombuffer(data, np.uint8).reshape(-1, size)
    samples = high.view("<i4").astype(np.float32) * np.float32(2.0**-31)
    return samples.reshape(-1, channels).T


def encode(samples: Float32, form: str) -> tuple[bytes, int]:
    """[channels, n] → interleaved frames, and how many samples were beyond full scale and had to be clipped (no float is)."""
    frames = np.ascontiguousarray(samples.T)
    if form == "f32le":
        return frames.astype("<f4", copy=False).tobytes(), 0
    size = FORMATS[form]
    full = 2.0 ** (8 * size - 1)
    integers = np.clip(np.rint(frames.astype(np.float64) * full), -full, full - 1).astype("<i4")
    low = integers.view(np.uint8).reshape(-1, 4)[:, :size]
    return low.tobytes(), int(np.count_nonzero(np.abs(samples) > 1))


class Reader:
    """Reads a pipe in a thread of its own, so that whoever writes into it is not held up while a window is computed.

    Attributes:
        limit: bytes that wait here at most; then the writer waits, and nothing is dropped.
        most: bytes that have waited here at most so far.
    """

    def __init__(self, descriptor: int, limit: int) -> None:
        self.limit, self.most = limit, 0
        self._descriptor, self._held, self._ended = descriptor, bytearray(), False
        self._error: OSError | None = None
        self._changed = Condition()
        Thread(target=self._fill, name="pcm reader", daemon=True).start()  # a read that never returns must not keep the process

    def read(self, size: int) -> bytes:
        """What has come, `size` bytes at most; waits for the first; nothing at the end.

        Raises:
            AudioError: the pipe could not be read.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._held or self._ended)
            piece = bytes(self._held[:size])
            del self._held[:size]
            self._changed.notify()
        if self._error is not None and not piece:
            raise AudioError(f"the input cannot be read ({self._error.strerror}); pipe raw PCM into it") from self._error
        return piece

    def stop(self) -> None:
        """No more is read; what has come is still given."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _fill(self) -> None:
        try:
            while data := os.read(self._descriptor, min(PIECE, self._room())):
                with self._changed:
                    if self._ended:
                        return
                    self._held += data
                    self.most = max(self.most, len(self._held))
                    self._changed.notify()
        except OSError as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _room(self) -> int:
        with self._changed:
            self._changed.wait_for(lambda: len(self._held) < self.limit)
            return self.limit - len(self._held)


def whole_frames(read: Callable[[int], bytes], frame: int, most: int) -> Iterator[bytes]:
    """What `read` gives, in pieces of whole frames of `frame` bytes, at most `most` frames each; a torn last one is logged and left out."""
    rest = b""
    while piece := read(most * frame - len(rest)):
        data = rest + piece
        rest = data[len(data) - len(data) % frame :]
        yield data[: len(data) - len(rest)]
    if rest:
        log.warning("the input ends within a sample frame: its last %d bytes of %d were left out", len(rest), frame)


def refuse_files(data: bytes) -> None:
    """Raises AudioError if PCM begins as files do: their headers would be heard as a click, and some as noise."""
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    if kind:
        raise AudioError(f"the input is {kind} and not raw PCM; decode it first, such as with ffmpeg -f f32le, or use clapsep separate")


class Pump:
    """Passes PCM through a stream that was opened with `channels`, and counts.

    Attributes:
        frames: written so far.
        received: seconds of sound that were pushed.
        computing, longest: seconds in all pushes and in the longest of them.
        clipped: samples beyond the full scale of an integer format.
    """

    def __init__(self, stream: Stream, form: str, channels: int, write: Callable[[bytes], object]) -> None:
        self._stream, self._form, self._channels, self._write = stream, form, channels, write
        self.frames = self.clipped = 0
        self.computing = self.longest = 0.0

    @property
    def received(self) -> float:
        return self._stream.state.received / self._stream.sample_rate

    def run(self, pieces: Iterable[bytes]) -> None:
        """Every piece holds whole frames. Results are written as soon as they are ready.

        Raises:
            AudioError: samples that are not finite.
            EngineError: the engine failed.
            BrokenPipeError, OutputError: as for `write_all`.
        """
        for i, piece in enumerate(pieces):
            if i == 0:
                refuse_files(piece)
            block = decode(piece, self._form, self._channels)
            try:
                self._pass(lambda block=block: self._stream.push(block))
            except AudioError as error:
                raise AudioError(f"after {self.received:.2f} s of input: {error} (--format is {self._form})") from error
        self._pass(self._stream.finish)

    def _pass(self, work: Callable[[], Float32]) -> None:
        begin = time.perf_counter()
        ready = work()
        took = time.perf_counter() - begin
        self.computing, self.longest = self.computing + took, max(self.longest, took)
        if not ready.size:
            return
        data, clipped = encode(ready, self._form)
        self._write(data)
        self.frames += ready.shape[1]
        self.clipped += clipped


def write_all(descriptor: int, data: bytes) -> None:
    """At once and not through a buffer, so that nothing is left to be flushed when the reader has gone.

    Raises:
        BrokenPipeError: nobody reads any more.
        OutputError: the disk is full, and the like.
    """
    left = memoryview(data)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the output cannot be written ({error.strerror}); free some space or choose another place") from error
