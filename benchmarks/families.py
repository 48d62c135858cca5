"""The model families beside each other: times of streaming steps, endless streams, ResUNet30 against PyTorch eager, costs, plans.

Usage: python benchmarks/families.py [--only GROUP]... [--work FOLDER] [--json RESULT.json] [--show]

Weights are generated, in the layouts of published files; speed does not depend on them. Bundles are built by the real command into
`--work`, or taken from there. Each group is measured and merged into the JSON by itself, with every raw observation:

steps    Waveformer through `Separator.stream`, one engine thread, blocks of one step: all ways in turn; and at the pace of real time
endless  10 minutes of sound through one stream of Waveformer, in a fresh process: memory resident; in another one: what Python allocates
peers    ResUNet30 (AudioSep), wave to wave and its U-Net alone: PyTorch eager as published against the engines, in turn in one process
compare  CLAPSep, AudioSep, Conformer, Waveformer on 10 s: time in turn, memory of a fresh process, size, nodes, multiply-adds, latency
plans    tensorrt-rtx compiles `separator` of every family for SM 8.9, without a GPU
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import family_bundles
import numpy as np
import torch
from clapsep.engines import EngineOptions, PlanSettings, engine_class, this_machine
from clapsep.engines.errors import EngineUnavailable
from clapsep.engines.tensorrt_builder import build
from clapsep.export import torch_dsp
from clapsep.export.bench.environment import Neighbours, look_around
from clapsep.export.families.resunet30 import MAPS, Network, ResunetModel, load_network
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.families.resunet30 import FLOOR, ResunetDsp
from clapsep.runtime.family import StepFamily
from clapsep.runtime.stream import Stream
from clapsep.runtime.windows import PRESETS
from family_child import conditions, sound
from numpy.typing import NDArray
from official_audio import Istft, Stft
from peers import measure
from peers_tables import floors, quiet_rounds
from products import SIZES, Peer, products
from torch import Tensor, nn
from work import work

RESULT = Path(__file__).parent / "results" / "families.json"
CHILD = Path(__file__).parent / "family_child.py"
COMPARED = ("clapsep", "audiosep", "conformer", "waveformer_E512_D256", "waveformer_E256_D128")
MAIN = ("waveformer_E256_D128", "waveformer_E512_D256")
QUERIES = 4  # at once
CHUNK, SETTLED = 100, 200  # steps of one way before the next has its turn; steps before the first that counts: the model remembers 160
PACED = 1000  # steps at the pace of real time
ENDLESS, TRACED = 63_600, 10_000  # steps; the former are 10 minutes
CAPABILITY = "8.9"
Row = dict[str, Any]
Times = tuple[float, float]  # seconds by the clock, and those in which this thread had a processor


class Setting(NamedTuple):
    """What the command line says: how to get a bundle, and how many rounds of alternation."""

    bundle: Callable[[str], Path]
    rounds: int


def spread(values: Any) -> dict[str, float]:
    """Median and percentiles."""
    found = np.percentile(np.asarray(values, float), (50, 10, 90, 95, 99))
    return dict(zip(("median", "p10", "p90", "p95", "p99"), found.tolist(), strict=True)) | {"max": float(np.max(values))}


def child(*words: object) -> Row:
    """The JSON that a measurement in a fresh process prints."""
    done = subprocess.run([sys.executable, str(CHILD), *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


# Waveformer.


def step_ways(bundle: Path) -> dict[str, Stream]:
    """A stream for each way: one query and several, by both routes."""
    found = {}
    for route in ("fused", "split"):
        separator = Separator(bundle, threads=1, route=route)
        asked = conditions(separator.family, QUERIES)
        found[route] = separator.stream(condition=asked[0])
        found[f"{route}, {QUERIES} queries"] = separator.stream_many(list(asked))
    return found


def blocks_of(stream: Stream) -> list[NDArray[np.float32]]:
    """10 s in blocks of one step."""
    samples, size = sound(stream.sample_rate), round(stream.period * stream.sample_rate)
    return [samples[i : i + size] for i in range(0, len(samples) - size, size)]


def push(stream: Stream, blocks: list[NDArray[np.float32]], first: int, count: int) -> list[Times]:
    """Times of each of so many steps, from the block `first` on; all runs in this thread, whose own time leaves the neighbours out."""
    took = []
    for i in range(first, first + count):
        block, begin, own = blocks[i % len(blocks)], time.perf_counter(), time.thread_time()
        stream.push(block)
        took.append((time.perf_counter() - begin, time.thread_time() - own))
    return took


def paced(stream: Stream, blocks: list[NDArray[np.float32]], count: int) -> list[Times]:
    """The same with each block when its last sample would have been recorded: caches and cores have gone cold in between."""
    begin, took = time.perf_counter(), []
    for i in range(count):
        time.sleep(max(0.0, begin + (i + 1) * stream.period - time.perf_counter()))
        took += push(stream, blocks, i, 1)
    return took


def time_steps(bundles: dict[str, Path], rounds: int, slow: int) -> Row:
    """Of each bundle and way: microseconds of each step and what they come to. `slow`: steps at the pace of real time."""
    streams = {(name, way): stream for name, path in bundles.items() for way, stream in step_ways(path).items()}
    blocks, period = blocks_of(next(iter(streams.values()))), next(iter(streams.values())).period
    seconds: dict[tuple[str, str], list[Times]] = {key: [] for key in streams}
    for (name, way), stream in streams.items():
        push(stream, blocks, 0, SETTLED)
        if way in ("fused", "split"):  # as a service runs it: caches hold this model and no other
            seconds[name, f"{way}, alone"] = push(stream, blocks, SETTLED, rounds * CHUNK)
    for i in range(rounds):
        for key, stream in streams.items():
            seconds[key] += push(stream, blocks, SETTLED + i * CHUNK, CHUNK)
    if slow:
        for name in bundles:
            seconds[name, "fused, paced"] = paced(streams[name, "fused"], blocks, slow)
            seconds[name, "split, paced"] = paced(streams[name, "split"], blocks, slow)
    models: Row = {name: {} for name in bundles}
    for (name, way), took in seconds.items():
        wall, own = 1e3 * np.array(took).T
        ms, late = spread(wall), int(np.sum(wall > 1e3 * period))
        rtf = {key: value / period / 1e3 for key, value in ms.items()}
        models[name][way] = {"ms": ms, "own_ms": spread(own), "rtf": rtf, "late": late, "us": (1e3 * wall).round().astype(int).tolist()}
    chosen = Separator(next(iter(bundles.values()))).choice
    about = {"threads": 1, "period_ms": 1e3 * period, "latency_ms": 1e3 * next(iter(streams.values())).latency}
    return {**about, "default": {"one query": chosen.one, "several": chosen.several}, "models": models}


def steps(setting: Setting) -> Row:
    names = [f"waveformer_{size}" for size in family_bundles.WAVEFORMERS]
    return time_steps({name: setting.bundle(name) for name in names}, max(setting.rounds, 10), PACED)


def endless(setting: Setting, count: int = ENDLESS, few: int = TRACED, names: tuple[str, ...] = MAIN) -> Row:
    models = {}
    for name in names:
        path = setting.bundle(name)
        models[name] = {"resident": child("endless", path, count), "traced": child("traced", path, few)}
    return {"threads": 1, "models": models}


# ResUNet30 against PyTorch eager.


class Published(nn.Module):
    """Wave to wave in the published order: STFTs as convolutions, the network not folded, channels first."""

    def __init__(self, model: ResunetModel) -> None:
        super().__init__()
        dsp = model.signal
        self.network, self.stft, self.istft = model.network, Stft(dsp.n_fft, dsp.hop), Istft(dsp.n_fft, dsp.hop)

    def forward(self, mixture: Tensor, condition: Tensor) -> Tensor:
        real, imag = self.stft(mixture)
        magnitude = (real**2 + imag**2).clamp(1e-10) ** 0.5
        cos, sin = real / magnitude, imag / magnitude
        mask, mask_cos, mask_sin = (m[:, None] for m in self.network(magnitude[:, 0], condition))
        out = torch.relu(magnitude * mask)
        return self.istft(out * (cos * mask_cos - sin * mask_sin), out * (sin * mask_cos + cos * mask_sin), mixture.shape[1])

    def maps(self, magnitude: Tensor, film: Tensor) -> Tensor:
        return torch.stack(self.network.base(magnitude, film), 1)


def model_of(tensors: dict[str, Tensor] | None = None, **sizes: int) -> ResunetModel:
    """The network of the bundle `audiosep`, or of other tensors, as published."""
    resunet = family_bundles.resunet
    network: Network = load_network(resunet.checkpoint(tensors or resunet.published("audiosep_ss_model")))
    return ResunetModel(network, ResunetDsp(**sizes))


def eager(model: ResunetModel, mixture: NDArray[np.float32], asked: NDArray[np.float32]) -> Iterator[Peer]:
    """PyTorch, with transforms as published and with FFTs; the network also in the other layout, which the publishers do not use."""
    published, condition = Published(model).eval(), torch.from_numpy(asked)[None]
    wave, film = torch.from_numpy(mixture)[None], model.network.film(model.network.query_net(condition))
    magnitude = torch_dsp.stft(wave, model.signal.n_fft, model.signal.hop).abs().clamp_min(FLOOR)

    def run(call: Callable[[], Tensor]) -> NDArray[Any]:
        with torch.inference_mode():
            return call().numpy()

    last = copy.deepcopy(published).to(memory_format=torch.channels_last)  # pyright: ignore
    yield Peer("wave", "PyTorch eager", lambda: run(lambda: published(wave, condition))[0])
    yield Peer("wave", "PyTorch eager, FFTs", lambda: model.separate(mixture[None], asked)[0])
    yield Peer("network", "PyTorch eager", lambda: run(lambda: published.maps(magnitude, film)))
    yield Peer("network", "PyTorch eager, channels last", lambda: run(lambda: last.maps(magnitude, film)))
    folded, folded_film = model.separator, model.film(condition)
    yield Peer("network", "PyTorch eager, folded", lambda: run(lambda: torch.stack(folded(magnitude, folded_film), 1)))


def ours(bundle: Path, mixture: NDArray[np.float32], asked: NDArray[np.float32], threads: int) -> Iterator[Peer]:
    """Our engines, wave to wave with a given condition and the U-Net alone; those that are not installed are left out."""
    for kind, precision in (("onnxruntime", None), ("openvino", None), ("openvino", "bf16")):
        try:
            engine_class(kind).preflight(EngineOptions(threads, precision=precision), this_machine())
        except EngineUnavailable as error:
            print(f"{kind}: {error}", file=sys.stderr)
            continue
        name = " ".join(filter(None, (kind, precision)))
        s = Separator(bundle, kind, threads=threads, precision=precision)
        rate, features = s.family.sample_rate, s.family.features(mixture[None])[0]  # pyright: ignore
        film = s.engine("film").run({"condition": asked[None]})["film"]
        yield Peer("wave", name, partial(s.separate, mixture, rate, condition=asked))
        call = partial(s.engine("separator").run, {**features, "film": film})
        yield Peer("network", name, lambda call=call: np.stack([made[m] for made in [call()] for m in MAPS], 1))


def against_eager(bundle: Path, model: ResunetModel, rounds: int, threads: int = 2) -> Row:
    """Seconds of every way in every round, and SNR against PyTorch eager."""
    torch.set_num_threads(threads)
    mixture = sound(model.signal.sample_rate)[: model.signal.window_samples]
    asked = conditions(Separator(bundle).family, 1)[0]
    peers = [*products("cpu"), *eager(model, mixture, asked), *ours(bundle, mixture, asked, threads)]
    seconds, quality = measure(peers, rounds)
    operations = sum(work(Bundle.open(bundle).graph("separator"))["operations"].values())
    about = {"threads": threads, "torch": torch.__version__, "operations": {"product": 2 * int(np.prod(SIZES)), "separator": operations}}
    finite = {task: {name: value if np.isfinite(value) else None for name, value in row.items()} for task, row in quality.items()}
    return {**about, "seconds": seconds, "snr_db": finite}


def peers(setting: Setting) -> Row:
    return against_eager(setting.bundle("audiosep"), model_of(), setting.rounds)


# All families beside each other.


def facts_of(path: Path) -> Row:
    """What a bundle says of itself: size, nodes, multiply-adds for 10 s and for one call of the graph, latency."""
    bundle, separator = Bundle.open(path), Separator(path)
    family, graphs = separator.family, bundle.manifest.graphs
    macs = {name: sum(work(bundle.graph(name))["operations"].values()) / 2 for name in graphs}
    causal = isinstance(family, StepFamily)
    calls = 10 * family.sample_rate / (family.step if isinstance(family, StepFamily) else family.window_samples)
    asked, shortest = conditions(family, 1)[0], {} if causal else PRESETS["shortest"]
    latency = {"default_s": separator.stream(condition=asked).latency, "shortest_s": separator.stream(condition=asked, **shortest).latency}
    nodes = {name: graph.nodes for name, graph in graphs.items()}
    row = {"bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()), "nodes": nodes, "macs_per_call": macs}
    return row | {"sample_rate": family.sample_rate, "macs_10_s": macs["separator"] * calls, **latency}


def compare_bundles(bundles: dict[str, Path], rounds: int, threads: int = 2, starts: int = 3) -> Row:
    models: Row = {name: facts_of(path) for name, path in bundles.items()}
    torch.set_num_threads(threads)
    calls = [next(products("cpu"))]  # says how busy the machine is with others
    for name, path in bundles.items():
        separator = Separator(path, threads=threads)
        asked, rate = conditions(separator.family, 1)[0], separator.family.sample_rate
        calls.append(Peer("separate", name, partial(separator.separate, sound(rate), rate, condition=asked)))
    seconds, _ = measure(calls, rounds)
    del calls, separator
    quiet = quiet_rounds({"seconds": seconds})
    for name, row in models.items():
        row["seconds"] = seconds["separate"][name]
        row["s_per_10_s"] = spread(np.array(row["seconds"])[quiet])
        row["rtf"] = row["s_per_10_s"]["median"] / 10
    for name, path in bundles.items():
        models[name]["fresh"] = [child("once", path) for _ in range(starts)]
        models[name]["peak_mb"] = float(np.median([run["peak_mb"] for run in models[name]["fresh"]]))
    return {"threads": threads, "product_seconds": seconds["product"]["float32"], "quiet_rounds": quiet, "models": models}


def compare(setting: Setting) -> Row:
    return compare_bundles({name: setting.bundle(name) for name in COMPARED}, setting.rounds)


def plans(setting: Setting, names: tuple[str, ...] = COMPARED) -> Row:
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            bundle = Bundle.open(setting.bundle(name))
            entry, wanted = bundle.manifest.graphs["separator"], PlanSettings("fp32", bundle.manifest.max_batch, (CAPABILITY,))
            made = build("tensorrt-rtx", bundle.graph("separator"), Path(folder) / "plan", wanted, lambda _: None)
            models[name] = {"nodes": entry.nodes, "max_batch": bundle.manifest.max_batch, **asdict(made)}
    return {"graph": "separator", "compute_capability": CAPABILITY, "models": models}


GROUPS: dict[str, Callable[[Setting], Row]] = {"steps": steps, "endless": endless, "peers": peers, "compare": compare, "plans": plans}


def observed(group: str, setting: Setting) -> Row:
    """A group's result with the machine that it is true of."""
    around, load, neighbours = asdict(look_around()), [os.getloadavg()], Neighbours()
    begin = time.perf_counter()
    row = GROUPS[group](setting)
    machine = {"load": [*load, os.getloadavg()], "cores_busy_with_others": neighbours(), "took_s": time.perf_counter() - begin}
    return {"environment": around, **machine, **row}


