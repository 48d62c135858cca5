"""A very small checkpoint file of each family that is not built from a pair of files, and what its bundle is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import conformer_files
import numpy as np
import resunet
import torch
import waveformers
from clapsep.export.clap import AudioEncoder, ClapConfig, TextConfig, TextEncoder
from clapsep.export.golden import CAPTIONS
from clapsep.export.htsat import HtsatConfig
from clapsep.export.synthetic import generate
from clapsep.export.vocabulary import train_tokenizer
from clapsep.runtime import Query
from safetensors.torch import save_file

BINS = 1025  # of ResUNet30's transform, whose hop of 320 does not fit a smaller one
WINDOW = 40960  # long enough for the presets of hop and overlap but `offline`
LABELS = ("Bark", "cough, Meow", "acoustic guitar + Bark")
CLAP = ClapConfig(
    text=TextConfig(vocab=512, hidden=64, layers=1, heads=1, ffn=32),  # the published sizes where shapes do not tell them
    audio=HtsatConfig(embed=8, depths=(1, 1), heads=(1, 2)),
    embedding=resunet.SIZE,
)


class Asked(NamedTuple):
    """One question: to a command, in a line of a job list, in Python."""

    options: tuple[str, ...]
    fields: Mapping[str, str]
    query: Query


@dataclass(frozen=True)
class Case:
    """A family, how to write its checkpoint into a folder, and what it takes.

    Attributes:
        size: of a vector.
        rate: of the model, in Hz.
        routes: that its graphs allow.
        labels: whether it is asked by them; otherwise by vectors.
    """

    family: str
    write: Callable[[Path], Path]
    size: int
    rate: int
    routes: tuple[str, ...]
    labels: bool = False

    def ask(self, folder: Path) -> list[Asked]:
        """Three questions; vectors are files in the folder."""
        if self.labels:
            return [Asked(("--positive", text), {"positive": text}, Query(text)) for text in LABELS]
        files = [folder / f"{i}.npy" for i in range(3)]
        for i, file in enumerate(files):
            np.save(file, np.random.default_rng(i).random(self.size, np.float32))
        return [Asked(("--positive-vector", str(file)), {"positive_vector": str(file)}, Query(vector=file)) for file in files]


def resunet_tensors() -> dict[str, torch.Tensor]:
    """Of a very small network with the published transform."""
    names = [f"base.bn0.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    return resunet.tiny() | {f"ss_model.{name}": resunet.generate(name, (BINS,)) for name in names}


def write_resunet(folder: Path) -> Path:
    """A safetensors file, whose metadata says what shapes do not."""
    path, metadata = folder / "resunet.safetensors", {"window_samples": WINDOW, "weights": "generated"}
    save_file(resunet_tensors(), path, {"clapsep": json.dumps(metadata)})
    return path


def write_waveformer(folder: Path) -> Path:
    """In the layout of the published files."""
    return waveformers.write_published(folder / "waveformer.pt", waveformers.tiny())


def write_conformer(folder: Path) -> Path:
    config = replace(conformer_files.TINY, bins=513)
    return conformer_files.write_generated(folder / "conformer.safetensors", config, WINDOW)


RESUNET = Case("resunet30", write_resunet, resunet.SIZE, 32000, ("fused", "waveform"))
WAVEFORMER = Case("waveformer", write_waveformer, 41, 44100, ("fused", "split"), labels=True)
CONFORMER = Case("conformer", write_conformer, conformer_files.TINY.condition, 32000, ("fused", "waveform"))
CASES = (RESUNET, WAVEFORMER, CONFORMER)


def clap_tensors() -> dict[str, torch.Tensor]:
    """Of very small towers that give embeddings of ResUNet30's condition size."""
    with torch.device("meta"):
        towers = {**TextEncoder(CLAP).state_dict(), **AudioEncoder(CLAP, 1001).state_dict()}
    return {name: torch.from_numpy(generate(f"module.{name}", value.shape, 1)) for name, value in towers.items()}


def write_clap(folder: Path) -> Path:
    """In the layout of the published file: a state dict with a prefix, among other things."""
    path = folder / "clap.pt"
    torch.save({"epoch": 15, "state_dict": {f"module.{name}": value for name, value in clap_tensors().items()}}, path)
    return path


def write_trained(folder: Path) -> Path:
    """A training checkpoint with the CLAP that the network was trained with, and what else the trainer left."""
    inside = {f"query_encoder.model.{name}": value for name, value in clap_tensors().items()}
    more = {"query_encoder.model.logit_scale_a": torch.tensor(1.0), "query_encoder.model.text_transform.sequential.0.weight": torch.ones(2)}
    state = {**resunet_tensors(), **inside, **more}
    path = folder / "trained.ckpt"
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [{"lr": 1e-3}], "hyper_parameters": {}}, path)
    return path


def write_tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    train_tokenizer(CAPTIONS, CLAP.text.vocab).save(str(path))
    return path
