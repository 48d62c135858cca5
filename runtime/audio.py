"""Audio in and out: files, channel layout, sample rates, levels. Outputs appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import operator
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dsp import Float32
from .errors import AudioError, OutputError, OutputExists

log = logging.getLogger(__name__)
MAX_CHANNELS = 64
BLOCK = 1 << 20  # samples
HEADROOM = 0.9  # peaks above 1 are brought here before separation, and back after it
FORMATS = {
    ".wav": "WAV",
    ".flac": "FLAC",
    ".ogg": "OGG",
    ".opus": "OGG",
    ".mp3": "MP3",
    ".aiff": "AIFF",
    ".aif": "AIFF",
}


@dataclass(frozen=True)
class Audio:
    """Samples [channels, n] float32, their rate in Hz, and the file format and subtype (libsndfile's names) they came from."""

    samples: Float32
    sample_rate: int
    format: str = ""
    subtype: str = ""


def check_rate(sample_rate: int, what: str) -> int:
    """A sample rate as an int; raises AudioError if it is none, or impossible."""
    try:
        rate = operator.index(sample_rate)
    except TypeError as error:
        raise AudioError(f"{what} has a sample rate of {sample_rate!r}; pass an integer in Hz") from error
    if not 1 <= rate <= 1_000_000:
        raise AudioError(f"{what} has a sample rate of {rate} Hz; pass a rate from 1 to 1000000 Hz")
    return rate


def check_samples(samples: NDArray[Any], what: str) -> Float32:
    """Samples as finite float32 [n] or [channels, n]; integers are scaled by their full range.

    Raises:
        AudioError: not numbers, wrong rank, no samples, too many channels, NaN or infinite samples.
    """
    try:
        array = np.asarray(samples)
    except ValueError as error:
        raise AudioError(f"{what} is no array of samples ({error}); pass [n] or [channels, n]") from error
    if array.ndim not in (1, 2):
        raise AudioError(f"{what} has {array.ndim} axes; pass samples as [n] or [channels, n]")
    if array.size == 0:
        raise AudioError(f"{what} has no samples; pass at least one")
    if array.ndim == 2 and len(array) > MAX_CHANNELS:
        raise AudioError(f"{what} has {len(array)} channels; transpose [n, channels] to [channels, n] (at most {MAX_CHANNELS})")
    if array.dtype.kind == "i":
        array = array / -float(np.iinfo(array.dtype).min)
    elif array.dtype.kind != "f":
        raise AudioError(f"{what} has samples of type {array.dtype}; pass float or signed integer samples")
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused in the next line
        array = array.astype(np.float32)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise AudioError(f"{what} has {bad} NaN or infinite samples; repair the recording first")
    return array


def read_audio(path: str | Path) -> Audio:
    """Read a WAV, FLAC, OGG, Opus, MP3 or AIFF file.

    Raises:
        AudioError: missing, unreadable, empty, or with samples that are not finite.
    """
    import soundfile as sf

    path = Path(path)
    if not os.path.isfile(path):  # unlike Path's, it says no to names that no file can have
        raise AudioError(f"{path} is not a file; check the path")
    if path.stat().st_size == 0:
        raise AudioError(f"{path} is empty; give a file with audio in it")
    try:
        with path.open("rb") as stream, sf.SoundFile(stream) as file:
            blocks = _blocks(file)
            rate, kind, subtype = file.samplerate, file.format, file.subtype
    except (sf.LibsndfileError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise AudioError(f"{path} cannot be read as audio ({reason}); give a WAV, FLAC, OGG, Opus or MP3 file") from error
    samples = np.concatenate(blocks, axis=1) if blocks else np.zeros((1, 0), np.float32)
    return Audio(check_samples(samples, str(path)), check_rate(rate, str(path)), kind, subtype)


def _blocks(file: Any) -> list[Float32]:
    """All samples of an open file in blocks [channels, BLOCK or fewer]; the length in a header may be a lie."""
    blocks = []
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block.T)
    return blocks


def to_mono(samples: Float32) -> Float32:
    """Mean of the channels: [n] or [channels, n] → [n]."""
    return samples if samples.ndim == 1 else samples.mean(0, dtype=np.float32)


def resample(x: Float32, source: int, target: int) -> Float32:
    """Resample [n] by soxr (HQ): ceil(n · target / source) samples, so never none."""
    if source == target:
        return x
    import soxr

    wanted = -(-len(x) * target // source)
    return fit_length(soxr.resample(x, source, target, quality="HQ").astype(np.float32), wanted)


def fit_length(x: Float32, length: int) -> Float32:
    """Cut or fill up with zeros to `length` samples."""
    return x[:length] if len(x) >= length else np.pad(x, (0, length - len(x)))


def headroom_gain(samples: Float32) -> float:
    """The factor that brings a peak above 1 to 0.9; 1 for everything else."""
    peak = float(np.max(np.abs(samples)))
    return HEADROOM / peak if peak > 1 else 1.0


def output_format(path: Path, like: Audio) -> tuple[str, str]:
    """Format by the extension of `path`; the subtype is kept from `like` where the format has it."""
    import soundfile as sf

    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise AudioError(f"{path} has no known audio extension; use one of: {' '.join(FORMATS)}")
    if path.suffix.lower() == ".opus":
        return kind, "OPUS"
    available = sf.available_subtypes(kind)
    if like.subtype in available and (like.format == kind or like.subtype.startswith("PCM")):
        return kind, like.subtype
    finest = "PCM_24" if "PCM_24" in available else sf.default_subtype(kind)  # never fewer bits than the input without need
    return kind, str(finest)


def write_audio(path: Path, samples: Float32, sample_rate: int, kind: str, subtype: str, *, force: bool = False) -> None:
    """Write [channels, n] to `path` through a temporary file in the same directory.

    Samples beyond full scale, which integer formats cannot hold, are avoided by lowering the whole file; that is logged.

    Raises:
        OutputExists: `path` exists and `force` is not set.
        OutputError: the format cannot hold these samples, or the disk is full, or the place is not writable.
    """
    import soundfile as sf

    peak = float(np.max(np.abs(samples)))
    if peak > 1 and subtype not in ("FLOAT", "DOUBLE"):
        log.warning(
            "%s: lowered by %.2f dB because %s cannot hold its peak; write a float .wav to keep the level",
            path,
            20 * np.log10(peak),
            subtype,
        )
        samples = samples / np.float32(peak)
    encoded = io.BytesIO()
    try:
        sf.write(encoded, samples.T, sample_rate, format=kind, subtype=subtype)
    except (sf.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        channels = samples.shape[0]
        detail = f"{channels} channels at {sample_rate} Hz as {kind}/{subtype}"
        raise OutputError(f"{path} cannot hold {detail} ({str(error).strip().rstrip('.')}); use .wav") from error
    with new_file(path, force=force) as file:
        file.write(encoded.getbuffer())


@contextlib.contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[Any]:
    """A binary file that takes its name only when it is complete; without `force` it never replaces another."""
    if os.path.exists(path) and not force:
        raise OutputExists(f"{path} exists; choose another name or pass --force")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _give_name(temporary, path, force)
    except FileExistsError as error:
        raise OutputExists(f"{path} exists; choose another name or pass --force") from error
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); choose another place or free some space") from error
    finally:
        with contextlib.suppress(OSError):  # what could not be made cannot be removed
            temporary.unlink()


def _give_name(temporary: Path, path: Path, force: bool) -> None:
    """A link, unlike a rename, fails if somebody made the file meanwhile; some file systems have none."""
    try:
        if not force:
            os.link(temporary, path)
            return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
    os.replace(temporary, path)
