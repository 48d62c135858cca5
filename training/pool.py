"""Renders every clip that training draws from, once: python -m training.pool --out FOLDER."""

from __future__ import annotations

import argparse
import os
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from .sounds import CLASSES, RATE, render

SAMPLES = 4 * RATE
TRAIN_CLIPS, DEV_CLIPS = 480, 48
DEV_SEED = 900_000  # away from the seeds of benchmarks/quality.py


def _clip(task: tuple[str, int, bool]) -> NDArray[np.int16]:
    name, index, dev = task
    x = render(name, index + (DEV_SEED if dev else 0), SAMPLES, test=dev)
    return np.round(x * 32767).astype(np.int16)


def write_pool(folder: Path, clips: int, *, dev: bool, processes: int) -> Path:
    """Write clips int16 [classes, clips, samples]; training parameters, or test parameters for `dev`. Kept if it is there."""
    path = folder / ("dev.npy" if dev else "train.npy")
    if path.exists():
        print(f"{path} is there already")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    out = open_memmap(draft, "w+", np.int16, (len(CLASSES), clips, SAMPLES))
    tasks = [(name, i, dev) for name in CLASSES for i in range(clips)]
    with Pool(processes) as workers:
        for k, x in enumerate(workers.imap(_clip, tasks, 8)):
            out[k // clips, k % clips] = x
            if (k + 1) % (2 * clips) == 0:
                print(f"{path.name}: {k + 1} of {len(tasks)} clips", flush=True)
    out.flush()
    os.replace(draft, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=TRAIN_CLIPS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    write_pool(args.out, min(DEV_CLIPS, args.clips), dev=True, processes=args.processes)
    write_pool(args.out, args.clips, dev=False, processes=args.processes)


if __name__ == "__main__":
    main()
