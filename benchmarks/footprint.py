"""What the runtime costs to have: size of an installation without torch, and time to import it.

Usage: python benchmarks/footprint.py RESULT.json
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def main(result: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", scratch], check=True)
        python = Path(scratch) / "bin" / "python"

        def run(*words: str) -> str:
            return subprocess.run([str(python), *words], capture_output=True, text=True, check=True, cwd=scratch).stdout

        site = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        size = lambda: sum(p.stat().st_size for p in site.rglob("*") if p.is_file() and p.suffix != ".pyc")  # noqa: E731
        before = size()
        run("-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(ROOT))
        core = size() - before
        run("-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), f"{ROOT}[cpu]")
        cpu = size() - before
        packages = run("-m", "pip", "list", "--format", "freeze").split()
        times = {name: [float(run("-c", IMPORT.format(name))) for _ in range(15)] for name in ("numpy", "clapsep.runtime")}
    data = {"python": platform.python_version(), "core_bytes": core, "cpu_bytes": cpu, "packages": packages, "import_seconds": times}
    result.write_text(json.dumps(data, indent=1) + "\n")
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    print(f"runtime core {core / 1e6:.0f} MB, with onnxruntime {cpu / 1e6:.0f} MB, torch installed: {any('torch' in p for p in packages)}")
    print(f"import clapsep.runtime: median {medians['clapsep.runtime']:.0f} ms, of which numpy {medians['numpy']:.0f} ms")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
