"""From checkpoint files to a verified bundle. A bundle exists whole or not at all."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..engines import EngineOptions, PlanSettings, engine_class, this_machine
from ..runtime.bundle import MANIFEST, Bundle, describe_file
from ..runtime.errors import InputError, OutputExists
from ..runtime.family import open_family
from ..runtime.manifest import FileEntry, Manifest
from ..runtime.separator import Separator
from ..runtime.tokenizer import Tokenizer
from . import demo
from .calibration import calibration_signals
from .checkpoint import read_checkpoint
from .compile import add_plans, check_request
from .derive import derive
from .family import Model, open_model
from .gates import LIMITS, Progress, judge_lowered, measure, require, run_gates
from .golden import Golden, make_golden
from .graph import export_graph, inspect_graph
from .hub import SCHEME, fetch
from .precision import REQUIRED, lower
from .publish import publish, recover, staging, write_manifest
from .strict import StrictSeparator
from .vocabulary import read_tokenizer

TOKENIZER = "tokenizer.json"
ROBERTA = "hf://FacebookAI/roberta-base/tokenizer.json"
TOOLS = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "numpy",
    "tokenizers",
    "clapsep-export",
)


@dataclass(frozen=True)
class Request:
    """What to build. Locations are paths or hf:// addresses; `demo` stands in place of the two checkpoints."""

    clap: str | None = None
    checkpoint: str | None = None
    tokenizer: str | None = None
    demo: bool = False
    family: str | None = None
    precision: str = "fp32"
    engines: tuple[str, ...] = ("onnxruntime",)
    max_batch: int = 4
    compute_capabilities: tuple[str, ...] = ()
    force: bool = False


def build(out: Path, request: Request, progress: Progress) -> Manifest:
    """Export, measure, publish.

    Raises:
        CheckpointError, DownloadError: the inputs.
        OutputExists, OutputError: the output.
        ExportError, GateError: nothing was published.
    """
    out = Path(os.path.realpath(out))  # a link stays a link
    _refuse_usage(out, request)
    recover(out)
    _refuse_overwriting(out, request.force)
    with staging(out) as root:
        manifest = _fill(root, request, progress)
        progress("publishing")
        publish(root, out, force=request.force)
    return manifest


def _refuse_usage(out: Path, request: Request) -> None:
    """What can be refused is refused before anything is touched."""
    if request.demo == (request.checkpoint is not None) or (request.demo and request.clap):
        raise InputError("give --clap and --checkpoint, or --demo in their place")
    for flag, location in (("clap", request.clap), ("checkpoint", request.checkpoint), ("tokenizer", request.tokenizer)):
        if location is not None and not location.startswith(SCHEME) and not os.path.exists(location):
            raise InputError(f"--{flag} {location} does not exist; check the path")
    if out.suffix != ".clapsep":
        raise InputError(f"{out} does not end in .clapsep, as bundles do; choose another name")
    if not os.path.isdir(out.parent):
        raise InputError(f"{out.parent} is not a directory; create it first")
    if request.compute_capabilities and not any(map(_needs_plans, request.engines)):
        raise InputError("--compute-capability is for engines that need plans; add --engine tensorrt-rtx, or leave it out")
    for kind in request.engines:
        if _needs_plans(kind):
            settings = PlanSettings(request.precision, request.max_batch, request.compute_capabilities)
            check_request(kind, settings, request.precision)
        else:
            engine_class(kind).preflight(EngineOptions(), this_machine(gpus_too=False))


def _refuse_overwriting(out: Path, force: bool) -> None:
    if os.path.exists(out) and not force:
        raise OutputExists(f"{out} exists; choose another name or pass --force")
    if os.path.exists(out) and not os.path.isfile(out / MANIFEST):
        raise OutputExists(f"{out} is not a bundle, so --force does not replace it; choose another name")


def _fill(root: Path, request: Request, progress: Progress) -> Manifest:
    model, manifest = _open(root, request, progress)
    manifest = _export(root, model, manifest, progress)
    progress("reference outputs in PyTorch")
    manifest, golden = _write_golden(root, model, manifest)
    if request.precision == "fp16":
        manifest = _lower(root, model, manifest, golden, progress)
    manifest = _derive(root, model, manifest, progress)
    write_manifest(root, manifest)
    onnx_kinds = [kind for kind in request.engines if not _needs_plans(kind)]
    if request.engines and not onnx_kinds:
        onnx_kinds = ["onnxruntime"]  # plans for other machines prove nothing here of the graphs that they are made from
    gates = measure(root, onnx_kinds, progress)
    require(gates, "the export", "no bundle was written")
    write_manifest(root, replace(manifest, gates=manifest.gates + gates))
    for kind in filter(_needs_plans, request.engines):
        add_plans(Bundle.open(root), kind, PlanSettings(compute_capabilities=request.compute_capabilities), progress)
    return Bundle.open(root).manifest


