"""Generated weights: value = f(seed, name, shape), the same bytes on every platform.

They pin arithmetic and make small models without training; they separate nothing. Each tensor is drawn from Philox keyed by
its name, as a sum of four 16-bit integers (near normal), then scaled so that activations stay in the range of a trained model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from ..runtime.families.clapsep import ClapsepDsp
from .clap import AudioEncoder, TextEncoder
from .clapsep import Separator, SeparatorConfig
from .families.clapsep import TUNED, describe_sizes
from .golden import CAPTIONS
from .vocabulary import train_tokenizer

VERSION = "clapsep-gen-v1"
UNIT = np.float32(np.sqrt(3.0) / 65536.0)  # makes the sum of four uniform 16-bit integers unit variance

# (pattern, shift, scale); a scale in a tuple is divided by sqrt(fan-in). First match wins.
RULES: list[tuple[str, float, float | tuple[float]]] = [
    (r"logit_scale_[at]$", 2.6592, 0.05),
    (r"bn0\.running_mean$", -35.0, 4.0),
    (r"bn0\.running_var$", 400.0, 60.0),
    (r"spec_norm\.running_mean$", 1.5, 0.3),
    (r"spec_norm\.running_var$", 20.0, 4.0),
    (r"running_mean$", 0.0, 0.1),
    (r"running_var$", 1.0, 0.2),
    (r"(LayerNorm|norm\d?|bn0|spec_norm|\.ln)\.weight$|mask_net\.1\.weight$", 1.0, 0.1),
    (r"(LayerNorm|norm\d?|bn0|spec_norm|\.ln)\.bias$|mask_net\.1\.bias$", 0.0, 0.1),
    (r"word_embeddings", 0.0, 0.08),
    (r"(position|token_type)_embeddings", 0.0, 0.02),
    (r"attention\.self\.(query|key)\.weight$", 0.0, (1.4,)),
    (r"pooler\.dense\.weight", 0.0, (1.0,)),
    (r"(text|audio)_(projection|transform).*weight$", 0.0, (1.4,)),
    (r"relative_position_bias_table$", 0.0, 0.5),
    (r"lora_A$", 0.0, (1.0,)),
    (r"lora_B$", 0.0, 1.4),
    (r"attn\.qkv\.weight$", 0.0, (1.3,)),
    (r"attn\.proj\.weight$", 0.0, (0.8,)),
    (r"mlp\.fc2\.weight$", 0.0, (0.9,)),
    (r"skip_conv\.(gamma|beta)\.weight$", 0.0, 0.55),
    (r"skip_conv\.gamma\.bias$", 0.6, 0.2),
    (r"inverse_patch_embed\.proj\.weight$", 0.0, (-1.0,)),  # negative: fan-in is the first axis
    (r"self_attn\.in_proj_weight$", 0.0, (1.2,)),
    (r"mask_net\.3\.weight$", 0.0, (1.5,)),
    (r"mask_net\.3\.bias$", 0.0, 0.3),
]
DEFAULT: tuple[tuple[float, float | tuple[float]], ...] = (0.0, 0.05), (0.0, (1.0,))  # biases, everything else


def canonical(name: str) -> str:
    """One key per underlying tensor: the separator's audio branch starts as a copy of CLAP's and shares its names."""
    name = re.sub(r"^(module\.|clap_model\.model\.)", "clap.", name)
    if name.startswith("audio_branch."):
        return ("sep." if re.search(r"lora_[AB]$|\.attn\.(qkv|proj)\.bias$", name) else "clap.") + name
    if name.startswith("decoder_model."):
        return "sep." + name
    if re.match(r"(text_branch|(text|audio)_(projection|transform))\.|logit_scale", name):
        return "clap." + name
    return name


def _scaling(key: str, shape: tuple[int, ...]) -> tuple[np.float32, np.float32]:
    shift, scale = next(((a, b) for pattern, a, b in RULES if re.search(pattern, key)), DEFAULT[len(shape) > 1])
    if isinstance(scale, tuple):
        (factor,) = scale
        fan = int(np.prod(shape[:1] if factor < 0 else shape[1:]))
        scale = abs(factor) / np.sqrt(fan)
    return np.float32(shift), np.float32(scale)


def generate(name: str, shape: Iterable[int], seed: int) -> NDArray[np.float32]:
    """The tensor `name` of `shape`, float32."""
    shape, key = tuple(shape), canonical(name)
    words = np.random.Philox(key=int.from_bytes(hashlib.sha256(f"{VERSION}|{seed}|{key}".encode()).digest()[:16], "little"))
    quarters = words.random_raw(int(np.prod(shape))).astype("<u8").view("<u2").reshape(-1, 4)
    x = (quarters.sum(1, dtype=np.int32) - np.int32(131070)).astype(np.float32).reshape(shape) * UNIT
    shift, scale = _scaling(key, shape)
    x *= scale
    if shift:
        x += shift
    if key.endswith("decoder_model.mask_net.0.weight"):
        x[:, -64:] *= np.float32(4)  # the columns that depend on the query weigh more
    return np.asarray(x)


def write_generated(folder: Path, config: SeparatorConfig, dsp: ClapsepDsp, seed: int) -> tuple[Path, Path, Path]:
    """Write a checkpoint pair of any size and a tokenizer into `folder`, laid out as published ones; returns their paths."""
    with torch.device("meta"):
        towers = {**TextEncoder(config.clap).state_dict(), **AudioEncoder(config.clap, dsp.frames).state_dict()}
        separator = Separator(config).state_dict()
    own = {n: t for n, t in separator.items() if n.startswith("decoder_model.") or TUNED.search(n)}
    clap, checkpoint, tokenizer = (folder / name for name in ("clap.safetensors", "clapsep.safetensors", "tokenizer.json"))
    metadata = {"clapsep": json.dumps({**describe_sizes(config, dsp), "weights": "generated"})}
    for path, tensors, prefix in ((clap, towers, "module."), (checkpoint, own, "")):
        arrays = {prefix + n: torch.from_numpy(generate(prefix + n, t.shape, seed)) for n, t in tensors.items()}
        save_file(arrays, path, metadata)
    train_tokenizer(CAPTIONS, min(config.clap.text.vocab, 512)).save(str(tokenizer))
    return clap, checkpoint, tokenizer
