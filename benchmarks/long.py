"""Memory of long files: separates files of several lengths with the command and watches how much memory it holds.

Usage: python benchmarks/long.py BUNDLE [--minutes N]... [--json RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from clapsep.export.bench.environment import look_around

RATE, WARM_UP = 44100, 10.0  # seconds of work after which memory must not grow
RESULT = Path(__file__).parent / "results" / "long.json"
Row = dict[str, Any]


def write_noise(path: Path, minutes: float) -> None:
    """Stereo 16-bit noise whose level comes and goes."""
    random = np.random.default_rng(0)
    with sf.SoundFile(path, "w", RATE, 2, "PCM_16", format="RF64" if minutes > 200 else "WAV") as file:
        for i in range(round(minutes * 60)):
            file.write(random.uniform(-0.5, 0.5, (RATE, 2)) * (0.5 + 0.5 * np.sin(i / 7)))


def resident(pid: int) -> float:
    """MB in memory, 0 after the end."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def watch(bundle: Path, minutes: float, folder: Path) -> Row:
    source, out = folder / "in.wav", folder / "out.wav"
    write_noise(source, minutes)
    words = [sys.executable, "-m", "clapsep.runtime", "separate", str(bundle), str(source), "--positive", "rain", "-o", str(out), "--force"]
    begin, seen = time.perf_counter(), []
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        seen.append((round(time.perf_counter() - begin, 2), round(resident(process.pid), 1)))
        time.sleep(0.2)
    took, said = time.perf_counter() - begin, process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        sys.exit(said)
    assert sf.info(out).frames == sf.info(source).frames
    late = [memory for second, memory in seen if second > min(WARM_UP, took / 4) and memory]
    row = {"minutes": minutes, "seconds": round(took, 1), "rtf": took / minutes / 60, "peak_mb": max(m for _, m in seen)}
    return row | {"after_warm_up_mb": [min(late), max(late)], "resident_mb": seen[:: max(1, len(seen) // 200)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, action="append")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = []
    for minutes in arguments.minutes or [2.0, 10.0, 60.0]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(watch(arguments.bundle, minutes, Path(folder)))
        row, (low, high) = rows[-1], rows[-1]["after_warm_up_mb"]
        figures = f"{row['seconds']} s, RTF {row['rtf']:.4f}, peak {row['peak_mb']} MB, after warm-up {low} to {high} MB"
        print(f"{minutes:g} min: {figures}", flush=True)
    result = {"environment": asdict(look_around()), "rate": RATE, "channels": 2, "runs": rows}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
