"""The steps of `gpu_check.py`, one a process. What a step needs it imports itself: a machine may have any part of it.

Usage: python gpu_steps.py TASK ANSWER: a task as JSON, and the file for [status, reason, data].
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPLAYING = ("tensorrt", "tensorrt-rtx")  # kinds with CUDA graphs
MISSING = {"not-installed", "not-loadable", "no-driver", "driver-too-old", "no-gpu"}  # reasons that are the machine's, at any step
SMI = ("name", "driver_version", "compute_cap", "memory.total", "memory.used", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw")
WARM_UP, REPETITIONS, MOST = 5, 10, 2000
ORDERS = ((0,), (1,), (0,), (0, 1), (1, 0), (0,), (1,))  # rows of the two inputs, batch 1, 2 and 1 again
ROUNDS = 3  # TensorRT kinds run a batch size plainly the first time, capture it the second, and replay it after that
APART = "A against B"

Task = dict[str, Any]
Answer = tuple[str, dict[str, Any]]  # one sentence, raw data


class Verdict(Exception):
    """Ends a step that is not ok."""

    def __init__(self, status: str, reason: str, data: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.status, self.data = status, data or {}


def preflight(task: Task) -> Answer:
    """Whether an engine kind can run here at all; no bundle is needed."""
    from clapsep.engines import EngineOptions, engine_class, this_machine

    engine, machine = engine_class(task["engine"]), this_machine()
    engine.preflight(EngineOptions(device=task["device"]), machine)
    own = machine.gpus[0].compute_capability if machine.gpus else ""
    targets = getattr(engine, "supported_capabilities", lambda: (own,))()
    if own not in targets:
        raise Verdict("skipped", f"{task['engine']} {engine.version()} compiles for SM {', '.join(targets)} and this GPU is SM {own}")
    where = machine.gpus[0].name if task["device"] == "cuda" else machine.architecture
    return f"version {engine.version()} on {where}", {"version": engine.version(), "machine": asdict(machine)}


def doctor(_task: Task) -> Answer:
    """`clapsep-export doctor --json`."""
    importlib.import_module("click")
    words = [sys.executable, "-P", "-m", "clapsep.export", "doctor", "--json"]  # -P: no modules from the current directory
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        raise Verdict("failed", f"exit {done.returncode}: {last_line(done.stderr)}") from None
    engines = ", ".join(f"{e['kind']} {e['device']}: {e['status']}" for e in said["engines"])
    return engines, {"exit": done.returncode, "report": said}


def build(task: Task) -> Answer:
    """The demo bundle in one precision; its gates run later, on every engine."""
    for name in ("onnx", "safetensors", "tokenizers", "torch", "onnxscript"):
        importlib.import_module(name)
    from clapsep.export.build import Request
    from clapsep.export.build import build as run

    manifest = run(Path(task["path"]), Request(demo=True, precision=task["precision"], engines=()), say)
    return "demo model, built here", {"toolchain": manifest.toolchain, "nodes": {n: g.nodes for n, g in manifest.graphs.items()}}


def compile_plans(task: Task) -> Answer:
    """Plans for this machine. Gates come in the next step: plans that fail them stay here, as how fast they are is worth knowing too."""
    from clapsep.engines import PlanSettings
    from clapsep.export.compile import compile_bundle

    made = compile_bundle(Path(task["path"]), task["engine"], PlanSettings(), say, verify=False).plans
    size = sum(plan.plan.size for plan in made) / 2**20
    return f"{len(made)} plans, {size:.0f} MiB, {made[0].target}", {"plans": [asdict(plan) for plan in made]}


def verify(task: Task) -> Answer:
    """The gates, with what they measured."""
    from clapsep.export.gates import measure

    gates = [asdict(gate) for gate in measure(Path(task["path"]), [task["engine"]], say, task["device"])]
    failed = [gate for gate in gates if not gate["passed"]]
    if failed:
        named = ", ".join(f"{g['stage']}: {g['metric']} {g['measured']} (limit {g['threshold']:g})" for g in failed)
        raise Verdict("failed", f"{len(failed)} of {len(gates)} gates: {named}", {"gates": gates})
    worst = min(gate["measured"] for gate in gates if gate["metric"] == "waveform SNR dB")
    return f"{len(gates)} gates, lowest waveform SNR {worst:.1f} dB", {"gates": gates}


def two_inputs(task: Task) -> Answer:
    """Whether two inputs that take turns on one engine, in batches of 1, 2 and 1 again, give what each gives alone on a fresh one."""
    from clapsep.export.gates import LIMITS

    separator, golden = open_bundle(task, False)
    orders = ORDERS * ROUNDS
    data: dict[str, Any] = {"limit": LIMITS["batch against single, max error"][1][separator.precision], "orders": orders, "graphs": {}}
    for graph, inputs in golden_inputs(separator, golden).items():
        alone = [run_rows(open_bundle(task, False)[0], graph, inputs, (row,)) for row in (0, 1)]
        data["graphs"][graph] = {APART: furthest(alone[0], alone, (1,))}
        for mode, replayed in modes(task).items():
            shared = open_bundle(task, replayed)[0]
            data["graphs"][graph][mode] = [furthest(run_rows(shared, graph, inputs, order), alone, order) for order in orders]
    return judge_two_inputs(data)


def run_rows(separator: Any, graph: str, inputs: dict[str, Any], rows: tuple[int, ...]) -> dict[str, Any]:
    import numpy as np

    return separator.engine(graph).run({name: np.ascontiguousarray(value[list(rows)]) for name, value in inputs.items()})


def furthest(found: dict[str, Any], alone: list[dict[str, Any]], rows: tuple[int, ...]) -> float | None:
    """The largest difference of any output from what its rows give alone; None if something is not finite."""
    import numpy as np

    worst = max(float(np.max(np.abs(value - np.concatenate([alone[row][name] for row in rows])))) for name, value in found.items())
    return worst if np.isfinite(worst) else None


def judge_two_inputs(data: dict[str, Any]) -> Answer:
    """A result that is not its input's own is a failure, and so are two inputs whose results cannot be told apart."""
    graphs, limit = data["graphs"], data["limit"]
    errors = [(f"{graph}, {mode}", e) for graph, found in graphs.items() for mode in found if mode != APART for e in found[mode]]
    wrong = sorted({where for where, error in errors if error is None or error > limit})
    if wrong:
        raise Verdict("failed", f"not the result of a single run: {'; '.join(wrong)}", data)
    same = [graph for graph, found in graphs.items() if found[APART] is None or found[APART] <= 2 * limit]
    if same:
        raise Verdict("failed", f"A and B give the same: {', '.join(same)}", data)
    apart = min(found[APART] for found in graphs.values())
    return f"largest error {max(error for _, error in errors):.1e}, A and B at least {apart:.2g} apart", data


