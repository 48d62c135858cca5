"""What `gpu_check.sh` measured, side by side, in Markdown: medians in ms, and for batches how much of the machine they use.

Usage: python benchmarks/gpu_tables.py RESULT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HALF = ("float16", "bfloat16")  # whose products are the ceiling, whichever was measured
HEAD = ("bundle", "runs on", "call", "median ms", "p10 to p90", "s of audio per s", "of half-precision products", "of float32 products")


def measured(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Bundle, what runs it, the call, and what was seen; also of steps that failed in another call."""
    for row in rows:
        bundle, on = f"{row['bundle']} {row['precision']}".strip(), f"{row['engine']} {row['device']}"
        if row["step"] == "pytorch":
            yield from ((bundle, on, name, seen) for name, seen in row["data"].get("calls", {}).items())
        elif row["step"] == "latency":
            found = {mode: part for mode, part in row["data"].items() if isinstance(part, dict) and "calls" in part}
            yield from ((bundle, f"{on}, {mode}", name, seen) for mode, part in found.items() for name, seen in part["calls"].items())


def cells(bundle: str, on: str, name: str, seen: dict[str, Any]) -> list[str]:
    shares, rate = seen.get("shares", {}), seen.get("audio seconds per second")
    half = next((shares[kind] for kind in HALF if kind in shares), None)
    of = ["" if share is None else f"{share:.1%}" for share in (half, shares.get("float32"))]
    return [bundle, on, name, f"{seen['median']:.4g}", f"{seen['p10']:.4g} to {seen['p90']:.4g}", f"{rate:.4g}" if rate else "", *of]


def show(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["step"] in ("ceilings", "operations") and row["status"] == "ok":
            print(f"{row['step']} {row['bundle']} {row['precision']} {row['device']}: {row['reason']}")
        for name, aim in row["data"].get("aims", {}).items():
            on = f"{row['engine']}, {row['bundle']} {row['precision']}"
            print(f"aim, {on}: {name} {aim['measured']:.3g}, wanted {aim['wanted']}: {'met' if aim['met'] else 'missed'}")
    print(f"\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for found in measured(result["rows"]):
        print(f"| {' | '.join(cells(*found))} |")


if __name__ == "__main__":
    show(json.loads(Path(sys.argv[1]).read_text()))
