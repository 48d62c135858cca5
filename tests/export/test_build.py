"""Builds: whole or not at all, whatever happens; and variants through export, engine and runtime."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from clapsep.export.build import Request, build
from clapsep.export.graph import FORBIDDEN
from clapsep.export.publish import held, publish, recover, staging
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.errors import GateError, InputError, OutputError, OutputExists
from tiny import Files, variant

X = np.random.default_rng(0).uniform(-0.5, 0.5, 50000).astype(np.float32)


def request(files: Files, **kwargs: object) -> Request:
    return Request(str(files.clap), str(files.checkpoint), str(files.tokenizer), **kwargs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tiny bundle, and every stage of its build with what stood at the output's place when the stage began."""
    folder = tmp_path_factory.mktemp("built")
    out, stages = folder / "tiny.clapsep", []
    build(out, request(variant(folder)), lambda stage: stages.append((stage, out.exists())))
    return out, stages


def test_no_stage_sees_a_bundle_before_it_is_complete(built):
    out, stages = built
    assert [exists for _, exists in stages] == [False] * len(stages)
    names = [stage for stage, _ in stages]
    assert names[0] == "fetching the files"
    assert names[-1] == "publishing"
    assert {"exporting separator", "reference outputs in PyTorch", "gates on onnxruntime: hard signals, waveform"} <= set(names)
    assert [p.name for p in out.parent.glob(".*")] == []


@pytest.mark.slow
def test_the_same_files_make_the_same_bundle(built, files, tmp_path):
    again = tmp_path / "again.clapsep"
    build(again, request(files), lambda _: None)
    first, second = Bundle.open(built[0]).manifest, Bundle.open(again).manifest
    assert first.sources == second.sources
    assert first.graphs == second.graphs


def test_graphs_are_static_and_keep_no_trace_of_this_machine(built):
    for path in sorted((built[0] / "graphs").glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        assert not {node.op_type for node in model.graph.node} & set(FORBIDDEN)
        assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()


def test_graphs_agree_with_all_optimisations_on_and_off(built):
    bundle = Bundle.open(built[0])
    for name, entry in bundle.manifest.graphs.items():
        rng = np.random.default_rng(3)
        inputs = {
            t.name: rng.integers(0, 2, (2, *t.shape[1:])) if t.dtype == "int64" else rng.random((2, *t.shape[1:]), np.float32)
            for t in entry.inputs
        }
        found = []
        for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
            options = ort.SessionOptions()
            options.graph_optimization_level = level
            session = ort.InferenceSession(str(bundle.graph(name)), options, providers=["CPUExecutionProvider"])
            found.append(session.run(None, inputs)[0])
        np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"phase": True, "mask_net": "conv"}, {"lora_rank": 0}])
def test_variants_pass_the_gates_and_run(tmp_path, changes):
    out = tmp_path / "v.clapsep"
    manifest = build(out, request(variant(tmp_path, **changes)), lambda _: None)
    assert {k: v for k, v in manifest.variant.items() if k in changes} == changes
    assert len(manifest.graphs["separator"].outputs) == (3 if changes.get("phase") else 1)
    assert Separator(out).separate(X, 32000, "rain").shape == X.shape


def test_existing_outputs_are_respected(built, files, tmp_path):
    with pytest.raises(OutputExists, match="--force"):
        build(built[0], request(files), lambda _: None)
    (tmp_path / "mine.clapsep").mkdir()
    (tmp_path / "mine.clapsep" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExists, match="is not a bundle"):
        build(tmp_path / "mine.clapsep", request(files, force=True), lambda _: None)
    assert (tmp_path / "mine.clapsep" / "thesis.txt").exists()


def test_a_failing_build_with_force_leaves_the_old_bundle(built, files):
    """The old bundle stays until the new one is complete."""
    before = (built[0] / "manifest.json").read_bytes()

    def stop(stage):
        if stage == "exporting text_encoder":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        build(built[0], request(files, force=True), stop)
    assert (built[0] / "manifest.json").read_bytes() == before
    assert [p.name for p in built[0].parent.glob(".*")] == []


def test_publishing_swaps_whole_directories(tmp_path, monkeypatch):
    out, new = tmp_path / "x.clapsep", tmp_path / "new"
    for folder in (out, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    with pytest.raises(OutputExists):
        publish(new, out, force=False)
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if a != new else os.stat("/nowhere"))
    with pytest.raises(FileNotFoundError):
        publish(new, out, force=True)
    assert (out / "name").read_text() == "x.clapsep"
    monkeypatch.undo()
    publish(new, out, force=True)
    assert (out / "name").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.clapsep"]


