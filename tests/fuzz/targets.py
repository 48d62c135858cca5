"""All targets, by the file that each stands in; a child imports only what its target needs."""

from __future__ import annotations

import importlib

from .target import TARGETS, Target

FILES = {
    "manifests": ("manifest", "bundle", "benchmark"),
    "graphs": ("graph", "onnx_in_onnxruntime", "onnx_in_openvino"),
    "tokenizers": ("tokenizer", "build_tokenizer"),
    "arrays": ("golden", "vector"),
    "checkpoints": ("torch_checkpoint", "safetensors_checkpoint", "model", "other_models"),
    "sounds": ("audio",),
    "streams": ("stream",),
    "lists": ("job_list", "job_table", "run_log"),
    "commands": ("clapsep", "clapsep_export"),
}
NAMES = tuple(name for names in FILES.values() for name in names)


def load(name: str) -> Target:
    """A target, after its file has been imported."""
    file = next(file for file, names in FILES.items() if name in names)
    importlib.import_module(f"{__package__}.{file}")
    return TARGETS[name]
