"""Checkpoints of Conformer extractors with generated weights, as no weights are published; they separate nothing."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from clapsep.export.checkpoint import Checkpoint
from clapsep.export.derive import derive
from clapsep.export.families.conformer import ConformerConfig, ConformerModel, Extractor, open_model
from clapsep.export.graph import export_graph
from clapsep.runtime.manifest import FileEntry, Manifest, Source
from safetensors.torch import save_file

TINY = ConformerConfig(condition=12, bins=33, hidden=16, layers=2, ffn=24, kernel=5, heads=2)
WINDOW = 640  # 21 frames

# End of a name → mean and deviation; the first that fits. Weights have deviations for outputs of about 1.
RULES = {
    "gamma.weight": (0.0, 0.5),  # enough for a query to matter
    "beta.weight": (0.0, 0.5),
    "gamma.bias": (1.0, 0.0),
    "beta.bias": (0.0, 0.0),
    "norm.weight": (1.0, 0.1),
    "bn.weight": (1.0, 0.1),
    "running_mean": (0.0, 0.1),
    "running_var": (1.0, 0.1),
    "pos_u": (0.0, 0.3),
    "pos_v": (0.0, 0.3),
    "bias": (0.0, 0.05),
}


def generated(config: ConformerConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict, the same for the same seed."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Extractor(config).state_dict().items()}
    tensors = {}
    for name, shape in shapes.items():
        mean, deviation = next((rule for end, rule in RULES.items() if name.endswith(end)), (0.0, float(np.prod(shape[1:])) ** -0.5))
        values = mean + deviation * np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
        tensors[name] = torch.from_numpy(values.astype(np.float32))
    return tensors


def hyper(config: ConformerConfig, window_samples: int = WINDOW) -> dict[str, object]:
    """The metadata of a file with a model of other than the usual sizes."""
    told = {name: value for name, value in asdict(config).items() if name in ("heads", "position", "cond_residual")}
    return {**told, "window_samples": window_samples, "weights": "generated"}


def write_generated(path: Path, config: ConformerConfig = ConformerConfig(), window_samples: int = 320000, seed: int = 0) -> Path:  # noqa: B008
    """A checkpoint file; the defaults are the full size."""
    save_file(generated(config, seed), path, {"clapsep": json.dumps(hyper(config, window_samples))})
    return path


def checkpoint(config: ConformerConfig = TINY, **metadata: object) -> Checkpoint:
    """What reading such a file would give."""
    return Checkpoint(Source("checkpoint", "tiny.safetensors", "0" * 64, 1), generated(config), {**hyper(config), **metadata})


def model(config: ConformerConfig = TINY, **metadata: object) -> ConformerModel:
    return open_model(None, checkpoint(config, **metadata))


def export(model: ConformerModel, root: Path, *, derived: bool = True) -> Manifest:
    """The model's graphs below `root`, with or without those that are made out of others."""
    graphs = {spec.name: export_graph(spec, root, {"precision": "fp32"}) for spec in model.graphs()}
    graphs |= {spec.name: derive(spec, root, graphs, {}) for spec in (model.derived() if derived else [])}
    empty = FileEntry("golden.npz", 0, "")
    said = {"dsp": model.dsp, "condition": model.condition, "query": model.query, "weights": model.weights, "variant": model.variant}
    return Manifest(
        family=model.family, sources=(), toolchain={}, max_batch=4, graphs=graphs, tokenizer=None, golden=empty, gates=(), **said
    )
