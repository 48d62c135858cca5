"""Full-size bundles of every family, built by the real command from generated weights in the layouts of published files.

Usage: python benchmarks/family_bundles.py WORK [NAME]... [--precision fp16]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from clapsep.export.golden import CAPTIONS
from clapsep.export.vocabulary import train_tokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import conformer_files
import published
import resunet
import waveformers

WAVEFORMERS = ("E256_D128", "E256_D256", "E512_D128", "E512_D256")
Options = list[str | Path]


def audiosep(folder: Path) -> Options:
    """A training checkpoint: the separator, and the CLAP that it was trained with."""
    clap = published.tensors("clap_music_audioset_htsat_base")
    inside = {f"query_encoder.model.{name.removeprefix('module.')}": value for name, value in clap.items()}
    path = folder / "audiosep_base_4M_steps.ckpt"
    torch.save({"epoch": 0, "state_dict": {**resunet.published("audiosep_ss_model"), **inside}}, path)
    return ["--checkpoint", path, "--tokenizer", tokenizer(folder)]


def clapsep(folder: Path) -> Options:
    clap, checkpoint = published.write_pair(folder)
    return ["--clap", clap, "--checkpoint", checkpoint, "--tokenizer", tokenizer(folder)]


def conformer(folder: Path) -> Options:
    return ["--checkpoint", conformer_files.write_generated(folder / "conformer.safetensors")]


def waveformer(folder: Path, size: str) -> Options:
    return ["--checkpoint", waveformers.write_published(folder / f"{size}.pt", waveformers.published(size))]


def tokenizer(folder: Path) -> Path:
    """Any vocabulary will do: with generated weights all words are alike."""
    path = folder / "tokenizer.json"
    train_tokenizer(CAPTIONS, 400).save(str(path))
    return path


MODELS: dict[str, Callable[[Path], Options]] = {"clapsep": clapsep, "audiosep": audiosep, "conformer": conformer}
MODELS |= {f"waveformer_{size}": lambda folder, size=size: waveformer(folder, size) for size in WAVEFORMERS}


def bundle(work: Path, name: str, precision: str = "fp32") -> Path:
    """The bundle of one of `MODELS`, built if `work` has none; what the build says is kept beside it, and its files are not."""
    made = work / f"{name}{'' if precision == 'fp32' else f'_{precision}'}.clapsep"
    if made.exists():
        return made
    files = work / made.stem
    files.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "clapsep.export", "build", made, *MODELS[name](files), "--precision", precision]
    print(f"building {made}", file=sys.stderr)
    with made.with_suffix(".log").open("w") as log:
        begin = time.perf_counter()
        code = subprocess.run([*map(str, words)], stdout=log, stderr=log, check=False).returncode
        log.write(f"exit {code} after {time.perf_counter() - begin:.1f} s\n")
    for file in files.iterdir():
        file.unlink()
    files.rmdir()
    if code:
        sys.exit(f"{made.name} was not built; {made.with_suffix('.log')} says why")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    for name in args.names or MODELS:
        print(bundle(args.work, name, args.precision))


if __name__ == "__main__":
    main()
