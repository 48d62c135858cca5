"""What graphs make of a bundle's calibration signals, against float32: strictly, every value rounded, or on an engine."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from clapsep.engines import Engine
from clapsep.engines.engine import Arrays
from clapsep.export import strict
from clapsep.export.calibration import calibration_signals
from clapsep.export.gates import load_golden
from clapsep.export.golden import as_float
from clapsep.export.precision import HALF, MAXIMUM, measure_ranges
from clapsep.export.signals import CALIBRATION, named
from clapsep.export.strict import StrictGraph
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.family import open_family
from clapsep.runtime.metrics import snr
from numpy.typing import NDArray
from quality import RATE, Judge, gains, make_scene
from torch import Tensor

Row = dict[str, Any]
Outputs = Mapping[str, NDArray[Any]]
Run = Callable[[Arrays], Outputs]


class Replaced(Separator):
    """A separator whose separator graph runs on the engine given."""

    replacement: Engine | None = None

    def engine(self, graph: str) -> Engine:
        return self.replacement if graph == "separator" and self.replacement is not None else super().engine(graph)


class Subject:
    """A bundle with float32 graphs, its calibration signals, and what float32 makes of them."""

    def __init__(self, path: Path) -> None:
        self.bundle = Bundle.open(path)
        self.family, self.golden = open_family(self.bundle.manifest), load_golden(self.bundle)
        self.is_demo = self.bundle.manifest.weights == "demo"
        self._wanted: dict[str, list[Outputs]] = {}
        self._ranges: dict[str, dict[str, float]] = {}

    @cached_property
    def signals(self) -> dict[str, tuple[list[Arrays], list[Arrays]]]:
        """As a build makes them, ordinary and hard."""
        tables = [v.shape for v in ir.load(self.bundle.graph("text_encoder")).graph.initializers.values() if v.shape is not None]
        vocabulary = max(int(shape[0]) for shape in tables if len(shape) == 2)
        return calibration_signals(Separator(self.bundle, route="fused"), self.golden, vocabulary)

    @cached_property
    def contexts(self) -> list[Any]:
        """Of the separator's signals: what turns a mask into a waveform."""
        size, rate = self.family.window_samples, self.family.sample_rate
        windows = [self.golden.mixture] * len(self.golden.condition) + [named(name, size, rate) for name in CALIBRATION]
        return [self.family.features(as_float(window)[None])[1] for window in windows]

    def every(self, graph: str) -> list[Arrays]:
        """The ordinary signals of a graph, then the hard ones."""
        ordinary, hard = self.signals[graph]
        return [*ordinary, *hard]

    def wanted(self, graph: str) -> list[Outputs]:
        if graph not in self._wanted:
            run = StrictGraph(ir.load(self.bundle.graph(graph))).run
            self._wanted[graph] = [run(feeds) for feeds in self.every(graph)]
        return self._wanted[graph]

    def ranges(self, graph: str) -> dict[str, float]:
        if graph not in self._ranges:
            self._ranges[graph] = measure_ranges(ir.load(self.bundle.graph(graph)), self.every(graph))[0]
        return self._ranges[graph]


def score(subject: Subject, graph: str, run: Run) -> Row:
    """Worst SNR in dB of the outputs and of the waveform, on the ordinary signals and on the hard ones, and the loudest silence."""
    found = [run(feeds) for feeds in subject.every(graph)]
    wanted, first = subject.wanted(graph), len(subject.signals[graph][0])
    outputs = [min_db([snr(w[name], f[name]) for name in w]) for w, f in zip(wanted, found, strict=True)]
    row: Row = {"output_db": min_db(outputs[:first]), "hard_output_db": min_db(outputs[first:])}
    if graph == "separator":
        waves = [
            [subject.family.reconstruct(maps, context) for maps in pair]
            for *pair, context in zip(wanted, found, subject.contexts, strict=True)
        ]
        hard = [pair for pair in waves[first:] if np.any(pair[0])]
        silent = [float(np.max(np.abs(f))) for w, f in waves if not np.any(w)]
        row |= {"wave_db": min_db([snr(w, f) for w, f in waves[:first]]), "hard_wave_db": min_db([snr(w, f) for w, f in hard])}
        row["silence"] = float(np.max(silent))
    return row


def min_db(values: list[float]) -> float:
    """The worst; a value that is not a number is worse than any."""
    return float(np.min(values))


class Census:
    """An observer that counts nodes by the type they really compute in, and values that are not finite."""

    def __init__(self) -> None:
        self.float32: set[str] = set()
        self.half: set[str] = set()
        self.not_finite, self.first_broken, self.largest = 0, "", 0.0

    def __call__(self, node: ir.Node, results: list[Tensor]) -> None:
        for result in filter(Tensor.is_floating_point, results):
            largest, half = float(result.abs().max()), result.dtype == torch.float16
            if not np.isfinite(largest):
                self.not_finite += int((~result.isfinite()).sum())
                self.first_broken = self.first_broken or f"{node.op_type} {node.name}"
            elif half:
                self.largest = max(self.largest, largest)
            if node.op_type != "Cast":
                (self.half if half else self.float32).add(str(node.name))

    def row(self) -> Row:
        return {
            "float32_nodes": len(self.float32),
            "half_nodes": len(self.half),
            "not_finite": self.not_finite,
            "first_broken": self.first_broken,
            "largest": self.largest / MAXIMUM,
        }


