"""What is measured, group by group. Probes to be compared are neighbours, and the engines take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from ...engines.engine import Arrays
from ...runtime.dsp import Float32
from ...runtime.family import WindowFamily
from ...runtime.plans import runnable_routes
from ...runtime.rates import resample
from ...runtime.routes import ROUTES
from ...runtime.separator import Separator
from ...runtime.windows import OVERLAP, Windower, WindowPlan
from ..calibration import recording
from .environment import physical_cores
from .lab import CLIP_RATE, LONG_TEXT, SHORT_TEXT, Lab, Variant
from .result import NUMPY
from .rounds import Probe


@dataclass(frozen=True)
class Sweeps:
    """Numbers to go through, and the length of the long file in seconds; `threads` None is 1, 2, 4, … to the number of cores."""

    queries: tuple[int, ...] = (1, 2, 4, 8)
    batches: tuple[int, ...] = (1, 2, 4)
    threads: tuple[int, ...] | None = None
    callers: tuple[int, ...] = (1, 2, 4)
    seconds: int = 60

    def engine_threads(self) -> tuple[int, ...]:
        cores = physical_cores()
        return self.threads or tuple(sorted({2**i for i in range(cores.bit_length()) if 2**i < cores} | {cores}))


def stages(lab: Lab, sweeps: Sweeps) -> Iterator[Probe]:
    """What runs in no engine."""
    rate = CLIP_RATE if lab.rate != CLIP_RATE else 48000
    raw, window, long = lab.noise(round(lab.window_seconds * rate)), lab.noise(lab.window)[None], lab.noise(sweeps.seconds * lab.rate)
    yield Probe("stage resample", NUMPY, partial(resample, raw, rate, lab.rate), {"from": rate, "to": lab.rate}, lab.window_seconds)
    if not isinstance(lab.family, WindowFamily):
        return
    maps = lab.separator(lab.variants[0]).maps(window, lab.conditions(1)[0])
    for name, call in lab.family.stages(window, maps).items():
        yield Probe(f"stage {name}", NUMPY, call, {}, lab.window_seconds)
    yield Probe("stage overlap-add", NUMPY, partial(_overlap_add, lab, long), {"seconds": sweeps.seconds}, sweeps.seconds)


def _overlap_add(lab: Lab, x: Float32) -> None:
    """The windows of [n] samples, cut and joined."""
    windower = Windower(WindowPlan.of(lab.window, lab.rate, OVERLAP), 1, lab.conditions(1)[0][None], lambda windows, _: windows[None])
    windower.push(x[None])
    windower.finish()


def graphs(lab: Lab, _: Sweeps) -> Iterator[Probe]:
    """One engine call of each graph of each route, with a batch of one, on what the runtime gives it."""
    calls = [_graph_calls(lab, variant) for variant in lab.variants]
    for graph in (graph for graph in lab.bundle.manifest.graphs if any(graph in found for found in calls)):
        routed = lab.windowed and any(graph in route.graphs for route in ROUTES.values())
        audio = lab.window_seconds if routed else 0.0
        for variant, found in zip(lab.variants, calls, strict=True):
            if graph in found:
                yield Probe(f"graph {graph}", _name(lab, variant), found[graph], {"batch": 1}, audio)


def _graph_calls(lab: Lab, variant: Variant) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for route in _routes(lab, variant):
        separator = lab.separator(variant, route=route)
        for graph, inputs in _given(lab, separator).items():
            calls.setdefault(graph, partial(separator.engine(graph).run, inputs))
    return calls


def _given(lab: Lab, separator: Separator) -> dict[str, Arrays]:
    """What each graph is given, at last, for a text query, an audio query and one window."""
    with recording(separator, list(separator.choice.plans)) as given:
        if lab.clip_seconds:
            separator.encode_text([next(lab.texts(length)) for length in (SHORT_TEXT, LONG_TEXT)])
            separator.encode_audio([next(lab.clips())])
        separator.separate(lab.noise(lab.window), lab.rate, condition=lab.conditions(1)[0])
    return {graph: feeds[-1] for graph, feeds in given.items() if feeds}


def queries(lab: Lab, _: Sweeps) -> Iterator[Probe]:
    """Queries that are new, and a text that was asked before."""
    if not lab.clip_seconds:
        return
    separators = lab.separators()
    for words in (SHORT_TEXT, LONG_TEXT):
        for s in separators:
            call = partial(_encode_next, s.encode_text, lab.texts(words))
            yield Probe("text query", s.engine_name, call, {"words": words, "cached": "no"})
    for s in separators:
        call = partial(s.encode_text, [next(lab.texts())])
        yield Probe("text query", s.engine_name, call, {"words": SHORT_TEXT, "cached": "yes"})
    for s in separators:
        yield Probe("audio query", s.engine_name, partial(_encode_next, s.encode_audio, lab.clips()), {"cached": "no"}, lab.clip_seconds)


def _encode_next(encode: Callable[[list], object], queries: Iterator[object]) -> None:
    encode([next(queries)])


def routes(lab: Lab, _: Sweeps) -> Iterator[Probe]:
    """One window from waveform to waveform, by each route."""
    mixture, condition = lab.noise(lab.window), lab.conditions(1)[0]
    for route in ROUTES:
        for variant in lab.variants:
            if route in _routes(lab, variant):
                separator = lab.separator(variant, route=route)
                call = partial(separator.separate, mixture, lab.rate, condition=condition)
                yield Probe("separate", separator.engine_name, call, {"route": route}, lab.window_seconds)


def long(lab: Lab, sweeps: Sweeps) -> Iterator[Probe]:
    """A file of many windows that must also be resampled."""
    mixture, condition = lab.noise(sweeps.seconds * CLIP_RATE), lab.conditions(1)[0]
    for s in lab.separators():
        call = partial(s.separate, mixture, CLIP_RATE, condition=condition)
        yield Probe("separate long file", s.engine_name, call, {"seconds": sweeps.seconds, "rate": CLIP_RATE}, sweeps.seconds)


def several(lab: Lab, sweeps: Sweeps) -> Iterator[Probe]:
    """K questions about one window."""
    mixture, separators = lab.noise(lab.window), lab.separators()
    for k in sweeps.queries:
        for s in separators:
            call = partial(s.separate_many, mixture, lab.rate, lab.conditions(k))
            yield Probe("separate many", s.engine_name, call, {"queries": k}, k * lab.window_seconds)


def batches(lab: Lab, sweeps: Sweeps) -> Iterator[Probe]:
    """A mixture of as many windows as the largest batch, cut without overlap."""
    if not lab.windowed:
        return
    most, condition = max(sweeps.batches), lab.conditions(1)[0]
    mixture = lab.noise(most * lab.window)
    for batch in sweeps.batches:
        for s in lab.separators(batch=batch, overlap=0):
            call = partial(s.separate, mixture, lab.rate, condition=condition)
            yield Probe("separate in batches", s.engine_name, call, {"batch": batch, "windows": most}, most * lab.window_seconds)


def threads(lab: Lab, sweeps: Sweeps) -> Iterator[Probe]:
    """One window with so many threads in the engine; numpy keeps its own number."""
    mixture, condition = lab.noise(lab.window), lab.conditions(1)[0]
    for count in sweeps.engine_threads():
        for variant in lab.variants:
            if not variant.on_gpu:
                s = lab.separator(variant, threads=count)
                call = partial(s.separate, mixture, lab.rate, condition=condition)
                yield Probe("separate with threads", s.engine_name, call, {"threads": count}, lab.window_seconds)


def callers(lab: Lab, sweeps: Sweeps) -> Iterator[Probe]:
    """So many threads that separate a window each with one separator, until the last has its result."""
    mixture, condition, separators = lab.noise(lab.window), lab.conditions(1)[0], lab.separators()
    for count in sweeps.callers:
        for s in separators:
            call = partial(_all_at_once, ThreadPoolExecutor(count), count, partial(s.separate, mixture, lab.rate, condition=condition))
            yield Probe("separate for callers", s.engine_name, call, {"callers": count}, count * lab.window_seconds)


def _all_at_once(pool: ThreadPoolExecutor, count: int, call: Callable[[], object]) -> None:
    for future in [pool.submit(call) for _ in range(count)]:
        future.result()


def _routes(lab: Lab, variant: Variant) -> list[str]:
    return runnable_routes(lab.bundle, variant.kind, variant.options)


def _name(lab: Lab, variant: Variant) -> str:
    return lab.separator(variant).engine_name


PROBES: dict[str, Callable[[Lab, Sweeps], Iterator[Probe]]] = {
    "stages": stages,
    "graphs": graphs,
    "queries": queries,
    "routes": routes,
    "long": long,
    "several": several,
    "batches": batches,
    "threads": threads,
    "callers": callers,
}
