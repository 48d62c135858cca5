"""Hostile checkpoints: torch archives, bare pickles and safetensors files; and what is opened as a model."""

from __future__ import annotations

import collections
import io
import json
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from clapsep.export.checkpoint import Checkpoint, read_checkpoint
from clapsep.export.family import open_model

from .mutators import damage, edit_directory, edit_length_prefixed_json, edit_zip
from .target import target, written

NAMES = (
    "os system",
    "posix system",
    "builtins eval",
    "builtins exec",
    "builtins getattr",
    "torch load",
    "torch.serialization load",
    "numpy memmap",
)
NAMES += ("numpy ndarray", "numpy dtype", "numpy._core.multiarray scalar", "numpy._core.multiarray _reconstruct", "collections OrderedDict")
NAMES += ("torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch._utils _rebuild_parameter", "torch Size", "subprocess Popen")


def _torch_files() -> list[bytes]:
    state = collections.OrderedDict(w=torch.arange(8.0), h=torch.ones(2, 3, dtype=torch.float16), b=torch.tensor(True))
    content = {"state_dict": state, "epoch": 3, "loss": np.float64(0.5), "curve": np.arange(3), "names": ["a", ("b", None)]}
    files = []
    for modern in (True, True, False):
        out = io.BytesIO()
        torch.save(content, out, _use_new_zipfile_serialization=modern)
        files.append(out.getvalue())
    return files


def edit_pickle(rng: random.Random, data: bytes) -> bytes:
    """The pickle inside refers to something else, is damaged, or is followed by a call."""
    if data[:2] != b"PK":
        return _other_pickle(rng, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, _other_pickle(rng, old.read(name)) if name.endswith(".pkl") else old.read(name))
    return out.getvalue()


def _other_pickle(rng: random.Random, content: bytes) -> bytes:
    globals_ = [i for i in range(len(content)) if content[i : i + 1] == b"c" and content[i + 1 : i + 3] in (b"to", b"co", b"nu")]
    way = rng.randrange(4)
    if way == 0 and globals_:
        at = rng.choice(globals_)
        end = content.index(b"\n", content.index(b"\n", at) + 1)
        return content[: at + 1] + rng.choice(NAMES).replace(" ", "\n").encode() + content[end:]
    if way == 1:
        call = f"c{rng.choice(NAMES)}\n(X".replace(" ", "\n").encode() + struct.pack("<I", 14) + b"touch was-heretR"
        at = rng.randrange(2, len(content))
        return content[:at] + call + content[at:]
    if way == 2:
        return (
            content[:2]
            + rng.choice(
                (b"(" * 50000, b"}" * 50000, b"]" + b"2" * 40 + b"a" * 40, b"\x8d" + b"\xff" * 8, b"\x8a\xff" * 9, b"r" + b"\xff" * 4)
            )
            + content[2:]
        )
    return damage(rng, content)


@target(_torch_files, edit_pickle, edit_pickle, edit_zip, edit_directory, damage)
def torch_checkpoint(data: bytes) -> None:
    """Read a torch.save file; nothing in it may run."""
    read_checkpoint(written(data, "a.pt"), "clap")
    assert not Path("was-here").exists(), "the pickle was run"


def _tiny() -> list[Path]:
    """The checkpoints of the tests' tiny model, made once."""
    from tiny import variant

    folder = Path("tiny")
    if not folder.is_dir():
        folder.mkdir()
        variant(folder)
    return [folder / "clap.safetensors", folder / "clapsep.safetensors"]


def _safetensors() -> list[bytes]:
    return [path.read_bytes() for path in _tiny()]


def edit_metadata(rng: random.Random, data: bytes) -> bytes:
    """What the file says of itself edited, which decides how the model is built."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    from .mutators import edit_json

    header["__metadata__"]["clapsep"] = edit_json(rng, header["__metadata__"]["clapsep"].encode()).decode()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@target(_safetensors, edit_length_prefixed_json, edit_length_prefixed_json, damage)
def safetensors_checkpoint(data: bytes) -> None:
    """Read a safetensors file."""
    read_checkpoint(written(data, "a.safetensors"), "clap")


def _separators() -> list[bytes]:
    return _safetensors()[1:]


def _clap() -> Checkpoint:
    return read_checkpoint(_tiny()[0], "clap")


@target(_separators, edit_metadata, edit_length_prefixed_json, seconds=10)
def model(data: bytes) -> None:
    """Build the model that a checkpoint describes."""
    open_model(_clap(), read_checkpoint(written(data, "b.safetensors"), "checkpoint"))


def _others() -> list[bytes]:
    """Very small models of the other families, with what their files may say of themselves."""
    import conformer_files
    import family_cases
    import waveformers
    from safetensors.torch import save

    models = [
        (family_cases.resunet_tensors(), {"window_samples": 32000, "weights": "generated"}),
        (waveformers.tiny(3), {"labels": ["a", "b", "c"], "weights": "generated"}),
        (conformer_files.generated(conformer_files.TINY), conformer_files.hyper(conformer_files.TINY)),
    ]
    return [save(tensors, {"clapsep": json.dumps(said)}) for tensors, said in models]


@target(_others, edit_metadata, edit_length_prefixed_json, seconds=10)
def other_models(data: bytes) -> None:
    """Build a model of another family."""
    open_model(None, read_checkpoint(written(data, "o.safetensors"), "checkpoint"))
