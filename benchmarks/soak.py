"""One Separator under load: threads separate mixtures of mixed lengths for minutes; every result is compared with a serial one.

Usage: python benchmarks/soak.py BUNDLE [--minutes N] [--threads N] [--engine KIND]... [--json RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from clapsep.export.bench.environment import look_around
from clapsep.runtime import Separator

RESULT = Path(__file__).parent / "results" / "soak.json"
QUERIES = ["rain", "a siren", "a dog barking", "wind", "a bell", "thunder"]
SECONDS = (1e-4, 0.03, 0.7, 2.5, 2.6, 7.0, 20.0)
Row = dict[str, Any]
Call = Callable[[], np.ndarray]


def streamed(separator: Separator, x: np.ndarray, rate: int, query: str) -> np.ndarray:
    stream = separator.stream(query, sample_rate=rate, channels=len(x))
    return np.concatenate([*(stream.push(block) for block in np.array_split(x, 9, axis=1)), stream.finish()], axis=1)


def mixtures() -> list[tuple[np.ndarray, int]]:
    """Noise of every length, mono and stereo."""
    random = np.random.default_rng(1)
    sizes = [(channels, max(1, round(seconds * rate)), rate) for seconds in SECONDS for rate, channels in ((32000, 1), (44100, 2))]
    return [(random.uniform(-1, 1, (channels, n)).astype(np.float32), rate) for channels, n, rate in sizes]


def calls(separator: Separator, sounds: list[tuple[np.ndarray, int]]) -> list[Call]:
    """Every mixture as a whole, as a stream and with several queries."""
    found = []
    for i, (x, rate) in enumerate(sounds):
        query = QUERIES[i % len(QUERIES)]
        found += [
            lambda x=x, rate=rate, query=query: separator.separate(x, rate, query, "speech"),
            lambda x=x, rate=rate, query=query: streamed(separator, x, rate, query),
            lambda x=x, rate=rate: separator.separate_many(x, rate, QUERIES[:3]),
        ]
    return found


def resident() -> float:
    """MB in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(bundle: Path, engine: str, minutes: float, threads: int) -> Row:
    sounds = mixtures()
    serial, shared = (Separator(bundle, engine, threads=1) for _ in range(2))
    wanted, mine = [call() for call in calls(serial, sounds)], calls(shared, sounds)
    del serial
    end, counts, errors, lock = time.monotonic() + 60 * minutes, Counter[str](), [], threading.Lock()

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        while time.monotonic() < end:
            i = int(random.integers(len(mine)))
            try:
                result = "equal" if np.array_equal(mine[i](), wanted[i]) else "different"
            except Exception as error:
                result = "error"
                errors.append(repr(error))
            with lock:
                counts[result] += 1
                counts["samples"] += wanted[i].size

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    begin, seen = time.monotonic(), []
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        seen.append((round(time.monotonic() - begin, 1), round(resident(), 1)))
        time.sleep(2)
    late = [memory for second, memory in seen if second > 6 * minutes]  # after a tenth of the time
    row = {"engine": engine, "threads": threads, "minutes": minutes, **counts, "errors": errors[:10]}
    return row | {"after_warm_up_mb": [min(late), max(late)], "resident_mb": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--engine", action="append")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = []
    for engine in arguments.engine or ["onnxruntime"]:
        rows.append(soak(arguments.bundle, engine, arguments.minutes, arguments.threads))
        row = rows[-1]
        counts = f"{row['equal']} equal, {row.get('different', 0)} different, {row.get('error', 0)} errors"
        print(f"{engine}: {counts}, after warm-up {row['after_warm_up_mb']} MB", flush=True)
    arguments.json.write_text(json.dumps({"environment": asdict(look_around()), "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
