"""One target in a process of its own, with a limit on its memory; it says which input comes next, so that a crash has a culprit."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clapsep.engines.errors import ClapsepError

MEMORY = 2 << 30  # bytes above what the process has after it ran the valid inputs
CURRENT = "current.bin"


def main(name: str, seed: int, begin: int, end: int, channel: int, corpus: str = "") -> None:
    """Run inputs `begin` to `end`; a line of JSON on the file descriptor `channel` before and after each.

    With `corpus`, a folder, coverage guides the inputs, and the numbers only count them.
    """
    from . import guided
    from .targets import load

    with guided.instrumented() if corpus else contextlib.nullcontext():
        target = load(name)
    with os.fdopen(channel, "w", buffering=1) as say:
        run = recorder(target.run, begin, lambda **line: say.write(json.dumps(line) + "\n"))
        for data in target.valid():
            with contextlib.suppress(ClapsepError):  # some arguments are refused for what is not there
                target.run(data)
        limit_memory()
        if corpus:
            guided.fuzz(target, run, seed, end - begin, Path(corpus))
        for number in range(begin, end):
            run(target.make(seed, number))


def recorder(target: Callable[[bytes], None], begin: int, say: Callable[..., object]) -> Callable[[bytes], None]:
    """The target, telling each input's number before it runs and what came of it after; inputs of findings are kept."""
    numbers = iter(range(begin, sys.maxsize))

    def run(data: bytes) -> None:
        number = next(numbers)
        Path(CURRENT).write_bytes(data)
        say(number=number)
        started = time.monotonic()
        result = outcome(target, data)
        if result["outcome"] == "finding":
            Path(f"{number}.bin").write_bytes(data)
        say(seconds=time.monotonic() - started, **result)

    return run


def outcome(target: Callable[[bytes], None], data: bytes) -> dict[str, Any]:
    """Accepted, refused by a typed error, or a finding."""
    try:
        target(data)
        return {"outcome": "accepted"}
    except ClapsepError as error:
        return refusal(error)
    except BaseException as error:
        return {"outcome": "finding", **describe(error)}


def limit_memory() -> None:
    """Allocations beyond the limit fail from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def refusal(error: BaseException) -> dict[str, Any]:
    """A typed error, unless memory ran out below it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or any(words in str(cause) for words in ("bad_alloc", "bad allocation", "allocate memory")):
            return {"outcome": "finding", **describe(error), "kind": "memory"}
        cause = cause.__cause__ or cause.__context__
    return {"outcome": "refused", "type": type(error).__name__}


def describe(error: BaseException) -> dict[str, Any]:
    """Type, words, and the last place in the product; findings at one place are one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).parent.name != "fuzz" and "site-packages" not in f.filename] or list(frames)
    place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else ""
    kind = "memory" if isinstance(error, MemoryError) else "untyped"
    return {"kind": kind, "type": type(error).__name__, "place": place, "message": str(error)[:500]}


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]), *sys.argv[6:])
