"""Hostile tokenizer.json files, in a bundle and given to a build."""

from __future__ import annotations

import json

from clapsep.export.vocabulary import read_tokenizer
from clapsep.runtime.tokenizer import Tokenizer

from .mutators import damage, edit_json
from .target import sample_bundle, target, written

TEXTS = ("a dog barking", "", " ", "\ud800", "💥" * 50, "x" * 5000, "<s></s><pad><mask>", "\0")


def _tokenizers() -> list[bytes]:
    """The bundle's own, and a short one in which an edit more often hits something else than the vocabulary."""
    whole = (sample_bundle() / "tokenizer.json").read_bytes()
    short = json.loads(whole)
    keep = dict(list(short["model"]["vocab"].items())[:300])
    short["model"] |= {"vocab": keep, "merges": [m for m in short["model"]["merges"] if {*m, "".join(m)} <= set(keep)]}
    parts = {"normalizer": {"type": "NFKC"}, "truncation": None, "padding": None}
    return [whole, json.dumps(short).encode(), json.dumps({**short, **parts}).encode()]


@target(_tokenizers, edit_json, edit_json, edit_json, damage)
def tokenizer(data: bytes) -> None:
    """Read a bundle's tokenizer and encode texts."""
    opened = Tokenizer(written(data, "tokenizer.json"), 77)
    for text in TEXTS:
        ids, mask = opened.encode([text])
        assert ids.shape == mask.shape == (1, 77), f"{ids.shape} ids"
        opened.truncates(text)


@target(_tokenizers, edit_json, edit_json, damage)
def build_tokenizer(data: bytes) -> None:
    """Read a tokenizer that was given to a build."""
    read_tokenizer(written(data, "tokenizer.json"), 512).save("out.json")
