"""ResUNet30 with generated weights, full-size as published or very small, and the outputs of the official code with the former."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from clapsep.engines.engine import EngineOptions
from clapsep.engines.onnxruntime import OnnxRuntimeEngine
from clapsep.export.checkpoint import DERIVED, Checkpoint
from clapsep.export.derive import derive
from clapsep.export.families.resunet30 import Network, ResunetModel, Sizes
from clapsep.export.graph import export_graph
from clapsep.runtime.family import open_family
from clapsep.runtime.manifest import FileEntry, Manifest, Source

GOLDEN = Path(__file__).parent / "data" / "golden-resunet30"
META = json.loads((GOLDEN / "meta.json").read_text())
SEED = META["weight_seed"]
MAPS = ("mask", "mask_cos", "mask_sin")
BINS, WIDTHS, SIZE = 129, (4, 4, 6, 8, 9, 10, 10), 16  # of the very small network
UNIT = np.float32(np.sqrt(3.0) / 65536.0)  # makes the sum of four uniform 16-bit integers unit variance

# Centres of running_var of each normalisation in its order, measured, so that normalised values have about unit variance.
BLOCKS = {
    "encoder_block1.conv_block1": (6.3, 1.4),
    "encoder_block2.conv_block1": (7.8, 0.89),
    "encoder_block3.conv_block1": (4, 1.3),
    "encoder_block4.conv_block1": (2.8, 1.2),
    "encoder_block5.conv_block1": (2.4, 1.4),
    "encoder_block6.conv_block1": (2.1, 1.2),
    "conv_block7a.conv_block1": (3.2, 1.1),
    "decoder_block1": (4.3,),
    "decoder_block1.conv_block2": (2.5, 1.3),
    "decoder_block2": (2.7,),
    "decoder_block2.conv_block2": (1.8, 1.3),
    "decoder_block3": (2.2,),
    "decoder_block3.conv_block2": (2, 1.6),
    "decoder_block4": (2.2,),
    "decoder_block4.conv_block2": (2.3, 1.4),
    "decoder_block5": (2.6,),
    "decoder_block5.conv_block2": (3.3, 1.7),
    "decoder_block6": (3.1,),
    "decoder_block6.conv_block2": (5, 1.4),
}
VARIANCES = {f"base.{block}.bn{i}.running_var": v for block, values in BLOCKS.items() for i, v in enumerate(values, 1)}


def scaling(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Shift and scale of a tensor's values."""
    fan = np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 1.0
    rules = [
        (r"^base\.bn0\.running_mean$", (1.0, 0.2)),
        (r"^base\.bn0\.running_var$", (4.0, 0.7)),
        (r"running_mean$", (0.0, 0.1)),
        (r"running_var$", (VARIANCES.get(name, 1.0), 0.15 * VARIANCES.get(name, 1.0))),
        (r"\.bn\d\.weight$", (1.0, 0.1)),
        (r"\.bn\d\.bias$|^film\..*bias$", (0.0, 0.1)),
        (r"^film\..*weight$", (0.0, 0.6)),
        (r"^base\.pre_conv\.weight$", (0.0, 1.0)),
        (r"^base\.after_conv\.weight$", (0.0, 1 / np.sqrt(shape[1]) if len(shape) > 1 else 0)),
        (r"decoder_block\d\.conv1\.weight$", (0.0, 1.4 / np.sqrt(shape[0]) if shape else 0)),
        (r"shortcut\.weight$", (0.0, 0.7 / fan)),
    ]
    default = (0.0, 1.4 / fan if len(shape) in (2, 4) else 0.1)
    return next((values for pattern, values in rules if re.search(pattern, name)), default)