def latency(task: Task) -> Answer:
    """Milliseconds of the separator graph, copies to and from the device included, and of a whole window from wave to wave."""
    data: dict[str, Any] = {"unit": "ms", "gpu before": gpu_state()}
    for mode, replayed in modes(task).items():
        data[mode] = measure_separator(task, replayed)
    said = "; ".join(f"{mode}: {medians(data[mode]['calls'])}" for mode in modes(task))
    before, after = data["gpu before"], data[list(modes(task))[-1]]["gpu"]  # while the engine is open
    memory = f"; GPU memory {before['memory.used']} to {after['memory.used']} MiB" if task["device"] == "cuda" and before and after else ""
    return f"ms, {said}{memory}", data


def measure_separator(task: Task, cuda_graph: bool) -> dict[str, Any]:
    import numpy as np
    from clapsep.export.golden import as_float

    start = time.perf_counter()
    separator, golden = open_bundle(task, cuda_graph)
    engine, batch = separator.engine("separator"), separator.bundle.manifest.max_batch
    opened = time.perf_counter() - start
    window, rate, condition = as_float(golden.mixture), separator.family.sample_rate, golden.condition[0]
    row = {name: value[:1] for name, value in golden_inputs(separator, golden)["separator"].items()}
    rows = {name: np.repeat(value, batch, axis=0) for name, value in row.items()}
    calls: dict[str, Callable[[], Any]] = {
        "graph b1": lambda: engine.run(row),
        f"graph b{batch}": lambda: engine.run(rows),
        "window": lambda: separator.separate(window, rate, condition=condition),
    }
    seen = {name: observe(call, task["seconds"]) for name, call in calls.items()}
    facts = {"provider": engine.provider, "open seconds": round(opened, 3), "window seconds": len(window) / rate, "gpu": gpu_state()}
    return {"calls": seen, **facts}


