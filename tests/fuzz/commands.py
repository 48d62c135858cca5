"""Hostile argument lists for the two commands, run in process; what takes minutes once its arguments are accepted is left out."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile as sf
from clapsep.export.cli import main as export
from clapsep.runtime.cli import main as separate
from clapsep.runtime.errors import ClapsepError, ExportError

from .target import sample_bundle, target

SEPARATE = (
    "separate b.clapsep mix.wav --positive rain -o out.wav",
    "separate b.clapsep mix.wav mix.flac --negative rain --positive-audio mix.wav --alpha 0.3 -o out",
    "separate b.clapsep mix.wav --target dog=dog --target rain=rain -o out --force --threads 1",
    "separate b.clapsep mix.wav --positive-audio mix.wav --engine auto --device cpu --overlap 0.5 --crop loudest -o out.flac",
    "separate b.clapsep mix.wav mix.flac --positive rain -o out --resume --preset fast --hop 0.5 --log log.jsonl --max-seconds 5",
    "separate b.clapsep jobs.jsonl *.flac folder --positive rain -o out --jobs 1 --max-channels 2 --max-bytes 99999",
    "stream b.clapsep --positive rain --rate 44100 --channels 2 --format s16le --preset live --overlap 0.1 --peak 2",
    "separate --help",
    "--version",
)
EXPORT = (
    "inspect b.clapsep --json",
    "verify b.clapsep --engine onnxruntime --json",
    "verify b.clapsep --reference laion_clap --reference-python nobody --clap clap.safetensors",
    "build out.clapsep --clap clap.safetensors --checkpoint clapsep.safetensors --tokenizer tokenizer.json --precision fp16",
    "build out.clapsep --demo --engine tensorrt-rtx --compute-capability 8.9 --max-batch 4 --force",
    "build b.clapsep --checkpoint hf://owner/repo/file@main --demo",
    "compile b.clapsep --engine tensorrt-rtx --compute-capability 8.6 --compatibility ampere-plus --workspace 100 --memory 100",
    "compile b.clapsep --engine openvino --precision bf16 --timing-cache cache --version-compatible",
    "bench --from old.json --json new.json --compare old.json --margin 1.2",
    "bench b.clapsep --engine openvino:bf16 --quick --only separation --queries 1 --batch 2 --threads 1 --callers 1 --seconds 0",
    "doctor --engine onnxruntime --json",
)
HOSTILE = (
    "",
    " ",
    "-",
    "--",
    "=",
    "-o",
    "--force",
    "\udcff",
    "💥",
    "x" * 5000,
    "nan",
    "inf",
    "-1",
    "0",
    "1e999",
    "9" * 400,
    "dog=",
    "=dog",
)
HOSTILE += (
    "b.clapsep/manifest.json",
    "b.clapsep/graphs",
    "none/none.wav",
    "mix.wav/x.wav",
    "folder",
    "folder/a.wav",
    "old.json",
    "mix.wav",
    "@x",
    "*",
)
HOSTILE += (
    "hf://",
    "hf://a",
    "hf://a/b/c@",
    "hf://a/../c",
    "8.9",
    "8",
    "auto",
    "cuda",
    "bf16",
    "--debugg",
    "-h",
    "%s",
    "{}",
    "empty.wav",
    "text.wav",
)


def edit_words(rng: random.Random, data: bytes) -> bytes:
    """Arguments dropped, repeated, swapped, cut, joined, or replaced."""
    words = _words(data)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(words)) if words else 0
        way = rng.randrange(7)
        if way == 0:
            del words[at : at + 1]
        elif way == 1:
            words[at:at] = words[at : at + rng.choice((1, 2, 50))]
        elif way == 2:
            words[at:at] = [rng.choice(HOSTILE)]
        elif way == 3 and words:
            other = rng.randrange(len(words))
            words[at], words[other] = words[other], words[at]
        elif way == 4 and words:
            words[at] = words[at][: rng.randrange(len(words[at]) + 1)] + rng.choice(("", "=", rng.choice(HOSTILE)))
        elif words:
            words[at] = rng.choice(HOSTILE)
    return "\0".join(words).encode("utf-8", "surrogateescape")


def _words(data: bytes) -> list[str]:
    """Arguments are separated by NUL bytes, which none can contain."""
    return data.decode("utf-8", "surrogateescape").split("\0")


def _seeds(lines: tuple[str, ...]) -> list[bytes]:
    return [line.replace(" ", "\0").encode() for line in lines]


def _furnish(room: Path) -> None:
    """What the arguments name: a bundle, recordings, files that are none, an earlier benchmark."""
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    shutil.copytree(sample_bundle(), room / "b.clapsep")
    for name in ("mix.wav", "mix.flac"):
        sf.write(room / name, np.random.default_rng(4).uniform(-0.5, 0.5, 4000), 32000)
    (room / "folder").mkdir()
    (room / "mix.pcm").write_bytes(np.random.default_rng(5).uniform(-0.5, 0.5, 9000).astype("<f4").tobytes())
    (room / "jobs.jsonl").write_text('{"input": "mix.wav", "output": "job.wav"}')
    (room / "empty.wav").touch()
    (room / "text.wav").write_text("no sound")
    (room / "old.json").write_text(json.dumps({"format": "x"}))
    for name in ("clap.safetensors", "clapsep.safetensors", "tokenizer.json"):
        (room / name).write_bytes(b"x")


def _inside(word: str) -> str:
    """Arguments that would lead out of the room lead nowhere."""
    return word.replace("..", "__").replace("/", "_") if word.split("=")[-1].startswith(("/", "~")) or ".." in word else word


def _run(command: object, data: bytes) -> None:
    """One call: exit code 0, 1 or 2, and no traceback, whatever the arguments."""
    words = [word for word in map(_inside, _words(data)) if word != "--debug"]
    room = Path("room").absolute()
    _furnish(room)
    code: object = 0
    logging.getLogger().handlers.clear()  # they would write to the stderr of an earlier call
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(room))
        sound = stack.enter_context(open("mix.pcm", errors="replace"))
        out = stack.enter_context(open(room.with_name("out.txt"), "w", encoding="utf-8", errors="strict"))
        err = stack.enter_context(open(room.with_name("err.txt"), "w", encoding="utf-8", errors="backslashreplace"))
        for name, file in (("argv", words), ("stdin", sound), ("stdout", out), ("stderr", err)):
            stack.enter_context(mock.patch.object(sys, name, file))
        try:
            command(words, prog_name="clapsep")  # pyright: ignore[reportCallIssue]
        except SystemExit as leaving:
            code = leaving.code
    said = "".join(room.with_name(name).read_bytes().decode("utf-8", "replace") for name in ("out.txt", "err.txt"))
    assert code in (0, 1, 2, None), f"exit code {code}"
    assert "unexpected" not in said.replace("unexpected extra argument", ""), said[-300:]
    assert "Traceback" not in said, said[-300:]
    if code:
        raise ClapsepError(said)


@target(lambda: _seeds(SEPARATE), edit_words, seconds=10)
def clapsep(data: bytes) -> None:
    """`clapsep` with hostile arguments."""
    _run(separate, data)


@target(lambda: _seeds(EXPORT), edit_words, seconds=20)
def clapsep_export(data: bytes) -> None:
    """`clapsep-export` with hostile arguments; exports, compilers, measurements and trials of engines are left out."""
    left_out = ExportError("the fuzzer leaves this out")
    names = (
        "export.build._fill",
        "export.compile._plan",
        "export.bench.command.measure",
        "engines.doctor.examine",
        "export.reference._run",
    )
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(f"clapsep.{name}", side_effect=left_out))
        _run(export, data)
