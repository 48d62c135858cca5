"""The two sources of `make demo`, from parameters that no training saw: python -m training.examples FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import soundfile

from .sounds import RATE, render

SECONDS, LEVEL, SEED = 7.5, 0.08, 77


def main(folder: Path) -> None:
    for name in ("siren", "speech"):
        x = render(name, SEED, int(SECONDS * RATE), test=True)
        x *= np.float32(LEVEL / np.sqrt(np.mean(x**2)))
        soundfile.write(folder / f"{name}.flac", x, RATE, subtype="PCM_16")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
