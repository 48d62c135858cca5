"""One engine kind tried for real: a tiny graph, run here and compared with numpy. `python -m` makes it a child of the doctor."""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .engine import Engine, EngineOptions
from .errors import EngineError, EngineUnavailable
from .machine import this_machine
from .onnxruntime import INSTALL_CUDA, PROVIDERS, OnnxRuntimeEngine, cuda_trouble
from .plan import PlanSettings
from .select import engine_class

Status = Literal["ok", "compile only", "not installed", "broken"]
MACHINE = "machine"  # in place of an engine kind: only look for the driver and the GPUs
MAX_BATCH = 2
TOLERANCE = 5e-3  # of a softmax; TensorRT kinds may use TF32
ELSEWHERE = ("8.9",)  # a compute capability to compile for where there is no GPU
KERNEL = ((np.arange(18) % 5 - 2) / 2).reshape(2, 1, 3, 3).astype(np.float32)
MATRIX = ((np.arange(16) % 7 - 3) / 4).reshape(4, 4).astype(np.float32)
# ONNX, opset 20: x [batch, 1, 4, 4] → Conv(KERNEL) → MatMul(MATRIX) → Softmax → y [batch, 2, 4, 4]; uses cuDNN and cuBLAS on CUDA.
GRAPH = base64.b64decode(
    "CAo6zAIKJwoBeAoGa2VybmVsEgFjIgRDb252KhEKBHBhZHNAAUABQAFAAaABBwoWCgFjCgZtYXRyaXgSAW0iBk1hdE11bAoPCgFtEgF5IgdTb2Z0bWF4EgR0"
    "aW55KlwIAggBCAMIAxABQgZrZXJuZWxKSAAAgL8AAAC/AAAAAAAAAD8AAIA/AACAvwAAAL8AAAAAAAAAPwAAgD8AAIC/AAAAvwAAAAAAAAA/AACAPwAAgL8A"
    "AAC/AAAAACpQCAQIBBABQgZtYXRyaXhKQAAAQL8AAAC/AACAvgAAAAAAAIA+AAAAPwAAQD8AAEC/AAAAvwAAgL4AAAAAAACAPgAAAD8AAEA/AABAvwAAAL9a"
    "IAoBeBIbChkIARIVCgcSBWJhdGNoCgIIAQoCCAQKAggEYiAKAXkSGwoZCAESFQoHEgViYXRjaAoCCAIKAggECgIIBEIECgAQFA=="
)


@dataclass(frozen=True)
class Trial:
    """How one engine kind did on one device.

    version: of its library. cuda: that ONNX Runtime was built for. provider: what really ran, as the engine reports it.
    reason, message: why it did not run. repair: a shell line, where one helps.
    """

    kind: str
    device: str
    status: Status
    version: str = ""
    cuda: str = ""
    provider: str = ""
    reason: str = ""
    message: str = ""
    repair: str = ""


def try_engine(kind: str, device: str) -> Trial | None:
    """Run the tiny graph with engine `kind` on `device`; None if this build of its library was not made for the device."""
    engine, trial = engine_class(kind), Trial(kind, device, "broken")
    try:
        library = engine.load_library()
        trial = replace(trial, version=engine.version(), cuda=getattr(library, "cuda_version", ""))
        if engine is OnnxRuntimeEngine and PROVIDERS[device] not in library.get_available_providers():
            return None
        with tempfile.TemporaryDirectory() as folder:
            return _run_or_compile(engine, trial, Path(folder))
    except Exception as error:  # whatever a library raises, the doctor reports it
        return failed(trial, error)


def failed(trial: Trial, error: Exception) -> Trial:
    """The trial with why it failed and, where the message names one, the line that repairs it."""
    reason = error.reason if isinstance(error, EngineUnavailable) else ""
    message = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
    _, _, repair = message.partition("; run: ")
    if repair == "clapsep-export doctor":  # that is this
        message, repair = message.removesuffix("; run: clapsep-export doctor"), ""
    missing = reason == "not-installed" and not trial.version
    return replace(trial, status="not installed" if missing else "broken", reason=reason, message=message, repair=repair)


def _run_or_compile(engine: type[Engine], trial: Trial, folder: Path) -> Trial:
    try:
        return replace(trial, status="ok", provider=_run(engine, trial.device, folder))
    except EngineError as error:
        trial = failed(trial, error)
        if trial.device == "cuda" and trial.reason in ("no-driver", "no-gpu") and engine is OnnxRuntimeEngine:
            missing = cuda_trouble(engine.load_library())
            return replace(trial, message=f"{trial.message}, and {missing}; run: {INSTALL_CUDA}", repair=INSTALL_CUDA) if missing else trial
        if engine.plans != "required":
            return trial
    try:
        _compile(engine, folder, ELSEWHERE)
    except EngineError as error:
        other = failed(trial, error)
        if other.reason == trial.reason:
            return trial
        return replace(trial, message=f"{trial.message}; nor does it compile: {other.message}", repair=other.repair)
    message = f"compiles for GPUs elsewhere, such as SM {ELSEWHERE[0]}, but does not run here ({trial.reason or trial.message})"
    return replace(trial, status="compile only", message=message)


def _run(engine: type[Engine], device: str, folder: Path) -> str:
    """The provider that ran the tiny graph, twice, with right results.

    Raises:
        EngineError
    """
    options = EngineOptions(threads=1, device=device)
    engine.preflight(options, this_machine())
    opened = engine(_compile(engine, folder, ()) if engine.plans == "required" else _graph(folder), options)
    for batch in range(1, MAX_BATCH + 1):
        x = np.sin(np.arange(batch * 16, dtype=np.float32) + batch).reshape(batch, 1, 4, 4)
        error = float(np.abs(opened.run({"x": x})["y"] - expected(x)).max())
        if not error <= TOLERANCE:  # also for NaN
            raise EngineError(f"engine {engine.kind} ran on {opened.provider} with wrong results, off by {error:.2g}; report this")
    return opened.provider


def _compile(engine: type[Engine], folder: Path, capabilities: tuple[str, ...]) -> Path:
    plan = folder / f"tiny{engine.plan_suffix}"
    engine.compile(_graph(folder), plan, PlanSettings("fp32", MAX_BATCH, capabilities), lambda _: None)
    return plan


def _graph(folder: Path) -> Path:
    (folder / "tiny.onnx").write_bytes(GRAPH)
    return folder / "tiny.onnx"


def expected(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """The tiny graph in numpy: [batch, 1, 4, 4] → [batch, 2, 4, 4]."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    convolved = np.einsum("bcijkl,ockl->boij", sliding_window_view(padded, (3, 3), (2, 3)), KERNEL)
    powers = np.exp(convolved @ MATRIX)
    return powers / powers.sum(-1, keepdims=True)


def main(kind: str, device: str, out: str) -> None:
    """Write the trial, or the machine, as JSON to the file `out`."""
    result = this_machine() if kind == MACHINE else try_engine(kind, device)
    Path(out).write_text(json.dumps(asdict(result) if result else None))


if __name__ == "__main__":
    main(*sys.argv[1:])
