"""What the numpy around the engine costs per window: time of each stage by turns, with one BLAS thread and with the default number.

Usage: python benchmarks/dsp.py --bundle DIR [--rounds N] [--json RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from clapsep.runtime import Bundle
from clapsep.runtime.families.clapsep import Clapsep
from clapsep.runtime.family import open_family
from clapsep.runtime.resampler import resample_2_3
from clapsep.runtime.stft import Stft

Row = dict[str, Any]
RESULT = Path(__file__).parent / "results" / "dsp.json"
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
PARTS = ("features", "reconstruct")  # that make a window's total


def stages(family: Clapsep) -> dict[str, Callable[[], Any]]:
    """One window through each stage alone, then through the two calls that a window needs."""
    random = np.random.default_rng(0)
    window = random.uniform(-1, 1, (1, family.window_samples)).astype(np.float32)
    transform, at_rate = Stft(family.dsp.n_fft, family.dsp.hop), resample_2_3(window)
    spectrum = transform.forward(window)
    mask = random.uniform(0, 1, spectrum.shape).astype(np.float32)
    return {
        "stft": lambda: transform.forward(window),
        "magnitude": lambda: np.abs(spectrum),
        "resample": lambda: resample_2_3(window, at_rate),
        "log_mel": lambda: family.towers.front_end.log_mel(at_rate),
        "istft": lambda: transform.inverse(spectrum, family.window_samples, mask),
        "features": lambda: family.features(window),
        "reconstruct": lambda: family.reconstruct({"mask": mask}, spectrum),
    }


def peak(call: Callable[[], Any]) -> int:
    """Bytes allocated at once by a call, its result among them."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = call()
        return tracemalloc.get_traced_memory()[1] - before if result is not None else 0
    finally:
        tracemalloc.stop()


def measure(bundle: Path, rounds: int) -> Row:
    """Seconds of each stage in each round, the stages by turns, and bytes allocated by one more call."""
    family = open_family(Bundle.open(bundle).manifest)
    assert isinstance(family, Clapsep)
    calls = stages(family)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):  # the first make the working memory
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    seconds["total"] = [sum(parts) for parts in zip(*(seconds[name] for name in PARTS), strict=True)]
    return {"seconds": seconds, "bytes": {name: peak(call) for name, call in calls.items()}}


def measure_apart(bundle: Path, rounds: int, threads: str | None) -> Row:
    """The same in a fresh process, where the number of BLAS threads can still be chosen."""
    environment = {name: value for name, value in os.environ.items() if name not in BLAS_THREADS}
    if threads is not None:
        environment |= dict.fromkeys(BLAS_THREADS, threads)
    words = [sys.executable, __file__, "--bundle", str(bundle), "--rounds", str(rounds), "--measure"]
    return json.loads(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)


def print_table(runs: dict[str, Row]) -> None:
    print(f"{'ms, median (smallest)':24}" + "".join(f"{f'BLAS threads: {name}':>24}" for name in runs) + f"{'allocated':>12}")
    allocated = next(iter(runs.values()))["bytes"]
    for stage in next(iter(runs.values()))["seconds"]:
        times = [[1000 * t for t in run["seconds"][stage]] for run in runs.values()]
        cells = "".join(f"{f'{statistics.median(t):.2f} ({min(t):.2f})':>24}" for t in times)
        print(f"{stage:24}{cells}" + (f"{allocated[stage] / 1e6:9.2f} MB" if stage in allocated else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.bundle, args.rounds)))
        return
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    machine = {"cpus": os.cpu_count(), "load": os.getloadavg(), "machine": platform.machine(), "system": platform.system()}
    runs = {name: measure_apart(args.bundle, args.rounds, threads) for name, threads in (("1", "1"), ("default", None))}
    about = {"bundle": args.bundle.name, "dsp": dict(Bundle.open(args.bundle).manifest.dsp), "versions": versions, "machine": machine}
    args.json.write_text(json.dumps(about | {"blas_threads": runs}) + "\n")
    print_table(runs)


if __name__ == "__main__":
    main()
