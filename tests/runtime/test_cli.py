import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("a.wav", 32000, 1, "PCM_16"),
        ("a.wav", 192000, 1, "FLOAT"),
        ("a.wav", 8000, 8, "PCM_24"),
        ("a.flac", 44100, 2, "PCM_16"),
        ("a.ogg", 48000, 2, "VORBIS"),
        ("a.mp3", 44100, 1, "MPEG_LAYER_III"),
    ],
)
def test_separate_keeps_rate_length_channels_and_format(run, demo_bundle, wav, tmp_path, name, rate, channels, subtype):
    source = wav(name, n=rate // 2, rate=rate, channels=channels, subtype=subtype)
    before = source.read_bytes()
    done = run("clapsep", "separate", demo_bundle, source, "--positive", "rain", "-o", tmp_path / f"out-{name}")
    assert done.stdout.strip() == str(tmp_path / f"out-{name}")
    old, new = sf.info(source), sf.info(tmp_path / f"out-{name}")
    assert (new.samplerate, new.channels, new.subtype) == (rate, channels, subtype)
    assert new.frames == old.frames or name.endswith("mp3")
    assert source.read_bytes() == before


def test_the_command_writes_what_the_api_returns(run, demo_bundle, separator, wav, tmp_path):
    from clapsep.runtime import Query

    source, clip = wav("mix.wav", subtype="FLOAT"), wav("clip.wav", n=30000, rate=48000)
    args = ["--positive", "rain", "--positive-audio", clip, "--positive-audio", source, "--negative", "a dog", "--alpha", "0.3"]
    run("clapsep", "separate", demo_bundle, source, *args, "-o", tmp_path / "out.wav", "--threads", "1")
    mixture, _ = sf.read(source, dtype="float32")
    wanted = separator.separate(mixture, 32000, Query("rain", [clip, source], 0.3), "a dog")
    np.testing.assert_allclose(sf.read(tmp_path / "out.wav", dtype="float32")[0], wanted, atol=1e-6)


def test_several_mixtures_go_into_a_directory(run, demo_bundle, wav, tmp_path):
    sources = [wav("a.wav"), wav("b.flac")]
    run("clapsep", "separate", demo_bundle, *sources, "--negative", "rain", "-o", tmp_path / "new" / "out")
    assert sorted(os.listdir(tmp_path / "new" / "out")) == ["a.wav", "b.flac", "clapsep.jsonl"]


def failures(tmp_path, wav, demo):
    """name → (arguments, exit code, words in the message)"""
    good, out = wav("good.wav"), tmp_path / "out.wav"
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "empty.wav").touch()
    sf.write(tmp_path / "nan.wav", np.array([np.nan]), 8000, subtype="FLOAT")
    (tmp_path / "taken.wav").write_bytes(b"precious")
    ask = ["--positive", "rain"]
    return {
        "missing mixture": ([demo, tmp_path / "no.wav", *ask, "-o", out], 2, ["no.wav", "not a file"]),
        "text as wav": ([demo, tmp_path / "text.wav", *ask, "-o", out], 2, ["text.wav", "cannot be read"]),
        "empty file": ([demo, tmp_path / "empty.wav", *ask, "-o", out], 2, ["empty.wav", "is empty"]),
        "nan": ([demo, tmp_path / "nan.wav", *ask, "-o", out], 2, ["nan.wav", "NaN"]),
        "no bundle": ([tmp_path / "none.clapsep", good, *ask, "-o", out], 2, ["none.clapsep", "not a bundle"]),
        "no query": ([demo, good, "-o", out], 2, ["neither a positive nor a negative"]),
        "no output": ([demo, good, *ask], 2, ["--output"]),
        "two outputs": ([demo, good, *ask, "-o", out, "-o", out], 2, ["--output was given 2 times"]),
        "bad alpha": ([demo, good, *ask, "--alpha", "2", "-o", out], 2, ["--alpha"]),
        "bad engine": ([demo, good, *ask, "--engine", "abacus", "-o", out], 2, ["abacus"]),
        "bad overlap": ([demo, good, *ask, "--overlap", "5", "-o", out], 2, ["overlap of 5"]),
        "nan overlap": ([demo, good, *ask, "--overlap", "nan", "-o", out], 2, ["overlap of nan"]),
        "taken output": ([demo, good, *ask, "-o", tmp_path / "taken.wav"], 2, ["taken.wav", "--force"]),
        "output is input": ([demo, good, *ask, "--force", "-o", good], 2, ["overwrite a mixture"]),
        "same name twice": ([demo, good, good, *ask, "-o", tmp_path / "dir"], 2, ["two results"]),
        "unknown extension": ([demo, good, *ask, "-o", tmp_path / "out.doc"], 2, ["out.doc", ".flac"]),
        "no such folder": ([demo, good, *ask, "-o", tmp_path / "no" / "out.wav"], 2, ["not a directory"]),
        "below a file": ([demo, good, *ask, "-o", good / "deep"], 1, ["cannot be created"]),
        "two texts": ([demo, good, *ask, "--positive", "wind", "-o", out], 2, ["--positive was given 2 times"]),
        "file as directory": ([demo, good, good, *ask, "-o", out], 2, ["give a directory"]),
        "stdout": ([demo, good, *ask, "-o", "-"], 2, ["give a directory"]),
        "nameless target": ([demo, good, "--target", "a dog", "-o", out], 2, ["--target a dog is not NAME=TEXT"]),
        "target of nothing": ([demo, good, "--target", "dog= ", "-o", out], 2, ["is not NAME=TEXT"]),
        "target as a path": ([demo, good, "--target", "../dog=a dog", "-o", out], 2, ["is not NAME=TEXT"]),
        "target twice": ([demo, good, "--target", "dog=a", "--target", "dog=b", "-o", out], 2, ["dog was given twice"]),
        "target beside positive": ([demo, good, *ask, "--target", "dog=a dog", "-o", tmp_path / "dir"], 2, ["--target was given with"]),
        "target over a mixture": (
            [demo, good, wav("good.x.wav"), "--target", "x=a", "--force", "-o", tmp_path],
            2,
            ["good.x.wav", "overwrite a mixture"],
        ),
        "output is a clip": (
            [demo, good, "--positive-audio", tmp_path / "taken.wav", "--force", "-o", tmp_path / "taken.wav"],
            2,
            ["taken.wav", "overwrite an example"],
        ),
        "targets into a file": ([demo, good, "--target", "dog=a dog", "-o", out], 2, ["give a directory"]),
        "missing query audio": ([demo, good, "--positive-audio", tmp_path / "q.wav", "-o", out], 2, ["q.wav"]),
    }


