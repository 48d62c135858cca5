"""Add plans to a bundle: compiled for the machine at hand or for named GPUs, checked where they can run. Needs no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..engines import KINDS, EngineOptions, EngineUnavailable, PlanSettings, Target, engine_class, this_machine
from ..engines.engine import Engine
from ..runtime.bundle import Bundle, describe_file
from ..runtime.errors import BundleError, EngineError, GateError, InputError, OutputError, UnsafePath
from ..runtime.manifest import FileEntry, Gate, Manifest, Plan
from ..runtime.plans import choose, graphs_of, usual_routes
from .gates import Progress, gate_engine, load_golden, require
from .publish import held, write_manifest

RECIPE = 1  # to be raised when the same settings are made into other plans
ELSEWHERE = ("no-driver", "no-gpu", "other-gpu", "driver-too-old")  # why plans for named GPUs cannot be verified where they are made
PLAN_FILE = re.compile(r"\.?[a-z_]+\.\w+\.[0-9a-f]{12}\.(plan|blob)(\..*)?")  # also while it is written


@dataclass(frozen=True)
class Compiled:
    """The bundle's plans of one kind: how many were made now, and the gates that they passed; none, and why, if they cannot run here."""

    plans: tuple[Plan, ...]
    made: int
    gates: tuple[Gate, ...]
    unverified: str = ""


def compile_bundle(
    path: Path, kind: str, settings: PlanSettings, progress: Progress, *, force: bool = False, verify: bool = True
) -> Compiled:
    """Compile every graph of the bundle at `path`, check the plans where they can run, and list them in the manifest.

    `settings` are without precision and batch, which are the bundle's, but for `bf16`. Plans made before from the same graph, settings
    and library for the same target are kept, unless `force` is given. Those that are superseded stay until the next compilation, for
    the sake of those who have opened them.

    Raises:
        BundleError: the bundle.
        EngineUnavailable, EngineError: the compiler; the bundle is as it was.
        GateError: the plans do not do what the model does; they are not, or no longer, in the bundle.
        OutputError: the bundle cannot be written, or another process is changing it.
    """
    Bundle.open(path)
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path} cannot be written (permission denied); copy the bundle to another place")
    with held(path) as free:
        if not free:
            raise OutputError(f"another process is changing {path}; wait until it is done")
        try:
            bundle = Bundle.open(path)
            _sweep(bundle)
            return add_plans(bundle, kind, settings, progress, force=force, verify=verify)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written ({error.strerror or error}); free some space or copy it to another place"
            ) from error


def add_plans(
    bundle: Bundle, kind: str, settings: PlanSettings, progress: Progress, *, force: bool = False, verify: bool = True
) -> Compiled:
    """`compile_bundle` for a bundle that the caller has locked."""
    own = bundle.manifest.graphs["separator"].precision
    settings = replace(settings, precision=settings.precision or own, max_batch=bundle.manifest.max_batch)
    target = check_request(kind, settings, own)
    options = EngineOptions(precision=None if settings.precision == own else settings.precision)
    device = engine_class(kind).device(options)
    graphs = graphs_of(bundle.manifest.graphs, device, *usual_routes(bundle, kind, options))
    made: list[Path] = []
    known = () if force else bundle.manifest.plans
    try:
        plans = tuple(_plan(bundle, graph, engine_class(kind), settings, target, known, made, progress) for graph in graphs)
        new = Bundle(bundle.path, replace(bundle.manifest, plans=plans))
        gates, unverified = _verify(new, kind, options, settings, progress) if verify else ((), "nobody asked for it")
    except GateError:
        write_manifest(bundle.path, _without(bundle.manifest, kind, settings.precision, target))
        _remove(made)
        raise
    except BaseException:
        _remove(made)
        raise
    name = " ".join(filter(None, (kind, options.precision)))
    if made or gates:  # gates speak of the plans that are listed with them
        rest = _without(bundle.manifest, kind, settings.precision, target)
        kept = tuple(gate for gate in rest.gates if gate.engine != name)
        write_manifest(bundle.path, replace(rest, plans=rest.plans + plans, gates=kept + gates))
    return Compiled(plans, len(made), gates, unverified)


