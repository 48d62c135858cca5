"""Which engine runs a bundle here: the one asked for, or nothing; `auto` takes the fastest that can and says why."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from ..engines import EngineOptions, Machine, engine_class
from .bundle import Bundle
from .errors import EngineUnavailable
from .manifest import Plan

log = logging.getLogger(__name__)
AUTO = "auto"
# Fastest first. `benchmarks/results/engines.json` has what was measured; the order of the GPU kinds is NVIDIA's word, not ours.
FASTEST = (("tensorrt", "cuda"), ("tensorrt-rtx", "cuda"), ("onnxruntime", "cuda"), ("openvino", "cpu"), ("onnxruntime", "cpu"))


@dataclass(frozen=True)
class Choice:
    """The engine kind that runs a bundle, its options, and one sentence that says why this one."""

    kind: str
    options: EngineOptions
    why: str


def choose(bundle: Bundle, kind: str, options: EngineOptions, machine: Machine) -> Choice:
    """The engine for `bundle` on `machine`, checked before anything is loaded.

    Raises:
        EngineUnavailable: the kind that was asked for cannot run the bundle here, or with `auto` none can; with reason and repair.
    """
    if kind != AUTO:
        check(bundle, kind, options, machine)
        return Choice(kind, options, f"engine {kind} was asked for")
    refused: list[str] = []
    for candidate, device in FASTEST:
        if options.device not in (None, device):
            continue
        chosen = replace(options, device=device)
        try:
            check(bundle, candidate, chosen, machine)
        except EngineUnavailable as error:
            refused.append(f"{candidate} on {device}: {error.reason}")
            continue
        why = f"engine {candidate} on {device}, the fastest that can run here" + (f" ({'; '.join(refused)})" if refused else "")
        return Choice(candidate, chosen, why)
    raise EngineUnavailable(f"no engine can run {bundle.path} here ({'; '.join(refused)}); run: clapsep-export doctor", "not-installed")


def check(bundle: Bundle, kind: str, options: EngineOptions, machine: Machine) -> None:
    """Whether this engine kind can run every graph of the bundle on `machine`; raises EngineUnavailable."""
    engine_class(kind).preflight(options, machine)
    for graph in bundle.manifest.graphs:
        find_plan(bundle, graph, kind, options, machine)


def find_plan(bundle: Bundle, graph: str, kind: str, options: EngineOptions, machine: Machine) -> Plan | None:
    """The plan of `graph` that runs on `machine`; None where the engine kind runs the ONNX file itself.

    Raises:
        EngineUnavailable: the kind needs a plan and there is none for this machine; the message has the command that makes one.
    """
    engine = engine_class(kind)
    if engine.plans == "none":
        return None
    precision = options.precision or bundle.manifest.graphs[graph].precision
    plans = [plan for plan in bundle.manifest.plans if (plan.graph, plan.kind, plan.precision) == (graph, kind, precision)]
    refusal = EngineUnavailable(f"there is no {precision} plan of {graph} for engine {kind}", "no-plan")
    for plan in plans:
        try:
            engine.check_plan(plan.target, machine)
        except EngineUnavailable as error:
            refusal = error
        else:
            return plan
    wanted = f" --precision {options.precision}" if options.precision else ""
    message = f"{bundle.path}: {refusal}; run: clapsep-export compile {bundle.path} --engine {kind}{wanted}"
    if engine.plans == "required":
        raise EngineUnavailable(message, refusal.reason)
    if plans:  # the engine still runs, from the ONNX file; only its start is slower
        log.warning("%s", message)
    return None
