"""Step `latency` of `gpu_check.py`: batches, one window from wave to wave by both routes, several queries, text and audio queries."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gpu_task
from gpu_ceilings import shares
from gpu_task import Answer, Seen, Task, Verdict, gpu_state, modes, observe, one_line

CPU_BATCH = 4  # the largest on the CPU, which gains nothing from batches
QUERIES = (1, 2, 4, 8)
GRAPH = "separator_waveform"
LATENCY, BATCH, SHARE = 3.0, 32, 0.4  # ms; windows; of the float16 products: the aims for the full-size model on an H200


@dataclass(frozen=True)
class Call:
    """What is repeated, and the seconds of audio that it takes in, once for every query; for batches also how many windows."""

    run: Callable[[], Any]
    audio: float = 0.0
    batch: int = 0


def latency(task: Task) -> Answer:
    """Milliseconds with copies to and from the device included, with and without CUDA graphs where the engine kind has them."""
    data: dict[str, Any] = {"unit": "ms", "gpu before": gpu_state()}
    for mode, replayed in modes(task).items():
        data[mode] = measure(task, replayed)
    aims = data["aims"] = aims_of(data) if task["device"] == "cuda" else {}
    met = "".join(f"; {name} {aim['measured']:.3g} (aim {aim['wanted']})" for name, aim in aims.items())
    said = f"ms{met}; " + "; ".join(f"{mode}: {summary(data[mode]['calls'])}" for mode in modes(task)) + memory(data, task)
    failed = {f"{mode}, {name}": reason for mode in modes(task) for name, reason in data[mode]["failed"].items()}
    if failed:
        name, reason = next(iter(failed.items()))
        raise Verdict("failed", f"{len(failed)} of the calls, {name} first: {reason}; {said}", data)
    return said, data


def measure(task: Task, cuda_graph: bool) -> dict[str, Any]:
    """Every call of one mode; the graphs of one route are in memory at a time. What fails is in `failed`, by name."""
    from clapsep.engines import EngineError

    found: dict[str, Any] = {"calls": {}, "failed": {}, "left out": {}, "provider": {}, "open seconds": {}, "gpu": {}}
    for route in routes(task):
        start = time.perf_counter()
        separator, golden = gpu_task.open_bundle(task, cuda_graph, route)
        found["provider"] |= {graph: separator.engine(graph).provider for graph in graphs_of(route)}
        found["open seconds"][route] = round(time.perf_counter() - start, 3)
        found["window seconds"] = separator.family.window_samples / separator.family.sample_rate
        for name, call in calls(separator, golden, route, task, found["left out"]):
            try:
                found["calls"][name] = described(observe(call.run, task["seconds"]), call, separator, task)
            except EngineError as error:
                found["failed"][name] = one_line(error)
        found["gpu"][route] = gpu_state()  # while its engines are open
    return found


def routes(task: Task) -> list[str]:
    """The routes to measure: those from the mixture's waveform and with shared work, of those that the bundle has graphs for."""
    from clapsep.engines import EngineOptions
    from clapsep.runtime import Bundle
    from clapsep.runtime.plans import runnable_routes

    runnable = runnable_routes(Bundle.open(task["path"]), task["engine"], EngineOptions(device=task["device"]))
    return [route for route in ("waveform", "split") if route in runnable] or runnable


def graphs_of(route: str) -> tuple[str, ...]:
    from clapsep.runtime.routes import ROUTES

    return ROUTES[route].graphs


def calls(separator: Any, golden: Any, route: str, task: Task, left_out: dict[str, str]) -> Iterator[tuple[str, Call]]:
    """By name, what to measure of a separator that takes `route`."""
    import numpy as np
    from clapsep.export.golden import as_float

    family, window = separator.family, as_float(golden.mixture)
    seconds = family.window_samples / family.sample_rate
    if route == "waveform":
        yield from batches(separator, window, golden.condition[:1], task)
    conditions = np.random.default_rng(0).standard_normal((max(QUERIES), family.condition_size)).astype(np.float32)
    conditions /= np.linalg.norm(conditions, axis=1, keepdims=True)
    yield f"window {route}", Call(lambda: separator.separate(window, family.sample_rate, condition=conditions[0]), seconds)
    if route == "waveform":  # several queries and the encoders come with the other route
        return
    for k in QUERIES:
        asked = list(conditions[:k])  # whose FiLM coefficients are kept after the first call, as everywhere
        yield f"queries {k}", Call(lambda q=asked: separator.separate_many(window, family.sample_rate, q), k * seconds)
    yield from query_encoders(separator, golden, left_out)


