"""The demo model: CLAPSep's topology at a hundredth of its size, with generated weights. It runs; it does not separate."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..runtime.families.clapsep import ClapsepDsp
from .clap import AudioEncoder, ClapConfig, TextConfig, TextEncoder
from .clapsep import Separator, SeparatorConfig
from .families.clapsep import TUNED
from .golden import CAPTIONS
from .htsat import HtsatConfig
from .synthetic import generate
from .vocabulary import train_tokenizer

SEED = 1
VOCABULARY = 512
CONFIG = SeparatorConfig(
    clap=ClapConfig(
        text=TextConfig(vocab=VOCABULARY, hidden=64, layers=2, heads=2, ffn=256, positions=80, context=77),
        audio=HtsatConfig(spec_size=128, embed=32, depths=(2, 2, 2, 2), heads=(2, 4, 8, 16)),
        embedding=128,
    ),
    attention=128,
    mask_layers=2,
    mask_heads=4,
    mask_ffn=512,
    lora_rank=8,
)
DSP = ClapsepDsp(window_samples=80000)


def write_demo(folder: Path, config: SeparatorConfig = CONFIG, dsp: ClapsepDsp = DSP, seed: int = SEED) -> tuple[Path, Path, Path]:
    """Write the checkpoint pair and the tokenizer into `folder`, laid out as published ones; returns their paths."""
    with torch.device("meta"):
        towers = {**TextEncoder(config.clap).state_dict(), **AudioEncoder(config.clap, dsp.frames).state_dict()}
        separator = Separator(config).state_dict()
    own = {n: t for n, t in separator.items() if n.startswith("decoder_model.") or TUNED.search(n)}
    text = config.clap.text
    hyper = {
        "spec_size": config.clap.audio.spec_size,
        "window_samples": dsp.window_samples,
        "context": text.context,
        "text_head_dim": text.hidden // text.heads,
        "mask_heads": config.mask_heads,
        "lora_alpha": config.lora_alpha,
        "weights": "generated",
    }
    clap, checkpoint, tokenizer = (folder / name for name in ("demo-clap.safetensors", "demo-clapsep.safetensors", "tokenizer.json"))
    for path, tensors, prefix in ((clap, towers, "module."), (checkpoint, own, "")):
        arrays = {prefix + n: torch.from_numpy(generate(prefix + n, t.shape, seed)) for n, t in tensors.items()}
        save_file(arrays, path, {"clapsep": json.dumps(hyper)})
    train_tokenizer(CAPTIONS, VOCABULARY).save(str(tokenizer))
    return clap, checkpoint, tokenizer
