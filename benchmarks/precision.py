"""Ways to make a float16 graph, and other precisions of CPU engines, against float32: accuracy, overflow, plans, separation.

Usage: python benchmarks/precision.py BUNDLE... [--python PYTHON] [--scenes N] [--json FILE]

PYTHON is an interpreter with onnxconverter-common and nvidia-modelopt[onnx], which are no dependencies; without it their rows say
"not installed". SDRi is measured on the demo model only. Bundles must be fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from clapsep.engines import Engine, EngineOptions, PlanSettings
from clapsep.engines.onnxruntime import OnnxRuntimeEngine
from clapsep.engines.tensorrt_builder import build
from clapsep.export.gates import LIMITS
from clapsep.export.precision import MOVES, NORMALISATIONS, PRODUCTS, REQUIRED, Policy, convert, keep, lower
from clapsep.export.strict import StrictEngine
from clapsep.runtime import Separator
from clapsep.runtime.errors import EngineError, EngineUnavailable
from precision_tables import show
from strict_runs import POOR, Row, Scenes, Subject, against_reference, rounded_inside, score, score_strictly

WORKER = Path(__file__).with_name("converter_worker.py")
LIMIT = 900  # seconds that somebody else's converter or compiler may take
SAMPLE, SEED = 60, 4
CAPABILITY, MAX_BATCH = "8.6", 4
ROUNDS, WARM_UP = 15, 2
GRAPHS = ("text_encoder", "audio_encoder", "separator")
OURS, UNGUARDED = "ours", "ours, whatever a LayerNormalization sums inside"
Make = Callable[[Subject, str, Path], Row]


class Failed(Exception):
    """A way that made no graph; the text belongs in the table."""


def work(python: str | None, tool: str, model: Path, out: Path, data: Path | None = None) -> Row:
    """Run one tool of converter_worker.py.

    Raises:
        Failed: not installed, too slow, or the first line of its error.
    """
    if python is None:
        raise Failed("not installed")
    words = [python, WORKER, tool, model, out, *([data] if data else [])]
    try:
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"nothing after {LIMIT} s") from None
    last = (done.stdout.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    if done.returncode:
        raise Failed("not installed" if done.returncode == 3 else last)
    return json.loads(last)


def copy_of(subject: Subject, graph: str, out: Path) -> Row:
    ir.save(ir.load(subject.bundle.graph(graph)), out, external_data=f"{out.name}.data")
    return {}


def ours(subject: Subject, graph: str, out: Path) -> Row:
    """As a build does it."""
    copy_of(subject, graph, out)
    required = LIMITS["waveform SNR dB"][1]["fp16"] + 3 if graph == "separator" else REQUIRED
    return {"summary": lower(out, *subject.signals[graph], required).summary()}


def variant(policy: Policy, subject: Subject, graph: str, out: Path) -> Row:
    model = ir.load(subject.bundle.graph(graph))
    convert(model, keep(model.graph, subject.ranges(graph), policy))
    ir.save(model, out, external_data=f"{out.name}.data")
    return {}


def unguarded(subject: Subject, graph: str, out: Path) -> Row:
    """What an engine spoils that sums a LayerNormalization's squares in float16."""
    model = ir.load(subject.bundle.graph(graph))
    outside = {name: largest for name, largest in subject.ranges(graph).items() if not name.endswith(", squares")}
    convert(model, keep(model.graph, outside, Policy()))
    ir.save(model, out, external_data=f"{out.name}.data")
    return {}


def only_products(subject: Subject, graph: str, out: Path) -> Row:
    others = {node.op_type for node in ir.load(subject.bundle.graph(graph)).graph} - PRODUCTS - MOVES
    return variant(Policy(frozenset(others)), subject, graph, out)


def naive(subject: Subject, graph: str, out: Path) -> Row:
    model = ir.load(subject.bundle.graph(graph))
    convert(model, ())
    ir.save(model, out, external_data=f"{out.name}.data")
    return {}


