"""Bundles of the full-size model in the published file layouts, each built once."""

from __future__ import annotations

from pathlib import Path

import pytest
from clapsep.export.golden import CAPTIONS
from clapsep.export.vocabulary import train_tokenizer
from published import write_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def build(run, pair):
    """Build a full-size bundle with further options of the command."""

    def call(name: str, *options: object) -> Path:
        out, tokenizer = pair[0].parent / name, pair[0].parent / "tokenizer.json"
        train_tokenizer(CAPTIONS, 400).save(str(tokenizer))  # the golden data comes with token ids; any vocabulary will do here
        run("clapsep-export", "build", out, "--clap", pair[0], "--checkpoint", pair[1], "--tokenizer", tokenizer, *options)
        return out

    return call


@pytest.fixture(scope="session")
def bundle(build) -> Path:
    return build("full.clapsep")


@pytest.fixture(scope="session")
def half_bundle(build) -> Path:
    return build("half.clapsep", "--precision", "fp16")