NAMES = [
    "missing mixture",
    "text as wav",
    "empty file",
    "nan",
    "no bundle",
    "no query",
    "no output",
    "two outputs",
    "bad alpha",
    "bad engine",
    "bad overlap",
    "nan overlap",
    "taken output",
    "output is input",
    "same name twice",
    "unknown extension",
    "no such folder",
    "below a file",
    "two texts",
    "file as directory",
    "stdout",
    "nameless target",
    "target of nothing",
    "target as a path",
    "target twice",
    "target beside positive",
    "target over a mixture",
    "output is a clip",
    "targets into a file",
    "missing query audio",
]


def test_named_targets(run, demo_bundle, wav, tmp_path):
    """Each is what asking for it alone gives."""
    targets = ["--target", "rain=rain on a roof", "--target", "dog=a dog barking", "--negative", "wind"]
    done = run("clapsep", "separate", demo_bundle, wav("a.wav"), wav("b.flac", channels=2), *targets, "-o", tmp_path / "dir")
    names = ["a.rain.wav", "a.dog.wav", "b.rain.flac", "b.dog.flac"]
    assert done.stdout.split() == [str(tmp_path / "dir" / name) for name in names]
    run(
        "clapsep",
        "separate",
        demo_bundle,
        tmp_path / "a.wav",
        "--positive",
        "a dog barking",
        "--negative",
        "wind",
        "-o",
        tmp_path / "o.wav",
    )
    assert (tmp_path / "dir/a.dog.wav").read_bytes() == (tmp_path / "o.wav").read_bytes()
    assert sf.info(tmp_path / "dir/b.rain.flac").channels == 2
    done = run("clapsep", "separate", demo_bundle, tmp_path / "a.wav", *targets, "-o", tmp_path / "dir", code=2)
    assert "a.rain.wav exists" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_failures_are_one_sentence_and_leave_nothing(run, demo_bundle, wav, tmp_path, name):
    args, code, words = failures(tmp_path, wav, demo_bundle)[name]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = run("clapsep", "separate", *args, code=code)
    message = done.stderr.strip().splitlines()[-1]
    assert message.lower().startswith("error: ")
    assert all(word in message for word in words), message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_debug_shows_the_traceback(demo_bundle, tmp_path):
    words = [
        sys.executable,
        "-m",
        "clapsep.runtime",
        "--debug",
        "separate",
        demo_bundle,
        tmp_path / "no.wav",
        "-o",
        tmp_path / "o.wav",
    ]
    done = subprocess.run([*map(str, words), "--positive", "x"], capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert done.returncode != 0


def test_force_replaces(run, demo_bundle, wav, tmp_path):
    (tmp_path / "out.wav").write_bytes(b"old")
    run("clapsep", "separate", demo_bundle, wav(), "--positive", "x", "-o", tmp_path / "out.wav", "--force")
    assert sf.info(tmp_path / "out.wav").frames == 16000


def test_interrupt_leaves_no_output(start, demo_bundle, wav, tmp_path):
    source = wav(n=32000 * 200)
    process = start("clapsep", "separate", demo_bundle, source, "--positive", "rain", "-o", tmp_path / "o.wav")
    assert process.stderr is not None
    assert any("separating" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "interrupted" in process.stderr.read()
    assert os.listdir(tmp_path) == ["mix.wav"]


@pytest.mark.parametrize("command", ["clapsep", "clapsep-export"])
def test_help_and_version(run, command):
    assert "Usage" in run(command, "-h").stdout
    assert "0.1.0" in run(command, "--version").stdout


def test_inspect_needs_no_engine_and_speaks_json(run, demo_bundle):
    text = run("clapsep-export", "inspect", demo_bundle).stdout
    assert "separator: fp32, opset 20" in text
    data = json.loads(run("clapsep-export", "inspect", demo_bundle, "--json").stdout)
    assert data["graphs"]["separator"]["precision"] == "fp32"
    assert "not a bundle" in run("clapsep-export", "inspect", "nowhere", code=2).stderr


def test_names_that_no_file_can_have(run, demo_bundle, wav, tmp_path):
    """pathlib raises for them."""
    long, mix = "x" * 300, wav()
    for words in ([long, mix], [demo_bundle, long], [demo_bundle, mix, "--positive-audio", long]):
        run("clapsep", "separate", *words, "--positive", "rain", "-o", tmp_path / "out.wav", code=2)
    run("clapsep", "separate", demo_bundle, mix, "--positive", "rain", "-o", tmp_path / f"{long}.wav", code=1)
    run("clapsep-export", "inspect", long, code=2)
    run("clapsep-export", "build", tmp_path / "o.clapsep", "--checkpoint", long, code=2)


def test_names_that_are_not_text(run, demo_bundle, wav, tmp_path):
    """A name on disk is bytes; it is printed as they are."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav")
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}
    done = run("clapsep", "separate", demo_bundle, wav(), "--positive", "rain", "-o", out, env=environment, errors="surrogateescape")
    assert done.stdout.strip() == out
    assert os.path.isfile(out)
