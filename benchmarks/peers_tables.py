"""Tables of `peers.py`'s results in Markdown: medians over the rounds, and ratios taken within each round.

Usage: python benchmarks/peers_tables.py RESULT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

BUSY = 1.15  # a round whose product took this much longer than the quickest one is left out
TOO_WIDE = 1.1  # p90 / p10 of the reference over the rounds that count


def quiet_rounds(result: dict[str, Any]) -> list[int]:
    """Rounds in which the machine was all ours, by the float32 product at their beginning."""
    product = np.array(result["seconds"]["product"]["float32"])
    return [int(i) for i in np.flatnonzero(product <= BUSY * product.min())]


def floors(result: dict[str, Any], rounds: list[int]) -> dict[str, float]:
    """Seconds that the network's operations take at the rate of the measured products, by type."""
    work, product = result["operations"]["separator"], result["operations"]["product"]
    seconds = {kind: float(np.median(np.array(row)[rounds])) for kind, row in result["seconds"]["product"].items()}
    single = min(seconds.pop("numpy float32", np.inf), seconds["float32"])  # the quicker library's
    return {kind: value * work / product for kind, value in {**seconds, "float32": single}.items()}


def show(result: dict[str, Any]) -> None:
    rounds = quiet_rounds(result)
    product = np.array(result["seconds"]["product"]["float32"])[rounds]
    spread = float(np.percentile(product, 90) / np.percentile(product, 10))
    total = len(result["seconds"]["product"]["float32"])
    e = result["environment"]
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in e["cpu"]["flags"]]
    print(f"{e['cpu']['model']}, {result['about']['threads']} threads, {' '.join(flags)}; {len(rounds)} of {total} rounds were quiet")
    if len(rounds) < 5 or spread > TOO_WIDE:
        print(f"TOO NOISY TO QUOTE: {len(rounds)} quiet rounds, p90/p10 of the product {spread:.2f}")
    least = floors(result, rounds)
    work = result["operations"]["separator"] / 1e9
    for kind, floor in least.items():
        print(f"floor {kind}: {work:.1f} GFLOP at {work / floor:.0f} GFLOP/s = {1e3 * floor:.0f} ms")
    for task, row in result["seconds"].items():
        if task not in ("product", "copy"):
            table(task, row, result["snr_db"].get(task, {}), rounds, least if task == "network" else {})


def table(task: str, row: dict[str, list[float]], quality: dict[str, float | None], rounds: list[int], least: dict[str, float]) -> None:
    names = list(row)
    base = np.array(row[names[0]])[rounds]
    print(f"\n| {task} | median ms | p10 to p90 | {names[0]} / this | of the floor | SNR dB |\n|---|---|---|---|---|---|")
    for name in names:
        times = np.array(row[name])[rounds]
        low, high = 1e3 * np.percentile(times, [10, 90])
        floor = least.get("bfloat16" if "bf16" in name else "float32")
        cells = [f"{1e3 * np.median(times):.4g}", f"{low:.4g} to {high:.4g}", f"{np.median(base / times):.2f}"]
        cells += [f"{np.median(times) / floor:.2f}" if floor else "", f"{q:.1f}" if (q := quality.get(name)) is not None else ""]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    show(json.loads(Path(sys.argv[1]).read_text()))
