"""What the steps of `gpu_check.py` share: their task and answer, bundles to run, repeated calls, the GPU's state. Standard library only."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

REPLAYING = ("tensorrt", "tensorrt-rtx")  # kinds with CUDA graphs
SMI = ("name", "driver_version", "compute_cap", "memory.total", "memory.used", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw")
WARM_UP, REPETITIONS, MOST = 5, 10, 2000  # TensorRT kinds run a batch size plainly the first time, capture it the second, replay it then
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}

Task = dict[str, Any]
Answer = tuple[str, dict[str, Any]]  # one sentence, raw data
Seen = dict[str, Any]  # what `observe` returns


class Verdict(Exception):
    """Ends a step that is not ok."""

    def __init__(self, status: str, reason: str, data: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.status, self.data = status, data or {}


def modes(task: Task) -> dict[str, bool]:
    """By name, whether CUDA graphs are on."""
    return {"CUDA graph": True, "no CUDA graph": False} if task["engine"] in REPLAYING else {"plain": False}


def open_bundle(task: Task, cuda_graph: bool, route: str | None = None) -> tuple[Any, Any]:
    """A fresh Separator, by the device's own route if none is given, and the bundle's golden data."""
    from clapsep.export.gates import load_golden
    from clapsep.runtime import Separator

    separator = Separator(task["path"], task["engine"], device=task["device"], cuda_graph=cuda_graph, route=route)
    return separator, load_golden(separator.bundle)


def need_torch(device: str) -> Any:
    """PyTorch, its products in float32 where they say so; ends the step where it does not see the device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise Verdict("skipped", f"PyTorch {torch.__version__} sees no GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch


def observe(call: Callable[[], Any], seconds: float) -> Seen:
    """Milliseconds of repeated calls: quantiles, and all that was seen."""
    for _ in range(WARM_UP):
        call()
    seen: list[float] = []
    start = time.perf_counter()
    while len(seen) < REPETITIONS or (time.perf_counter() - start < seconds and len(seen) < MOST):
        before = time.perf_counter()
        call()
        seen.append(round(1000 * (time.perf_counter() - before), 4))
    ranked = sorted(seen)
    return {**{name: ranked[round(q * (len(seen) - 1))] for name, q in QUANTILES.items()}, "n": len(seen), "observed": seen}


def medians(calls: dict[str, Seen]) -> str:
    return ", ".join(f"{name} {seen['median']:.2f}" for name, seen in calls.items())


def gpu_state() -> dict[str, str] | None:
    """The first GPU's name, driver, memory in MiB, clocks in MHz and power in W as nvidia-smi has them; None without it."""
    words = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
        values = [value.strip() for value in done.stdout.split(",")]
        if done.returncode == 0 and len(values) == len(SMI):
            return dict(zip(SMI, values, strict=True))
    return None


def say(message: str) -> None:
    print(message, flush=True)  # into the log that the parent keeps


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
