"""What the machine can do at most: dense products, copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
SIZES = (4096, 1024, 4096)  # of the product that stands for the machine: rows, inner, columns
COPIED = 64 << 20  # bytes


@dataclass(frozen=True)
class Peer:
    """One way of doing `task`: a call that returns its result, which is compared with the first peer's of the same task."""

    task: str
    name: str
    run: Callable[[], Array]


def products(device: str, sizes: tuple[int, int, int] = SIZES, copied: int = COPIED) -> Iterator[Peer]:
    """The machine's dense products: 2 · rows · inner · columns operations each; and a copy of `copied` bytes."""
    rows, inner, columns = sizes
    for dtype in (torch.float32, torch.bfloat16 if device == "cpu" else torch.float16):
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
        out = torch.empty(rows, columns, dtype=dtype, device=device)  # fresh memory would cost a tenth of the time
        yield Peer("product", str(dtype).removeprefix("torch."), on(device, lambda a=a, b=b, out=out: torch.matmul(a, b, out=out)))
    if device == "cpu":
        x, y = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((rows, inner), (inner, columns)))
        z = np.empty((rows, columns), np.float32)
        yield Peer("product", "numpy float32", lambda: np.matmul(x, y, out=z)[:0])
    source, target = torch.zeros(copied // 4, device=device), torch.empty(copied // 4, device=device)
    yield Peer("copy", f"{copied >> 20} MiB", on(device, lambda: target.copy_(source)))


def host_copies(copied: int) -> Iterator[Peer]:
    """Copies of `copied` bytes between pinned host memory and the GPU."""
    host, device = torch.zeros(copied // 4, pin_memory=True), torch.zeros(copied // 4, device="cuda")
    yield Peer("copy", "to device", on("cuda", lambda: device.copy_(host, non_blocking=True)))
    yield Peer("copy", "from device", on("cuda", lambda: host.copy_(device, non_blocking=True)))


def on(device: str, call: Callable[[], torch.Tensor]) -> Callable[[], Array]:
    """A call that has really ended when it returns; its result is not fetched."""

    def run() -> Array:
        with torch.inference_mode():
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return np.zeros(0)

    return run