def foreign(tool: str, python: str | None, subject: Subject, graph: str, out: Path) -> Row:
    """A converter that is not ours, sorted, as some leave nodes before what they need; it is shown three signals, two of them hard."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        data, raw = Path(scratch) / "data", Path(scratch) / "raw.onnx"
        data.mkdir()
        ordinary, hard = subject.signals[graph]
        for i, feeds in enumerate([ordinary[0], *hard[-2:]]):
            np.savez(data / f"{i}.npz", **feeds)
        facts = work(python, tool, subject.bundle.graph(graph), raw, data)
        try:
            model = ir.load(raw)
            model.graph.sort()
            ir.save(model, out, external_data=f"{out.name}.data")
        except Exception as error:  # not a graph, or one with a cycle
            raise Failed(f"{type(error).__name__}: {error}") from error
    return facts


def ways(python: str | None) -> dict[str, Make]:
    """Name of each way to make a graph, and what makes it."""
    layers = NORMALISATIONS | {"LayerNormalization"}
    return {
        "float32": copy_of,
        OURS: ours,
        UNGUARDED: unguarded,
        "ours, LayerNormalization in float32": partial(variant, Policy(layers)),
        "ours, LayerNormalization and Softmax in float32": partial(variant, Policy(layers | {"Softmax"})),
        "ours, everything but products in float32": only_products,
        "ours, no edges": partial(variant, Policy(edges=False)),
        "naive: every float node in float16": naive,
        "onnxruntime.transformers.float16": partial(foreign, "onnxruntime.transformers.float16", sys.executable),
        **{
            tool: partial(foreign, tool, python)
            for tool in ("onnxconverter_common.float16", "onnxconverter_common.auto_mixed_precision", "modelopt.onnx.autocast")
        },
    }


def attempt(work: Callable[[], Row], key: str, caught: type[Exception] = Exception) -> Row:
    """What `work` measures, or the first line of its error under `key`."""
    try:
        return work()
    except caught as error:
        lines = [re.sub(r"/\S*/", "", line).strip() for line in str(error).splitlines() if line.strip()]  # scratch folders mean nothing
        return {key: lines[0] if lines else type(error).__name__}


def pessimistic(subject: Subject, graph: str, path: Path, operator: str, scenes: Scenes | None) -> Row:
    """The same graph on an engine that rounds inside `operator` too."""
    with rounded_inside(operator) as lost:
        row: Row = {"strict": score_strictly(subject, graph, path)}
        row |= {"inside": dict(lost)} | (scenes.row(StrictEngine(path, EngineOptions())) if scenes else {})
    return row


def plan_of(model: Path) -> Row:
    """Compile the graph with the surrogate for TensorRT that needs no GPU."""
    settings = PlanSettings("fp16", MAX_BATCH, (CAPABILITY,))
    report = build("tensorrt-rtx", model, model.with_suffix(".plan"), settings, lambda _: None)
    return {"library": report.target.version} | {key: getattr(report, key) for key in ("layers", "half_share", "seconds", "size", "memory")}


def measure(subject: Subject, graph: str, make: Make, scenes: Scenes | None = None, plans: bool = True) -> Row:
    """One row: make the graph, check it, run it strictly and on ONNX Runtime, build a plan, separate scenes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{graph}.onnx"
        row = attempt(lambda: make(subject, graph, path), "failed", Failed)
        if "failed" in row:
            return row
        model = onnx.load(path, load_external_data=False)
        row |= {"nodes": len(model.graph.node), "casts": sum(node.op_type == "Cast" for node in model.graph.node)}
        row |= attempt(lambda: onnx.checker.check_model(str(path), full_check=True) or {}, "invalid")
        row["ort"] = attempt(lambda: score(subject, graph, OnnxRuntimeEngine(path, EngineOptions()).run), "failed")
        if plans:
            row["plan"] = attempt(lambda: plan_of(path), "failed", EngineError)
        if "invalid" in row:  # types that do not fit: there is nothing to run strictly
            return row
        row["strict"] = attempt(lambda: score_strictly(subject, graph, path), "failed")
        if scenes is not None and "failed" not in row["strict"]:
            row |= scenes.row(StrictEngine(path, EngineOptions()))
        if make in (ours, unguarded):
            row["reference"] = against_reference(path, subject.every(graph)[0], SAMPLE, SEED)
            row["pessimistic"] = {operator: pessimistic(subject, graph, path, operator, scenes) for operator in POOR}
    return row


