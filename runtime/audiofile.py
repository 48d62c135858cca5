"""Audio files, read and written block by block."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

from .audio import MAX_CHANNELS, check_peak, check_rate, check_samples, peak_of
from .dsp import Float32
from .errors import AudioError, LimitError, OutputError
from .outputs import new_file, unwritable

log = logging.getLogger(__name__)
BLOCK = 1 << 16  # samples of all channels
READABLE = (".aifc", ".au", ".caf", ".oga", ".rf64", ".snd", ".w64")  # besides those that can also be written
FORMATS = {
    ".wav": "WAV",
    ".flac": "FLAC",
    ".ogg": "OGG",
    ".opus": "OGG",
    ".mp3": "MP3",
    ".aiff": "AIFF",
    ".aif": "AIFF",
}
WAV_LIMIT = (1 << 32) - 4096  # bytes; what is larger becomes RF64
FLOATS = ("FLOAT", "DOUBLE")
VORBIS_RATE = 200_000  # Hz
BYTES = {"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "DOUBLE": 8}


@dataclass(frozen=True)
class Limits:
    """What a file may have at most.

    Attributes:
        bytes: on disk.
        seconds: of a mixture; it is never in memory as a whole.
        samples: of a query's example, over all channels; it is in memory as a whole.
        example_seconds: of a query's example.
    """

    bytes: int = 1 << 36
    channels: int = MAX_CHANNELS
    seconds: float = 86400.0
    samples: int = 1 << 27
    example_seconds: float = 600.0


LIMITS = Limits()


@dataclass(frozen=True)
class AudioFile:
    """A file that was read once from end to end: `frames` samples in each channel, all finite, of magnitude `peak` at most.

    `format` and `subtype` are libsndfile's names; `identity` tells the file from what may come in its place.
    """

    path: Path
    frames: int
    channels: int
    sample_rate: int
    format: str
    subtype: str
    peak: float
    identity: tuple[int, ...]
    complaint: str = ""

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate

    def blocks(self) -> Iterator[Float32]:
        """The samples once more, [channels, n] at a time.

        Raises:
            AudioError: the file is not what it was.
        """
        left = self.frames
        with _opened(self.path) as file:
            for block in _read(file):
                yield check_samples(block[:left].T, str(self.path))
                left -= min(left, len(block))
                if not left:
                    break
        if left or _identity(self.path) != self.identity:
            raise AudioError(f"{self.path} was changed while it was read; separate it when it is complete")


def scan(path: str | Path, limits: Limits = LIMITS) -> AudioFile:
    """Read a WAV, FLAC, OGG, Opus, MP3 or AIFF file from end to end in little memory.

    Raises:
        AudioError: missing, unreadable, empty, or with samples that are not finite.
        LimitError: larger, longer or with more channels than `limits` allow.
    """
    path = _path(path)
    frames, bad, peak, where = 0, 0, 0.0, 0
    with _opened(path, limits) as file:
        identity = _identity(path)
        for block in _read(file):
            frames += len(block)
            if frames > limits.seconds * file.samplerate:
                raise LimitError(f"{path} is longer than {limits.seconds:g} s; cut it, or raise --max-seconds")
            wrong = block.size - int(np.isfinite(block).sum())
            peak = peak if wrong else max(peak, peak_of(block))
            where = where if bad or not wrong else frames - len(block) + int(np.argmin(np.isfinite(block).all(axis=1)))
            bad += wrong
        rate, complaint = check_rate(file.samplerate, str(path)), _complaint(path, file.frames, frames)
        found = AudioFile(path, frames, file.channels, rate, file.format, file.subtype, peak, identity, complaint)
    if not frames:
        raise AudioError(f"{path} has no samples; give a file with audio in it")
    if bad:
        first = where / found.sample_rate
        raise AudioError(f"{path} has {bad} NaN or infinite samples, the first at {first:.3f} s; repair the recording first")
    check_peak(peak, str(path))
    return found


def read_audio(path: str | Path, limits: Limits = LIMITS) -> tuple[Float32, int]:
    """Samples [channels, n] and sample rate of a whole file.

    Raises:
        AudioError, LimitError: as for `scan`, but `limits.samples` counts and not `limits.seconds`.
    """
    blocks, size = [], 0
    with _opened(_path(path), limits) as file:
        for block in _read(file):
            size += block.size
            if size > limits.samples or size > limits.example_seconds * file.samplerate * file.channels:
                most = f"{limits.example_seconds:g} s or {limits.samples} samples"
                raise LimitError(f"{path} has more than {most}; an example of a few seconds is enough")
            blocks.append(block.T)
        samples = np.concatenate(blocks, axis=1) if blocks else np.zeros((1, 0), np.float32)
        return check_samples(samples, str(path)), check_rate(file.samplerate, str(path))


def duration(path: Path) -> float:
    """Seconds of sound that a file's header promises, for progress bars; 0 if it cannot be read."""
    try:
        with _opened(path) as file:
            return min(file.frames / file.samplerate, LIMITS.seconds)
    except AudioError:
        return 0.0


