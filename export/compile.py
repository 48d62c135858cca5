"""Add plans to a bundle: compiled for the machine at hand or for named GPUs, checked where they can run. Needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from ..engines import EngineOptions, EngineUnavailable, PlanSettings, engine_class, this_machine
from ..engines.engine import Engine
from ..runtime.bundle import Bundle, describe_file
from ..runtime.errors import InputError, OutputError
from ..runtime.manifest import Gate, Plan
from ..runtime.plans import check
from ..runtime.separator import Separator
from .gates import Progress, load_golden, require, run_gates
from .publish import held, write_manifest


@dataclass(frozen=True)
class Compilation:
    """What to compile: an engine kind and its settings, without what the bundle knows."""

    kind: str
    precision: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    compatibility: str = "none"
    version_compatible: bool = False
    workspace: int | None = None
    memory: int | None = None
    timing_cache: Path | None = None

    @property
    def options(self) -> EngineOptions:
        """How its plans are run."""
        return EngineOptions(precision=self.precision)


@dataclass(frozen=True)
class Compiled:
    """The bundle's plans of one kind: how many were made now, and the gates that they passed; none, and why, if they cannot run here."""

    plans: tuple[Plan, ...]
    made: int
    gates: tuple[Gate, ...]
    unverified: str = ""


def compile_bundle(path: Path, wanted: Compilation, progress: Progress) -> Compiled:
    """Compile every graph of the bundle at `path`, check the plans where they can run, and list them in the manifest.

    Plans made before from the same graph, settings, library and device are kept as they are.

    Raises:
        BundleError: the bundle.
        EngineUnavailable, EngineError: the compiler; the bundle is as it was.
        GateError: the plans do not do what the model does; they were removed.
        OutputError: the bundle cannot be written, or another process is changing it.
    """
    Bundle.open(path)
    with held(path) as free:
        if not free:
            raise OutputError(f"another process is changing {path}; wait until it is done")
        try:
            _sweep(Bundle.open(path))
            return add_plans(Bundle.open(path), wanted, progress)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written ({error.strerror or error}); free some space or copy it to another place"
            ) from error
        finally:
            _sweep(Bundle.open(path))


def add_plans(bundle: Bundle, wanted: Compilation, progress: Progress) -> Compiled:
    """`compile_bundle` for a bundle that the caller has locked, and sweeps if this raises."""
    engine = engine_class(wanted.kind)
    if engine.plans == "none":
        raise InputError(f"engine {wanted.kind} runs the ONNX files themselves and takes no plans; there is nothing to compile")
    if wanted.precision not in (None, *engine.precisions, bundle.manifest.graphs["separator"].precision):
        raise InputError(
            f"the graphs of {bundle.path} are {bundle.manifest.graphs['separator'].precision} and engine {wanted.kind} cannot compute "
            f"in {wanted.precision}; build a bundle with --precision {wanted.precision}"
        )
    if wanted.compute_capabilities and "cuda" not in engine.devices:
        raise InputError(f"engine {wanted.kind} runs on the {engine.devices[0]} and knows no compute capabilities; leave them out")
    old = {plan.key: plan for plan in bundle.manifest.plans}
    plans = tuple(_plan(bundle, graph, engine, wanted, old, progress) for graph in bundle.manifest.graphs)
    made = sum(plan not in bundle.manifest.plans for plan in plans)
    manifest = replace(bundle.manifest, plans=_merged(bundle.manifest.plans, plans))
    compiled = _verify(Bundle(bundle.path, manifest), wanted, progress)
    if made or compiled.gates:
        names = {gate.engine for gate in compiled.gates}
        kept = tuple(gate for gate in manifest.gates if gate.engine not in names)
        write_manifest(bundle.path, replace(manifest, gates=kept + compiled.gates))
    return replace(compiled, plans=plans, made=made)


def _verify(bundle: Bundle, wanted: Compilation, progress: Progress) -> Compiled:
    """Run the gates on the plans, unless they are for other machines than this one."""
    try:
        check(bundle, wanted.kind, wanted.options, this_machine())
    except EngineUnavailable as error:
        if not wanted.compute_capabilities:
            raise
        progress(f"not verified: {error}")
        return Compiled((), 0, (), str(error))
    separator = Separator(bundle, wanted.kind, precision=wanted.precision)
    gates = run_gates(separator, load_golden(bundle), progress)
    require(gates, f"the {wanted.kind} plan", "it was not added to the bundle")
    return Compiled((), 0, gates)


def _plan(bundle: Bundle, graph: str, engine: type[Engine], wanted: Compilation, old: dict[str, Plan], progress: Progress) -> Plan:
    entry = bundle.manifest.graphs[graph]
    settings = PlanSettings(
        precision=wanted.precision or entry.precision,
        max_batch=bundle.manifest.max_batch,
        **{f.name: getattr(wanted, f.name) for f in dataclasses.fields(wanted) if f.name not in ("kind", "precision")},
    )
    hashes = [file.sha256 for file in (entry.graph, entry.data) if file is not None]
    key = _key(engine, settings, hashes)
    if key in old and _usable(engine, old[key], wanted):
        progress(f"{graph}: the {engine.kind} plan is there")
        bundle.file(old[key].plan)
        return old[key]
    progress(f"compiling {graph} with {engine.kind}")
    relative = f"plans/{engine.kind}/{graph}.{settings.precision}.{key[:12]}{engine.plan_suffix}"
    out = bundle.path / relative
    out.parent.mkdir(parents=True, exist_ok=True)
    target = engine.compile(bundle.graph(graph), out, settings, progress)
    return Plan(graph, engine.kind, settings.precision, target, key, describe_file(bundle.path, relative))


def _usable(engine: type[Engine], plan: Plan, wanted: Compilation) -> bool:
    """Whether a plan from the same ingredients is for this machine too, or for GPUs that were named."""
    if wanted.compute_capabilities:
        return True
    try:
        engine.check_plan(plan.target, this_machine())
    except EngineUnavailable:
        return False
    return True


def _key(engine: type[Engine], settings: PlanSettings, hashes: list[str]) -> str:
    """Of everything that a plan is made from: graph, settings that shape it, library, and the device if none is named."""
    shaping = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name not in ("memory", "timing_cache")}
    device = () if settings.compute_capabilities else dataclasses.astuple(this_machine())
    facts = [hashes, engine.kind, engine.version(), shaping, device]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _merged(old: tuple[Plan, ...], new: tuple[Plan, ...]) -> tuple[Plan, ...]:
    """New plans take the place of older ones for the same graph and device."""

    def place(plan: Plan) -> tuple[object, ...]:
        target = plan.target
        return plan.graph, plan.kind, plan.precision, target.os, target.architecture, target.compute_capabilities, target.cpu

    taken = {place(plan) for plan in new}
    return tuple(plan for plan in old if place(plan) not in taken) + new


def _sweep(bundle: Bundle) -> None:
    """Remove from plans/ what the manifest does not list: left by compilations that were killed, failed, or have been superseded."""
    listed = {bundle.path / plan.plan.file for plan in bundle.manifest.plans}
    for path in (bundle.path / "plans").glob("*/*"):
        if path not in listed and path.is_file():
            path.unlink()
