"""Writes the checkpoint pair as published ones are laid out, in float16."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from clapsep.export.clap import AudioEncoder, TextEncoder
from clapsep.export.clapsep import Separator
from clapsep.export.demo import CONFIG, DSP
from clapsep.export.families.clapsep import TUNED, describe_sizes
from safetensors.torch import save_file
from torch import Tensor

from .captions import corpus

FILES = ("demo-clap.safetensors", "demo-clapsep.safetensors", "tokenizer.json")


def _half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to(torch.float16).contiguous() for name, value in tensors.items()}


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they will be read back, so that stage 2 learns on the very CLAP that is stored."""
    return {name: value.half().float() for name, value in tensors.items()}


def write_weights(folder: Path, text: TextEncoder, audio: AudioEncoder, separator: Separator, tokenizer: Path) -> None:
    """CLAP's towers with `module.` before their names, the separator's own tensors without, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for text in corpus() for word in re.findall(r"\w+", text.lower())})
    metadata = {"clapsep": json.dumps({**describe_sizes(CONFIG, DSP), "weights": "demo", "words": words})}
    towers = {f"module.{name}": value for name, value in {**text.state_dict(), **audio.state_dict()}.items()}
    own = {n: v for n, v in separator.state_dict().items() if n.startswith("decoder_model.") or TUNED.search(n)}
    for name, tensors in zip(FILES, (towers, own), strict=False):
        save_file(_half(tensors), folder / f".{name}", metadata)
        (folder / f".{name}").chmod(0o644)
        os.replace(folder / f".{name}", folder / name)
    shutil.copyfile(tokenizer, folder / FILES[2])