def _needs_plans(kind: str) -> bool:
    return engine_class(kind).plans == "required"


def _open(root: Path, request: Request, progress: Progress) -> tuple[Model, Manifest]:
    """Read the inputs; the manifest as far as it is known without graphs."""
    if request.demo:
        clap_path, path, tokenizer_path = demo.CLAP, demo.CHECKPOINT, demo.TOKENIZER
    else:
        progress("fetching the files")
        clap_path = None if request.clap is None else fetch(request.clap)
        path, tokenizer_path = fetch(request.checkpoint or ""), request.tokenizer or ROBERTA
    progress("reading the checkpoints")
    clap = None if clap_path is None else read_checkpoint(clap_path, "clap")
    checkpoint = read_checkpoint(path, "checkpoint")
    model = open_model(clap, checkpoint, request.family)
    if model.towers is not None:
        read_tokenizer(fetch(str(tokenizer_path)), model.towers.vocabulary).save(str(root / TOKENIZER))
    elif request.tokenizer:
        raise InputError(f"--tokenizer is for text queries, which this {model.family} model does not take; leave it out")
    return model, Manifest(
        family=model.family,
        variant=model.variant,
        weights=model.weights,
        sources=tuple(c.source for c in (clap, checkpoint) if c is not None),
        toolchain={"python": platform.python_version(), **_versions()},
        dsp=model.dsp,
        condition=model.condition,
        query=model.query,
        max_batch=request.max_batch,
        graphs={},
        tokenizer=None if model.towers is None else describe_file(root, TOKENIZER),
        golden=FileEntry("golden.npz", 0, ""),
        gates=(),
    )


def _versions() -> dict[str, str]:
    """Versions of the tools that are installed; of the two ONNX Runtime wheels, one is."""
    found = {}
    for tool in TOOLS:
        with contextlib.suppress(PackageNotFoundError):
            found[tool] = version(tool)
    return found


def _export(root: Path, model: Model, manifest: Manifest, progress: Progress) -> Manifest:
    graphs = {}
    for spec in (*(model.towers.graphs() if model.towers else ()), *model.graphs()):
        progress(f"exporting {spec.name}")
        graphs[spec.name] = export_graph(spec, root, {**_metadata(manifest), "graph": spec.name, "precision": "fp32"})
    return replace(manifest, graphs=graphs)


def _derive(root: Path, model: Model, manifest: Manifest, progress: Progress) -> Manifest:
    graphs = dict(manifest.graphs)
    for spec in (*(model.towers.derived() if model.towers else ()), *model.derived()):
        progress(f"making {spec.name} out of {spec.source}")
        graphs[spec.name] = derive(spec, root, graphs, _metadata(manifest))
    return replace(manifest, graphs=graphs)


def _metadata(manifest: Manifest) -> dict[str, Any]:
    """What every graph says of itself, so that it can be used without the manifest."""
    return {
        "family": manifest.family,
        "variant": manifest.variant,
        "weights": manifest.weights,
        "dsp": manifest.dsp,
        "condition": manifest.condition,
        "query": manifest.query,
        "sources": {source.role: source.sha256 for source in manifest.sources},
        "toolchain": manifest.toolchain,
    }


def _write_golden(root: Path, model: Model, manifest: Manifest) -> tuple[Manifest, Golden]:
    tokenizer = None if model.towers is None else Tokenizer(root / TOKENIZER, manifest.query["context"])
    golden = make_golden(model, open_family(manifest), tokenizer)
    golden.save(root / manifest.golden.file)
    return replace(manifest, golden=describe_file(root, manifest.golden.file)), golden


def _lower(root: Path, model: Model, manifest: Manifest, golden: Golden, progress: Progress) -> Manifest:
    """Replace the float32 graphs by mixed float16 ones, chosen and judged on the calibration signals."""
    progress("calibration signals")
    vocabulary = 0 if model.towers is None else model.towers.vocabulary
    signals = calibration_signals(Separator(Bundle(root, manifest), route="fused"), golden, vocabulary)
    graphs, gates = {}, ()
    for name in manifest.graphs:
        progress(f"float16 for {name}")
        required = LIMITS["waveform SNR dB"][1]["fp16"] + 3 if name == "separator" else REQUIRED
        lowered = lower(root / f"graphs/{name}.onnx", *signals[name], required)
        progress(lowered.summary())
        graphs[name] = inspect_graph(root, name, "fp16", tuple(lowered.kept))
        gates += judge_lowered(name, lowered)
    manifest = replace(manifest, graphs=graphs)
    gates += run_gates(lambda route: StrictSeparator(Bundle(root, manifest), route=route), ["fused"], golden, progress)
    require(gates, "the conversion to float16", "no bundle was written")
    return replace(manifest, gates=manifest.gates + gates)
