"""Steps `ceilings` and `operations` of `gpu_check.py`, and what share of the ceilings a measured batch reaches."""

from __future__ import annotations

import math

from gpu_task import Answer, Seen, Task, Verdict, gpu_state, need_torch, observe

# Large on a GPU, so that neither launches nor its caches count.
PRODUCT = {"cuda": (8192, 8192, 8192), "cpu": (2048, 1024, 2048)}  # rows, inner, columns
COPY = {"cuda": 1 << 30, "cpu": 64 << 20}  # bytes
HOST_COPY = 256 << 20  # bytes


def ceilings(task: Task) -> Answer:
    """Rates of dense products, TF32 off, and of copies: on the device (bytes read and written), and from and to pinned host memory.

    `data["rates"]` has the medians: FLOP/s by type, and bytes/s by the name of the copy.
    """
    device = task["device"]
    need_torch(device)
    from products import host_copies, products

    seen: dict[str, Seen] = {}
    rates: dict[str, dict[str, float]] = {"products": {}, "copies": {}}
    for peer in products(device, PRODUCT[device], COPY[device]):
        found = seen[f"{peer.task} {peer.name}"] = observe(peer.run, task["seconds"])
        if peer.task == "product":
            rates["products"][peer.name] = 2 * math.prod(PRODUCT[device]) / found["median"] * 1000
        else:
            rates["copies"]["on device"] = 2 * COPY[device] / found["median"] * 1000
    for peer in host_copies(HOST_COPY) if device == "cuda" else ():
        found = seen[f"{peer.task} {peer.name}"] = observe(peer.run, task["seconds"])
        rates["copies"][peer.name] = HOST_COPY / found["median"] * 1000
    sizes = {"product": PRODUCT[device], "copy on device": COPY[device], "copy to and from host": HOST_COPY}
    said = [f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates["products"].items()]
    said += [f"copies {name} {rate / 1e9:.3g} GB/s" for name, rate in rates["copies"].items()]
    return ", ".join(said), {"unit": "ms", "rates": rates, "sizes": sizes, "calls": seen, "gpu": gpu_state()}


def operations(task: Task) -> Answer:
    """Floating-point operations of the network for one window, from the shapes in its graph, and bytes of its weights.

    The network is the separator between the transforms.
    """
    from clapsep.runtime import Bundle
    from work import work

    bundle = Bundle.open(task["path"])
    try:
        flop = float(sum(work(bundle.graph("separator"))["operations"].values()))
    except ValueError as error:
        raise Verdict("skipped", str(error)) from error
    entry = bundle.manifest.graphs["separator"]
    weights = entry.graph.size + (entry.data.size if entry.data else 0)
    return f"{flop / 1e9:.2f} GFLOP in each window; {weights / 1e6:.1f} MB of weights", {"flop": flop, "weights": weights}


def shares(milliseconds: float, batch: int, moved: dict[str, int], task: Task) -> dict[str, float]:
    """What part of a batch's time the machine needs at least, by what it would be busy with: products by type, copies.

    `moved` are the bytes that the batch copies `to device` and `from device`. Without measured ceilings there is none.
    """
    rates, network = task.get("rates") or {}, task.get("network") or {}
    seconds = milliseconds / 1000
    found = {}
    if network:
        found = {name: network["flop"] * batch / rate / seconds for name, rate in rates.get("products", {}).items()}
    copies = rates.get("copies", {})
    if network and "on device" in copies:
        found["weights read once"] = network["weights"] / copies["on device"] / seconds
    if set(moved) <= set(copies):
        found["host copies"] = sum(size / copies[name] for name, size in moved.items()) / seconds
    return found
