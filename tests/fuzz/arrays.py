"""Hostile golden.npz files: zip structure, array headers, shapes, types, pickles."""

from __future__ import annotations

import io
import random
import zipfile

import numpy as np
from clapsep.export import signals
from clapsep.export.golden import Golden
from clapsep.runtime.query import read_vector
from numpy.lib import format as npy

from .mutators import NUMBERS, damage, edit_directory, edit_zip
from .target import target, written

TYPES = ("<f4", ">f8", "<i8", "|b1", "<U5", "|S3", "|O", "|V0", "<c16", "<M8[s]", "|u1", [("a", "<f4"), ("b", "|O")], "<f4,<i8", "zz")


def _golden() -> list[bytes]:
    """A golden.npz of very small arrays that belong together."""
    random_, hard = np.random.default_rng(1), len(signals.HARD)

    def values(*shape: int) -> np.ndarray:
        return random_.normal(size=shape).astype(np.float32)

    arrays = {
        "captions": np.array(["a dog", "rain"]),
        "input_ids": np.ones((2, 5), np.int64),
        "attention_mask": np.ones((2, 5), np.int64),
        "text_embedding": values(2, 4),
        "clip": np.ones((2, 8), np.int16),
        "clip_length": np.array([8, 3]),
        "log_mel": values(2, 3, 2),
        "audio_embedding": values(2, 4),
        "pairs": np.array([[0, -1], [2, 3]]),
        "condition": values(2, 8),
        "mixture": np.ones(10, np.int16),
        "target": values(2, 10),
        "hard_names": np.array(signals.HARD),
        "hard": np.ones((hard, 10), np.int16),
        "hard_target": values(hard, 10),
    }
    packed = []
    for save in (np.savez, np.savez_compressed):
        out = io.BytesIO()
        save(out, **arrays)
        packed.append(out.getvalue())
    return packed


def edit_header(rng: random.Random, data: bytes) -> bytes:
    """An array's header names another type, shape or order, or lies about its size; or the array is a pickle."""
    header = io.BytesIO()
    array = np.load(io.BytesIO(data))
    shape = list(array.shape) or [1]
    shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
    fields = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": rng.random() < 0.3, "shape": array.shape}
    fields |= rng.choice(({"shape": tuple(shape)}, {"descr": rng.choice(TYPES)}, {"shape": ()}, {"shape": (0,) * rng.choice((1, 40))}))
    text = (repr(fields) if rng.random() < 0.9 else "(" * 5000).encode() + b"\n"
    header.write(b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text)
    body = rng.choice((array.tobytes(), array.tobytes() * 3, b"", b"cos\nsystem\n(S'touch was-here'\ntR."))
    return header.getvalue() + body


def edit_array(rng: random.Random, data: bytes) -> bytes:
    """One of the arrays has another header."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    members[name] = edit_header(rng, members[name])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


@target(_golden, edit_array, edit_array, edit_zip, edit_directory, damage)
def golden(data: bytes) -> None:
    """Read golden.npz as the gates do."""
    Golden.load(written(data, "golden.npz"))


def _vector() -> list[bytes]:
    """Vectors of three numbers, as files have them."""
    files = []
    for dtype in ("<f4", "<f8", "<i8"):
        out = io.BytesIO()
        np.save(out, np.arange(3, dtype=dtype))
        files.append(out.getvalue())
    return files


@target(_vector, edit_header, edit_header, damage)
def vector(data: bytes) -> None:
    """Read a query's vector."""
    found = read_vector(written(data, "vector.npy"), 3)
    assert found.shape == (3,)
    assert np.isfinite(found).all()