def _path(path: str | Path) -> Path:
    try:
        return Path(path)
    except TypeError as error:
        raise AudioError(f"{path!r} is no path; give the name of an audio file") from error


@contextlib.contextmanager
def _opened(path: Path, limits: Limits = LIMITS) -> Iterator[Any]:
    """A soundfile.SoundFile; what it raises becomes an AudioError."""
    import soundfile as sf

    if not os.path.isfile(path):  # unlike Path's, it says no to names that no file can have
        raise AudioError(f"{path} is not a file; check the path")
    size = path.stat().st_size
    if size == 0:
        raise AudioError(f"{path} is empty; give a file with audio in it")
    if size > limits.bytes:
        raise LimitError(f"{path} has {size} bytes, and {limits.bytes} are allowed; raise --max-bytes")
    try:
        with path.open("rb") as stream, sf.SoundFile(stream.fileno(), closefd=False) as file:
            if file.channels > limits.channels:
                raise LimitError(f"{path} has {file.channels} channels, and {limits.channels} are allowed; raise --max-channels")
            yield file
    except (sf.LibsndfileError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise AudioError(f"{path} cannot be read as audio ({_reason(error)}); give a whole WAV, FLAC, OGG, Opus or MP3 file") from error


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(file: Any) -> Iterator[Float32]:
    """All samples of an open file in blocks [n, channels]; the length in a header may be a lie."""
    frames = max(1, BLOCK // file.channels)
    while len(block := file.read(frames, dtype="float32", always_2d=True)):
        yield block


def _complaint(path: Path, promised: int, found: int) -> str:
    """A file that ends before its header says so. Writers to pipes leave 0 or the largest number in the header."""
    with path.open("rb") as file:
        head = file.read(8)
    order = {b"RIFF": "little", b"FORM": "big"}.get(head[:4])
    size = int.from_bytes(head[4:8], order) if order else 0  # pyright: ignore[reportArgumentType]
    there = path.stat().st_size - 8
    if 0 < there < size < 0xFFFFFF00:
        return f"{path} ends early: its header promises {size} bytes and {there} are there; what is there is used"
    if found < promised < 1 << 40:
        return f"{path} ends early: its header promises {promised} samples and {found} are there; what is there is used"
    return ""


def output_format(path: Path, like: AudioFile) -> tuple[str, str]:
    """Format by the extension of `path`; the subtype is kept from `like` where the format has it."""
    import soundfile as sf

    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise AudioError(f"{path} has no known audio extension; use one of: {' '.join(FORMATS)}")
    if path.suffix.lower() == ".opus":
        return kind, "OPUS"
    available = sf.available_subtypes(kind)
    finest = "PCM_24" if "PCM_24" in available else str(sf.default_subtype(kind))  # never fewer bits than the input without need
    kept = like.subtype in available and (like.format == kind or like.subtype.startswith("PCM") or like.subtype in FLOATS)
    subtype = like.subtype if kept else finest
    large = like.frames * like.channels * BYTES.get(subtype, 4) > WAV_LIMIT
    if large and kind == "AIFF":
        raise OutputError(f"{path} would be larger than AIFF can be ({WAV_LIMIT} bytes); use .wav")
    return ("RF64" if kind == "WAV" and large else kind), subtype


class _Target:
    """A file for libsndfile, which says nothing of what goes wrong when it closes: it is kept here."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._at = file.fileno(), 0
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, os.fstat(self._file).st_size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        data = os.pread(self._file, size, self._at)
        self._at += len(data)
        return data

    def write(self, data: Any) -> int:
        left = memoryview(data)
        try:
            while left and self.error is None:
                done = os.pwrite(self._file, left, self._at)
                left, self._at = left[done:], self._at + done
        except OSError as error:
            self.error = error
        return len(data)


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """An interrupt while libsndfile calls `_Target` would be printed and forgotten; it comes afterwards instead."""
    pending: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # no other runs handlers
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if main and signal.getsignal(n) is not None]
    handlers = {number: signal.signal(number, lambda number, _frame: pending.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in pending:
            signal.raise_signal(number)


class AudioSink:
    """Samples on their way into an audio file. They lie on disk as float32 until their peak is known.

    Attributes:
        peak: largest magnitude so far.
        lowered: by how many dB, to be held by integers.
    """

    def __init__(self, path: Path, file: BinaryIO, encoded: Any, target: _Target, spool: IO[bytes]) -> None:
        self.path, self.lowered, self.peak = path, 0.0, 0.0
        self._file, self._encoded, self._target, self._spool = file, encoded, target, spool

    def write(self, samples: Float32) -> None:
        """The next samples [channels, n], n ≥ 0."""
        if samples.size:
            self.peak = max(self.peak, peak_of(samples))
            with self._writing():
                self._spool.write(np.ascontiguousarray(samples.T).data)

    def encode(self) -> tuple[int, int]:
        """All samples are there: put the whole file on disk; returns its size in bytes and its time in ns, which it keeps.

        The file is lowered if integers could not hold it; that is logged.

        Raises:
            OutputError: the disk is full.
        """
        gain = np.float32(1.0)
        if self.peak > 1 and self._encoded.subtype not in FLOATS:
            gain, self.lowered = np.float32(1 / self.peak), float(20 * np.log10(self.peak))
            level = logging.WARNING if self.lowered > 0.005 else logging.INFO
            why = f"because {self._encoded.subtype} cannot hold its peak; write a float .wav to keep the level"
            log.log(level, "%s: lowered by %.2f dB %s", self.path, self.lowered, why)
        with self._writing():
            self._spool.seek(0)
            for block in self._blocks():
                with _signals_deferred():
                    self._encoded.write(np.clip(block * gain, -1, 1) if self.lowered else block)
            with _signals_deferred():
                self._encoded.close()
            if self._target.error is not None:
                raise self._target.error
            os.fsync(self._file.fileno())
            status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _blocks(self) -> Iterator[Float32]:
        """[n, channels]"""
        channels = self._encoded.channels
        while data := self._spool.read(BLOCK // channels * channels * 4):
            yield np.frombuffer(data, np.float32).reshape(-1, channels)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        import soundfile as sf

        try:
            yield
        except OSError as error:
            raise unwritable(self.path, error) from error
        except (sf.LibsndfileError, AssertionError) as error:
            raise OutputError(f"{self.path} cannot be written ({_reason(error)}); write a .wav") from error


@contextlib.contextmanager
def new_audio(path: Path, sample_rate: int, channels: int, kind: str, subtype: str, *, force: bool = False) -> Iterator[AudioSink]:
    """An audio file that takes its name after the block, in which `encode` must have been called.

    Raises:
        OutputExists: `path` exists and `force` is not set.
        OutputError: the format cannot hold this, or the disk is full, or the place is not writable.
    """
    with new_file(path, force=force) as file, tempfile.TemporaryFile(dir=path.parent) as spool:
        target, encoded = _Target(file), None
        try:
            with _signals_deferred():
                encoded = _encoder(target, path, sample_rate, channels, kind, subtype)
            yield AudioSink(path, file, encoded, target, spool)
        finally:
            if encoded is not None:
                with _signals_deferred():
                    encoded.close()


def _encoder(target: _Target, path: Path, sample_rate: int, channels: int, kind: str, subtype: str) -> Any:
    """A soundfile.SoundFile that writes into `target`."""
    import soundfile as sf

    detail = f"{channels} channels at {sample_rate} Hz as {kind}/{subtype}"
    if subtype == "VORBIS" and sample_rate > VORBIS_RATE:  # libsndfile would end the process
        raise OutputError(f"{path} cannot hold {detail} (Vorbis ends at {VORBIS_RATE} Hz); use .wav")
    try:
        sf.write(io.BytesIO(), np.zeros((1, channels), np.float32), sample_rate, subtype, format=kind)  # FLAC says no at the first sample
        return sf.SoundFile(cast(BinaryIO, target), "w", sample_rate, channels, subtype, format=kind)
    except (sf.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        raise OutputError(f"{path} cannot hold {detail} ({_reason(error)}); use .wav") from error


def _reason(error: Exception) -> str:
    """libsndfile's words, without the name of the file."""
    return str(getattr(error, "error_string", error)).removeprefix("Error : ").strip().rstrip(".")
