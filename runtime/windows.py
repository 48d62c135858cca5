"""Run a sound of any length through a model's windows, piece by piece, and join the results without seams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real

import numpy as np

from .dsp import Float32
from .errors import QueryError

DISCARD = 8  # of the overlap, one part of so many is thrown away at either side
OVERLAP = 1.0  # seconds
PRESETS: dict[str, dict[str, float | None]] = {  # seconds, None for the usual; docs/reliability.md has what they cost
    "offline": {"hop": None, "overlap": None},
    "fast": {"hop": None, "overlap": 0.25},
    "balanced": {"hop": 1.0, "overlap": 0.25},
    "live": {"hop": 0.5, "overlap": 0.25},
    "shortest": {"hop": 0.25, "overlap": 0.1},
}


@dataclass(frozen=True)
class WindowPlan:
    """Where windows lie and where one hands over to the next; sizes in samples at the model's rate.

    Window k ends at sample `first + k · hop` and holds the `window` samples before its end. In the last `overlap` samples before
    its end it hands over to window k + 1: the outer `discard` samples on either side are thrown away, the `fade` samples between them are
    cross-faded with weights sin² that sum to 1. The last window ends where the sound ends. A window that would begin before the
    sound begins with it instead, and is filled up with zeros. With hop + overlap = window (offline) neighbours share `overlap` samples and
    nothing else; a smaller hop hears most samples several times, so that results are ready sooner.
    """

    window: int
    hop: int
    overlap: int

    def __post_init__(self) -> None:
        if not (self.hop > 0 and self.overlap >= 0 and self.hop + self.overlap <= self.window):
            raise QueryError(f"a hop of {self.hop} and an overlap of {self.overlap} samples do not fit a window of {self.window}")

    @classmethod
    def of(cls, window: int, sample_rate: int, overlap: float, hop: float | None = None) -> WindowPlan:
        """From seconds; without a hop, the largest that fits.

        Raises:
            QueryError: not numbers, or hop and overlap are longer than the window, or the overlap than half of it.
        """
        limit = window / sample_rate
        if not isinstance(overlap, Real) or not 0 <= overlap <= limit / 2:
            raise QueryError(f"an overlap of {overlap} s does not fit the model's window; give 0 to {limit / 2:g} s")
        shared = round(float(overlap) * sample_rate)
        longest = window - shared
        if hop is None:
            return cls(window, longest, shared)
        if not isinstance(hop, Real) or not 1 / sample_rate <= hop < (longest + 0.5) / sample_rate:
            most = f"more than 0 and at most {longest / sample_rate:g} s"
            raise QueryError(f"a hop of {hop} s does not fit the model's window; with this overlap give {most}")
        return cls(window, min(round(float(hop) * sample_rate), longest), shared)

    @property
    def discard(self) -> int:
        return self.overlap // DISCARD

    @property
    def fade(self) -> int:
        return self.overlap - 2 * self.discard

    @property
    def latency(self) -> int:
        """A sample's result is ready at the latest when so many samples from it on have been heard."""
        return self.hop + self.overlap

    @property
    def first(self) -> int:
        """End of the first window."""
        return self.window - self.hop * -(-(self.window - self.latency) // self.hop)

    def ends(self, length: int) -> list[int]:
        """Ends of all windows of a sound of `length` samples."""
        return [*range(self.first, length, self.hop), length]


@dataclass
class WindowState:
    """All that is remembered between windows.

    Attributes:
        heard: [channels, window + hop], of which the first `kept` samples are the last ones received.
        tail: [targets, channels, n], results of the last window that are not final, n is 0 or fade + discard.
        received, emitted: samples since the beginning.
        windows: how many have been cut.
        waiting: windows [channels, window] that have been cut and not yet run, and their ends.
    """

    heard: Float32
    tail: Float32
    kept: int = 0
    received: int = 0
    emitted: int = 0
    windows: int = 0
    waiting: list[tuple[Float32, int]] = field(default_factory=list)


class Windower:
    """Cuts a sound that arrives in pieces into windows, runs `process` on them and joins the results.

    The same samples give the same results however they are cut into pieces.

    Args:
        process: windows [B, window] and conditions → [K, B, window], B ≤ `batch`.
        conditions: [K, condition_size]; others may be set between two calls.
        batch: how many windows are run at once; above 1 results are ready that much later.
    """

    def __init__(
        self, plan: WindowPlan, channels: int, conditions: Float32, process: Callable[[Float32, Float32], Float32], batch: int = 1
    ) -> None:
        self.plan, self.conditions, self._process, self._batch = plan, conditions, process, batch
        heard = np.zeros((channels, plan.window + plan.hop), np.float32)
        self.state = WindowState(heard, np.zeros((len(conditions), channels, 0), np.float32))
        self._fade = np.sin(np.pi / 2 * (np.arange(plan.fade) + 0.5) / max(plan.fade, 1)).astype(np.float32) ** 2

    @property
    def period(self) -> int:
        """Samples from one result to the next."""
        return self.plan.hop

    @property
    def delays(self) -> dict[str, int]:
        """Samples that a result waits for, by their reason."""
        return {"hop": self.plan.hop, "overlap": self.plan.overlap}

    def push(self, x: Float32) -> Float32:
        """The next samples [channels, n], n ≥ 0 → the results [targets, channels, m] that they made ready."""
        state, plan, ready = self.state, self.plan, []
        while x.shape[1]:
            end = plan.first + state.windows * plan.hop
            piece, x = np.split(x, [end - state.received], axis=1)
            self._hear(piece)
            if state.received == end:
                self._cut(end)
                ready += self._run(self._batch)
        return self._joined(ready)

    def finish(self) -> Float32:
        """No more samples → all results that are left."""
        state = self.state
        heard = self.plan.first + (state.windows - 1) * self.plan.hop if state.windows else 0  # where the last window ended
        if state.received > heard:
            self._cut(state.received)
        ready = [*self._run(1), state.tail]
        state.emitted += state.tail.shape[2]
        state.tail = state.tail[:, :, :0]
        return self._joined(ready)

    def _hear(self, piece: Float32) -> None:
        state, n = self.state, piece.shape[1]
        if state.kept + n > state.heard.shape[1]:
            begin, state.kept = state.kept - self.plan.window, self.plan.window
            state.heard[:, : state.kept] = state.heard[:, begin : begin + state.kept]
        state.heard[:, state.kept : state.kept + n] = piece
        state.kept += n
        state.received += n

    def _cut(self, end: int) -> None:
        state, size = self.state, self.plan.window
        window = np.zeros((len(state.heard), size), np.float32)
        last = state.heard[:, max(0, state.kept - size) : state.kept]
        window[:, : last.shape[1]] = last
        state.waiting.append((window, end))
        state.windows += 1

    def _run(self, enough: int) -> Iterator[Float32]:
        """Run the windows that wait, if there are enough of them, and join each to the one before."""
        waiting, channels = self.state.waiting, len(self.state.heard)
        if not waiting or len(waiting) * channels < enough:
            return
        rows = np.concatenate([window for window, _ in waiting])
        results = [self._process(rows[i : i + self._batch], self.conditions) for i in range(0, len(rows), self._batch)]
        targets = np.concatenate(results, axis=1)
        for i, (_, end) in enumerate(waiting):
            yield self._hand_over(targets[:, i * channels : (i + 1) * channels], end)
        waiting.clear()

    def _hand_over(self, target: Float32, end: int) -> Float32:
        """A window's results, from where the last window's were final to where its own are."""
        state, plan = self.state, self.plan
        start = max(0, end - plan.window)
        fresh = target[:, :, state.emitted - start : end - start].copy()
        n = min(plan.fade, state.tail.shape[2])  # 0 for the first window
        old, new = state.tail[:, :, :n], fresh[:, :, :n]
        new[:] = old + self._fade[:n] * (new - old)
        final = max(0, fresh.shape[2] - plan.fade - plan.discard)
        state.tail = fresh[:, :, final:]
        state.emitted += final
        return fresh[:, :, :final]

    def _joined(self, ready: list[Float32]) -> Float32:
        return np.concatenate([self.state.tail[:, :, :0], *ready], axis=2)
