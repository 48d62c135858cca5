"""`make demo`: build the demo bundle with the real command, separate a recording twice with the queries swapped, show the result.

Usage: python benchmarks/demo.py FOLDER
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import soundfile as sf
from clapsep.export import signals
from clapsep.runtime import Bundle
from clapsep.runtime.audio import read_audio, resample
from clapsep.runtime.dsp import stft
from clapsep.runtime.metrics import snr
from numpy.typing import NDArray

mpl.use("Agg")
from matplotlib import pyplot as plt

RATE, SECONDS = 32000, 6
QUERIES = {"siren": "a siren", "speech": "a person speaking"}
Samples = NDArray[np.float32]


def speech(folder: Path) -> Samples:
    """Speech by espeak-ng, or something like it where espeak-ng is not installed."""
    n = RATE * SECONDS
    if shutil.which("espeak-ng") is None:
        return signals.speech_like(n, RATE, 1).astype(np.float32)
    path = folder / "espeak.wav"
    text = "Say what you want to hear, and what you do not, and get that sound out of a recording."
    subprocess.run(["espeak-ng", "-s", "150", "-w", str(path), text], check=True)
    spoken = read_audio(path)
    path.unlink()
    return np.resize(resample(spoken.samples[0], spoken.sample_rate, RATE), n)


def render(folder: Path) -> dict[str, Samples]:
    """The two sources at equal loudness, and their mixture, written as WAV files."""
    sources = {"siren": signals.chirps(RATE * SECONDS, RATE).astype(np.float32), "speech": speech(folder)}
    sources = {name: 0.1 * x / np.sqrt(np.mean(x**2)) for name, x in sources.items()}
    sources["mixture"] = np.sum(list(sources.values()), axis=0, dtype=np.float32)
    for name, x in sources.items():
        sf.write(folder / f"{name}.wav", x, RATE, subtype="FLOAT")
    return sources


def run(*words: object) -> None:
    print("$", *words)
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def picture(path: Path, panels: dict[str, Samples], title: str) -> None:
    """Spectrograms, one a panel."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3), sharey=True, layout="constrained")
    for axis, (name, x) in zip(axes, panels.items(), strict=True):
        level = 20 * np.log10(np.abs(stft(x, 1024, 320)).T + 1e-3)
        axis.imshow(level, origin="lower", aspect="auto", vmin=-40, vmax=40, extent=(0, SECONDS, 0, RATE / 2000), cmap="magma")
        axis.set(title=name, xlabel="s", ylim=(0, 8))
    axes[0].set_ylabel("kHz")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    bundle = folder / "demo.clapsep"
    if not bundle.exists():
        run("clapsep.export", "build", bundle, "--demo")
    sources = render(folder)
    panels = {"mixture": sources["mixture"]}
    for wanted, other in (("siren", "speech"), ("speech", "siren")):
        out = folder / f"extracted-{wanted}.wav"
        words = ["--positive", QUERIES[wanted], "--negative", QUERIES[other], "-o", out, "--force"]
        run("clapsep.runtime", "separate", bundle, folder / "mixture.wav", *words)
        target = read_audio(out).samples[0]
        gain = snr(sources[wanted], target) - snr(sources[wanted], sources["mixture"])
        print(f"asked for {wanted}: SDR improvement {gain:+.1f} dB")
        panels |= {f"{wanted}: truth": sources[wanted], f"{wanted}: extracted": target}
    generated = Bundle.open(bundle).manifest.weights == "generated"
    note = "weights are GENERATED, not trained: the path runs end to end, nothing is separated" if generated else ""
    picture(folder / "demo.png", panels, note)
    print(note or "listen to the files:", *sorted(str(path) for path in folder.glob("*.[wp]*")), sep="\n  ")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
