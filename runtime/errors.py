"""The errors of the runtime and the export. Each type is something that a caller can act on."""

from __future__ import annotations

from ..engines.errors import ClapsepError, EngineError, EngineUnavailable

__all__ = [
    "AudioError",
    "BundleError",
    "CheckpointError",
    "ClapsepError",
    "DownloadError",
    "EngineError",
    "EngineUnavailable",
    "ExportError",
    "GateError",
    "HashMismatch",
    "InputError",
    "LimitError",
    "ManifestError",
    "MissingFile",
    "OutputError",
    "OutputExists",
    "QueryError",
    "RegressionError",
    "SchemaVersionError",
    "SizeMismatch",
    "StreamError",
    "UnsafePath",
    "WorkerError",
]


class InputError(ClapsepError):
    """Wrong usage or wrong input."""

    exit_code = 2


class AudioError(InputError):
    """An audio file or array cannot be used."""


class LimitError(AudioError):
    """An audio file is larger, longer, or has more channels than is allowed."""


class QueryError(InputError):
    """A query is empty or contradicts itself."""


class StreamError(InputError):
    """A stream has ended, or is used by two threads at once."""


class CheckpointError(InputError):
    """A checkpoint is unreadable, unsafe, incomplete, or not what it was given as."""


class BundleError(InputError):
    """A bundle cannot be used."""


class ManifestError(BundleError):
    """manifest.json is not JSON, or a field is missing or has the wrong type."""


class SchemaVersionError(BundleError):
    """The bundle was written by a newer format than this version reads."""


class MissingFile(BundleError):
    """A file that the manifest lists is not there."""


class SizeMismatch(BundleError):
    """A file is shorter or longer than the manifest says."""


class HashMismatch(BundleError):
    """A file's content is not what the manifest says."""


class UnsafePath(BundleError):
    """A path in the manifest would leave the bundle."""


class OutputExists(InputError):
    """The output is already there and nobody agreed to overwrite it."""


class OutputError(ClapsepError):
    """An output could not be written."""


class WorkerError(ClapsepError):
    """A worker process died, or met what nobody expected, while it separated a mixture."""


class DownloadError(ClapsepError):
    """A checkpoint could not be fetched."""


class ExportError(ClapsepError):
    """A graph could not be made, or is not what an engine needs."""


class GateError(ClapsepError):
    """A gate failed: the engine's output is not the model's."""


class RegressionError(ClapsepError):
    """A benchmark is slower, or needs more memory, than an earlier one."""
