"""The gates: what a bundle must prove, on the machine and with the engine that will run it, and the limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..engines import EngineOptions, this_machine
from ..runtime.bundle import Bundle
from ..runtime.dsp import Float32
from ..runtime.errors import GateError
from ..runtime.family import WindowFamily
from ..runtime.manifest import Gate
from ..runtime.metrics import cosine, si_sdr, snr
from ..runtime.plans import SHORT_TEXT, choose, runnable_routes
from ..runtime.separator import Separator
from .golden import Golden, as_float, clips_of, condition_of

if TYPE_CHECKING:  # torch converts to float16 but is not needed to judge
    from .precision import Lowered

# metric: (relation, limit per precision). One table, no other place has a threshold.
LIMITS: dict[str, tuple[str, dict[str, float]]] = {
    "token ids differing": ("<=", {"fp32": 0, "fp16": 0, "bf16": 0}),
    "1 - cosine": ("<=", {"fp32": 1e-8, "fp16": 1e-4, "bf16": 3e-3}),
    "max error": ("<=", {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2}),
    "caption cosines, max error": ("<=", {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}),
    "log-mel error dB": ("<=", {"fp32": 1e-2, "fp16": 1e-2, "bf16": 1e-2}),
    "waveform SNR dB": (">=", {"fp32": 100, "fp16": 50, "bf16": 30}),
    "SI-SDR dB": (">=", {"fp32": 100, "fp16": 50, "bf16": 30}),
    "batch against single, max error": ("<=", {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}),
    "hard-signal SNR dB": (">=", {"fp32": 90, "fp16": 40, "bf16": 25}),
    "silence, max output": ("<=", {"fp32": 1e-6, "fp16": 1e-6, "bf16": 1e-6}),
    "mask values not finite": ("<=", {"fp32": 0, "fp16": 0, "bf16": 0}),
    "mask below 0 or above 1": ("<=", {"fp32": 0, "fp16": 0, "bf16": 0}),
    "float16 values not finite": ("<=", {"fp16": 0}),
    "largest float16 activation / 65504": ("<=", {"fp16": 0.25}),
}

INAUDIBLE = 1e-5  # of the mixture, -100 dB: a target of less is rounding noise

Progress = Callable[[str], None]
Measurement = tuple[str, str, float]  # stage, metric, measured


def judge(stage: str, metric: str, measured: float, precision: str, engine: str) -> Gate:
    """One line of the table; a value that is not finite fails."""
    relation, limits = LIMITS[metric]
    limit = float(limits[precision])
    finite = bool(np.isfinite(measured))
    passed = finite and (measured >= limit if relation == ">=" else measured <= limit)
    return Gate(engine, stage, metric, relation, limit, float(measured) if finite else None, passed)


def judge_lowered(graph: str, lowered: Lowered) -> tuple[Gate, ...]:
    """Ranges of a float16 graph: engines on the CPU compute in float32 inside and hide overflow."""
    measurements = (
        ("float16 values not finite", lowered.not_finite),
        ("largest float16 activation / 65504", lowered.largest),
    )
    return tuple(judge(graph, metric, measured, "fp16", "strict") for metric, measured in measurements)


def _text(separator: Separator, golden: Golden) -> Iterator[Measurement]:
    stage = "text_encoder"
    if separator.bundle.manifest.tokenizer is not None:
        ids, mask = separator.queries.tokenizer.encode([str(caption) for caption in golden.captions])
        yield stage, "token ids differing", int(np.sum((ids != golden.input_ids) | (mask != golden.attention_mask)))
    if SHORT_TEXT in separator.choice.plans:
        size = int(separator.bundle.manifest.graphs[SHORT_TEXT].inputs[0].shape[1])
        fitting = ~golden.attention_mask[:, size:].any(axis=1)
        cut = {name: np.ascontiguousarray(rows[fitting, :size]) for name, rows in golden.tokens.items()}
        if fitting.any():
            yield from _embedding(SHORT_TEXT, golden.text_embedding[fitting], separator.engine(SHORT_TEXT).run(cut)["embedding"])
    embedding = separator.engine(stage).run(golden.tokens)["embedding"]
    yield from _embedding(stage, golden.text_embedding, embedding)
    wanted, found = (cosine(e[:, None], e[None]) for e in (golden.text_embedding, embedding))
    yield stage, "caption cosines, max error", float(np.max(np.abs(wanted - found)))


def _embedding(stage: str, wanted: Float32, found: Float32) -> Iterator[Measurement]:
    yield stage, "1 - cosine", float(np.max(1 - cosine(wanted, found)))
    yield stage, "max error", float(np.max(np.abs(wanted - found)))


def _audio(separator: Separator, golden: Golden) -> Iterator[Measurement]:
    stage, towers = "audio_encoder", separator.queries.towers
    log_mel = np.stack([towers.features(clip, towers.front_end.sample_rate, None)[0] for clip in clips_of(golden)])
    yield stage, "log-mel error dB", float(np.max(np.abs(log_mel - golden.log_mel)))
    yield from _embedding(stage, golden.audio_embedding, separator.engine(stage).run({"log_mel": log_mel})["embedding"])


def _separation(separator: Separator, golden: Golden) -> Iterator[Measurement]:
    """End to end, from mixture and query to waveform, the queries embedded by the engine under test."""
    conditions, embeddings = golden.condition, []
    if separator.family.towers is not None:
        embeddings += [*separator.engine("text_encoder").run(golden.tokens)["embedding"]]
        embeddings += [*separator.engine("audio_encoder").run({"log_mel": golden.log_mel})["embedding"]]
        conditions = [condition_of(separator.family, pair, embeddings) for pair in golden.pairs]
    window = as_float(golden.mixture)[None]
    for i, (pair, condition, target) in enumerate(zip(golden.pairs, conditions, golden.target, strict=True)):
        found = separator.separate_windows(window, condition[None])[0, 0]
        sides = "".join(side for side, row in zip("PN", pair, strict=True) if row >= 0) or f"condition {i + 1}"
        stage = f"{separator.choice.one} {sides}{' audio' if max(pair) >= len(golden.captions) > 0 else ''}"
        yield stage, "waveform SNR dB", snr(target, found)
        yield stage, "SI-SDR dB", si_sdr(target, found)


def _hard(separator: Separator, golden: Golden) -> Iterator[Measurement]:
    """Signals on which engines overflow or divide by zero: in batches as the runtime makes them, of two at least, and the last alone."""
    windows, condition, route, family = as_float(golden.hard), golden.condition[0], separator.choice.one, separator.family
    size, waves, not_finite, outside = max(2, separator.batch), [], 0, 0  # all at once would take 15 GB with the largest models
    for part in np.array_split(windows, -(-len(windows) // size)):
        if not (separator.has_maps and isinstance(family, WindowFamily)):
            waves.append(separator.separate_windows(part, condition[None])[0])
            continue
        maps, (_, context) = separator.maps(part, condition), family.features(part)
        waves.append(family.reconstruct(maps, context))
        not_finite += sum(int(np.sum(~np.isfinite(values))) for values in maps.values())
        outside += int(np.sum((maps["mask"] < 0) | (maps["mask"] > 1)))
    found = np.concatenate(waves)
    if separator.has_maps and isinstance(family, WindowFamily):
        yield route, "mask values not finite", not_finite
        yield route, "mask below 0 or above 1", outside
    alone = separator.separate_windows(windows[-1:], condition[None])[0, 0]
    yield route, "batch against single, max error", float(np.max(np.abs(alone - found[-1])))
    for name, window, wanted, wave in zip(golden.hard_names, windows, golden.hard_target, found, strict=True):
        if np.linalg.norm(wanted) > INAUDIBLE * np.linalg.norm(window):
            yield f"{route} {name}", "hard-signal SNR dB", snr(wanted, wave)
        else:
            yield f"{route} {name}", "silence, max output", float(np.max(np.abs(wave)))


Stage = Callable[[Separator, Golden], Iterator[Measurement]]
QUERIES: dict[str, Stage] = {"text encoder": _text, "audio encoder": _audio}
SEPARATION: dict[str, Stage] = {"separation": _separation, "hard signals": _hard}


def run_gates(open_separator: Callable[[str], Separator], routes: Sequence[str], golden: Golden, progress: Progress) -> tuple[Gate, ...]:
    """Measure the query encoders, and the separation by each of `routes`, with separators of one engine kind and precision."""
    first = open_separator(routes[0])
    gates = () if first.family.towers is None else _run(first, QUERIES, golden, progress)
    del first
    for route in routes:  # the graphs of one route are in memory at a time
        gates += _run(open_separator(route), SEPARATION, golden, progress)
    return gates


def _run(separator: Separator, stages: dict[str, Stage], golden: Golden, progress: Progress) -> tuple[Gate, ...]:
    gates = []
    for name, measure in stages.items():
        progress(f"gates on {separator.engine_name}: {name}{f', {separator.choice.one}' if stages is SEPARATION else ''}")
        gates += [judge(*measurement, separator.precision, separator.engine_name) for measurement in measure(separator, golden)]
    return tuple(gates)


def load_golden(bundle: Bundle) -> Golden:
    return Golden.load(bundle.file(bundle.manifest.golden), towers="text_encoder" in bundle.manifest.graphs)


def measure(
    path: Path, engines: Sequence[str], progress: Progress, device: str | None = None, precision: str | None = None
) -> tuple[Gate, ...]:
    """Check every file of a bundle, then run its gates on each engine kind."""
    bundle = Bundle.open(path)
    options = EngineOptions(device=device, precision=precision)
    for kind in engines:  # what cannot run is said before anything long begins
        choose(bundle, kind, options, this_machine())
    progress("checking files")
    bundle.check_files()
    golden = load_golden(bundle)
    gates: tuple[Gate, ...] = ()
    for kind in engines:  # one at a time is in memory
        gates += gate_engine(bundle, kind, options, golden, progress)
    return gates


def gate_engine(bundle: Bundle, kind: str, options: EngineOptions, golden: Golden, progress: Progress) -> tuple[Gate, ...]:
    """Run the gates with one engine kind on every route that it can take."""
    settings = {"device": options.device, "precision": options.precision, "host_code": options.host_code}
    routes = runnable_routes(bundle, kind, options)
    return run_gates(lambda route: Separator(bundle, kind, route=route, **settings), routes, golden, progress)


def _shown(gate: Gate) -> str:
    return "not finite" if gate.measured is None else f"{gate.measured:.4g}"


def table(gates: tuple[Gate, ...]) -> str:
    """Engine, stage, metric, limit, measured, verdict: one line a gate."""
    header = ("engine", "stage", "metric", "limit", "measured", "")
    rows = [(g.engine, g.stage, g.metric, f"{g.relation} {g.threshold:g}", _shown(g), "✓" if g.passed else "✗") for g in gates]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows])


def require(gates: tuple[Gate, ...], what: str, consequence: str) -> None:
    """Raise GateError with the first failure in one sentence if any gate failed."""
    failed = [g for g in gates if not g.passed]
    if failed:
        g = failed[0]
        raise GateError(
            f"{what} failed {len(failed)} of {len(gates)} gates, first {g.stage}: {g.metric} is {_shown(g)} and must be "
            f"{g.relation} {g.threshold:g}; {consequence}"
        )