def cpu_engines(subject: Subject, folder: Path) -> dict[str, Callable[[], Engine]]:
    """Ways to run the separator on this machine's CPU; ONNX Runtime in float32 is first, as what the others are compared with."""
    model, options = subject.bundle.graph("separator"), EngineOptions()

    def int8() -> Engine:
        work(sys.executable, "onnxruntime.quantization int8", model, folder / "int8.onnx")
        return OnnxRuntimeEngine(folder / "int8.onnx", options)

    def half() -> Engine:
        ours(subject, "separator", folder / "half.onnx")
        return OnnxRuntimeEngine(folder / "half.onnx", options)

    return {
        "onnxruntime float32": lambda: OnnxRuntimeEngine(model, options),
        "onnxruntime int8, dynamic": int8,
        "onnxruntime float16 (ours)": half,
        "openvino float32": lambda: Separator(subject.bundle, "openvino").engine("separator"),
        "openvino bf16": lambda: Separator(subject.bundle, "openvino", precision="bf16").engine("separator"),
    }


def compare_engines(subject: Subject, scenes: Scenes | None) -> dict[str, Row]:
    """Accuracy of each CPU engine, then their times on one window, taken in turns."""
    rows: dict[str, Row] = {}
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, start in cpu_engines(subject, Path(scratch)).items():
            try:
                engines[name] = start()
            except (Failed, EngineUnavailable) as error:
                rows[name] = {"failed": str(error)}
                continue
            rows[name] = score(subject, "separator", engines[name].run) | (scenes.row(engines[name]) if scenes else {})
            progress(f"{subject.bundle.path.name} {name}")
        for name, seconds in times_in_turns(engines, subject).items():
            rows[name] |= {"seconds": seconds, "median": statistics.median(seconds), "load": os.getloadavg()}
    return rows


def times_in_turns(engines: dict[str, Engine], subject: Subject) -> dict[str, list[float]]:
    feeds, seconds = subject.every("separator")[0], {name: [] for name in engines}
    for turn in range(WARM_UP + ROUNDS):
        for name, engine in engines.items():
            begin = time.perf_counter()
            engine.run(feeds)
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def compare(path: Path, python: str | None, count: int) -> Row:
    """Every way on every graph of one bundle."""
    subject = Subject(path)
    scenes = Scenes(subject.bundle, count) if subject.is_demo and count else None
    found: Row = {"weights": subject.bundle.manifest.weights, "graphs": {}}
    if scenes is not None:
        found["sdri_float32"] = scenes.float32
    for graph in GRAPHS:
        found["graphs"][graph] = rows = {}
        for name, make in ways(python).items():
            rows[name] = row = measure(subject, graph, make, scenes if graph == "separator" else None)
            progress(f"{path.name} {graph} {name} {row.get('strict', row)}")
            if "pessimistic" in row:
                rows |= {f"{name}; {operator} rounded at every step": poor for operator, poor in row.pop("pessimistic").items()}
    found["engines"] = compare_engines(subject, scenes)
    return found


def this_place() -> Row:
    names = ("numpy", "torch", "onnx", "onnx-ir", "onnxruntime", "openvino", "tensorrt_rtx")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = sorted(set(re.findall(r"\b(?:amx_\w+|avx512_bf16|avx512_fp16|avx512_vnni|avx512f)\b", info)))
    model = re.search(r"model name\s*: (.*)", info)
    place = {"cpu": model[1] if model else platform.processor(), "flags": flags, "cpus": os.cpu_count()}
    place |= {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""), "nice": os.nice(0)}
    return {"versions": versions, **place, "float32_operators": sorted(NORMALISATIONS)}


def plain(value: Any) -> Any:
    """For JSON: what is not finite is null."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--python")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: Row = {**this_place(), "load": os.getloadavg(), "scenes": args.scenes, "sample": SAMPLE, "seed": SEED, "bundles": {}}
    for path in args.bundles:
        found["bundles"][path.name] = compare(path, args.python, args.scenes)
        if args.json:
            args.json.write_text(json.dumps(plain(found), indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
