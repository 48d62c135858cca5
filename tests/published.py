"""Checkpoint files in the published layouts, written from generated weights."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from clapsep.export.checkpoint import DERIVED
from clapsep.export.synthetic import generate

GOLDEN = Path(__file__).parent / "data" / "golden"
SEED = 20241
META = json.loads((GOLDEN / "meta.json").read_text())
CASES = sorted(META["cases"])
SHORT = ("text_P_4s", "text_P_odd_length")


@cache
def manifest(name: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every tensor of a published file."""
    rows = json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))
    return [(n, tuple(shape), dtype) for n, shape, dtype in rows]


def tensors(name: str, seed: int = SEED) -> dict[str, torch.Tensor]:
    """Generated values for a published file; derived buffers hold rubbish, because nobody may trust them."""
    made = {}
    for n, shape, dtype in manifest(name):
        if DERIVED.search(n):
            made[n] = torch.full(shape, 7, dtype=getattr(torch, dtype))
        else:
            made[n] = torch.from_numpy(generate(n, shape, seed))
    return made


def write_pair(folder: Path, seed: int = SEED) -> tuple[Path, Path]:
    """The two published files: CLAP with its `module.` keys and optimiser leftovers, CLAPSep as a flat dict."""
    clap, checkpoint = folder / "music_audioset_epoch_15_esc_90.14.pt", folder / "best_model.ckpt"
    extra = {
        "epoch": 15,
        "name": "generated",
        "loss": np.float64(0.5),
        "curve": np.arange(3),
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save({**extra, "state_dict": tensors("clap_music_audioset_htsat_base", seed)}, clap)
    torch.save(tensors("clapsep_best_model_subset", seed), checkpoint)
    return clap, checkpoint


def case(name):
    """Condition halves (None for a missing query), whether they are normalised, the samples, and the wanted part of the wave."""
    data = np.load(GOLDEN / f"case_{name}.npz")
    halves = [half if half.any() else None for half in (data["pos"][0], data["neg"][0])]
    n = int(data["n_samples"])
    if "wave" in data:
        return halves, bool(data["normalise"]), n, slice(0, n), data["wave"], data["mask_sub"]
    start = META["wave_segment"][0] if n == 320000 else 0
    wave = data["wave_segment"]
    return halves, bool(data["normalise"]), n, slice(start, start + len(wave)), wave, data["mask_sub"]
