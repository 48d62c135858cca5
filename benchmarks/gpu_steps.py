"""The steps of `gpu_check.py`, one a process. What a step needs it imports itself: a machine may have any part of it.

Usage: python gpu_steps.py TASK ANSWER: a task as JSON, and the file for [status, reason, data].
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_ceilings import ceilings, operations
from gpu_latency import latency
from gpu_pytorch import pytorch
from gpu_task import Answer, Task, Verdict, last_line, one_line, say
from gpu_two_inputs import two_inputs

MISSING = {"not-installed", "not-loadable", "no-driver", "driver-too-old", "no-gpu"}  # reasons that are the machine's, at any step
MAX_BATCH = 64  # of the demo bundle


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

    manifest = run(Path(task["path"]), Request(demo=True, precision=task["precision"], engines=(), max_batch=MAX_BATCH), say)
    return f"demo model, built here for batches up to {MAX_BATCH}", {
        "toolchain": manifest.toolchain,
        "nodes": {n: g.nodes for n, g in manifest.graphs.items()},
    }


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


STEPS: dict[str, Callable[[Task], Answer]] = {
    "doctor": doctor,
    "ceilings": ceilings,
    "preflight": preflight,
    "build": build,
    "operations": operations,
    "compile": compile_plans,
    "verify": verify,
    "two inputs": two_inputs,
    "latency": latency,
    "pytorch": pytorch,
}


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
