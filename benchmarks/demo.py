"""`make demo`: build the demo bundle, ask one recording for a siren and for speech, measure and show what comes out.

Usage: python benchmarks/demo.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import soundfile as sf
from clapsep.runtime import Bundle
from clapsep.runtime.audiofile import read_audio
from clapsep.runtime.metrics import snr_improvement
from clapsep.runtime.stft import Stft
from numpy.typing import NDArray

mpl.use("Agg")
from matplotlib import pyplot as plt

EXAMPLES = Path(__file__).parent / "examples"
QUERIES = {"siren": "an ambulance wailing", "speech": "a person speaking"}
Samples = NDArray[np.float32]


def run(*words: object) -> None:
    print("$ python -m", *words, flush=True)
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def separate(bundle: Path, folder: Path) -> dict[str, Samples]:
    """Ask twice, with the queries swapped; returns what the picture shows."""
    files = {name: read_audio(EXAMPLES / f"{name}.flac") for name in QUERIES}
    sources, rate = {name: samples[0] for name, (samples, _) in files.items()}, files["siren"][1]
    mixture = np.sum(list(sources.values()), axis=0)
    sf.write(folder / "mixture.wav", mixture, rate, subtype="FLOAT")
    panels = {"mixture": mixture}
    for wanted, other in (("siren", "speech"), ("speech", "siren")):
        out = folder / f"{wanted}-extracted.wav"
        words = ["--positive", QUERIES[wanted], "--negative", QUERIES[other], "-o", out, "--force"]
        run("clapsep.runtime", "separate", bundle, folder / "mixture.wav", *words)
        truth, found = sources[wanted], read_audio(out)[0][0]
        better = snr_improvement(truth, found, mixture)
        worse = snr_improvement(sources[other], found, mixture)
        print(f"asked for {wanted}: SDR improvement {better:+.1f} dB for {wanted}, {worse:+.1f} dB for {other}")
        panels |= {f"{wanted}, true": truth, f"{wanted}, extracted": found}
    return panels


def picture(path: Path, panels: dict[str, Samples], rate: int, title: str) -> None:
    """Spectrograms side by side."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3), sharey=True, layout="constrained")
    for axis, (name, x) in zip(axes, panels.items(), strict=True):
        level = 20 * np.log10(np.abs(Stft(1024, 320).forward(x)).T + 1e-3)
        extent = (0, len(x) / rate, 0, rate / 2000)
        axis.imshow(level, origin="lower", aspect="auto", vmin=-35, vmax=35, extent=extent, cmap="magma")
        axis.set(title=name, xlabel="s", ylim=(0, 8))
    axes[0].set_ylabel("kHz")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=100)


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    bundle = folder / "demo.clapsep"
    if not bundle.exists():
        run("clapsep.export", "build", bundle, "--demo")
    panels = separate(bundle, folder)
    rate = Bundle.open(bundle).manifest.dsp["sample_rate"]
    queries = " / ".join(f'"{query}"' for query in QUERIES.values())
    picture(folder / "demo.png", panels, rate, f"demo model, one mixture, asked for {queries}")
    print("listen and look:", *sorted(str(path) for path in folder.glob("*.[wp]*")), sep="\n  ")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
