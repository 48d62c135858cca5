"""What `gpu_check.sh` runs: every engine kind on this machine, each step in a process of its own, one line and one JSON row a step.

This process needs only the standard library; the steps are in `gpu_steps.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_task import REPETITIONS, REPLAYING, gpu_state, last_line, one_line

ROOT = Path(__file__).resolve().parents[1]
STEPS = Path(__file__).with_name("gpu_steps.py")
GPU_ENGINES = (("tensorrt", "cuda"), ("tensorrt-rtx", "cuda"), ("onnxruntime", "cuda"))
CONTROLS = (("openvino", "cpu"), ("onnxruntime", "cpu"))
PLANS = (*REPLAYING, "openvino")  # kinds to compile for; the first cannot run without
TIMEOUTS = {"build": 900, "compile": 1800, "latency": 1200, "pytorch": 1200}  # seconds
TIMEOUT = 600
PACKAGES = r"(torch|triton|onnx|numpy|openvino|tensorrt|nvidia|cuda|polygraphy|tokenizers|click|safetensors|soundfile|soxr|flatbuffers).*"
THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass
class Row:
    """One step: `status` is ok, failed or skipped, `reason` one sentence that sums up the data or says what was wrong."""

    step: str
    bundle: str = ""
    precision: str = ""
    engine: str = ""
    device: str = ""
    status: str = "ok"
    reason: str = ""
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """A bundle that may be changed: how it is called, where it lies, and what its network computes (empty if that could not be told)."""

    name: str
    precision: str
    path: Path
    network: dict[str, Any]


class Check:
    """The rows so far, printed and written as they come; `run` adds one by running a step in a child."""

    def __init__(self, out: Path, scratch: Path, seconds: float) -> None:
        self.out, self.scratch, self.seconds = out, scratch, seconds
        self.rows: list[Row] = []
        self._facts = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": seconds, "environment": environment()}
        self.write(complete=False)

    def write(self, complete: bool) -> None:
        """The whole JSON at once: the machine may go away at any time."""
        part = self.out.with_name(f".{self.out.name}.part")
        part.write_text(json.dumps({"complete": complete, **self._facts, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n")
        os.replace(part, self.out)

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        self.write(complete=False)
        what, on = f"{row.bundle} {row.precision}".strip(), f"{row.engine} {row.device}".strip()
        print(f"{row.status:8} {row.step:10} {what:12} {on:17} {row.seconds:6.1f} s  {row.reason[:240]}", flush=True)
        return row

    def run(self, row: Row, path: Path | None = None, **more: Any) -> Row:
        """Do the row's step in a child, which is told `more`; a crash or a hang is a failed row."""
        task = {name: getattr(row, name) for name in ("step", "precision", "engine", "device")}
        task |= {"path": str(path), "seconds": self.seconds, **more}
        start = time.perf_counter()
        row.status, row.reason, row.data = self._child(task, TIMEOUTS.get(row.step, TIMEOUT))
        row.seconds = round(time.perf_counter() - start, 2)
        return self.add(row)

    def _child(self, task: dict[str, Any], timeout: float) -> tuple[str, str, dict[str, Any]]:
        answer, log = self.scratch / "answer.json", self.scratch / "log"
        answer.unlink(missing_ok=True)
        with log.open("wb") as sink:
            words = [sys.executable, str(STEPS), json.dumps(task), str(answer)]
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True)
            code = wait(process, timeout)
        said = log.read_text(errors="replace")[-4000:]
        if code is None:
            return "failed", f"did not end within {timeout:g} s", {"log": said}
        if code != 0:
            how = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return "failed", f"{how}: {last_line(said)}", {"log": said}
        if not answer.exists():
            return "failed", f"ended without an answer: {last_line(said)}", {"log": said}
        status, reason, data = json.loads(answer.read_text())
        return status, reason, data if status == "ok" else {**data, "log": said}


