"""How well a bundle separates: seeded mixtures of sounds that no training saw, asked for in wordings that no training saw.

Usage: python benchmarks/quality.py BUNDLE [--mixtures N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from clapsep.runtime import Query, Separator
from clapsep.runtime.metrics import cosine, si_sdr, si_sdr_improvement, snr, snr_improvement
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.captions import caption
from training.mixtures import at_snr, fit_peak
from training.sounds import CLASSES, RATE, render

Float32 = NDArray[np.float32]
Row = dict[str, Any]
SEED, QUERY_SEED = 2_000_000, 3_000_000
QUERY_CLIPS, MAX_SHOTS, PEAK = 20, 10, 0.7
SNRS = (-10.0, -5.0, 0.0, 5.0, 10.0)
MODALITIES = {"text": 0.0, "audio": 1.0, "both": 0.5}
KINDS = ("P", "N", "PN")


@dataclass(frozen=True)
class Scene:
    """One evaluation mixture: source 0 is asked for.

    `captions` and `shots` are what each class, the absent one last, may be asked by; `others` says all other sources in one caption.
    """

    index: int
    snr: float
    names: tuple[str, ...]
    absent: str
    sources: Float32
    captions: tuple[str, ...]
    others: str
    shots: tuple[tuple[int, ...], ...]

    @cached_property
    def mixture(self) -> Float32:
        return self.sources.sum(0)


def make_scene(index: int, count: int, level: float, samples: int) -> Scene:
    """Mixture number `index` of `count` sources, the first of them `level` dB above the sum of the others."""
    random = np.random.Generator(np.random.PCG64([SEED, index]))
    names = tuple(str(name) for name in random.choice(CLASSES, len(CLASSES), replace=False))[: count + 1]
    parts = np.stack([render(name, SEED + 10 * index + i, samples, test=True) for i, name in enumerate(names[:count])])
    captions = tuple(caption([name], random, test=True) for name in names)
    others = caption(names[1:count], random, test=True)
    shots = tuple(tuple(int(i) for i in random.choice(QUERY_CLIPS, MAX_SHOTS, replace=False)) for _ in names)
    return Scene(index, level, names[:count], names[count], fit_peak(at_snr(parts, [0], level), PEAK), captions, others, shots)


class Judge:
    """Asks a separator about scenes and measures the answers."""

    def __init__(self, separator: Separator) -> None:
        self.separator, self.samples = separator, separator.family.window_samples
        self._clips: dict[tuple[str, int], Float32] = {}

    def clip(self, name: str, index: int) -> tuple[Float32, int]:
        """Example clip of a class: test parameters, never a sound that is in a mixture."""
        if (name, index) not in self._clips:
            self._clips[name, index] = render(name, QUERY_SEED + index, self.samples, test=True)
        return self._clips[name, index], RATE

    def query(self, scene: Scene, classes: Iterable[int], modality: str, shots: int) -> Query:
        """Query for one or more of the scene's classes by number; the last number is the absent one."""
        names = (*scene.names, scene.absent)
        classes = list(classes)
        text = scene.captions[classes[0]] if len(classes) == 1 else scene.others
        audio = [self.clip(names[i], k) for i in classes for k in scene.shots[i][:shots]] if modality != "text" else []
        return Query(text=None if modality == "audio" else text, audio=audio, alpha=MODALITIES[modality])

    def run(self, scene: Scene, positive: Query | None, negative: Query | None) -> Float32:
        return self.separator.separate(scene.mixture, RATE, positive, negative)

    def ask(self, scene: Scene, modality: str, kind: str, shots: int = 1, *, score: bool = False) -> Row:
        """Extract source 0 and compare; with `score` also the cosine of the result's embedding with the caption's."""
        positive = self.query(scene, [0], modality, shots) if kind != "N" else None
        negative = self.query(scene, range(1, len(scene.names)), modality, shots) if kind != "P" else None
        out = self.run(scene, positive, negative)
        row = {"experiment": "ask", "modality": modality, "query": kind, "shots": 0 if modality == "text" else shots} | gains(scene, out, 0)
        if score:
            text = self.separator.encode_text([scene.captions[0]])[0]
            heard = self.separator.encode_audio([(x, RATE) for x in (out, scene.mixture, scene.sources[0])])
            row |= dict(zip(("clap_score", "clap_score_mixture", "clap_score_target"), cosine(heard, text).tolist(), strict=True))
        return row

    def swap(self, scene: Scene) -> Row:
        """Ask for source 1 against source 0: what that does to both."""
        out = self.run(scene, self.query(scene, [1], "text", 1), self.query(scene, [0], "text", 1))
        return {"experiment": "swapped"} | gains(scene, out, 1) | {"sdri_first": gains(scene, out, 0)["sdri"]}

    def absent(self, scene: Scene, modality: str, kind: str) -> Row:
        """Ask for a class that is not there; how far below the mixture the answer is."""
        negative = self.query(scene, [0], modality, 5) if kind == "PN" else None
        out = self.run(scene, self.query(scene, [len(scene.names)], modality, 5), negative)
        left = 10 * np.log10(max(float(np.sum(out.astype(np.float64) ** 2)), 1e-12) / float(np.sum(scene.mixture.astype(np.float64) ** 2)))
        return {"experiment": "absent", "modality": modality, "query": kind, "absent": scene.absent, "attenuation": -left}


def gains(scene: Scene, out: Float32, wanted: int) -> Row:
    """SDR and SI-SDR of the answer and their improvements over the mixture (paper Eq. 15-18)."""
    target, mixture = scene.sources[wanted], scene.mixture
    return {
        "sdr": snr(target, out),
        "si_sdr": si_sdr(target, out),
        "sdri": snr_improvement(target, out, mixture),
        "si_sdri": si_sdr_improvement(target, out, mixture),
    }