def batches(separator: Any, window: Any, condition: Any, task: Task) -> Iterator[tuple[str, Call]]:
    """The graph alone, from waveform to waveform, in batches of 1, 2, 4 and so on up to what the bundle's plans take."""
    import numpy as np

    engine, largest = separator.engine(GRAPH), separator.bundle.manifest.max_batch
    largest = min(largest, CPU_BATCH if task["device"] == "cpu" else largest, engine.max_batch or largest)
    seconds = len(window) / separator.family.sample_rate
    for size in sorted({*(1 << i for i in range(largest.bit_length())), largest}):
        inputs = {"mixture": np.repeat(window[None], size, axis=0), "condition": np.repeat(condition, size, axis=0)}
        yield f"b{size}", Call(lambda i=inputs: engine.run(i), size * seconds, size)


def query_encoders(separator: Any, golden: Any, left_out: dict[str, str]) -> Iterator[tuple[str, Call]]:
    """Embeddings of a text and of an example sound of the model's length that were never asked for before, so that none is kept."""
    from clapsep.export.golden import clips_of

    if separator.bundle.manifest.tokenizer is None:
        left_out["text query"] = "the bundle has no tokenizer"
    else:
        words = sorted({word for caption in golden.captions for word in str(caption).split()})
        texts = map(" ".join, itertools.permutations(words, 4))
        yield "text query", Call(lambda: separator.encode_text([next(texts)]))
    clip, rate, count = clips_of(golden)[0].copy(), separator.family.towers.front_end.sample_rate, itertools.count()

    def unheard() -> Any:
        clip[0] = next(count) * 2.0**-15
        return separator.encode_audio([(clip, rate)])

    yield "audio query", Call(unheard, len(clip) / rate)


def described(seen: Seen, call: Call, separator: Any, task: Task) -> Seen:
    """With seconds of audio per second, and for batches the shares of the machine's ceilings."""
    extra: dict[str, Any] = {}
    if call.audio:
        extra["audio seconds per second"] = call.audio / seen["median"] * 1000
    if call.batch:
        wave = 4 * call.batch * separator.family.window_samples  # bytes of float32
        moved = {"to device": wave + 4 * call.batch * separator.family.condition_size, "from device": wave}
        extra["shares"] = shares(seen["median"], call.batch, moved, task)
    return {**extra, **seen}


def aims_of(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the full-size model is meant to reach on an H200, where it was measured: latency with CUDA graphs, throughput in any mode."""
    aims = {}
    if window := data.get("CUDA graph", {}).get("calls", {}).get("window waveform"):
        aims["window with CUDA graph, ms"] = {"measured": window["median"], "wanted": f"<= {LATENCY:g}", "met": window["median"] <= LATENCY}
    measured = [mode["calls"].get(f"b{BATCH}", {}) for mode in data.values() if isinstance(mode, dict) and "calls" in mode]
    found = [row["shares"]["float16"] for row in measured if "float16" in row.get("shares", {})]
    if found:
        aims[f"b{BATCH}, of the float16 products"] = {"measured": max(found), "wanted": f">= {SHARE:g}", "met": max(found) >= SHARE}
    return aims


def summary(found: dict[str, Seen]) -> str:
    """Medians; for the largest batch throughput and shares too."""
    batched = [name for name, seen in found.items() if "shares" in seen]
    shown = [name for name in found if name not in batched[1:-1]]
    return ", ".join(f"{name} {found[name]['median']:.2f}{_throughput(found[name]) if name in batched[-1:] else ''}" for name in shown)


def _throughput(seen: Seen) -> str:
    products = [f"{share:.0%} of {name}" for name, share in seen["shares"].items() if name.endswith(("float16", "float32"))]
    rate = seen["audio seconds per second"]
    return f" ({', '.join([f'{rate:.0f} s of audio per s', *products])})"


def memory(data: dict[str, Any], task: Task) -> str:
    """How GPU memory grew, with the engines of each route of the last mode open."""
    before, after = data["gpu before"], data[list(modes(task))[-1]]["gpu"]
    grown = [f"{state['memory.used']} ({route})" for route, state in after.items() if state]
    return f"; GPU memory {before['memory.used']} to {', '.join(grown)} MiB" if task["device"] == "cuda" and before and grown else ""