def generate(name: str, shape: tuple[int, ...], seed: int = SEED) -> torch.Tensor:
    """Value = f(seed, name without ss_model., shape), the same bytes everywhere."""
    key = f"{META['gen_version']}|{seed}|{name}"
    words = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
    quarters = words.random_raw(int(np.prod(shape))).astype("<u8").view("<u2").reshape(-1, 4)
    x = (quarters.sum(1, dtype=np.int32) - np.int32(131070)).astype(np.float32).reshape(shape) * UNIT
    shift, scale = scaling(name, shape)
    x = x * np.float32(scale)
    if shift:
        x = x + np.float32(shift)
    if name == "base.after_conv.weight":  # the mask varies more than the phase
        x = x * np.array([2, 1, 1], np.float32).reshape(3, 1, 1, 1)
    if name == "base.after_conv.bias":
        x = x + np.array([1.8, 0.6, 0], np.float32)
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))


def published(manifest: str, seed: int = SEED) -> dict[str, torch.Tensor]:
    """Generated tensors under the names of a published file; derived ones hold rubbish, because nobody may trust them."""
    rows = json.loads(gzip.decompress((GOLDEN / f"{manifest}.json.gz").read_bytes()))
    return {
        name: torch.full(shape, 7, dtype=getattr(torch, dtype))
        if DERIVED.search(name)
        else generate(name.removeprefix("ss_model."), tuple(shape), seed)
        for name, shape, dtype in rows
    }


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of the generated tensors, and of counters as if they were 0."""
    found = hashlib.sha256()
    for name, value in sorted((name.removeprefix("ss_model."), value) for name, value in tensors.items()):
        if name.endswith("num_batches_tracked"):
            value = torch.zeros((), dtype=torch.int64)
        elif DERIVED.search(name):
            continue
        found.update(name.encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def checkpoint(tensors: dict[str, torch.Tensor], **metadata: object) -> Checkpoint:
    return Checkpoint(Source("checkpoint", "model.ckpt", "", 0), tensors, metadata)


@cache
def tiny(adaptor: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of a very small network, in a training checkpoint's layout with what else such files hold."""
    with torch.device("meta"):
        network = Network(Sizes(BINS, WIDTHS, SIZE, (SIZE + 2, 24) if adaptor else None))
    own = {name: generate(name, tuple(value.shape)) for name, value in network.state_dict().items()}
    more = {"base.decoder_block2.bn2.weight": torch.ones(3), "film.decoder_block2->beta2.bias": torch.ones(3)}
    more |= {"base.bn0.num_batches_tracked": torch.tensor(5), "base.stft.conv_real.weight": torch.ones(2)}
    named = {name if name.startswith("query_net.") else f"ss_model.{name}": value for name, value in (own | more).items()}
    return named | {"anchor_segment_detector.fc1.weight": torch.ones(2), "query_net.base.fc1.weight": torch.ones(2)}


class Exported(NamedTuple):
    """A model's graphs, written to a folder, with what the runtime makes of them."""

    manifest: Manifest
    root: Path

    @property
    def family(self):
        return open_family(self.manifest)

    def run(self, graph: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        file = self.root / self.manifest.graphs[graph].graph.file
        return OnnxRuntimeEngine(file, EngineOptions(threads=2)).run(inputs)


def export(model: ResunetModel, root: Path) -> Exported:
    metadata = {"precision": "fp32"}
    towers = model.towers
    specs = [*model.graphs(), *(towers.graphs() if towers else [])]
    graphs = {spec.name: export_graph(spec, root, metadata) for spec in specs}
    graphs |= {spec.name: derive(spec, root, graphs, metadata) for spec in [*model.derived(), *(towers.derived() if towers else [])]}
    described = {key: getattr(model, key) for key in ("family", "variant", "weights", "dsp", "condition", "query")}
    nothing = FileEntry("golden.npz", 0, "")
    manifest = Manifest(
        **described, sources=(), toolchain={}, max_batch=1, graphs=graphs, tokenizer=None, golden=nothing, gates=()
    )  # fmt: skip
    return Exported(manifest, root)
