"""One 10 s mixture through every way of running CLAPSep, in one process, in turn: time, and SNR against float32 in PyTorch eager.

Usage: python benchmarks/peers.py BUNDLE.clapsep --clap CLAP.pt --checkpoint CLAPSEP.ckpt [--rounds N] [--threads N]
       [--device cuda] [--json FILE]

The checkpoints must be those that the bundle was built from. `eager` is the path of the official project (convolutions as STFT, LoRA
unfolded), written from its specification (`official.py`). Every round measures the machine's matrix products first: this is the floor, and
tells rounds apart in which the machine was busy with something else. `peers_tables.py` makes tables of the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clapsep.engines import EngineOptions, engine_class, open_engine, this_machine
from clapsep.engines.errors import EngineUnavailable
from clapsep.export import signals
from clapsep.export.bench.environment import look_around
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.metrics import snr
from official import Official, naive_export, read_official
from products import SIZES, Array, Peer, products
from work import work

CAPTION = "a dog barking"
KINDS = (("onnxruntime", None), ("openvino", None), ("openvino", "bf16"))
GPU_KINDS = (("onnxruntime", None), ("tensorrt", None), ("tensorrt-rtx", None))
QUERIES = (1, 2, 4, 8)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Inputs:
    """Mixture [1, window], network inputs by name, query conditions [K, condition], tokens by name, a query's log-mel [1, …]."""

    mixture: Array
    network: dict[str, Array]
    conditions: Array
    tokens: dict[str, Array]
    clip: Array


def inputs_of(separator: Separator) -> Inputs:
    family = separator.family
    mixture = signals.mixture(family.window_samples, family.sample_rate).astype(np.float32)[None] / 32768
    features, _ = family.features(mixture)
    random = np.random.default_rng(0).standard_normal((max(QUERIES), family.condition_size)).astype(np.float32)
    conditions = random / np.linalg.norm(random, axis=1, keepdims=True)
    ids, mask = separator.queries.tokenizer.encode([CAPTION])
    clip = signals.query(family.towers.front_end.clip_samples, family.towers.front_end.sample_rate, 1).astype(np.float32) / 32768
    log_mel = family.towers.features(clip, family.towers.front_end.sample_rate, None)
    tokens = {"input_ids": ids, "attention_mask": mask}
    return Inputs(mixture, {**features, "condition": conditions[:1]}, conditions, tokens, log_mel)


def fetched(call: Callable[[], torch.Tensor]) -> Callable[[], Array]:
    def run() -> Array:
        with torch.inference_mode():
            return call().float().cpu().numpy()

    return run


def eager(models: Official, x: Inputs, device: str) -> Iterator[Peer]:
    """The official path; what follows a task's first peer is compared with it."""

    def tensors(values: dict[str, Array]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(value).to(device) for name, value in values.items()}

    separator, text, audio = (module.to(device) for module in (models.separator, models.text, models.audio))
    network, tokens, clip = tensors(x.network), tensors(x.tokens), torch.from_numpy(x.clip).to(device)
    mixture, conditions = torch.from_numpy(x.mixture), torch.from_numpy(x.conditions)
    yield Peer("wave", "PyTorch eager", fetched(lambda: separator(mixture.to(device), conditions[:1].to(device))))
    yield Peer("network", "PyTorch eager", fetched(lambda: separator.network(**network)))
    yield Peer("text", "PyTorch eager", fetched(lambda: text(**tokens)))
    yield Peer("audio query", "PyTorch eager", fetched(lambda: audio.network(clip)))
    compiled = torch.compile(separator.network)
    yield Peer("network", "torch.compile", fetched(lambda: compiled(**network)))
    if device == "cuda":
        yield from halves(separator, mixture, conditions)


def halves(separator: torch.nn.Module, mixture: torch.Tensor, conditions: torch.Tensor, device: str = "cuda") -> Iterator[Peer]:
    """PyTorch in float16 by autocast, eager and, on a GPU, with its launches captured; in bfloat16 on the CPU.

    The weights of linear layers are kept in that type, as autocast would cast them again at each call.
    """
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    name = f"PyTorch autocast {str(dtype).removeprefix('torch.')}"
    lowered = copy.deepcopy(separator)
    for module in lowered.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)
    there = mixture.to(device, copy=True), conditions[:1].to(device)

    def call() -> torch.Tensor:
        with torch.autocast(device, dtype):
            return lowered(*there)

    def run() -> torch.Tensor:
        there[0].copy_(mixture)
        return call()

    yield Peer("wave", name, fetched(run))
    if device != "cuda":
        return
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()

    def replay() -> torch.Tensor:
        there[0].copy_(mixture)
        graph.replay()
        return captured

    yield Peer("wave", f"{name}, CUDA graph", fetched(replay))


def naive(models: Official, x: Inputs, folder: Path, threads: int, device: str) -> Iterator[Peer]:
    path = folder / "naive.onnx"
    nodes = naive_export(models.separator.to("cpu"), path, x.network["magnitude"].shape[1])
    print(f"the naive graph has {nodes} nodes", file=sys.stderr)
    engine = open_engine("onnxruntime", path, EngineOptions(threads=threads, device=device))
    yield Peer("network", "naive export, onnxruntime", lambda: engine.run(x.network)["mask"])


