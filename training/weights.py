"""Writes the checkpoint pair as published ones are laid out, in float16."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from clapsep.export.clap import AudioEncoder, TextEncoder
from clapsep.export.clapsep import Separator
from clapsep.export.demo import CONFIG, DSP
from clapsep.export.families.clapsep import TUNED
from safetensors.torch import save_file
from torch import Tensor

FILES = ("demo-clap.safetensors", "demo-clapsep.safetensors", "tokenizer.json")


def _half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to(torch.float16).contiguous() for name, value in tensors.items()}


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they will be read back, so that stage 2 learns on the very CLAP that is stored."""
    return {name: value.half().float() for name, value in tensors.items()}


def write_weights(folder: Path, text: TextEncoder, audio: AudioEncoder, separator: Separator, tokenizer: Path) -> None:
    """CLAP's towers with `module.` before their names, the separator's own tensors without, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG.clap.text
    hyper = {
        "spec_size": CONFIG.clap.audio.spec_size,
        "window_samples": DSP.window_samples,
        "context": config.context,
        "text_head_dim": config.hidden // config.heads,
        "mask_heads": CONFIG.mask_heads,
        "lora_alpha": CONFIG.lora_alpha,
    }
    towers = {f"module.{name}": value for name, value in {**text.state_dict(), **audio.state_dict()}.items()}
    own = {n: v for n, v in separator.state_dict().items() if n.startswith("decoder_model.") or TUNED.search(n)}
    for name, tensors in zip(FILES, (towers, own), strict=False):
        save_file(_half(tensors), folder / f".{name}", {"clapsep": json.dumps(hyper)})
        os.replace(folder / f".{name}", folder / name)
    shutil.copyfile(tokenizer, folder / FILES[2])
