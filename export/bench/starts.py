"""Cold start and memory: a fresh process that imports the runtime, opens a bundle, answers one query, and says what that took.

`python -m clapsep.export.bench.starts` is that process; nothing heavy may be imported before it looks at the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lab import Lab, Variant
    from .result import Case
    from .rounds import Stopwatch

TIMEOUT = 600.0  # seconds
TIMES = {"total": "cold start", "import": "cold start: import", "open": "cold start: open", "first": "cold start: first result"}
SIZES = {"resident": "memory resident", "peak": "memory peak", "gpu": "memory on GPU"}
Row = dict[str, float]


def measure_starts(lab: Lab, count: int, stopwatch: Stopwatch) -> list[Case]:
    """`count` processes of each variant, by turns; one before them fills the page cache."""
    begin = stopwatch.now()
    rows: dict[Variant, list[Row]] = {variant: [] for variant in lab.variants}
    for turn in range(count + 1):
        for variant in lab.variants:
            stopwatch.refer()
            row = _start(lab, variant)
            if turn:
                rows[variant].append(row)
    stopwatch.refer()
    return [case for variant in rows for case in _cases(lab, variant, rows[variant], begin, stopwatch.now())]


def _cases(lab: Lab, variant: Variant, rows: list[Row], begin: float, end: float) -> list[Case]:
    from .result import Case

    engine = lab.separator(variant).engine_name
    named = [(key, name, "s") for key, name in TIMES.items()] + [(key, name, "bytes") for key, name in SIZES.items()]
    found = [(name, unit, tuple(float(row[key]) for row in rows)) for key, name, unit in named if all(row.get(key) for row in rows)]
    return [Case(name, engine, unit, {}, 0.0, 1, round(begin, 6), round(end, 6), values) for name, unit, values in found]


def _start(lab: Lab, variant: Variant) -> Row:
    from ...runtime.errors import EngineError

    request = {"bundle": str(lab.bundle.path), "engine": variant.kind, "device": variant.device, "precision": variant.precision}
    request["text"] = next(lab.texts()) if lab.bundle.manifest.tokenizer is not None else None
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}  # it finds what we find
    words = [sys.executable, "-P", "-m", __name__, json.dumps(request)]
    begin = time.perf_counter()
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        try:
            out, errors = child.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"a fresh process with engine {variant.kind} took more than {TIMEOUT:g} s; run: clapsep-export doctor"
            ) from error
        finally:
            child.kill()
    if child.returncode:
        last = (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise EngineError(f"a fresh process with engine {variant.kind} failed ({last}); run: clapsep-export doctor --engine {variant.kind}")
    answer: Row = json.loads(out.splitlines()[-1])
    answer["total"] = answer.pop("done") - begin
    return {key: round(value, 9) for key, value in answer.items()}


# From here on: in the fresh process.


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def _import() -> Any:
    from ... import runtime

    return runtime


def main(request: dict[str, Any]) -> dict[str, float]:
    """Import, open, one query and one window; `done` is the clock at the first result (the parent's clock too)."""
    importing, runtime = _timed(_import)
    settings = {name: request[name] for name in ("engine", "device", "precision")}
    opening, separator = _timed(lambda: runtime.Separator(request["bundle"], **settings))
    free = _gpu_free(separator)
    first, _ = _timed(lambda: _first_result(separator, request["text"]))
    done = time.perf_counter()
    sizes = {**_memory(), "gpu": max(free - _gpu_free(separator), 0)}
    return {"import": importing, "open": opening, "first": first, "done": done, **sizes}


def _first_result(separator: Any, text: str | None) -> object:
    import numpy as np

    rate, samples = separator.family.sample_rate, separator.family.window_samples
    mixture = np.random.default_rng(0).uniform(-0.3, 0.3, samples).astype(np.float32)
    if text is None and separator.family.towers is None:
        size = separator.family.condition_size
        return separator.separate(mixture, rate, condition=np.full(size, size**-0.5, np.float32))
    return separator.separate(mixture, rate, text or _import().Query(audio=[(mixture, rate)]))


def _memory() -> dict[str, float]:
    """Bytes that this process has resident, and had at most; 0 where the system does not say."""
    from ...engines.child import peak_memory

    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except OSError:
        pages = 0
    return {"resident": pages * os.sysconf("SC_PAGE_SIZE"), "peak": peak_memory()}


def _gpu_free(separator: Any) -> int:
    """Bytes free on the GPU, 0 if the engine runs on the CPU. The first call makes a CUDA context, which is not counted so."""
    from ...engines import engine_class
    from ...engines.cuda import Cuda

    choice = separator.choice
    return int(Cuda().call("cudaMemGetInfo")[0]) if engine_class(choice.kind).device(choice.options) == "cuda" else 0


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))  # noqa: T201