def observe(judge: Judge, index: int) -> Iterator[Row]:
    """Every observation of one mixture number."""
    scene = make_scene(index, 2, 0.0, judge.samples)
    for modality in MODALITIES:
        for kind in KINDS:
            yield _label(scene, judge.ask(scene, modality, kind, 5, score=modality == "text" and kind != "N"))
    for kind in ("P", "PN"):
        for shots in (1, MAX_SHOTS):
            yield _label(scene, judge.ask(scene, "audio", kind, shots))
        for modality in ("text", "audio"):
            yield _label(scene, judge.absent(scene, modality, kind))
    yield _label(scene, judge.swap(scene))
    others = [make_scene(index, 2, level, judge.samples) for level in SNRS if level] + [
        make_scene(index, n, 0.0, judge.samples) for n in (3, 4)
    ]
    for other in others:
        for kind in ("P", "PN"):
            yield _label(other, judge.ask(other, "text", kind))


def _label(scene: Scene, row: Row) -> Row:
    return {"mixture": scene.index, "sources": len(scene.names), "snr": scene.snr, "classes": list(scene.names)} | row


def _plain(row: Row) -> bool:
    """An ordinary question about two sources at 0 dB."""
    return row["experiment"] == "ask" and row["sources"] == 2 and row["snr"] == 0


def _both_kinds(row: Row, modality: str) -> bool:
    return row["experiment"] == "ask" and row["modality"] == modality and row["query"] != "N"


def _text_pair(row: Row) -> bool:
    return _plain(row) and (row["modality"], row["query"]) == ("text", "PN")


# Title: rows, label of a row's cell, measures.
TABLES: dict[str, tuple[Callable[[Row], bool], Callable[[Row], tuple[Any, ...]], tuple[str, ...]]] = {
    "two sources at 0 dB, audio queries with 5 shots": (
        lambda row: _plain(row) and row["shots"] in (0, 5),
        lambda row: (row["modality"], row["query"]),
        ("sdri", "si_sdri"),
    ),
    "CLAPScore of the result, the mixture and the truth, text": (
        lambda row: "clap_score" in row,
        lambda row: (row["query"],),
        ("clap_score", "clap_score_mixture", "clap_score_target"),
    ),
    "audio shots": (lambda row: _both_kinds(row, "audio"), lambda row: (row["query"], row["shots"]), ("sdri", "si_sdri")),
    "input SNR in dB, text": (
        lambda row: _both_kinds(row, "text") and row["sources"] == 2,
        lambda row: (row["query"], round(row["snr"])),
        ("sdri", "si_sdri"),
    ),
    "number of sources, text, 0 dB": (
        lambda row: _both_kinds(row, "text") and row["snr"] == 0,
        lambda row: (row["query"], row["sources"]),
        ("sdri", "si_sdri"),
    ),
    "swapped queries, text P+N": (lambda row: row["experiment"] == "swapped", lambda _: ("PN",), ("sdri", "sdri_first")),
    "absent class, dB below the mixture": (
        lambda row: row["experiment"] == "absent",
        lambda row: (row["modality"], row["query"]),
        ("attenuation",),
    ),
    "per wanted class, text P+N, 0 dB": (_text_pair, lambda row: (row["classes"][0],), ("sdri", "si_sdri")),
    "per disturbing class, text P+N, 0 dB": (_text_pair, lambda row: (row["classes"][1],), ("sdri", "si_sdri")),
}


def summarise(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Mean, standard deviation and count of every cell of every table."""
    tables: dict[str, dict[str, Row]] = {}
    for title, (chosen, label, measures) in TABLES.items():
        cells: dict[tuple[Any, ...], list[Row]] = {}
        for row in filter(chosen, rows):
            cells.setdefault(label(row), []).append(row)
        tables[title] = {
            " ".join(map(str, name)): {"n": len(found)}
            | {m: {"mean": float(np.mean([r[m] for r in found])), "std": float(np.std([r[m] for r in found]))} for m in measures}
            for name, found in sorted(cells.items())
        }
    return tables


def show(tables: dict[str, dict[str, Row]]) -> None:
    for title, cells in tables.items():
        print(f"\n{title}")
        for label, cell in cells.items():
            values = "   ".join(f"{m} {v['mean']:6.2f} ± {v['std']:5.2f}" for m, v in cell.items() if m != "n")
            print(f"  {label:14s} {values}   n {cell['n']}")


_judge: list[Judge] = []  # one per worker process


def _start(bundle: Path, engine: str) -> None:
    _judge.append(Judge(Separator(bundle, engine, threads=1)))


def _observe(index: int) -> list[Row]:
    return list(observe(_judge[0], index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--mixtures", type=int, default=300)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    begin, rows = time.monotonic(), []
    with get_context("spawn").Pool(args.processes, _start, (args.bundle, args.engine)) as workers:
        for done, found in enumerate(workers.imap(_observe, range(args.mixtures)), 1):
            rows += found
            print(f"\r{done} of {args.mixtures} mixtures, {time.monotonic() - begin:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    tables = summarise(rows)
    show(tables)
    if args.json:
        versions = {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "onnxruntime", "soxr", "tokenizers")}
        about = {"bundle": args.bundle.name, "engine": args.engine, "mixtures": args.mixtures, "seed": SEED, "versions": versions}
        args.json.write_text(json.dumps(about | {"summary": tables, "observations": rows}, indent=None) + "\n")


if __name__ == "__main__":
    main()
