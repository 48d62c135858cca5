"""Waveformer checkpoints from generated weights, their graphs, and a loop that runs them."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clapsep.engines import Engine, open_engine
from clapsep.engines.engine import EngineOptions
from clapsep.export.checkpoint import Checkpoint
from clapsep.export.derive import derive
from clapsep.export.families.waveformer import Network, WaveformerModel, open_model
from clapsep.export.graph import export_graph
from clapsep.runtime.families.waveformer import DELAYED, LAYERS, Waveformer, WaveformerSteps
from clapsep.runtime.manifest import FileEntry, GraphEntry, Manifest, Source, parse_manifest

GOLDEN = Path(__file__).parent / "data" / "golden-waveformer"
META = json.loads((GOLDEN / "meta.json").read_text())
UNIT = np.float32(np.sqrt(3.0) / 65536.0)  # makes the sum of four uniform 16-bit integers unit variance

# (pattern, shift, scale); a scale in a tuple is divided by sqrt(fan-in). First match wins.
RULES: list[tuple[str, float, float | tuple[float]]] = [
    (r"in_conv\.0\.weight", 0.0, (4.0,)),
    (r"(label_embedding\.[14]|\.layers\.[14]|\.norm[123])\.weight$", 1.0, 0.1),
    (r"\.layers\.[14]\.bias$", -0.3, 0.2),
    (r"(label_embedding\.[14]|\.norm[123])\.bias$", 0.0, 0.1),
    (r"label_embedding\.0\.weight", 0.0, 1.0),
    (r"label_embedding\.3\.weight", 0.0, (1.4,)),
    (r"layers\.0\.weight$", 0.0, (1.2,)),
    (r"layers\.3\.weight$", 0.0, (1.0,)),
    (r"proj_e2d_[el]\.0\.weight$", 0.0, (0.8,)),
    (r"proj_(e2d_[el]|d2e)\.0\.bias$", 0.1, 0.2),
    (r"proj_d2e\.0\.weight$", 0.0, 1.0),
    (r"in_proj_weight$", 0.0, (1.4,)),
]
DEFAULT: tuple[tuple[float, float | tuple[float]], ...] = (0.0, 0.05), (0.0, (1.0,))  # biases, everything else


def generate(name: str, shape: tuple[int, ...], seed: int, tag: str) -> np.ndarray:
    """The tensor `name` of the golden data's set `seed`, scheme waveformer-gen-v1."""
    key = hashlib.sha256(f"{META['gen_version']}|{seed}|{tag}|{name}".encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(int(np.prod(shape))).astype("<u8")
    quarters = words.view("<u2").reshape(-1, 4).sum(1, dtype=np.int32) - np.int32(131070)
    shift, scale = next(((a, b) for pattern, a, b in RULES if re.search(pattern, name)), DEFAULT[len(shape) > 1])
    if name == "out_conv.0.weight":
        scale = 0.12 / np.sqrt(shape[0])
    elif isinstance(scale, tuple):
        scale = scale[0] / np.sqrt(int(np.prod(shape[1:])))
    x = quarters.astype(np.float32).reshape(shape) * UNIT * np.float32(scale)
    return x + np.float32(shift) if shift else x


def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()


@cache
def published(tag: str) -> dict[str, torch.Tensor]:
    """All learned tensors of a published size."""
    rows = json.loads(gzip.decompress((GOLDEN / "tensors.json.gz").read_bytes()))[tag]
    learned = {name: tuple(shape) for name, shape in rows if not name.endswith("pos_enc.pe")}
    return {name: torch.from_numpy(generate(name, shape, META["weight_seed"], tag)) for name, shape in learned.items()}


@cache
def tiny(labels: int = 41, encoder: int = 16, decoder: int = 8) -> dict[str, torch.Tensor]:
    """Tensors of a very small model."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Network(encoder, decoder, labels, 24).state_dict().items()}
    return {name: torch.from_numpy(generate(name, shape, 1, "tiny")) for name, shape in shapes.items()}


def write_published(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The layout of the published files: everything that training left, and a derived buffer that nobody may trust."""
    decoder = len(tensors["mask_gen.proj_e2d_e.0.weight"])
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)} for i in range(2)}
    content = {
        "epoch": 7,
        "model_state_dict": {**tensors, "mask_gen.decoder.pos_enc.pe": torch.full((1, 200, decoder), 7.0)},
        "optim_state_dict": {"state": moments, "param_groups": [{"lr": 5e-4, "params": [0, 1]}]},
        "lr_sched_state_dict": None,
        "train_metrics": {"loss": [0.5, np.float64(0.25)]},
        "val_metrics": {"scale_invariant_signal_noise_ratio": [np.float32(7.5)]},
    }
    torch.save(content, path)
    return path


