"""One target in a process of its own, with a limit on its memory; it says which input comes next, so that a crash has a culprit."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

MEMORY = 2 << 30  # bytes above what the process has after it ran the valid inputs
CURRENT = "current.bin"


def main(name: str, seed: int, begin: int, end: int, channel: int) -> None:
    """Run inputs `begin` to `end`; a line of JSON on the file descriptor `channel` before and after each."""
    from clapsep.runtime.errors import ClapsepError
    from fuzz.targets import TARGETS

    target = TARGETS[name]
    with os.fdopen(channel, "w", buffering=1) as say:
        for data in target.valid():
            with contextlib.suppress(ClapsepError):  # some arguments are refused for what is not there
                target.run(data)
        limit_memory()
        say.write(json.dumps({"ready": True}) + "\n")
        for number in range(begin, end):
            data = target.make(seed, number)
            Path(CURRENT).write_bytes(data)
            say.write(json.dumps({"number": number}) + "\n")
            started = time.monotonic()
            try:
                target.run(data)
                result: dict[str, Any] = {"outcome": "accepted"}
            except ClapsepError as error:
                result = refusal(error)
            except BaseException as error:
                result = {"outcome": "finding", **describe(error)}
            if result["outcome"] == "finding":
                Path(f"{number}.bin").write_bytes(data)
            say.write(json.dumps({"seconds": time.monotonic() - started, **result}) + "\n")


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
        if isinstance(cause, MemoryError) or "bad_alloc" in str(cause) or "bad allocation" in str(cause) or "allocate memory" in str(cause):
            return {"outcome": "finding", **describe(error), "kind": "memory"}
        cause = cause.__cause__ or cause.__context__
    return {"outcome": "refused", "type": type(error).__name__, "message": str(error)[:300]}


def describe(error: BaseException) -> dict[str, Any]:
    """Type, words, and the last place in the product; findings at one place are one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "fuzz" not in Path(frame.filename).parent.name and "site-packages" not in frame.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else ""
    kind = "memory" if isinstance(error, MemoryError) else "untyped"
    return {"kind": kind, "type": type(error).__name__, "place": place, "message": str(error)[:500]}


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