def pytorch(task: Task) -> Answer:
    """The demo model's separator module in PyTorch eager, batch 1: with inputs on the device, and with copies as engines have them."""
    import torch

    if task["device"] == "cuda" and not torch.cuda.is_available():
        raise Verdict("skipped", f"PyTorch {torch.__version__} sees no GPU")
    from clapsep.export import demo
    from clapsep.export.checkpoint import read_checkpoint
    from clapsep.export.family import open_model

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = open_model(read_checkpoint(demo.CLAP, "clap"), read_checkpoint(demo.CHECKPOINT, "checkpoint"))
    spec = next(spec for spec in model.graphs() if spec.name == "separator")
    dtype = torch.float16 if task["precision"] == "fp16" else torch.float32
    module, host = spec.module.to(task["device"], dtype), [value[:1].to(dtype) for value in spec.inputs.values()]
    there = [value.to(task["device"]) for value in host]

    def resident() -> None:
        module(*there)
        if task["device"] == "cuda":
            torch.cuda.synchronize()

    calls = {"on device": resident, "with copies": lambda: module(*(value.to(task["device"]) for value in host))[0].cpu()}
    try:
        with torch.inference_mode():
            seen = {name: observe(call, task["seconds"]) for name, call in calls.items()}
    except RuntimeError as error:
        raise Verdict("skipped" if task["precision"] == "fp16" else "failed", f"PyTorch does not run it: {one_line(error)}") from error
    facts = {"unit": "ms", "torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu_state()}
    return f"ms, graph b1, eager: {medians(seen)}", {"calls": seen, **facts}


STEPS: dict[str, Callable[[Task], Answer]] = {
    "doctor": doctor,
    "preflight": preflight,
    "build": build,
    "compile": compile_plans,
    "verify": verify,
    "two inputs": two_inputs,
    "latency": latency,
    "pytorch": pytorch,
}


def modes(task: Task) -> dict[str, bool]:
    """By name, whether CUDA graphs are on."""
    return {"CUDA graph": True, "no CUDA graph": False} if task["engine"] in REPLAYING else {"plain": False}


def open_bundle(task: Task, cuda_graph: bool) -> tuple[Any, Any]:
    """A fresh Separator, and the bundle's golden data."""
    from clapsep.export.gates import load_golden
    from clapsep.runtime import Separator

    separator = Separator(task["path"], task["engine"], device=task["device"], cuda_graph=cuda_graph)
    return separator, load_golden(separator.bundle)


def golden_inputs(separator: Any, golden: Any) -> dict[str, dict[str, Any]]:
    """Two different rows of every graph's inputs."""
    import numpy as np
    from clapsep.export.golden import as_float

    features, _ = separator.family.features(as_float(np.stack([golden.mixture, golden.hard[-1]])))
    return {
        "separator": {**features, "condition": golden.condition[:2]},
        "text_encoder": {name: value[:2] for name, value in golden.tokens.items()},
        "audio_encoder": {"log_mel": golden.log_mel[:2]},
    }


def observe(call: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Milliseconds of repeated calls: what was seen, and its median, 90th percentile, interquartile range and extremes."""
    for _ in range(WARM_UP):
        call()
    seen: list[float] = []
    start = time.perf_counter()
    while len(seen) < REPETITIONS or (time.perf_counter() - start < seconds and len(seen) < MOST):
        before = time.perf_counter()
        call()
        seen.append(round(1000 * (time.perf_counter() - before), 4))
    low, median, high, p90 = (sorted(seen)[round(q * (len(seen) - 1))] for q in (0.25, 0.5, 0.75, 0.9))
    return {"median": median, "p90": p90, "iqr": round(high - low, 4), "min": min(seen), "max": max(seen), "n": len(seen), "observed": seen}


def medians(calls: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{name} {seen['median']:.2f}" for name, seen in calls.items())


def gpu_state() -> dict[str, str] | None:
    """The first GPU's name, driver, memory in MiB, clocks in MHz and power in W as nvidia-smi has them; None without it."""
    words = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
        values = [value.strip() for value in done.stdout.split(",")]
        if done.returncode == 0 and len(values) == len(SMI):
            return dict(zip(SMI, values, strict=True))
    return None


def say(message: str) -> None:
    print(message, flush=True)  # into the log that the parent keeps


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def attempt(task: Task) -> tuple[str, str, dict[str, Any]]:
    """Status, reason and data of a step; whatever the engines raise ends here."""
    try:
        return "ok", *STEPS[task["step"]](task)
    except Verdict as verdict:
        return verdict.status, str(verdict), verdict.data
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("clapsep"):
            return "skipped", f"{error.name} is not installed", {}
        reason = getattr(error, "reason", None) if type(error).__name__ == "EngineUnavailable" else None
        data = {"error": type(error).__name__, "reason": reason, "traceback": traceback.format_exc()}
        skip = reason in MISSING or (reason and task["step"] in ("preflight", "compile"))
        return "skipped" if skip else "failed", one_line(error), data


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(attempt(json.loads(sys.argv[1]))))