def ours(bundle: Bundle, x: Inputs, kind: str, precision: str | None, threads: int, device: str) -> Iterator[Peer]:
    """Every route of one engine kind, queries, and the encoders."""
    name = " ".join(filter(None, (kind, precision)))
    options: dict[str, Any] = {"precision": precision, "threads": threads, "device": device}
    split = Separator(bundle, kind, route="split", **options)
    for route in ("fused", "waveform"):
        try:
            separator = Separator(bundle, kind, route=route, **options)
        except EngineUnavailable as error:
            print(f"{name}, {route}: {error}", file=sys.stderr)
            continue
        if route == "fused":
            yield Peer("network", name, lambda s=separator: s.engine("separator").run(x.network)["mask"])
        else:
            yield Peer("wave", f"{name}, waveform", lambda s=separator: s.separate_windows(x.mixture, x.conditions[:1])[0])
    yield Peer("wave", name, lambda: split.separate_windows(x.mixture, x.conditions[:1])[0])
    for k in QUERIES:
        yield Peer("queries", f"{name}, {k}", lambda k=k: split.separate_windows(x.mixture, x.conditions[:k]))
    tokens = {key: np.ascontiguousarray(value[:, :16]) for key, value in x.tokens.items()}
    yield Peer("text", name, lambda: split.engine("text_encoder").run(x.tokens)["embedding"])
    if device == "cpu":
        yield Peer("text", f"{name}, short", lambda: split.engine("text_encoder_short").run(tokens)["embedding"])
    yield Peer("text", f"{name}, cached", lambda: split.encode_text([CAPTION]))
    yield Peer("audio query", name, lambda: split.engine("audio_encoder").run({"log_mel": x.clip})["embedding"])
    if device == "cuda":
        yield from batches(Separator(bundle, kind, route="waveform", **options), x, name)


def batches(separator: Separator, x: Inputs, name: str) -> Iterator[Peer]:
    limit = separator.engine("separator_waveform").max_batch or max(BATCHES)
    for size in (size for size in BATCHES if size <= limit):
        windows = np.repeat(x.mixture, size, axis=0)
        yield Peer("batch", f"{name}, {size}", lambda w=windows: separator.separate_windows(w, x.conditions[:1]))


def timed(peer: Peer) -> tuple[Array, float]:
    """A call's result and its seconds; the best of three where it stands for the machine."""
    seconds = []
    for _ in range(3 if peer.task in ("product", "copy") else 1):
        begun = time.perf_counter()
        result = peer.run()
        seconds.append(time.perf_counter() - begun)
    return result, min(seconds)


def measure(peers: list[Peer], rounds: int) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, float]]]:
    """Seconds of every peer in every round, after one round that is not counted, and its SNR in dB against the first of its task."""
    seconds: dict[str, dict[str, list[float]]] = {}
    quality: dict[str, dict[str, float]] = {}
    wanted: dict[str, Array] = {}
    for round_ in range(rounds + 1):
        print(f"round {round_} of {rounds}", file=sys.stderr)
        for peer in peers:
            result, took = timed(peer)
            if round_:
                seconds.setdefault(peer.task, {}).setdefault(peer.name, []).append(took)
            elif result.size:
                first = wanted.setdefault(peer.task, result)
                comparable = first.shape == result.shape and first is not result
                quality.setdefault(peer.task, {})[peer.name] = float(snr(first, result)) if comparable else float("nan")
    return seconds, quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clap", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bundle, models = Bundle.open(args.bundle), read_official(args.clap, args.checkpoint)
    x = inputs_of(Separator(bundle))
    with tempfile.TemporaryDirectory() as folder:
        peers = [*products(args.device), *naive(models, x, Path(folder), args.threads, args.device)]
        peers = [*peers[:-1], *eager(models, x, args.device), peers[-1]]
        for kind, precision in KINDS if args.device == "cpu" else GPU_KINDS:
            try:
                engine_class(kind).preflight(EngineOptions(args.threads, args.device, precision), this_machine())
                peers += ours(bundle, x, kind, precision, args.threads, args.device)
            except EngineUnavailable as error:
                print(f"{kind}: {error}", file=sys.stderr)
        seconds, quality = measure(peers, args.rounds)
    graphs = {name: entry.nodes for name, entry in bundle.manifest.graphs.items()}
    product = 2 * SIZES[0] * SIZES[1] * SIZES[2]
    about = {"threads": args.threads, "device": args.device, "precision": bundle.manifest.graphs["separator"].precision, "nodes": graphs}
    result = {
        "environment": {**asdict(look_around()), "torch": torch.__version__},
        "about": about,
        "operations": {"product": product, **{name: sum(work(bundle.graph(name))["operations"].values()) for name in graphs}},
        "seconds": seconds,
        "snr_db": {task: {name: value if np.isfinite(value) else None for name, value in row.items()} for task, row in quality.items()},
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    from peers_tables import show

    show(result)


if __name__ == "__main__":
    main()
