"""Ways to damage inputs: blind, and with the structure of JSON, zip archives and argument lists in mind."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 16, 127, 128, 255, 256, 32767, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
TEXTS = ("", "x", "/etc/passwd", "../../x", "/dev/zero", ".", "a\0b", "\ud800", "x" * 5000, "1", "nan", "💥", "__class__", "batch", "fp32")
LITERALS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-0", "1e-400", '"\\ud800"', "[" * 3000, '{"a":' * 3000, "tru", "")
HOLE = "\N{OBJECT REPLACEMENT CHARACTER}hole"


def damage(rng: random.Random, data: bytes) -> bytes:
    """A few blind changes: bits, numbers, cuts, repetitions, insertions."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        rng.choice(BLIND)(rng, content)
    return bytes(content)


def _place(rng: random.Random, content: bytearray) -> int:
    """Headers stand at the beginning and directories at the end; both are hit more often than their size says."""
    size = len(content)
    near = rng.choice((size, 16, 128, 1024))
    return rng.randrange(min(near, size) + 1) if rng.random() < 0.7 else size - rng.randrange(min(near, size) + 1)


def _flip(rng: random.Random, content: bytearray) -> None:
    at = _place(rng, content)
    content[at : at + 1] = bytes([content[at] ^ (1 << rng.randrange(8))]) if at < len(content) else b""


def _number(rng: random.Random, content: bytearray) -> None:
    at, size = _place(rng, content), rng.choice((1, 2, 4, 8))
    value = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
    content[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))


def _cut(rng: random.Random, content: bytearray) -> None:
    at = _place(rng, content)
    del content[at : at + rng.choice((1, 4, 64, len(content)))]


def _repeat(rng: random.Random, content: bytearray) -> None:
    at, to, size = _place(rng, content), _place(rng, content), rng.choice((1, 4, 64, 1024))
    content[to:to] = content[at : at + size]


def _insert(rng: random.Random, content: bytearray) -> None:
    at = _place(rng, content)
    content[at:at] = rng.randbytes(rng.choice((1, 4, 64)))


BLIND: tuple[Callable[[random.Random, bytearray], None], ...] = (_flip, _flip, _number, _number, _cut, _repeat, _insert)


def edit_json(rng: random.Random, data: bytes) -> bytes:
    """A few values of a JSON document replaced, removed, repeated, renamed or moved; sometimes by what is no JSON."""
    document, literals = json.loads(data), []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _edit_node(rng, document, literals)
    text = json.dumps(document)
    for literal in literals:
        text = text.replace(json.dumps(HOLE), literal, 1)
    return text.encode()


def _nodes(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value."""
    found, waiting = [], [document]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        found += [(node, key) for key in keys]
        waiting += [node[key] for key in keys if isinstance(node[key], dict | list)]
    return found


def _edit_node(rng: random.Random, document: Any, literals: list[str]) -> None:
    nodes = _nodes(document)
    if not nodes:
        return
    node, key = rng.choice(nodes)
    way = rng.randrange(8)
    if way == 0:
        del node[key]
    elif way == 1 and isinstance(node, dict):
        node[rng.choice((str(key) + "x", *TEXTS))] = node.pop(key)
    elif way == 2 and isinstance(node, list):
        node[key:key] = [node[key]] * rng.choice((1, 2, 1000))
    elif way == 3:
        other, there = rng.choice(nodes)
        node[key] = copy.deepcopy(other[there]) if there in other or isinstance(other, list) else None
    elif way == 4:
        literals.append(rng.choice(LITERALS))
        node[key] = HOLE
    else:
        node[key] = hostile_value(rng, node[key])


def hostile_value(rng: random.Random, old: Any = None) -> Any:
    """Something that hardly belongs here; like `old` half of the time."""
    if type(old) in (int, float) and rng.random() < 0.6:
        return rng.choice((*NUMBERS, old + 1, old - 1, -old, old * 2, old / 2, float(old), 1e300, str(old)))
    if isinstance(old, str) and rng.random() < 0.6:
        return rng.choice((*TEXTS, old.upper(), old[:-1], old + "x", old * 2, "../" + old, "./" + old, old.replace("/", "//")))
    return rng.choice((None, True, False, [], {}, [[]], {"": {}}, 0.5, rng.choice(NUMBERS), rng.choice(TEXTS), [rng.choice(TEXTS)] * 3))


def edit_zip(rng: random.Random, data: bytes) -> bytes:
    """Members of a zip archive repeated, renamed, dropped, compressed, damaged, or added to; written as a valid archive."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return damage(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(rng.choice((1, 1, 2))):
        members = _edit_members(rng, members)
    packing = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def _edit_members(rng: random.Random, members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    at = rng.randrange(len(members)) if members else 0
    name, content = members[at] if members else ("x", b"")
    folder, _, leaf = name.rpartition("/")
    other = rng.choice(members)[0] if members else "x"
    new = rng.choice(
        (
            [(name, damage(rng, content))],
            [(name, damage(rng, content))],
            [],
            [(name, content), (name, damage(rng, content))],
            [(other, content)],
            [(rng.choice(("/" + name, "../" + name, "a\0b", f"{folder}/../{leaf}", name.upper(), "/etc/x", name + "/")), content)],
            [(name, bytes(rng.choice((0, 1 << 20, 1 << 24))))],
            [(name, content[: rng.randrange(len(content) + 1)])],
            [(name, content), ("extra", rng.randbytes(10))],
        )
    )
    return members[:at] + new + members[at + 1 :]


def edit_directory(rng: random.Random, data: bytes) -> bytes:
    """Fields of a zip's directory changed: sizes, offsets, checksums, methods, flags, names."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return damage(rng, data)
    content = bytearray(data)
    entries = [i for i in range(len(data) - 46) if data[i : i + 4] == b"PK\1\2"]
    end = data.rfind(b"PK\5\6")
    for _ in range(rng.choice((1, 2, 4))):
        if entries and rng.random() < 0.8:
            start, (offset, size) = (
                rng.choice(entries),
                rng.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4), (46, 4))),
            )
        else:
            start, (offset, size) = end, rng.choice(((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)))
        old = int.from_bytes(content[start + offset : start + offset + size], "little")
        value = rng.choice((*NUMBERS, old + 1, old - 1, old * 2)) & ((1 << 8 * size) - 1)
        content[start + offset : start + offset + size] = value.to_bytes(size, "little")
    return bytes(content)


def edit_length_prefixed_json(rng: random.Random, data: bytes) -> bytes:
    """The JSON header of a safetensors file edited; its length is right most of the time."""
    (size,) = struct.unpack("<Q", data[:8])
    header = edit_json(rng, data[8 : 8 + size])
    length = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS) & ((1 << 64) - 1)
    return struct.pack("<Q", length) + header + data[8 + size :]
