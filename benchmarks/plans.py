"""TensorRT-RTX plans of the graphs that a GPU runs, compiled without one: layers, share of float16, time, size, the same bytes again.

Usage: python benchmarks/plans.py BUNDLE.clapsep... [--compute-capability X.Y]... [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clapsep.engines import PlanSettings
from clapsep.engines.tensorrt_builder import build
from clapsep.runtime import Bundle
from clapsep.runtime.plans import graphs_of

CAPABILITIES = ("8.6", "8.9", "12.0")
PACKAGES = ("tensorrt_rtx", "polygraphy", "clapsep-export")


def observe(bundle: Bundle, graph: str, capabilities: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Compile one graph for each capability alone, for all of them at once, and twice again: batch 1 to N, batch 1."""
    entry, model = bundle.manifest.graphs[graph], bundle.graph(graph)
    row: dict[str, Any] = {"bundle": bundle.path.name, "graph": graph, "precision": entry.precision, "nodes": entry.nodes, "plans": []}
    batch, first, plan = bundle.manifest.max_batch, capabilities[:1], folder / "plan"
    for size, target in [*((batch, (c,)) for c in capabilities), (batch, capabilities), (batch, first), (1, first), (1, first)]:
        print(f"{bundle.path.name} {graph} {entry.precision} for {' '.join(target)}, batch to {size}", file=sys.stderr)
        report = build("tensorrt-rtx", model, plan, PlanSettings(entry.precision, size, target), lambda _: None)
        row["plans"].append({"max_batch": size, "sha256": hashlib.sha256(plan.read_bytes()).hexdigest(), **asdict(report)})
        plan.unlink()
    return row


def show(rows: list[dict[str, Any]]) -> None:
    print("| graph | precision | nodes | layers | float16 layers | one GPU: s, MB | all: s, MB | same bytes again: batch 1 to N, batch 1 |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        *single, together, again, fixed, fixed_again = row["plans"]
        seconds, size = sorted(p["seconds"] for p in single)[len(single) // 2], single[0]["size"] / 1e6
        share = f"{single[0]['half_share']:.0%}"
        same = ["yes" if a["sha256"] == b["sha256"] else "no" for a, b in ((single[0], again), (fixed, fixed_again))]
        cells = [f"`{row['graph']}`", row["precision"], row["nodes"], single[0]["layers"], share, f"{seconds:.1f}, {size:.0f}"]
        print("| " + " | ".join(map(str, [*cells, f"{together['seconds']:.1f}, {together['size'] / 1e6:.0f}", ", ".join(same)])) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--compute-capability", action="append", dest="capabilities")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    capabilities = tuple(args.capabilities or CAPABILITIES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for bundle in map(Bundle.open, args.bundles):
            graphs = graphs_of(bundle.manifest.graphs, "cuda", "waveform", "split")
            rows += [observe(bundle, graph, capabilities, Path(folder)) for graph in graphs]
    show(rows)
    if args.json:
        about = {"python": platform.python_version(), "cpus": os.cpu_count(), **{name: version(name) for name in PACKAGES}}
        args.json.write_text(json.dumps({"versions": about, "observations": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
