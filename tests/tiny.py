"""Checkpoints of a very small model, which the same code reads as the published ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from clapsep.export.checkpoint import Checkpoint, read_checkpoint
from clapsep.export.clap import ClapConfig, TextConfig
from clapsep.export.clapsep import SeparatorConfig
from clapsep.export.htsat import HtsatConfig
from clapsep.export.synthetic import write_generated
from clapsep.runtime.families.clapsep import ClapsepDsp
from safetensors.torch import load_file, save_file

TINY = SeparatorConfig(
    clap=ClapConfig(
        text=TextConfig(vocab=512, hidden=16, layers=2, heads=2, ffn=32, positions=80, context=77),
        audio=HtsatConfig(spec_size=128, embed=8, depths=(2, 1), heads=(1, 2)),
        embedding=16,
    ),
    depths=(1, 1),
    attention=16,
    mask_layers=1,
    mask_heads=2,
    mask_ffn=32,
    lora_rank=2,
)
DSP = ClapsepDsp(window_samples=80000)


class Files(NamedTuple):
    clap: Path
    checkpoint: Path
    tokenizer: Path


def rewrite(path: Path, change) -> None:
    """Change the tensors of a safetensors file; the metadata stays."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def metadata(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["clapsep"])


def variant(folder: Path, **changes: object) -> Files:
    return Files(*write_generated(folder, dataclasses.replace(TINY, **changes), DSP, seed=1))


def read(files: Files) -> tuple[Checkpoint, Checkpoint]:
    return read_checkpoint(files.clap, "clap"), read_checkpoint(files.checkpoint, "checkpoint")


def raw_lightning(files: Files, path: Path) -> Path:
    """The raw training checkpoint of the same model: everything in one state dict, CLAP under clap_model.model."""
    clap = {name.removeprefix("module."): t for name, t in load_file(files.clap).items()}
    own = load_file(files.checkpoint)
    base = {name: t for name, t in clap.items() if name.startswith("audio_branch.")}
    state = {
        **{"clap_model.model." + name: t for name, t in clap.items()},
        **base,
        **own,
        "stft.conv_real.weight": torch.zeros(3),
    }
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [], "hyper_parameters": {"lr": 1e-4}}, path)
    return path
