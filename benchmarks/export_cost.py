"""Wall time, peak memory and size of a full-size build: generated weights, the real command, one JSON of raw observations.

Usage: python benchmarks/export_cost.py RESULT.json [RUNS]
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from clapsep.export.clapsep import SeparatorConfig
from clapsep.export.synthetic import write_generated
from clapsep.runtime import Bundle
from clapsep.runtime.families.clapsep import ClapsepDsp

STAGE = re.compile(r"^ *([\d.]+) s +([\d.]+) GiB +(.*)$")


def build(folder: Path, files: tuple[Path, Path, Path]) -> dict[str, Any]:
    """One build in a fresh process: its stages with start time and peak memory, and what the manifest says of the graphs."""
    out = folder / "full.clapsep"
    clap, checkpoint, tokenizer = files
    words = [sys.executable, "-m", "clapsep.export", "build", out, "--clap", clap, "--checkpoint", checkpoint, "--tokenizer", tokenizer]
    done = subprocess.run([*map(str, words), "--force"], capture_output=True, text=True, check=True)
    stages = [(float(m[1]), float(m[2]), m[3]) for line in done.stderr.splitlines() if (m := STAGE.match(line))]
    graphs = Bundle.open(out).manifest.graphs
    sizes = {name: {"nodes": g.nodes, "bytes": g.graph.size + (g.data.size if g.data else 0)} for name, g in graphs.items()}
    return {"stages": stages, "seconds": stages[-1][0], "peak_gib": max(peak for _, peak, _ in stages), "graphs": sizes}


def main(result: Path, runs: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        files = write_generated(Path(scratch), SeparatorConfig(), ClapsepDsp(), seed=1)
        observations = [build(Path(scratch), files) for _ in range(runs)]
        toolchain = Bundle.open(Path(scratch) / "full.clapsep").manifest.toolchain
    seconds = [o["seconds"] for o in observations]
    machine = {"cpus": os.cpu_count(), "load": os.getloadavg(), "machine": platform.machine(), "system": platform.system()}
    result.write_text(json.dumps({"machine": machine, "toolchain": toolchain, "observations": observations}, indent=1) + "\n")
    print(f"build: median {statistics.median(seconds):.0f} s of {seconds}, peak {max(o['peak_gib'] for o in observations):.1f} GiB")
    for name, graph in observations[0]["graphs"].items():
        print(f"{name}: {graph['nodes']} nodes, {graph['bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
