"""What each graph is given on signals that calibrate lower precisions, recorded while a float32 bundle runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle

import numpy as np

from ..engines import Engine
from ..engines.engine import Arrays
from ..runtime.separator import Separator
from . import signals
from .golden import Golden, as_float

FEW = 6  # inputs of a graph that are kept of one signal; causal graphs have hundreds
Feeds = dict[str, list[Arrays]]  # by graph


@contextmanager
def recording(separator: Separator, graphs: Sequence[str]) -> Iterator[Feeds]:
    """What graphs are given while this lasts."""
    given: Feeds = {graph: [] for graph in graphs}
    engines = {graph: separator.engine(graph) for graph in graphs}

    def record(graph: str, engine: Engine, inputs: Arrays) -> dict[str, np.ndarray]:
        given[graph].append({name: value.copy() for name, value in inputs.items()})
        return type(engine).run(engine, inputs)

    for graph, engine in engines.items():
        setattr(engine, "run", lambda inputs, graph=graph, engine=engine: record(graph, engine, inputs))  # noqa: B010
    try:
        yield given
    finally:
        for engine in engines.values():
            delattr(engine, "run")


def calibration_signals(separator: Separator, golden: Golden, vocabulary: int) -> dict[str, tuple[list[Arrays], list[Arrays]]]:
    """Inputs of each of a float32 bundle's graphs for `precision.lower`: the ordinary ones, then the hard ones of `signals.CALIBRATION`.

    Args:
        separator: of the route `fused`.
        vocabulary: tokens of the text tower.
    """
    family, graphs = separator.family, list(separator.choice.plans)
    conditions, mixture = golden.condition, as_float(golden.mixture)[None]
    ordinary = _collect(separator, graphs, [(mixture, c) for c in conditions])
    mixtures = [as_float(signals.named(name, family.window_samples, family.sample_rate))[None] for name in signals.CALIBRATION]
    hard = _collect(separator, graphs, list(zip(mixtures, cycle(conditions), strict=False)))
    if (towers := family.towers) is not None:
        random = np.random.Generator(np.random.PCG64(9))
        ids = random.integers(4, vocabulary, (4, golden.input_ids.shape[1]))  # past the special tokens, no padding
        size, rate = towers.front_end.clip_samples, towers.front_end.sample_rate
        clips = [towers.features(as_float(signals.named(name, size, rate)), rate, None)[0] for name in signals.CALIBRATION]
        ordinary |= {"text_encoder": [golden.tokens], "audio_encoder": [{"log_mel": golden.log_mel}]}
        hard |= {
            "text_encoder": [{"input_ids": ids, "attention_mask": np.ones_like(ids)}],
            "audio_encoder": [{"log_mel": clip[None]} for clip in clips],
        }
    return {graph: (ordinary[graph], hard[graph] or ordinary[graph]) for graph in graphs}


def _collect(separator: Separator, graphs: Sequence[str], questions: Sequence[tuple[np.ndarray, np.ndarray]]) -> Feeds:
    """A few of the inputs that each graph gets for each mixture and condition, from the first to the last."""
    found: Feeds = {graph: [] for graph in graphs}
    for mixture, condition in questions:
        with recording(separator, graphs) as given:
            separator.separate_windows(mixture, condition[None])
        for graph, feeds in given.items():
            found[graph] += [feeds[i] for i in np.unique(np.linspace(0, len(feeds) - 1, FEW).round().astype(int))] if feeds else []
    return found
