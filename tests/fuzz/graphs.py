"""Hostile ONNX graphs in a bundle whose manifest vouches for them, opened and run by the engines."""

from __future__ import annotations

import contextlib
import hashlib
import json
from functools import cache
from typing import Any

import numpy as np
import onnx
from clapsep.runtime import Separator
from clapsep.runtime.graph import check_graph
from clapsep.runtime.manifest import parse_manifest
from google.protobuf.message import DecodeError

from .graph_edits import bury_graph, damage_graph, edit_graph
from .manifests import copied, mixture
from .target import sample_bundle, target, written

GRAPHS = ("text_encoder_short", "audio_encoder", "separator", "mixture_encoder", "film", "mask_decoder")


def _graphs() -> list[bytes]:
    """Each graph file behind one byte that says which it is."""
    return [bytes([i]) + (sample_bundle() / f"graphs/{name}.onnx").read_bytes() for i, name in enumerate(GRAPHS)]


@cache
def _signed() -> dict[str, Any]:
    return json.loads((sample_bundle() / "manifest.json").read_text())


def _sign(name: str, content: bytes) -> None:
    """Put a file into the bundle as the graph `name`; the manifest vouches for it, as a hostile author's would."""
    manifest = json.loads(json.dumps(_signed()))
    with contextlib.suppress(DecodeError):
        manifest["graphs"][name]["nodes"] = len(onnx.load_from_string(content).graph.node)
    entry = manifest["graphs"][name]["graph"]
    entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (copied() / entry["file"]).write_bytes(content)
    (copied() / "manifest.json").write_text(json.dumps(manifest))


def _restore(name: str) -> None:
    relative = f"graphs/{name}.onnx"
    (copied() / relative).write_bytes((sample_bundle() / relative).read_bytes())


def _use(name: str, kind: str) -> None:
    separator = Separator(copied(), kind, threads=1, route="fused" if name == "separator" else "split")
    if name == "text_encoder_short":
        separator.encode_text(["rain"])
    elif name == "audio_encoder":
        separator.encode_audio([(mixture(), 48000)])
    else:
        condition = np.full(separator.family.condition_size, 0.1, np.float32)
        separator.separate(mixture(), 32000, condition=condition)


def _open_and_run(data: bytes, kind: str) -> None:
    name = GRAPHS[(data[0] if data else 0) % len(GRAPHS)]
    _sign(name, data[1:])
    try:
        _use(name, kind)
    finally:
        _restore(name)


@target(_graphs, edit_graph, damage_graph, bury_graph)
def graph(data: bytes) -> None:
    """Check a graph, without any engine."""
    name = GRAPHS[(data[0] if data else 0) % len(GRAPHS)]
    entry = parse_manifest(json.dumps(_signed()), "manifest.json").graphs[name]
    check_graph(written(data[1:], "x.onnx"), entry)


@target(_graphs, *[edit_graph] * 14, *[damage_graph] * 5, bury_graph)
def onnx_in_onnxruntime(data: bytes) -> None:
    """Open a graph in ONNX Runtime and run it."""
    _open_and_run(data, "onnxruntime")


@target(_graphs, *[edit_graph] * 14, *[damage_graph] * 5, bury_graph)
def onnx_in_openvino(data: bytes) -> None:
    """Open a graph in OpenVINO and run it."""
    _open_and_run(data, "openvino")
