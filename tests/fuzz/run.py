"""Fuzz everything that comes from outside: `python tests/fuzz/run.py [--target NAME]... [--count N] [--json OUT]`.

Each target runs in a child process with a memory limit and a watchdog. Success and typed errors are fine; everything else is a
finding, whose input is saved.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parent)  # in place of this folder, some of whose names others have too

from fuzz.guided import load_atheris  # noqa: E402
from fuzz.session import Session  # noqa: E402
from fuzz.targets import NAMES  # noqa: E402

LIBRARIES = ("numpy", "onnxruntime", "openvino", "onnx", "torch", "safetensors", "tokenizers", "soundfile", "click")


def make_bundle(folder: Path) -> Path:
    """A bundle of the tests' tiny model."""
    from clapsep.export.build import Request, build
    from tiny import variant

    (folder / "source").mkdir(parents=True)
    files = variant(folder / "source")
    out = folder / "tiny.clapsep"
    build(out, Request(str(files.clap), str(files.checkpoint), str(files.tokenizer), engines=()), lambda _: None)
    return out


def fuzz(given: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    """Results of each target by its name."""
    results = {}
    for name in given.target or NAMES:
        with tempfile.TemporaryDirectory(prefix="clapsep-fuzz-") as room:
            results[name] = Session(name, given.seed, bundle, Path(room), given.saved.absolute(), guided=given.atheris).run(
                given.count, given.seconds
            )
        found = results[name]
        kinds = ", ".join(f"{f['kind']} {f['type']} at {f['place']} ×{f['count']}" for f in found["findings"])
        print(
            f"{name}: {found['inputs']} inputs in {found['seconds']:.0f} s, {found['accepted']} accepted; findings: {kinds or 'none'}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=NAMES, help="only these")
    parser.add_argument("--count", type=int, default=200, help="inputs for each target")
    parser.add_argument("--seconds", type=float, default=600, help="time for each target at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bundle", type=Path, help="a bundle to damage copies of; made if not given")
    parser.add_argument("--saved", type=Path, default=Path("build/fuzz"), help="folder for the inputs of findings")
    parser.add_argument("--json", type=Path, help="write or complete this report")
    parser.add_argument("--atheris", action="store_true", help="let coverage guide the inputs of pure Python targets (needs atheris)")
    given = parser.parse_args()
    if given.atheris:
        load_atheris()
    with tempfile.TemporaryDirectory(prefix="clapsep-fuzz-") as folder:
        bundle = (given.bundle or make_bundle(Path(folder))).absolute()
        results = fuzz(given, bundle)
    if given.json is not None:
        write(given.json, {name + (", guided" if given.atheris else ""): {"seed": given.seed, **r} for name, r in results.items()})
    sys.exit(any(result["findings"] for result in results.values()))


def write(path: Path, results: dict[str, Any]) -> None:
    """The report; targets that were not run this time keep what an earlier run found."""
    earlier = json.loads(path.read_text())["targets"] if path.exists() else {}
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in LIBRARIES},
        "targets": {**earlier, **results},
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
