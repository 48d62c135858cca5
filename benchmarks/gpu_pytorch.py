"""Step `pytorch` of `gpu_check.py`: the official way of computing in PyTorch, wave to wave, as what everything else is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from gpu_task import Answer, Task, Verdict, gpu_state, medians, need_torch, observe, one_line

BATCHES = {"cuda": (1, 32), "cpu": (1,)}
FIRST = "PyTorch eager"


def pytorch(task: Task) -> Answer:
    """Milliseconds from a waveform on the host to one on the host: eager float32, torch.compile, autocast, autocast in a CUDA graph.

    The demo model, or that of the task's `checkpoints`, CLAP's and the separator's. What does not run is left out with its reason.
    """
    torch, device = need_torch(task["device"]), task["device"]
    separator, seconds = open_official(task)
    data: dict[str, Any] = {"unit": "ms", "torch": torch.__version__, "threads": torch.get_num_threads(), "window seconds": seconds}
    data |= {"calls": {}, "snr_db": {}, "left out": {}}
    for batch in BATCHES[device]:
        measure_batch(separator.to(device), batch, task, data)
    if f"b1 {FIRST}" not in data["calls"]:
        raise Verdict("failed", f"PyTorch does not run it: {data['left out'][f'b1 {FIRST}']}", data)
    for name, seen in data["calls"].items():
        seen["audio seconds per second"] = int(name.split()[0][1:]) * seconds / seen["median"] * 1000
    left_out = "".join(f"; left out {name}: {reason}" for name, reason in data["left out"].items())
    return f"ms, {medians(data['calls'])}{left_out}", {**data, "gpu": gpu_state()}


def open_official(task: Task) -> tuple[Any, float]:
    """The separator with its weights, and the seconds of its window."""
    from clapsep.export import demo
    from clapsep.export.checkpoint import read_checkpoint
    from clapsep.export.families.clapsep import hyper_parameters
    from clapsep.runtime.families.clapsep import ClapsepDsp
    from official import read_official

    clap, checkpoint = task.get("checkpoints") or (demo.CLAP, demo.CHECKPOINT)
    hyper = hyper_parameters(read_checkpoint(clap, "clap").metadata, read_checkpoint(checkpoint, "checkpoint").metadata)
    return read_official(clap, checkpoint).separator, hyper["window_samples"] / ClapsepDsp.sample_rate


def measure_batch(separator: Any, batch: int, task: Task, data: dict[str, Any]) -> None:
    """Every way of running one batch, into `data`, with its SNR against the first way."""
    import torch
    from clapsep.export import signals
    from clapsep.runtime.families.clapsep import ClapsepDsp
    from clapsep.runtime.metrics import snr

    rate = ClapsepDsp.sample_rate
    mixture = torch.from_numpy(signals.mixture(round(data["window seconds"] * rate), rate) / 32768).float().repeat(batch, 1)
    size = separator.decoder_model.film.skip_conv.gamma.in_features
    condition = torch.nn.functional.normalize(torch.randn(1, size, generator=torch.Generator().manual_seed(0)))
    ways, name, wanted = waves(separator, mixture, condition, task["device"]), f"b{batch} all", None
    while True:
        try:
            peer = next(ways, None)
            if peer is None:
                return
            name = f"b{batch} {peer.name}"
            found = peer.run()
            data["calls"][name] = observe(peer.run, task["seconds"])
        except Exception as error:  # compilers, captures and full memories have many types
            data["left out"][f"after {name}" if name in data["calls"] else name] = f"{type(error).__name__}: {one_line(error)[:200]}"
            continue
        if wanted is None:
            wanted = found
        else:
            quality = float(snr(wanted, found))
            data["snr_db"][name] = quality if math.isfinite(quality) else None


def waves(separator: Any, mixture: Any, condition: Any, device: str) -> Iterator[Any]:
    """Mixture [B, window] and condition [1, c] on the host through every way, as `Peer`s."""
    import torch
    from peers import fetched, halves
    from products import Peer

    compiled = torch.compile(separator, dynamic=False)
    yield Peer("wave", FIRST, fetched(lambda: separator(mixture.to(device), condition.to(device))))
    yield Peer("wave", "torch.compile", fetched(lambda: compiled(mixture.to(device), condition.to(device))))
    yield from halves(separator, mixture, condition, device)
