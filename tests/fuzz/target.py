"""What a fuzz target is: a function from bytes to None, with seeds and the ways in which they are damaged.

To add one, write the function in a file of this folder, decorate it with `@target(seeds)`, and name it in `targets.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .mutators import damage

Mutator = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """`run` is called with hostile bytes: it returns or raises a ClapsepError within `seconds`; everything else is a finding."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutators: tuple[Mutator, ...]
    seconds: float

    @cached_property
    def _valid(self) -> list[bytes]:
        return self.seeds()

    def valid(self) -> list[bytes]:
        """Inputs as they should be, made once."""
        return self._valid

    def make(self, seed: int, number: int) -> bytes:
        """Input `number` of a run with `seed`, always the same."""
        rng = random.Random(f"{self.name} {seed} {number}")
        return rng.choice(self.mutators)(rng, rng.choice(self.valid()))


TARGETS: dict[str, Target] = {}


def target(seeds: Callable[[], list[bytes]], *mutators: Mutator, seconds: float = 5) -> Callable[[Callable[[bytes], None]], Target]:
    """Make a function a target under its own name; without mutators, bytes are damaged at random."""

    def register(run: Callable[[bytes], None]) -> Target:
        made = Target(run.__name__, run, seeds, mutators or (damage,), seconds)
        TARGETS[made.name] = made
        return made

    return register


def sample_bundle() -> Path:
    """A valid bundle, which nobody may change."""
    return Path(os.environ["CLAPSEP_FUZZ_BUNDLE"])


def written(data: bytes, name: str) -> Path:
    """A file with this content in the target's own folder, which is the current one."""
    path = Path(name)
    path.write_bytes(data)
    return path