# Tables.


def table(header: str, rows: list[list[object]]) -> None:
    columns = header.split(" | ")
    print(f"\n| {header} |\n{'|---' * len(columns)}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def show_steps(result: Row) -> None:
    rows = []
    for name, ways in result["models"].items():
        for way, of in ways.items():
            ms, rtf = of["ms"], of["rtf"]
            cells = [f"{ms[key]:.2f}" for key in ("median", "p95", "p99", "max")] + [
                f"{of['own_ms'][key]:.2f}" for key in ("median", "p95")
            ]
            rows.append([name, way, *cells, f"{rtf['median']:.3f}", f"{rtf['p95']:.3f}", f"{of['late']} of {len(of['us'])}"])
    table("model | way | ms median | p95 | p99 | max | of the thread | p95 | RTF median | RTF p95 | later than a step", rows)


def show_endless(result: Row) -> None:
    rows = []
    for name, runs in result["models"].items():
        for way, of in runs.items():
            cells = [
                f"{of['sound_s']:.0f} / {of['seconds']:.0f}",
                *(f"{of[key]:.2f}" for key in ("first_half_mb", "second_half_mb", "peak_mb")),
            ]
            rows.append([name, way, of["steps"], *cells, f"{of['growth_bytes_per_step']:.1f}"])
    table("model | memory | steps | s of sound / taken | MB first half | second half | peak | bytes more per step", rows)


def show_peers(result: Row) -> None:
    """Of the rounds in which the machine was ours, by the product at their beginning; ratios are taken within rounds."""
    seconds, quiet = result["seconds"], quiet_rounds(result)
    floor = floors(result, quiet)
    print(f"{len(quiet)} of {len(seconds['product']['float32'])} rounds were quiet")
    rows: list[list[object]] = [["network", f"floor {name}", f"{1e3 * value:.0f}", "", "", "", ""] for name, value in floor.items()]
    for task in ("wave", "network"):
        took = {name: np.array(row)[quiet] for name, row in seconds[task].items()}
        for name, row in took.items():
            ms, ratio, quality = spread(1e3 * row), spread(took["PyTorch eager"] / row), result["snr_db"][task].get(name)
            cells = [f"{ms['median']:.0f}", f"{ms['p10']:.0f} to {ms['p90']:.0f}", f"{ratio['median']:.2f}"]
            rows.append([task, name, *cells, f"{ratio['p10']:.2f} to {ratio['p90']:.2f}", "" if quality is None else f"{quality:.0f}"])
    table("task | way | ms median | p10 to p90 | eager / this | p10 to p90 | SNR dB", rows)


def show_compare(result: Row) -> None:
    print(f"{len(result['quiet_rounds'])} of {len(result['product_seconds'])} rounds were quiet")
    rows = []
    for name, of in result["models"].items():
        ms = {key: f"{1e3 * value:.0f}" for key, value in of["s_per_10_s"].items()}
        cells = [ms["median"], f"{ms['p10']} to {ms['p90']}", f"{of['rtf']:.4f}", f"{of['peak_mb']:.0f}", f"{of['bytes'] / 1e6:.0f}"]
        cells += [of["nodes"]["separator"], f"{of['macs_10_s'] / 1e9:.1f}", f"{of['macs_per_call']['separator'] / 1e6:.1f}"]
        rows.append([name, *cells, f"{of['default_s']:.4g} / {of['shortest_s']:.4g}"])
    table(
        "model | ms per 10 s | p10 to p90 | RTF | peak MB | bundle MB | nodes | G MAC per 10 s | M MAC per call | latency s / shortest",
        rows,
    )


def show_plans(result: Row) -> None:
    rows = []
    for name, of in result["models"].items():
        rows.append([name, of["nodes"], of["layers"], f"{of['seconds']:.1f}", f"{of['size'] / 1e6:.1f}", f"{of['memory'] / 1e6:.0f}"])
    table("model | nodes | layers | s | plan MB | compiler's peak MB", rows)


TABLES = {"steps": show_steps, "endless": show_endless, "peers": show_peers, "compare": show_compare, "plans": show_plans}


def show(result: Row) -> None:
    for group, of in result.items():
        (before, *_), (after, *_) = of["load"]
        print(f"\n{group}: {of.get('threads', 'no')} threads, load {before:.1f} before, {after:.1f} after, {of['took_s']:.0f} s")
        TABLES[group](of)


def rounded(value: Any) -> Any:
    """To six digits that count."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def read(path: Path) -> Row:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*GROUPS], metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--work", type=Path, help="where bundles are, or are built")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--show", action="store_true", help="print the tables of what was measured before")
    args = parser.parse_args()
    if args.show:
        return show(read(args.json))
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(partial(family_bundles.bundle, args.work or Path(folder)), args.rounds)
        for group in args.only or GROUPS:
            row = rounded(observed(group, setting))
            result = {**read(args.json), group: row}  # read late: another group may have been measured meanwhile
            args.json.write_text(json.dumps({name: result[name] for name in GROUPS if name in result}, separators=(",", ":")) + "\n")
            show({group: row})
    return None


if __name__ == "__main__":
    main()
