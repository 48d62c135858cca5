"""Separation of sound that arrives in pieces: a file, a microphone, a pipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .audio import LOUDEST, MAX_CHANNELS, check_rate, check_samples, headroom_gain, peak_of
from .dsp import Float32
from .errors import AudioError, EngineError, StreamError
from .query import Query
from .rates import Resampler, fit_length
from .steps import StepState
from .windows import WindowPlan, WindowState

if TYPE_CHECKING:
    from .separator import Separator

log = logging.getLogger(__name__)
PIECE = 1 << 18  # samples at the model's rate


@dataclass
class StreamState:
    """All that a stream remembers, besides what its resamplers hold back.

    Attributes:
        heard: what was heard at the model's rate, and of windows the results that are not final.
        received, returned: samples at the stream's rate.
        closed: why nothing more can be pushed; empty while the stream is open.
    """

    heard: WindowState | StepState
    received: int = 0
    returned: int = 0
    closed: str = ""


class Stream:
    """Separates blocks of any size as they come; made by `Separator.stream`.

    Results do not depend on the sizes of the blocks, and are those of `Separator.separate` with the same hop and overlap, sample for
    sample. One stream belongs to one thread at a time; streams of one Separator do not disturb each other.

    Attributes:
        sample_rate: of blocks and results, in Hz.
        plan: window, hop and overlap at the model's rate; None for a causal model, which goes in steps of its own.
        period: seconds from one result to the next: the hop, or the step.
        latency: seconds after a sample, at the latest, in which its result is ready, without the time of computing.
        delays: what it is the sum of: hop and overlap, or the step and what it hears beyond it, and what the resamplers hold back where
            `sample_rate` is not the model's.
        state: to look at, not to change.
    """

    def __init__(
        self,
        separator: Separator,
        plan: WindowPlan | None,
        conditions: Float32,
        sample_rate: int | None,
        channels: int | None,
        *,
        peak: float = 1.0,
        single: bool = True,
        batch: int = 1,
    ) -> None:
        if channels is not None and not (isinstance(channels, Integral) and 0 < channels <= MAX_CHANNELS):
            raise AudioError(f"the stream has {channels!r} channels; give None for mono or a number from 1 to {MAX_CHANNELS}")
        if not isinstance(peak, Real) or not 0 <= peak <= LOUDEST:
            raise AudioError(f"a peak of {peak!r} was announced; give the largest magnitude that will come, such as 1")
        rate, rows = separator.family.sample_rate, channels or 1
        self.sample_rate = rate if sample_rate is None else check_rate(sample_rate, "the stream")
        self.plan = plan
        self._separator, self._channels, self._single = separator, channels, single
        self._peak, self._warned = max(1.0, float(peak)), False
        self._gain = np.float32(headroom_gain(peak))  # the model knows mixtures within [-1, 1]
        self._into = Resampler(self.sample_rate, rate, rows)
        self._out = Resampler(rate, self.sample_rate, len(conditions) * rows)
        self._driver = separator.drive(plan, rows, conditions, batch)
        self.period = self._driver.period / rate
        self.delays = {name: samples / rate for name, samples in self._driver.delays.items()}
        self.delays["resampling"] = self._into.delay + self._out.delay
        self.latency = sum(self.delays.values())
        self.state = StreamState(self._driver.state)
        self._busy = Lock()

    def push(self, block: NDArray[Any]) -> Float32:
        """Hear the next samples.

        Args:
            block: [n], or [channels, n] if the stream was opened with `channels`; n ≥ 0; float or signed integers; never modified.

        Returns:
            float32 results that became ready, [m] or [channels, m], of several queries [K, m] or [K, channels, m]; m may be 0.

        Raises:
            AudioError: a block of another shape, or with samples that are not finite; it was not heard, and the stream goes on.
            StreamError: the stream has ended, or another thread is in it.
            EngineError: the engine failed; the stream has ended.
        """
        samples = self._checked(block)
        return self._guarded(lambda: self._push(samples, last=False))

    def finish(self) -> Float32:
        """Nothing more will come → all results that are left; in all there are as many samples as were pushed.

        Raises:
            StreamError, EngineError: as for `push`.
        """
        nothing = np.zeros((self._channels or 1, 0), np.float32)
        return self._guarded(lambda: self._push(nothing, last=True), "it is finished")

    def ask(self, positive: Query | str | None = None, negative: Query | str | None = None, *, condition: Float32 | None = None) -> None:
        """Ask for something else from the next window or step on; between windows the old result fades into the new one.

        Raises:
            QueryError: as for `Separator.separate`.
            StreamError: as for `push`, or the stream answers several queries.
        """
        if not self._single:
            raise StreamError("the stream answers several queries, which stay as they are; open another one")
        asked = self._separator.ask(positive, negative, condition)[None]
        with self._alone():
            self._driver.conditions = asked

    def _checked(self, block: NDArray[Any]) -> Float32:
        """[channels, n]"""
        channels = self._channels
        try:
            array = np.asarray(block)
        except ValueError as error:
            raise AudioError(f"a block is no array of samples ({error}); push [n] or [channels, n]") from error
        wanted = "[n]" if channels is None else f"[{channels}, n]"
        if array.ndim != (1 if channels is None else 2) or (channels is not None and array.shape[0] != channels):
            raise AudioError(f"a block of shape {list(array.shape)} was pushed; this stream takes {wanted}")
        if array.size == 0:
            return np.zeros((channels or 1, 0), np.float32)
        return np.atleast_2d(check_samples(array, "a block"))

    def _guarded(self, work: Callable[[], Float32], closed: str = "") -> Float32:
        """A stream that was interrupted or failed within a window has lost its place, so it ends."""
        with self._alone():
            try:
                ready = work()
                self.state.closed = closed
                return ready
            except BaseException as error:
                self.state.closed = f"it failed ({error or type(error).__name__})"
                raise

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise StreamError("two threads use one stream at once; give each thread a stream of its own")
        try:
            if self.state.closed:
                raise StreamError(f"the stream takes nothing more, as {self.state.closed}; open another one")
            yield
        finally:
            self._busy.release()

    def _push(self, samples: Float32, *, last: bool) -> Float32:
        """Long blocks go through in pieces, so that only their results need memory."""
        size = max(1, PIECE * self.sample_rate // self._separator.family.sample_rate)
        pieces = [samples[:, i : i + size] for i in range(0, samples.shape[1], size)] or [samples]
        ready = [self._push_piece(piece, last=last) for piece in pieces]
        return ready[0] if len(ready) == 1 else np.concatenate(ready, axis=-1)

    def _push_piece(self, samples: Float32, *, last: bool) -> Float32:
        state = self.state
        if samples.size and not self._warned and (peak := peak_of(samples)) > self._peak:
            self._warned = True
            log.warning(
                "samples reach %.3g and a peak of %.3g was announced; results differ a little from a whole file's", peak, self._peak
            )
        state.received += samples.shape[1]
        targets = self._driver.push(self._into.push(samples * self._gain, last=last))
        if last:
            targets = np.concatenate([targets, self._driver.finish()], axis=2)
        if not np.isfinite(targets).all():
            raise EngineError("the model gave values that are not finite; verify the bundle on this machine, or ask something else")
        k, channels, n = targets.shape
        ready = self._out.push(targets.reshape(k * channels, n), last=last).reshape(k, channels, -1)
        left = state.received - state.returned
        ready = fit_length(ready, left) if last else ready[:, :, :left]
        state.returned += ready.shape[2]
        return self._shaped(ready / self._gain)

    def _shaped(self, ready: Float32) -> Float32:
        ready = ready[0] if self._single else ready
        return ready[..., 0, :] if self._channels is None else ready
