"""Take a sound of any length through a causal model, step by step, as it comes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from .dsp import Float32
from .family import StepFamily, Steps


@dataclass
class StepState:
    """All that is remembered between steps, besides the model's own state.

    Attributes:
        heard: [channels, n], samples from `before` samples before the next step on.
        received, emitted: samples since the beginning.
    """

    heard: Float32
    received: int = 0
    emitted: int = 0


class Stepper:
    """Cuts a sound that arrives in pieces into steps and runs them; the same samples give the same results however they are cut.

    Args:
        steps: the model's state before the first step.
        conditions: [K, condition_size]; others may be set between two calls.
        slot: is held during each step.
    """

    def __init__(
        self,
        family: StepFamily,
        steps: Steps,
        channels: int,
        conditions: Float32,
        slot: AbstractContextManager[object] | None = None,
    ) -> None:
        self._family, self._steps, self._slot, self.conditions = family, steps, slot or nullcontext(), conditions
        self.state = StepState(np.zeros((channels, family.before), np.float32))

    @property
    def period(self) -> int:
        """Samples from one result to the next."""
        return self._family.step

    @property
    def delays(self) -> dict[str, int]:
        """Samples that a result waits for, by their reason."""
        return {"step": self._family.step, "look-ahead": self._family.after}

    def push(self, x: Float32) -> Float32:
        """The next samples [channels, n], n ≥ 0 → the results [K, channels, m] that they made ready."""
        state, family = self.state, self._family
        state.heard = np.concatenate([state.heard, x], axis=1)
        state.received += x.shape[1]
        steps = max(0, state.heard.shape[1] - family.before - family.after) // family.step
        return self._run(steps * family.step)

    def finish(self) -> Float32:
        """No more samples → all results that are left; what the model hears beyond the end is silence."""
        state, family = self.state, self._family
        left = state.received - state.emitted
        silence = np.zeros((len(state.heard), -left % family.step + family.after), np.float32)
        state.heard = np.concatenate([state.heard, silence], axis=1)
        return self._run(left)

    def _run(self, samples: int) -> Float32:
        """The next results; their number is a multiple of the step, but at the end of the sound."""
        state, family = self.state, self._family
        ready = np.empty((len(self.conditions), len(state.heard), samples), np.float32)
        for begin in range(0, samples, family.step):
            x = np.ascontiguousarray(state.heard[:, begin : begin + family.before + family.step + family.after])
            valid = min(family.step, samples - begin)
            with self._slot:
                ready[:, :, begin : begin + valid] = self._steps.run(x, self.conditions, valid)[:, :, :valid]
        state.heard = state.heard[:, samples:].copy()
        state.emitted += samples
        return ready