def score_strictly(subject: Subject, graph: str, path: Path) -> Row:
    strictly, census = StrictGraph(ir.load(path)), Census()
    return score(subject, graph, lambda feeds: strictly.run(feeds, census)) | census.row()


class Scenes:
    """Seeded scenes of benchmarks/quality.py, asked for by text, positive and negative."""

    def __init__(self, bundle: Bundle, count: int) -> None:
        self._separator = Replaced(bundle)
        judge = Judge(self._separator)
        self._scenes = [make_scene(index, 2, 0.0, judge.samples) for index in range(count)]
        self._conditions = [
            self._separator.condition(judge.query(scene, [0], "text", 0), judge.query(scene, [1], "text", 0)) for scene in self._scenes
        ]
        self.float32 = self.sdri(None)

    def sdri(self, engine: Engine | None) -> list[float]:
        """SDR improvement of every scene with the separator graph on `engine`, None for float32 on ONNX Runtime."""
        self._separator.replacement = engine
        pairs = zip(self._scenes, self._conditions, strict=True)
        return [gains(s, self._separator.separate(s.mixture, RATE, condition=c), 0)["sdri"] for s, c in pairs]

    def row(self, engine: Engine) -> Row:
        """What is lost against float32: mean and worst scene, in dB of SDRi."""
        loss = np.subtract(self.float32, found := self.sdri(engine))
        return {"sdri_loss": float(np.mean(loss)), "sdri_worst_loss": float(np.max(loss)), "sdri": found}


def against_reference(path: Path, feeds: Arrays, count: int, seed: int) -> dict[str, Row]:
    """Per operator: a sample of half nodes run by ONNX's reference evaluator on the strict run's own inputs.

    ulp: largest difference in units of the reference's last place. relative: largest difference as a share of the largest result.
    """
    model = ir.load(path)
    strictly = StrictGraph(model)
    nodes = [n for n in model.graph if n.op_type in strict.OPERATORS and n.outputs[0].dtype == HALF]
    chosen = set(np.random.default_rng(seed).choice([str(n.name) for n in nodes], min(count, len(nodes)), replace=False).tolist())
    names = {str(v.name) for n in nodes if n.name in chosen for v in n.inputs if v is not None}
    values = {str(n): torch.from_numpy(v.const_value.numpy().copy()) for n, v in model.graph.initializers.items() if n in names}
    values |= {name: torch.from_numpy(value) for name, value in feeds.items() if name in names}
    rows: dict[str, list[Row]] = defaultdict(list)

    def observe(node: ir.Node, results: list[Tensor]) -> None:
        values.update((str(v.name), r) for v, r in zip(node.outputs, results, strict=False) if str(v.name) in names)
        if node.name in chosen:
            reference = strictly._reference(node, [None if v is None else values[str(v.name)] for v in node.inputs])
            rows[node.op_type].append(_difference(results[0].numpy(), reference[0].numpy()))

    strictly.run(feeds, observe)
    worst = lambda found, key: max(row[key] for row in found)  # noqa: E731
    return {op: {"nodes": len(found)} | {key: worst(found, key) for key in found[0]} for op, found in sorted(rows.items())}


def _difference(found: NDArray[Any], reference: NDArray[Any]) -> Row:
    reference = reference.astype(found.dtype)
    error = np.abs(found.astype(np.float64) - reference)
    ulps = error / np.spacing(np.abs(reference)).astype(np.float64)
    return {
        "differing": float(np.mean(error > 0)),
        "over_one_ulp": float(np.mean(ulps > 1)),
        "ulp": float(ulps.max()),
        "relative": float(error.max() / max(float(np.abs(reference).max()), 1e-30)),
    }


@contextlib.contextmanager
def rounded_inside(operator: str) -> Iterator[Counter[str]]:
    """An engine that ignores `stash_type`: every step inside one of POOR rounded to half, sums one element at a time.

    Yields how many sums were not finite, which may leave no trace outside: 1 / inf is 0.
    """
    kept, lost = strict.OPERATORS[operator], Counter[str]()

    def poor(attributes: strict.Attributes, x: list[Any]) -> Tensor:
        if x[0].dtype != torch.float16:
            return kept(attributes, x)
        assert attributes.get("axis", -1) in (-1, x[0].ndim - 1)
        result, total = POOR[operator](attributes, x)
        lost["sums not finite"] += int((~total.isfinite()).sum())
        lost["nodes"] += not total.isfinite().all()
        return result

    strict.OPERATORS[operator] = poor
    try:
        yield lost
    finally:
        strict.OPERATORS[operator] = kept


def _sum(x: Tensor) -> Tensor:
    """Along the last axis, rounded after each addition."""
    first, *rest = x.movedim(-1, 0).contiguous()
    for value in rest:
        first = first + value
    return first[..., None]


def _poor_layer_norm(a: strict.Attributes, x: list[Any]) -> tuple[Tensor, Tensor]:
    size = x[0].shape[-1]
    centred = x[0] - _sum(x[0]) / size
    squares = _sum(centred * centred)
    scaled = centred / (squares / size + a.get("epsilon", 1e-5)).sqrt() * x[1]
    return (scaled + x[2] if len(x) > 2 else scaled), squares


def _poor_softmax(_: strict.Attributes, x: list[Any]) -> tuple[Tensor, Tensor]:
    raised = (x[0] - x[0].amax(-1, keepdim=True)).exp()
    total = _sum(raised)
    return raised / total, total


POOR = {"LayerNormalization": _poor_layer_norm, "Softmax": _poor_softmax}
