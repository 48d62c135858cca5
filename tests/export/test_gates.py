import hashlib
import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from clapsep.engines import Engine
from clapsep.export.gates import LIMITS, SEPARATION, judge, load_golden, require, table
from clapsep.export.golden import Golden
from clapsep.export.signals import HARD
from clapsep.runtime import Separator
from clapsep.runtime.errors import BundleError, GateError


@pytest.fixture
def copy(demo_bundle, tmp_path):
    return shutil.copytree(demo_bundle, tmp_path / "copy.clapsep")


def accept(bundle, name):
    """Make the manifest vouch for a file that was changed, as a careless or hostile tool would."""
    text = (bundle / "manifest.json").read_text()
    manifest = json.loads(text)
    entries = [e for g in manifest["graphs"].values() for e in (g["graph"], g["data"])] + [manifest["golden"], manifest["tokenizer"]]
    content = (bundle / name).read_bytes()
    for entry in (e for e in entries if e["file"] == name):
        entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_verify_passes_on_an_honest_bundle(run, demo_bundle):
    before = {p: p.read_bytes() for p in demo_bundle.rglob("*") if p.is_file()}
    done = run("clapsep-export", "verify", demo_bundle)
    assert done.stdout.count("✓") == 58
    assert "✗" not in done.stdout
    assert {p: p.read_bytes() for p in demo_bundle.rglob("*") if p.is_file()} == before
    rows = json.loads(run("clapsep-export", "verify", demo_bundle, "--json").stdout)
    assert len(rows) == 58
    assert all(row["passed"] for row in rows)


def test_verifying_needs_neither_torch_nor_onnx(demo_bundle):
    code = (
        "import sys; sys.modules.update(torch=None, onnx=None, onnxscript=None, safetensors=None, huggingface_hub=None)\n"
        "from clapsep.export.cli import main; main(sys.argv[1:])"
    )
    for words in (["verify", demo_bundle], ["inspect", demo_bundle]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("graph", "stage"), [("separator", "fused P"), ("audio_encoder", "audio_encoder"), ("text_encoder", "text_encoder")]
)
def test_verify_catches_slightly_wrong_weights(run, copy, graph, stage):
    """One part in a hundred on every weight: no shape, name or hash tells, only the gates do."""
    path = copy / "graphs" / f"{graph}.onnx.data"
    weights = np.fromfile(path, "<f4")
    noise = np.random.default_rng(0).standard_normal(weights.shape).astype(np.float32)
    usual = np.isfinite(weights) & (np.abs(weights) > 1e-30) & (np.abs(weights) < 50)  # leaves integers and masks alone
    np.where(usual, weights * (1 + 0.01 * noise), weights).astype("<f4").tofile(path)
    accept(copy, f"graphs/{graph}.onnx.data")
    done = run("clapsep-export", "verify", copy, code=1)
    assert "✗" in done.stdout
    assert f"first {stage}" in done.stderr


@pytest.mark.parametrize("route", ["fused", "waveform"])
@pytest.mark.parametrize(("batch", "sizes"), [(None, {1, 2}), (4, {1, 3}), (64, {1, len(HARD)})])
def test_hard_signals_go_in_batches_of_the_runtime(demo_bundle, monkeypatch, route, batch, sizes):
    """All at once they would take more memory than some model ever needs; one by one would not show rows that leak."""
    seen, run = set(), Engine.run
    monkeypatch.setattr(Engine, "run", lambda engine, inputs: seen.add(len(next(iter(inputs.values())))) or run(engine, inputs))
    separator = Separator(demo_bundle, route=route, batch=batch)
    golden = load_golden(separator.bundle)
    assert all(judge(*measured, "fp32", "onnxruntime").passed for measured in SEPARATION["hard signals"](separator, golden))
    assert seen == sizes


