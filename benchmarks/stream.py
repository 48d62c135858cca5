"""What hop and overlap cost and bring: quality of long mixtures, seams, latency; and `clapsep stream` beside a clock.

Usage: python benchmarks/stream.py BUNDLE [--mixtures N] [--seconds N] [--threads N] [--json RESULT.json]

Quality: mixtures of 12 to 20 s, made of sounds that no training saw as benchmarks/quality.py makes its own, asked for by text, positive and
negative. `pieces` are the mixture's stretches of one window; with an overlap of 0 each of them is the answer of a single window.
Edges: every sample is heard at every place of a window; each answer is compared with that of the window that has the sample in its middle.
Clock: blocks of 10 ms are written into the command at the moment they would have been recorded, and every output sample's arrival is noted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import quality
from clapsep.runtime import Separator
from clapsep.runtime.metrics import si_sdr_improvement, snr_improvement
from clapsep.runtime.windows import Windower, WindowPlan
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Row = dict[str, Any]
FIRST = 1000  # number of the first mixture; benchmarks/quality.py has used the lower ones
OFFLINE = (0.0, 0.1, 0.25, 0.5, 1.0)  # overlaps in seconds, with the longest hop
LIVE = (
    (1.25, 0.25), (1.0, 0.5), (1.0, 0.25), (1.0, 0.1), (0.5, 0.5), (0.5, 0.25), (0.5, 0.1),
    (0.25, 0.5), (0.25, 0.25), (0.25, 0.1), (0.1, 0.1), (0.1, 0.05),
)  # fmt: skip
SHARES = {"none": 0.0, "1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4, "3/8": 3 / 8, "cut": 1 / 2}  # of the overlap, thrown away on either side
OURS = "1/8"
CLOCKED = ((1.0, 0.25), (0.5, 0.25), (0.25, 0.1))
MARGINS = (0.02, 0.05, 0.1, 0.2)  # seconds that a player waits longer than the latency
BLOCK = 0.01  # seconds
STEP, BUCKET = 0.05, 0.01  # seconds between the windows that hear one place, and of one figure about edges


@dataclass(frozen=True)
class TrialPlan(WindowPlan):
    """A plan that throws away another share of the overlap; with one half it cuts hard in the middle."""

    share: float = 1 / 8

    @property
    def discard(self) -> int:
        return int(self.overlap * self.share)


class Bench:
    """One separator, its mixtures and their conditions."""

    def __init__(self, separator: Separator, mixtures: int) -> None:
        self.separator, self.rate, self.window = separator, separator.family.sample_rate, separator.family.window_samples
        self.scenes = [self._scene(FIRST + i) for i in range(mixtures)]
        self.conditions = [separator.condition(scene.captions[0], scene.others) for scene in self.scenes]

    def _scene(self, index: int) -> quality.Scene:
        seconds = np.random.default_rng(index).uniform(12, 20)
        return quality.make_scene(index, 2, 0.0, round(seconds * self.rate))

    def plan(self, hop: float | None, overlap: float, share: str = OURS) -> TrialPlan:
        plan = WindowPlan.of(self.window, self.rate, overlap, hop)
        return TrialPlan(plan.window, plan.hop, plan.overlap, SHARES[share])

    def answers(self, i: int, windows: Float32) -> Float32:
        return self.separator.separate_windows(windows, self.conditions[i][None])


def join(mixture: Float32, plan: WindowPlan, process: Callable[[Float32], Float32]) -> Float32:
    windower = Windower(plan, 1, np.zeros((1, 1), np.float32), lambda windows, _: process(windows))
    return np.concatenate([windower.push(mixture[None]), windower.finish()], axis=2)[0, 0]


def try_setting(bench: Bench, i: int, hop: float | None, overlap: float) -> Row:
    """One mixture with one hop and overlap: cost, and quality and seams with every share thrown away."""
    scene, results = bench.scenes[i], []

    def process(windows: Float32) -> Float32:
        results.append(bench.answers(i, windows))
        return results[-1]

    plan = bench.plan(hop, overlap)
    begin = time.perf_counter()
    out = join(scene.mixture, plan, process)
    took = time.perf_counter() - begin
    row = {"mixture": scene.index, "hop": plan.hop / bench.rate, "overlap": overlap, "windows": len(results)}
    row |= {"rtf": took * bench.rate / len(out), "si_sdri": si_sdr_improvement(scene.sources[0], out, scene.mixture)}
    row["pieces"] = pieces(scene, out, bench.window)
    row["sdri"], row["seams"] = {}, {}
    for name in SHARES if overlap else ("cut",):
        trial, answers = bench.plan(hop, overlap, name), iter(results)
        joined = join(scene.mixture, trial, lambda _, answers=answers: next(answers))
        row["sdri"][name] = snr_improvement(scene.sources[0], joined, scene.mixture)
        if name in (OURS, "cut"):
            row["seams"][name] = seams(joined, trial, 0)
            row["seams"][f"{name} elsewhere"] = seams(joined, trial, trial.hop // 2)
    return row


def pieces(scene: quality.Scene, out: Float32, size: int) -> list[float]:
    """SDRi of every stretch of one window in which neither source is 20 dB below its mean."""
    whole = np.mean(np.square(scene.sources, dtype=np.float64), axis=1)
    found = []
    for begin in range(0, len(out) - size + 1, size):
        place = slice(begin, begin + size)
        if np.all(np.mean(np.square(scene.sources[:, place], dtype=np.float64), axis=1) > whole / 100):
            found.append(snr_improvement(scene.sources[0, place], out[place], scene.mixture[place]))
    return found


def seams(out: Float32, plan: WindowPlan, shift: int) -> Row:
    """Of every hand-over: the largest |x[n] - x[n-1]| at its begin, middle and end, against the 99.9th percentile of all within 0.25 s.

    With a `shift` of so many samples before each hand-over, where there is none: what chance makes of the same figure.
    """
    jumps, ratios = np.abs(np.diff(out)), []
    for end in plan.ends(len(out))[:-1]:
        begin, stop = end - shift - plan.overlap + plan.discard, end - shift - plan.discard
        at = np.clip([begin, (begin + stop) // 2, stop], 1, len(jumps)) - 1
        around = jumps[max(0, begin - plan.window // 10) : stop + plan.window // 10]
        ratios.append(float(jumps[at].max() / max(np.quantile(around, 0.999), 1e-9)))
    return {"n": len(ratios), "above 1": sum(ratio > 1 for ratio in ratios), "median": statistics.median(ratios), "max": max(ratios)}


def edges(bench: Bench, i: int) -> Row:
    """SDR by place in the window: against the answer of the window that has the sample in its middle, and against the truth."""
    scene, size, step, bucket = bench.scenes[i], bench.window, round(STEP * bench.rate), round(BUCKET * bench.rate)
    starts = range(0, len(scene.mixture) - size + 1, step)
    answers = [bench.answers(i, scene.mixture[None, s : s + size])[0, 0] for s in starts]
    reference, begin = np.zeros_like(scene.mixture), (size - step) // 2
    for s, answer in zip(starts, answers, strict=True):
        reference[s + begin : s + begin + step] = answer[begin : begin + step]
    heard = slice(begin, starts[-1] + begin + step)
    row = {"mixture": scene.index}
    for name, truth in (("middle", reference), ("truth", scene.sources[0])):
        row[name] = [_sdr_at(place, bucket, truth, starts, answers, heard) for place in range(0, size, bucket)]
    row["reference"] = snr_improvement(scene.sources[0, heard], reference[heard], scene.mixture[heard])
    return row


def _sdr_at(place: int, bucket: int, truth: Float32, starts: range, answers: list[Float32], heard: slice) -> float:
    """In dB, over all windows whose stretch at `place` lies where there is a reference."""
    signal = noise = 0.0
    for s, answer in zip(starts, answers, strict=True):
        if heard.start <= s + place and s + place + bucket <= heard.stop:
            wanted = truth[s + place : s + place + bucket].astype(np.float64)
            signal += float(np.sum(wanted**2))
            noise += float(np.sum((wanted - answer[place : place + bucket]) ** 2))
    return float(min(10 * np.log10(max(signal, 1e-20) / max(noise, 1e-20)), 100))


def clock(bundle: Path, bench: Bench, hop: float, overlap: float, seconds: float, threads: int) -> Row:
    """The command in real time: when every output sample came, in seconds after it would have been recorded."""
    rate, scene = bench.rate, bench.scenes[0]
    sound = np.resize(scene.mixture, round(seconds * rate))
    words = [sys.executable, "-m", "clapsep.runtime", "stream", str(bundle), "--positive", scene.captions[0], "--negative", scene.others]
    options = ["--hop", str(hop), "--overlap", str(overlap), "--threads", str(threads)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    load = os.getloadavg()[0]
    with subprocess.Popen([*words, *options], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        said = [process.stderr.readline().decode().strip()]
        came: list[tuple[float, int]] = []
        listener = Thread(target=_listen, args=(process.stdout.fileno(), came))
        listener.start()
        begin, late = _feed(process.stdin.fileno(), np.array_split(sound, round(seconds / BLOCK)))
        process.stdin.close()
        listener.join()
        said += process.stderr.read().decode().splitlines()
    assert came[-1][1] == len(sound), "the output has another length than the input"
    return _lags(came, begin, rate, hop + overlap) | {"hop": hop, "overlap": overlap, "late": late, "load": load, "said": said}


def _feed(pipe: int, blocks: Iterable[Float32]) -> tuple[float, float]:
    """Write every block when its last sample would have been recorded → when the first sample was, and the largest delay of a block."""
    begin, late = time.perf_counter(), 0.0
    for number, block in enumerate(blocks, 1):
        due = begin + number * BLOCK
        time.sleep(max(0.0, due - time.perf_counter()))
        late = max(late, time.perf_counter() - due)
        os.write(pipe, block.tobytes())
    return begin, late


def _listen(pipe: int, came: list[tuple[float, int]]) -> None:
    total = 0
    while data := os.read(pipe, 1 << 16):
        total += len(data) // 4
        came.append((time.perf_counter(), total))


def _lags(came: list[tuple[float, int]], begin: float, rate: int, latency: float) -> Row:
    """Of every arrival, the lag of its first sample, which is the largest in it; drop-outs are arrivals after a player needed them."""
    firsts = [0, *(total for _, total in came[:-1])]
    lags = [moment - begin - first / rate for (moment, _), first in zip(came, firsts, strict=True)]
    late = {str(margin): sum(lag > latency + margin for lag in lags) for margin in MARGINS}
    return {"latency": latency, "largest": max(lags), "beyond": max(lags) - latency, "dropouts": late, "lags": lags}


def observe(bench: Bench, mixtures_for_edges: int) -> Iterator[tuple[str, Row]]:
    for i in range(len(bench.scenes)):
        for hop, overlap in [(None, overlap) for overlap in OFFLINE] + list(LIVE):
            yield "settings", try_setting(bench, i, hop, overlap)
        if i < mixtures_for_edges:
            yield "edges", edges(bench, i)
        print(f"mixture {i + 1} of {len(bench.scenes)}", file=sys.stderr)


def summarise(rows: list[Row], window: float) -> list[Row]:
    """One line for each hop and overlap; SDRi in dB, `gain` against single windows with its standard error over mixtures."""
    groups: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["hop"], row["overlap"]), []).append(row)
    single = groups[window, 0.0]
    table = []
    for (hop, overlap), group in groups.items():
        ours = OURS if overlap else "cut"
        values = np.array([row["sdri"][ours] for row in group])
        gain = values - [row["sdri"]["cut"] for row in single]
        line = {"hop": hop, "overlap": overlap, "offline": abs(hop + overlap - window) < 1e-6, "latency": hop + overlap}
        line |= {"sdri": float(values.mean()), "sdri_median": float(np.median(values)), "gain": float(gain.mean())}
        line |= {"gain_error": float(gain.std() / np.sqrt(len(gain))), "gain_least": float(gain.min())}
        line["sdri_pieces"] = statistics.fmean(value for row in group for value in row["pieces"])
        line["sdri_by_discard"] = {name: statistics.fmean(row["sdri"][name] for row in group) for name in group[0]["sdri"]}
        line["compute"] = sum(row["windows"] for row in group) / sum(row["windows"] for row in single)
        line["rtf"] = statistics.median(row["rtf"] for row in group)
        line["seams"] = {name: _pooled([row["seams"][name] for row in group]) for name in group[0]["seams"]}
        table.append(line)
    return table


def _pooled(found: list[Row]) -> Row:
    count = sum(row["n"] for row in found)
    return {"n": count, "above 1": sum(row["above 1"] for row in found) / count, "max": max(row["max"] for row in found)}


def print_tables(table: list[Row], edge_rows: list[Row], clocked: list[Row]) -> None:
    print("hop + overlap        SDRi  median   gain ± error (least)  pieces  windows     RTF   SDRi by share thrown away")
    for line in table:
        head = f"{line['hop']:5.2f} + {line['overlap']:<4.2f}{' off' if line['offline'] else '':5}"
        gain = f"{line['gain']:7.3f} ± {line['gain_error']:.3f} ({line['gain_least']:.2f})"
        shares = " ".join(f"{name} {value:.3f}" for name, value in line["sdri_by_discard"].items())
        cost = f"{line['sdri_pieces']:8.2f}{line['compute']:9.2f}{line['rtf']:8.4f}"
        print(f"{head}{line['sdri']:8.2f}{line['sdri_median']:8.2f}{gain}{cost}   {shares}")
        joints = [f"{name} {100 * of['above 1']:.2f} % (max {of['max']:.2f})" for name, of in line["seams"].items()]
        print(f"{'':18}seams above 1: {', '.join(joints)}, of {line['seams']['cut']['n']}")
    for name in ("middle", "truth") if edge_rows else ():
        values = np.median([row[name] for row in edge_rows], axis=0)
        for side, of in (("left", values), ("right", values[::-1])):
            shown = " ".join(f"{BUCKET * i:.2f}:{of[i]:.1f}" for i in (0, 1, 2, 3, 4, 6, 8, 12, 20, 40, 80))
            print(f"SDR against the {name}, s from the {side} edge: {shown}")
    for row in clocked:
        lag = f"largest lag {row['largest']:.3f} s, {row['beyond']:.3f} s beyond the latency"
        print(f"{row['hop']} + {row['overlap']}: {lag}, drop-outs by margin {row['dropouts']}, load {row['load']:.1f}")
        print(*(f"  {line}" for line in row["said"]), sep="\n")


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--mixtures", type=int, default=24)
    parser.add_argument("--edges", type=int, default=12, metavar="N", help="mixtures for the edges")
    parser.add_argument("--seconds", type=float, default=60, help="of every run beside a clock")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        quality.CLASSES = tuple(name for name in quality.CLASSES if name != "speech")
    load = [os.getloadavg()]
    bench = Bench(Separator(args.bundle, threads=args.threads), args.mixtures)
    rows: dict[str, list[Row]] = {"settings": [], "edges": []}
    for kind, row in observe(bench, args.edges):
        rows[kind].append(row)
    clocked = [clock(args.bundle, bench, *setting, args.seconds, args.threads) for setting in CLOCKED] if args.seconds else []
    load.append(os.getloadavg())
    table = summarise(rows["settings"], bench.window / bench.rate)
    print_tables(table, rows["edges"], clocked)
    if args.json:
        versions = {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "onnxruntime", "soxr")}
        machine = {"cpus": os.cpu_count(), "load": load, "machine": platform.machine(), "threads": args.threads}
        about = {"bundle": args.bundle.name, "classes": len(quality.CLASSES), "versions": versions, "machine": machine}
        args.json.write_text(json.dumps(rounded(about | {"table": table} | rows | {"clock": clocked}), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