@pytest.mark.slow
def test_a_failed_gate_publishes_nothing(files, tmp_path, monkeypatch):
    from clapsep.export import gates

    monkeypatch.setitem(gates.LIMITS, "waveform SNR dB", (">=", {"fp32": 200}))
    with pytest.raises(GateError, match=r"first fused P: waveform SNR dB is \d+.* and must be >= 200; no bundle was written"):
        build(tmp_path / "x.clapsep", request(files), lambda _: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files"]


@pytest.mark.parametrize(
    "stage",
    [
        "exporting text_encoder",
        *(
            pytest.param(stage, marks=pytest.mark.slow)
            for stage in (
                "fetching the files",
                "reading the checkpoints",
                "exporting separator",
                "reference outputs in PyTorch",
                "checking files",
                "gates on onnxruntime: text encoder",
                "gates on onnxruntime: hard signals",
            )
        ),
    ],
)
def test_kill_leaves_no_bundle_and_the_next_build_cleans_up(start, files, tmp_path, stage):
    out = tmp_path / "x.clapsep"
    words = ["--clap", files.clap, "--checkpoint", files.checkpoint, "--tokenizer", files.tokenizer]
    process = start("clapsep-export", "build", out, *words)
    assert process.stderr is not None
    assert any(stage in line for line in process.stderr)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    (left,) = tmp_path.glob(".x.clapsep.*")
    with pytest.raises(InputError):  # refused before anything is touched
        build(out, Request(), lambda _: None)
    assert left.exists()
    recover(out)
    assert not left.exists()


def test_a_swap_that_was_killed_half_way_is_undone(tmp_path):
    out = tmp_path / "x[1].clapsep"
    aside, dead, living = (tmp_path / f".{out.name}.{name}" for name in ("a.replaced", "b.building", "c.building"))
    for folder in (aside, dead, living):
        folder.mkdir()
    (aside / "old").touch()
    with held(living):
        recover(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [living.name, out.name]
    assert (out / "old").exists()


def test_two_builds_of_one_bundle_leave_each_other_alone(tmp_path):
    out = tmp_path / "x.clapsep"
    with staging(out) as first, staging(out) as second:
        recover(out)
        assert first != second
        assert first.is_dir()
        assert second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_bundle_stays_a_link(tmp_path, files):
    (tmp_path / "link.clapsep").symlink_to("real.clapsep")
    stages = []

    def stop(stage):
        stages.extend(p.name for p in tmp_path.glob(".*"))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        build(tmp_path / "link.clapsep", request(files), stop)
    assert all(name.startswith(".real.clapsep.") for name in stages)
    assert (tmp_path / "link.clapsep").is_symlink()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_end_cleans_up_at_once(start, files, tmp_path, sign):
    process = start("clapsep-export", "build", tmp_path / "x.clapsep", "--demo")
    assert process.stderr is not None
    assert any("exporting text_encoder" in line for line in process.stderr)
    process.send_signal(sign)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "Traceback" not in rest
    assert [p.name for p in tmp_path.iterdir()] == ["files"]


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['torch'] = None; from clapsep.export.cli import main; main(['build', '/tmp/x.clapsep', '--demo'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: torch is not installed; run: pip install 'clapsep-export[cpu,export]'"


def test_a_full_disk_leaves_nothing(files, small_disk):
    disk = small_disk(48)
    with pytest.raises(OutputError, match="No space left"):
        build(disk / "x.clapsep", request(files), lambda _: None)
    assert os.listdir(disk) == []


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["x.clapsep"], 2, "give --clap and --checkpoint, or --demo"),
        (["x.clapsep", "--demo", "--checkpoint", "y"], 2, "or --demo in their place"),
        (["x.onnx", "--demo"], 2, "does not end in .clapsep"),
        (["no/x.clapsep", "--demo"], 2, "not a directory"),
        (["x.clapsep", "--checkpoint", "none.ckpt", "--tokenizer", "t"], 2, "none.ckpt does not exist"),
        (["x.clapsep", "--demo", "--precision", "int3"], 2, "--precision"),
        (["x.clapsep", "--checkpoint", "hf://just-a-name", "--tokenizer", "."], 2, "not a hub address"),
    ],
)
def test_wrong_usage(run, tmp_path, args, code, words):
    done = run("clapsep-export", "build", *args, code=code, cwd=tmp_path)
    assert words in done.stderr
    assert os.listdir(tmp_path) == []


def test_wrong_tokenizers(files, tmp_path):
    from clapsep.export.vocabulary import read_tokenizer, train_tokenizer
    from clapsep.runtime.errors import CheckpointError
    from tokenizers import Tokenizer, models

    (tmp_path / "text.json").write_text("not JSON")
    Tokenizer(models.BPE()).save(str(tmp_path / "other.json"))
    for path, reason in {
        tmp_path / "none": "neither a tokenizer.json",
        tmp_path / "text.json": "cannot be read",
        tmp_path / "other.json": "instead of 0, 1, 2",
    }.items():
        with pytest.raises(CheckpointError, match=reason):
            read_tokenizer(path, 512)
    with pytest.raises(CheckpointError, match="the model knows 100"):
        read_tokenizer(files.tokenizer, 100)
    sparse = json.loads(files.tokenizer.read_text())
    sparse["model"]["vocab"]["dog"] = (1 << 32) - 1  # when it is written, every id below becomes an entry
    (tmp_path / "sparse.json").write_text(json.dumps(sparse))
    with pytest.raises(CheckpointError, match="ids up to 4294967295"):
        read_tokenizer(tmp_path / "sparse.json", 512)
    backend = train_tokenizer(["a dog barks", "rain on a roof"], 300)
    backend.model.save(str(tmp_path))
    folder = read_tokenizer(tmp_path, 512)
    for text in ("a dog barks", "Rain 🐶", ""):
        assert folder.encode(text).ids == backend.encode(text).ids
