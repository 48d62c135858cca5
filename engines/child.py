"""A file made by a child process, for native code that may crash, take all memory or be impossible to interrupt.

The child gets its request on stdin as one line of JSON and answers with lines of JSON: progress, then a report or an error. It ends when
its stdin is closed, thus also when the parent is killed. The file is made under another name and moved: it is complete or not there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import IO, Any, NoReturn

from .errors import EngineError
from .plan import Progress

Fields = Mapping[str, Any]  # of a request; JSON
Write = Callable[[Any], int]  # takes bytes, returns how many they were
LESS_MEMORY = "allow or free more memory, or compile for a smaller batch"


@dataclass(frozen=True)
class Child:
    """What runs: `python -m module`, with `environment` added to ours. memory: bytes that it may have resident at most, None for any."""

    module: str
    environment: Mapping[str, str]
    memory: int | None = None


def make_file(out: Path, child: Child, request: Fields, progress: Progress) -> dict[str, Any]:
    """Have `child` make the file `out`; returns its report.

    Raises:
        EngineError: it reported an error, crashed, or took too much memory; `out` is as it was.
    """
    if child.memory is not None and not sys.platform.startswith("linux"):
        raise EngineError("a memory limit for the compiler needs Linux; leave it out")
    if not out.parent.is_dir():
        raise EngineError(f"{out} cannot be written, as {out.parent} is no directory; make it, or choose another place")
    temporary = out.resolve().with_name(f".{out.name}.{os.getpid()}.tmp")
    line = json.dumps({"request": request, "file": str(temporary), "out": str(out), "memory": child.memory}) + "\n"
    try:
        with tempfile.TemporaryFile() as errors, _running(child, line, errors) as process:
            report = _listen(process, errors, progress)
            _move(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return report


@contextmanager
def _running(child: Child, line: str, errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The child, which is gone when the block is left."""
    words = [sys.executable, "-P", "-m", child.module]  # -P: what lies in the current directory is not imported
    path = os.pathsep.join(place for place in sys.path if place)  # it finds what we find, as with multiprocessing
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": path, **child.environment}
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=errors, env=environment, bufsize=0) as process:
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it died at once; `_listen` says of what
                process.stdin.write(line.encode())
            yield process
        finally:
            process.kill()


def _listen(process: subprocess.Popen[bytes], errors: IO[bytes], progress: Progress) -> dict[str, Any]:
    """Pass progress on until the child reports or fails."""
    for line in process.stdout or ():
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        if "report" in answer:
            return answer["report"]
        progress(answer["progress"])
    raise _death(process.wait(), errors)


def _death(code: int, errors: IO[bytes]) -> EngineError:
    if code == -signal.SIGKILL:
        return EngineError(f"the compiler was ended by signal 9, which is what running out of memory looks like; {LESS_MEMORY}")
    errors.seek(0)
    words = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    last = f" ({words[-1][-300:]})" if words else ""
    what = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return EngineError(f"the compiler {what}{last}; try another version of the library, or another engine")


def _move(temporary: Path, out: Path) -> None:
    try:
        os.replace(temporary, out)
    except OSError as error:
        raise EngineError(f"{out} cannot be written ({error.strerror}); choose another place") from error


# From here on: in the child.


class _Output:
    """The file, which is removed unless the parent has moved it: the child only ends through `end`."""

    def __init__(self, path: Path) -> None:
        self._path, self._writing = path, Lock()

    def write(self, data: Any) -> int:
        with self._writing:
            self._path.write_bytes(data)
            return self._path.stat().st_size

    def end(self) -> NoReturn:
        """End this process, whatever native code is doing."""
        self._writing.acquire()  # for good
        self._path.unlink(missing_ok=True)
        os._exit(0)


def serve(work: Callable[[Fields, Progress, Write], dict[str, Any]]) -> None:
    """Be the child: `work` gets the request, reports progress, writes the file and returns the report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the parent too, which decides
    say = _speaker()
    given = json.loads(sys.stdin.readline())
    output = _Output(Path(given["file"]))
    parent = Thread(target=_watch_parent, args=(output,), daemon=True)
    parent.start()
    if given["memory"] is not None:
        Thread(target=_watch_memory, args=(given["memory"], say, output), daemon=True).start()
    try:
        report = work(given["request"], lambda text: say(progress=text), output.write)
        _check_memory(given["memory"])
        say(report=report)
    except EngineError as error:
        say(error=str(error))
    except MemoryError:
        say(error=f"the compiler ran out of memory; {LESS_MEMORY}")
    except OSError as error:
        name = given["out"] if error.filename in (None, given["file"]) else error.filename
        say(error=f"{name} cannot be read or written ({error.strerror}); free some space or choose another place")
    parent.join()


def _speaker() -> Callable[..., None]:
    """A function that sends its keywords as a line. Stdout is kept for it, and what libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock = Lock()

    def say(**fields: Any) -> None:
        with lock:
            out.write(json.dumps(fields) + "\n")
            out.flush()

    return say


def _watch_parent(output: _Output) -> None:
    while os.read(0, 4096):
        pass
    output.end()


def _watch_memory(limit: int, say: Callable[..., None], output: _Output) -> None:
    """Watched, not left to setrlimit: TensorRT-RTX may hang where allocations fail, and CUDA reserves more addresses than it uses."""
    try:
        while True:
            _check_memory(limit)
            time.sleep(0.01)
    except EngineError as error:
        say(error=str(error))
        output.end()


def _check_memory(limit: int | None) -> None:
    if limit is not None and peak_memory() > limit:
        raise EngineError(f"the compiler took more than the {limit:,} bytes of memory that it may; {LESS_MEMORY}")


def peak_memory() -> int:
    """Bytes that this process had resident at most, mapped files included; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