def check_request(kind: str, settings: PlanSettings, own: str) -> Target:
    """What the plans will run on; `own` is the graphs' precision.

    Raises:
        InputError: the engine kind does not do what `settings` ask for.
        EngineUnavailable: the library, or the GPU to compile for, is not there.
    """
    engine = engine_class(kind)
    if engine.plans == "none":
        raise InputError(f"engine {kind} runs the ONNX files themselves and takes no plans; there is nothing to compile")
    if settings.precision not in (own, *engine.precisions):
        advice = f"build a bundle with --precision {settings.precision}" if settings.precision in ("fp32", "fp16") else "leave it out"
        raise InputError(f"the graphs are {own} and engine {kind} does not compute them in {settings.precision}; {advice}")
    try:
        return engine.target(settings, this_machine(gpus_too="cuda" in engine.devices))
    except EngineUnavailable:
        raise
    except EngineError as error:
        raise InputError(str(error)) from error


def _verify(bundle: Bundle, kind: str, options: EngineOptions, settings: PlanSettings, progress: Progress) -> tuple[tuple[Gate, ...], str]:
    """Run the gates on the plans, unless they are for other GPUs than those that are here."""
    try:
        choose(bundle, kind, options, this_machine(gpus_too=engine_class(kind).device(options) == "cuda"))
    except EngineUnavailable as error:
        if not settings.compute_capabilities or error.reason not in ELSEWHERE:
            raise
        progress(f"not verified: {error}")
        return (), str(error)
    options = replace(options, host_code=settings.version_compatible)
    gates = gate_engine(bundle, kind, options, load_golden(bundle), progress)
    require(gates, f"the {kind} plan", "it is not in the bundle")
    return gates, ""


def _plan(
    bundle: Bundle,
    graph: str,
    engine: type[Engine],
    settings: PlanSettings,
    target: Target,
    known: Sequence[Plan],
    made: list[Path],
    progress: Progress,
) -> Plan:
    entry = bundle.manifest.graphs[graph]
    key = plan_key(engine.kind, settings, target, [file.sha256 for file in (entry.graph, entry.data) if file is not None])
    old = next((plan for plan in known if plan.key == key and _intact(bundle, plan.plan)), None)
    if old is not None:
        progress(f"{graph}: the {engine.kind} plan is there")
        return old
    progress(f"compiling {graph} with {engine.kind}")
    relative = f"plans/{engine.kind}/{graph}.{settings.precision}.{key[:12]}{engine.plan_suffix}"
    out = bundle.path / relative
    out.parent.mkdir(parents=True, exist_ok=True)
    engine.compile(bundle.graph(graph), out, settings, progress)
    made.append(out)
    return Plan(graph, engine.kind, settings.precision, target, key, describe_file(bundle.path, relative))


def _intact(bundle: Bundle, entry: FileEntry) -> bool:
    try:
        bundle.file(entry)
    except BundleError:  # damaged or gone: it is compiled again
        return False
    return True


def plan_key(kind: str, settings: PlanSettings, target: Target, hashes: list[str]) -> str:
    """SHA-256 over everything that a plan is made from: graph, engine kind, what it runs on, and the settings that shape it."""
    shaping = {name: value for name, value in dataclasses.asdict(settings).items() if name in ("precision", "max_batch", "workspace")}
    facts = [RECIPE, kind, dataclasses.asdict(target), shaping, hashes]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _without(manifest: Manifest, kind: str, precision: str, target: Target) -> Manifest:
    """The manifest without the plans that new ones for `target` take the place of, whatever version of the library made them."""

    def place(plan_kind: str, plan_precision: str, t: Target) -> tuple[object, ...]:
        return plan_kind, plan_precision, t.os, t.architecture, t.compute_capabilities, t.cpu, t.compatibility

    taken = place(kind, precision, target)
    return replace(manifest, plans=tuple(plan for plan in manifest.plans if place(plan.kind, plan.precision, plan.target) != taken))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
        _remove_if_empty(path.parent)


def _remove_if_empty(folder: Path) -> None:
    """A folder of plans, and the one around it."""
    with contextlib.suppress(OSError):  # it is not empty, or not there
        folder.rmdir()
        folder.parent.rmdir()


def _sweep(bundle: Bundle) -> None:
    """Remove what earlier compilations left in plans/ and the manifest does not list: killed, failed, or superseded."""
    listed = {bundle.path / entry.file for entry in bundle.manifest.files()}
    for folder in (bundle.path / "plans", *(bundle.path / "plans" / kind for kind in KINDS)):
        if folder.is_symlink():
            raise UnsafePath(f"{folder} is a link, and plans are written only inside the bundle; do not use this bundle")
        for path in folder.iterdir() if folder.is_dir() and folder.name in KINDS else ():
            if PLAN_FILE.fullmatch(path.name) and path not in listed and path.is_file() and not path.is_symlink():
                path.unlink()
                _remove_if_empty(folder)