def test_verify_checks_hashes_first(run, copy):
    path = copy / "golden.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert "golden.npz" in run("clapsep-export", "verify", copy, code=2).stderr


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x93NUMPY"])
def test_a_golden_file_that_is_none(run, copy, content):
    (copy / "golden.npz").write_bytes(content)
    accept(copy, "golden.npz")
    assert "golden.npz" in run("clapsep-export", "verify", copy, code=2).stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.update(pairs=g["pairs"][:0], condition=g["condition"][:0], target=g["target"][:0]),
        lambda g: g.update(hard_names=g["hard_names"][:0], hard=g["hard"][:0], hard_target=g["hard_target"][:0]),
        lambda g: g.update(pairs=g["pairs"] + 99),
        lambda g: g.update(clip_length=g["clip_length"] * 0),
        lambda g: g.update(target=g["target"] * np.nan),
        lambda g: g.pop("mixture"),
    ],
)
def test_golden_files_that_would_measure_nothing(demo_bundle, tmp_path, change):
    with np.load(demo_bundle / "golden.npz") as data:
        arrays = dict(data)
    change(arrays)
    np.savez(tmp_path / "g.npz", **arrays)
    with pytest.raises(BundleError, match=r"g\.npz is not a golden"):
        Golden.load(tmp_path / "g.npz")


def test_the_front_end_is_measured_against_an_independent_one(demo_bundle, monkeypatch):
    """A runtime that fills short clips wrongly must not pass, neither in a build nor in verify."""
    from clapsep.export.gates import run_gates
    from clapsep.runtime import Separator
    from clapsep.runtime.clap import ClapFrontEnd

    monkeypatch.setattr(ClapFrontEnd, "_repeat_pad", lambda self, x: np.resize(x, self.clip_samples))
    gates = run_gates(lambda route: Separator(demo_bundle, route=route), ["split"], Golden.load(demo_bundle / "golden.npz"), lambda _: None)
    assert "log-mel error dB" in {gate.metric for gate in gates if not gate.passed}


def test_golden_files_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "g.npz", captions=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BundleError, match=r"g\.npz is not a golden"):
        Golden.load(tmp_path / "g.npz")


@pytest.mark.parametrize(
    ("metric", "value", "passed"),
    [
        ("waveform SNR dB", 100.0, True),
        ("waveform SNR dB", 99.9, False),
        ("waveform SNR dB", float("nan"), False),
        ("max error", 1e-6, True),
        ("max error", 1e-4, False),
        ("max error", float("inf"), False),
        ("max error", float("nan"), False),
    ],
)
def test_judging(metric, value, passed):
    gate = judge("s", metric, value, "fp32", "onnxruntime")
    assert gate.passed is passed
    assert (gate.measured is None) == (not np.isfinite(value))
    if passed:
        require((gate,), "it", "stop")
    else:
        with pytest.raises(GateError, match=r"it failed 1 of 1 gates, first s: .*; stop"):
            require((gate,), "it", "stop")


def test_the_table_shows_everything():
    gates = tuple(judge("stage", metric, 0.0, "fp16", "onnxruntime") for metric in LIMITS)
    lines = table(gates).splitlines()
    assert len(lines) == len(LIMITS) + 1
    assert all(metric in line for metric, line in zip(LIMITS, lines[1:], strict=True))


def rewrite(bundle, change):
    """golden.npz with some members' bytes changed, and a manifest that vouches for it."""
    path = bundle / "golden.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    accept(bundle, "golden.npz")


def array(shape, descr="<f4", body=b""):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({"target.npy": array((1 << 40,))}), "has 0 bytes"),  # numpy would allocate 4 TiB
        (lambda m: m.update({"target.npy": array((1 << 40,), "|V0")}), "has 0 bytes"),
        (lambda m: m.update({"target.npy": array((1,), "|O", b"cos\nsystem\n.")}), "target|bytes|pickle"),
        (lambda m: m.update({"bomb": bytes(257 << 20)}), "unpacks to more than 256 MiB"),
        (lambda m: m.pop("target.npy"), "target.npy"),
    ],
)
def test_golden_files_that_want_memory_or_run(copy, change, words):
    rewrite(copy, change)
    with pytest.raises(BundleError, match=words):
        Golden.load(copy / "golden.npz")