def wait(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """Exit code, None if it took too long; whatever it started ends with it."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment() -> dict[str, Any]:
    """What figures depend on."""
    installed = {d.metadata["Name"]: d.version for d in reversed(list(metadata.distributions())) if d.metadata["Name"]}
    processors = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", processors.read_text()) if processors.exists() else None
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name, version in sorted(installed.items()) if re.fullmatch(PACKAGES, name, re.IGNORECASE)},
        "gpu": gpu_state(),
        "cpu": {"model": model[1] if model else platform.machine(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()},
        "threads": {name: os.environ.get(name) for name in THREADS},
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }


def bundles(check: Check, given: list[Path]) -> Iterator[Copy]:
    """Copies of the bundles that were given, or the demo bundle in both precisions."""
    if not given:
        for precision in ("fp32", "fp16"):
            path = check.scratch / f"demo-{precision}.clapsep"
            if check.run(Row("build", "demo", precision), path).status == "ok":
                yield examined(check, "demo", precision, path)
    for index, source in enumerate(given):
        row, path = Row("copy", source.resolve().name.removesuffix(".clapsep")), check.scratch / str(index) / "copy.clapsep"
        try:
            row.precision = json.loads((source / "manifest.json").read_text())["graphs"]["separator"]["precision"]
            shutil.copytree(source, path)
        except (OSError, ValueError, LookupError, TypeError) as error:
            row.status, row.reason = "failed", f"{source} cannot be read as a bundle ({type(error).__name__}: {one_line(error)})"
        if check.add(row).status == "ok":
            yield examined(check, row.bundle, row.precision, path)


def examined(check: Check, name: str, precision: str, path: Path) -> Copy:
    """With the operations of its network."""
    row = check.run(Row("operations", name, precision), path)
    return Copy(name, precision, path, row.data if row.status == "ok" else {})


def check_engine(check: Check, engine: str, device: str, copies: list[Copy], rates: dict[str, Any]) -> None:
    """All steps of one engine kind on all bundles; `rates` are the device's ceilings, empty if they are not known."""
    if check.run(Row("preflight", engine=engine, device=device)).status != "ok":
        return
    if not copies:
        check.add(Row("all", engine=engine, device=device, status="skipped", reason="there is no bundle to run"))
    for copy in copies:
        place = (copy.name, copy.precision, engine, device)
        compiled = engine not in PLANS or check.run(Row("compile", *place), copy.path).status == "ok"
        if not compiled and engine in REPLAYING:
            check.add(Row("all", *place, "skipped", "there are no plans, as they did not compile"))
            continue
        for step in ("verify", "two inputs"):
            check.run(Row(step, *place), copy.path)
        check.run(Row("latency", *place), copy.path, rates=rates, network=copy.network)


def main(out: Path, given: list[Path], seconds: float, checkpoints: list[str]) -> int:
    """Run everything, the GPU first; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as scratch:
        check = Check(out, Path(scratch), seconds)
        check.run(Row("doctor"))
        rates = check.run(Row("ceilings", device="cuda")).data.get("rates", {})
        copies = list(bundles(check, given))
        for engine, device in GPU_ENGINES:
            check_engine(check, engine, device, copies, rates)
        check.run(Row("pytorch", "given" if checkpoints else "demo", engine="pytorch", device="cuda"), checkpoints=checkpoints)
        rates = check.run(Row("ceilings", device="cpu")).data.get("rates", {})
        for engine, device in CONTROLS:
            check_engine(check, engine, device, copies, rates)
        check.write(complete=True)
    counts = {status: sum(row.status == status for row in check.rows) for status in ("ok", "failed", "skipped")}
    print(f"{', '.join(f'{n} {status}' for status, n in counts.items())}; raw observations in {out}")
    return 1 if counts["failed"] else 0


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="Check and measure every engine kind on this machine.")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="a bundle; give it again for more  [the demo bundle]")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu_check.json", help="raw observations  [%(default)s]")
    parser.add_argument("--seconds", type=float, default=3.0, help=f"of each measurement, of {REPETITIONS} calls at least  [3]")
    help_ = "those of the full-size model, CLAP's and the separator's, for the comparison with PyTorch  [the demo model's]"
    parser.add_argument("--checkpoints", nargs=2, default=[], metavar=("CLAP", "CLAPSEP"), help=help_)
    options = parser.parse_args(words)
    if options.json.is_dir():
        parser.error(f"{options.json} is a directory; name a file with --json")
    try:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.touch()
    except OSError as error:
        parser.error(f"{options.json} cannot be written ({error.strerror}); choose another place with --json")
    return options


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    options = parse(sys.argv[1:])
    sys.exit(main(options.json, options.bundle, options.seconds, options.checkpoints))