def as_checkpoint(tensors: dict[str, torch.Tensor], **metadata: object) -> Checkpoint:
    return Checkpoint(Source("checkpoint", "w.pt", "", 0), dict(tensors), metadata)


def manifest_of(model: WaveformerModel, graphs: dict[str, GraphEntry]) -> Manifest:
    """As a reader of a bundle gets it."""
    made = Manifest(
        family=model.family,
        variant=model.variant,
        weights=model.weights,
        sources=(),
        toolchain={},
        dsp=model.dsp,
        condition=model.condition,
        query=model.query,
        max_batch=4,
        graphs=graphs,
        tokenizer=None,
        golden=FileEntry("golden.npz", 0, ""),
        gates=(),
    )
    return parse_manifest(made.to_json(), "manifest.json")


@dataclass
class Exported:
    """A model, its graphs and the runtime's side of it."""

    model: WaveformerModel
    root: Path
    manifest: Manifest
    family: Waveformer
    engine: Callable[[str], Engine]


def export(model: WaveformerModel, root: Path) -> Exported:
    entries: dict[str, GraphEntry] = {}
    for spec in model.graphs():
        entries[spec.name] = export_graph(spec, root, {"precision": "fp32"})
    for derived in model.derived():
        entries[derived.name] = derive(derived, root, entries, {})
    manifest = manifest_of(model, entries)
    engine = cache(lambda name: open_engine("onnxruntime", root / manifest.graphs[name].graph.file, EngineOptions(threads=1)))
    return Exported(model, root, manifest, Waveformer(manifest), engine)


@cache
def exported(tag: str) -> Exported:
    """A published size, or `tiny`; once per process."""
    folder = tempfile.TemporaryDirectory()
    made = export(open_model(None, as_checkpoint(tiny() if tag == "tiny" else published(tag))), Path(folder.name))
    made.folder = folder  # type: ignore[attr-defined]  # goes with it
    return made


def labels(*wanted: int, count: int = 41) -> np.ndarray:
    """[1, count] with ones at `wanted`."""
    row = np.zeros((1, count), np.float32)
    row[0, list(wanted)] = 1
    return row


Seen = Callable[[int, WaveformerSteps], None]


def drive(made: Exported, route: str, x: np.ndarray, conditions: Any, seen: Seen = lambda *_: None) -> np.ndarray:
    """Samples [channels, n] → [K, channels, n], step by step; `conditions` may be a function of the step's number."""
    family, n = made.family, x.shape[1]
    steps, count = family.begin(made.engine, route, len(x)), -(-n // family.step)
    padded = np.pad(x, ((0, 0), (family.before, count * family.step - n + family.after)))
    results = []
    for i in range(count):
        part = padded[:, i * family.step :][:, : family.before + family.step + family.after]
        asked: Any = conditions(i) if callable(conditions) else conditions
        results.append(steps.run(part, asked, min(family.step, n - i * family.step)))
        seen(i + 1, steps)
    return np.concatenate(results, axis=2)[:, :, :n]


def official_order(made: Exported) -> np.ndarray:
    """Where each of the official encoder channels stands among those of the graphs."""
    widths = made.family.widths
    return np.argsort(np.arange(widths.encoder).reshape(widths.decoder, -1).T.ravel())


def official_states(made: Exported, steps: WaveformerSteps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The states of one query on one channel as the official code packs them: [E, 2046], [2, 13, D], [E, 4]."""
    frames = made.family.frames
    contexts = [steps._heard[f"ctx{i}"][0] for i in range(LAYERS - len(DELAYED))]
    for i, line in steps._lines.items():
        blocks = [line.back(back).copy()[0] for back in range(2 << i, 0, -frames)]
        contexts.append(np.concatenate(blocks)[: 2 << i])
    order, decoder = official_order(made), np.stack([steps._heard["dec_mem"][0], steps._made["dec_tgt"][0]])
    return np.concatenate(contexts).T[order], decoder, steps._made["out_buf"][0].T[order]
