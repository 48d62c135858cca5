"""What `families.py` measures in processes of their own, so that their memory is that of the runtime alone: no torch.

Usage: python benchmarks/family_child.py once|endless|traced BUNDLE [STEPS]; prints JSON
"""

from __future__ import annotations

import json
import os
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from clapsep.engines.child import peak_memory
from clapsep.runtime import Separator
from clapsep.runtime.family import Family, StepFamily
from numpy.typing import NDArray

Row = dict[str, Any]
SECONDS, EVERY, SETTLED = 10, 1000, 1000  # steps between two looks at the memory, and before the first one


def conditions(family: Family, count: int) -> NDArray[np.float32]:
    """[count, size]: one label each, or vectors of length 1."""
    if isinstance(family, StepFamily):
        return np.eye(count, family.condition_size, dtype=np.float32)
    rows = np.random.default_rng(0).uniform(0, 1, (count, family.condition_size)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sound(rate: int, seconds: float = SECONDS) -> NDArray[np.float32]:
    """The same sweeping chord under noise at any rate."""
    t = np.arange(round(seconds * rate)) / rate
    noise = 0.02 * np.random.default_rng(0).standard_normal(len(t))
    return sum((0.1 * np.sin(2 * np.pi * f * t * (1 + 0.02 * np.sin(t))) for f in (220, 660, 1500)), noise).astype(np.float32)


def resident() -> float:
    """MB in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def once(bundle: str) -> Row:
    """A bundle is opened and separates 10 s by a given condition, 2 threads."""
    before, begin = resident(), time.perf_counter()
    separator = Separator(bundle, threads=2)
    family = separator.family
    separator.separate(sound(family.sample_rate), family.sample_rate, condition=conditions(family, 1)[0])
    return {"seconds": time.perf_counter() - begin, "peak_mb": peak_memory() / 1e6, "before_mb": before, "after_mb": resident()}


def endless(bundle: str, steps: int) -> Row:
    """So many steps through one stream, with the memory resident after every thousand."""
    return _watched(bundle, steps, resident)


def traced(bundle: str, steps: int) -> Row:
    """The same with what Python and numpy have allocated in place of what the process holds; the engine's own memory is not in it."""
    tracemalloc.start()
    try:
        return _watched(bundle, steps, lambda: tracemalloc.get_traced_memory()[0] / 1e6)
    finally:
        tracemalloc.stop()


def _watched(bundle: str, steps: int, memory: Callable[[], float]) -> Row:
    separator = Separator(bundle, threads=1)
    family = separator.family
    assert isinstance(family, StepFamily)
    blocks = np.split(sound(family.sample_rate)[: 1000 * family.step], 1000)
    stream = separator.stream(condition=conditions(family, 1)[0])
    for i in range(SETTLED):
        stream.push(blocks[i % len(blocks)])
    seen, begin = np.zeros(steps // EVERY + 1), time.perf_counter()  # which is not to grow either
    seen[0], returned = memory(), 0
    for i in range(1, steps + 1):
        returned += len(stream.push(blocks[i % len(blocks)]))
        if i % EVERY == 0:
            seen[i // EVERY] = memory()
    assert returned == steps * family.step
    row = {"steps": steps, "sound_s": steps * family.step / family.sample_rate, "seconds": time.perf_counter() - begin}
    first, second = np.array_split(seen, 2)
    row |= {"first_half_mb": float(np.median(first)), "second_half_mb": float(np.median(second)), "peak_mb": float(seen.max())}
    growth = float(np.polyfit(np.arange(len(seen)), seen, 1)[0]) * 1e6 / EVERY if len(seen) > 1 else 0.0
    return row | {"growth_bytes_per_step": growth, "process_peak_mb": peak_memory() / 1e6, "mb": [round(float(x), 4) for x in seen]}


if __name__ == "__main__":
    name, path, *numbers = sys.argv[1:]
    print(json.dumps({"once": once, "endless": endless, "traced": traced}[name](path, *map(int, numbers))))
