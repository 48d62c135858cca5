"""Inputs that coverage guides, by atheris: for parsers in pure Python, whose branches it sees."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .target import Target


def load_atheris() -> Any:
    """The package, which has wheels for some versions of Python on Linux only and is therefore in no extra."""
    try:
        import atheris  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        sys.exit("--atheris needs the package atheris, which has wheels for few systems; run: pip install atheris, or leave it out")
    return atheris


def instrumented() -> AbstractContextManager[None]:
    """What is imported within reports the branches that it takes."""
    return load_atheris().instrument_imports(include=["clapsep"], enable_loader_override=False)


def fuzz(target: Target, run: Callable[[bytes], None], seed: int, count: int, corpus: Path) -> None:
    """Call `run` with `count` inputs; those that reach something new are kept in `corpus` and changed further. Does not return."""
    atheris = load_atheris()
    corpus.mkdir(exist_ok=True)
    for i, data in enumerate(target.valid()):
        (corpus / f"valid{i}").write_bytes(data)

    def mutate(data: bytes, limit: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.5:
            try:
                return rng.choice(target.mutators)(rng, data)[:limit]
            except Exception:  # what is damaged already has no structure to edit
                pass
        return atheris.Mutate(data, limit)

    size = 4 * max(map(len, target.valid()))
    words = [
        sys.argv[0],
        f"-seed={seed}",
        f"-runs={count}",
        f"-max_len={size}",
        "-timeout=60",
        "-rss_limit_mb=0",
        "-verbosity=0",
        str(corpus),
    ]
    atheris.Setup(words, run, custom_mutator=mutate, internal_libfuzzer=True)
    atheris.Fuzz()
