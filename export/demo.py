"""The demo model: CLAPSep's topology at a hundredth of its size, trained on procedural sounds (docs/demo-model.md)."""

from __future__ import annotations

from pathlib import Path

from ..runtime.families.clapsep import ClapsepDsp
from .clap import ClapConfig, TextConfig
from .clapsep import SeparatorConfig
from .htsat import HtsatConfig

FOLDER = Path(__file__).parent / "demo_model"
CLAP, CHECKPOINT, TOKENIZER = (FOLDER / name for name in ("demo-clap.safetensors", "demo-clapsep.safetensors", "tokenizer.json"))
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
