"""Which engine runs a bundle here: the one asked for, or nothing; `auto` takes the first in an order of speed and says why."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..engines import EngineOptions, Machine, engine_class
from .bundle import Bundle
from .errors import EngineUnavailable
from .family import FILM, StepFamily, open_family
from .manifest import GraphEntry, Plan
from .routes import ROUTES, available, needs, plan_routes

log = logging.getLogger(__name__)
AUTO = "auto"
SHORT_TEXT = "text_encoder_short"
# Fastest first. On the CPU this is measured (benchmarks/results/precision.json); among the GPU kinds it is NVIDIA's word, not ours.
FASTEST = (("tensorrt", "cuda"), ("tensorrt-rtx", "cuda"), ("onnxruntime", "cuda"), ("openvino", "cpu"), ("onnxruntime", "cpu"))


@dataclass(frozen=True)
class Choice:
    """What runs a bundle.

    Engine kind, options, the plan of each graph that is needed (None: the ONNX file itself), a sentence that says why, and the routes
    (see `routes`) for one query and for several.
    """

    kind: str
    options: EngineOptions
    plans: dict[str, Plan | None]
    why: str
    one: str
    several: str


def needs_gpu(kind: str, options: EngineOptions) -> bool:
    """Whether the answer depends on the GPUs, so that the driver must be asked."""
    return options.device != "cpu" if kind == AUTO else engine_class(kind).device(options) == "cuda"


def choose(bundle: Bundle, kind: str, options: EngineOptions, machine: Machine, route: str | None = None) -> Choice:
    """The engine for `bundle` on `machine`, checked before anything is loaded; `route` takes the place of the device's usual one.

    Raises:
        EngineUnavailable: the kind that was asked for cannot run the bundle here, or with `auto` none can; with reason and repair.
        QueryError: there is no such route.
        BundleError: a plan's file is not there, in full, or the bundle has no graphs for the route.
    """
    if options.precision == bundle.manifest.graphs["separator"].precision:
        options = replace(options, precision=None)  # asking for what is there anyway
    if kind != AUTO:
        return _check(bundle, kind, options, machine, route, f"engine {kind} was asked for")
    refused: list[str] = []
    refusal = EngineUnavailable("there is no such device", "wrong-device")
    for candidate, device in FASTEST:
        if options.device not in (None, device):
            continue
        why = f"engine {candidate} on {device}, the first in our order of speed that can run here"
        try:
            choice = _check(bundle, candidate, replace(options, device=device), machine, route, why)
        except EngineUnavailable as error:
            refusal = error
            refused.append(f"{candidate} on {device} ({error.reason})")
            continue
        return replace(choice, why=choice.why + (f"; not {', '.join(refused)}" if refused else "") + _unproven(bundle, choice))
    raise EngineUnavailable(f"no engine can run {bundle.path} here, not {', '.join(refused)}; run: clapsep-export doctor", refusal.reason)


def _check(bundle: Bundle, kind: str, options: EngineOptions, machine: Machine, route: str | None, why: str) -> Choice:
    graphs = bundle.manifest.graphs
    device = engine_class(kind).device(options)
    one, several = usual_routes(bundle, kind, options) if route is None else plan_routes(graphs, route, device, options.precision)
    if engine_class(kind).plans == "required" and route not in (None, *usual_routes(bundle, kind, options)):
        raise EngineUnavailable(f"plans are not made for the route {route} with engine {kind}; leave the route out", "no-plan")
    plans = check(bundle, kind, options, machine, graphs_of(graphs, device, one, several))
    return Choice(
        kind, options, plans, f"{why}, by the route {one}" + (f" ({several} for several queries)" if one != several else ""), one, several
    )


def usual_routes(bundle: Bundle, kind: str, options: EngineOptions) -> tuple[str, str]:
    """The routes that are taken for one query and for several where nobody says otherwise."""
    causal = isinstance(open_family(bundle.manifest), StepFamily)
    return plan_routes(bundle.manifest.graphs, None, engine_class(kind).device(options), options.precision, causal=causal)


def runnable_routes(bundle: Bundle, kind: str, options: EngineOptions) -> list[str]:
    """The routes that an engine kind can take through a bundle; those for which plans are made, where it needs plans."""
    graphs = bundle.manifest.graphs
    if engine_class(kind).plans == "required":
        return list(dict.fromkeys(usual_routes(bundle, kind, options)))
    return [name for name in available(graphs) if not (name == "waveform" and options.precision)]


def graphs_of(graphs: Mapping[str, GraphEntry], device: str, *routes: str) -> list[str]:
    """The graphs that these routes need, after those that belong to no route: the query encoders."""
    routed = {FILM, *(graph for route in ROUTES.values() for graph in route.graphs)}
    if device != "cpu":
        routed.add(SHORT_TEXT)  # a GPU gains less from it than its weights would take up once more
    needed = {graph for route in routes for graph in needs(route, graphs)}
    return [graph for graph in graphs if graph not in routed or graph in needed]


def _unproven(bundle: Bundle, choice: Choice) -> str:
    if not any(choice.plans.values()) or choice.kind in {gate.engine.split()[0] for gate in bundle.manifest.gates}:
        return ""
    return f"; its plans could not be verified where they were compiled, clapsep-export verify --engine {choice.kind} does it here"


def check(bundle: Bundle, kind: str, options: EngineOptions, machine: Machine, graphs: Iterable[str]) -> dict[str, Plan | None]:
    """The plan of each of `graphs`, None where the engine kind runs the ONNX file itself.

    Raises:
        EngineUnavailable: this kind cannot run the bundle on `machine`.
    """
    engine_class(kind).preflight(options, machine)
    plans, unfit = {}, ""
    for graph in graphs:
        plans[graph], said = _find(bundle, graph, kind, options, machine)
        unfit = unfit or said
    if unfit:  # the engine runs all the same, from the ONNX file; only its start is slower
        log.warning("%s", unfit)
    return plans


def _find(bundle: Bundle, graph: str, kind: str, options: EngineOptions, machine: Machine) -> tuple[Plan | None, str]:
    """The newest plan of `graph` that runs on `machine`, or None and what is wrong with those that are there."""
    engine = engine_class(kind)
    if engine.plans == "none":
        return None, ""
    precision = options.precision or bundle.manifest.graphs[graph].precision
    plans = [plan for plan in bundle.manifest.plans if (plan.graph, plan.kind, plan.precision) == (graph, kind, precision)]
    refusal = EngineUnavailable(f"there is no {precision} plan of {graph} for engine {kind}", "no-plan")
    for plan in reversed(plans):
        try:
            engine.check_plan(plan.target, machine)
        except EngineUnavailable as error:
            refusal = error if refusal.reason == "no-plan" else refusal  # the newest is what the user knows of
        else:
            bundle.locate(plan.plan)
            return plan, ""
    wanted = f" --precision {options.precision}" if options.precision else ""
    compiling = f"run: clapsep-export compile {shlex.quote(str(bundle.path))} --engine {kind}{wanted}"
    message = f"{bundle.path}: {refusal}; {'update the driver' if refusal.reason == 'driver-too-old' else compiling}"
    if engine.plans == "required":
        raise EngineUnavailable(message, refusal.reason)
    return None, message if plans else ""
