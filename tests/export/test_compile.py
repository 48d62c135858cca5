"""Plans: added whole or not at all, made once, for this machine or for GPUs that are not here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from clapsep.engines import EngineUnavailable, engine_class, this_machine
from clapsep.export import compile as module
from clapsep.export.compile import Compilation, compile_bundle
from clapsep.export.publish import held
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.errors import ClapsepError, GateError, HashMismatch, InputError, OutputError, SizeMismatch

OPENVINO, RTX = Compilation("openvino"), Compilation("tensorrt-rtx", compute_capabilities=("8.6",))
GRAPHS = ("text_encoder", "audio_encoder", "separator")


@pytest.fixture
def copy(demo_bundle, tmp_path):
    return shutil.copytree(demo_bundle, tmp_path / "copy.clapsep")


@pytest.fixture(scope="module")
def compiled(demo_bundle, tmp_path_factory):
    """A bundle with plans of two kinds; tests must not change it."""
    path = shutil.copytree(demo_bundle, tmp_path_factory.mktemp("compiled") / "demo.clapsep")
    for wanted in (OPENVINO, RTX):
        compile_bundle(path, wanted, quiet)
    return path


def quiet(_stage: str) -> None:
    pass


def plans(path):
    return sorted(str(p.relative_to(path)) for p in (path / "plans").rglob("*") if p.is_file()) if (path / "plans").exists() else []


def state(path):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*") if p.is_file()}


def test_the_command_adds_plans_and_proves_them(run, copy):
    graphs = {p: p.read_bytes() for p in (copy / "graphs").iterdir()}
    done = run("clapsep-export", "compile", copy, "--engine", "openvino")
    assert done.stdout.count("✓") == 24
    manifest = Bundle.open(copy).manifest
    assert [plan.graph for plan in manifest.plans] == list(GRAPHS)
    assert [plan.plan.file for plan in manifest.plans] == [f for g in GRAPHS for f in plans(copy) if f"/{g}." in f]
    assert {gate.engine for gate in manifest.gates} == {"onnxruntime", "openvino"}
    assert {p: p.read_bytes() for p in (copy / "graphs").iterdir()} == graphs
    run("clapsep-export", "verify", copy, "--engine", "openvino")
    assert "plan       separator: openvino fp32" in run("clapsep-export", "inspect", copy).stdout


def test_a_plan_is_what_runs(compiled, tmp_path):
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    (entry,) = (p for p in Bundle.open(path).manifest.plans if (p.graph, p.kind) == ("separator", "openvino"))
    file = path / entry.plan.file
    file.write_bytes(file.read_bytes()[:-9] + bytes(9))
    with pytest.raises(HashMismatch, match=r"separator\.fp32"):
        Separator(path, "openvino").mask(np.zeros((1, 80000)), np.zeros(256, np.float32))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SizeMismatch):
        Separator(path, "openvino")
    file.unlink()
    shutil.copy(compiled / entry.plan.file, file)
    Separator(path, "onnxruntime").mask(np.zeros((1, 80000)), np.zeros(256, np.float32))


def test_the_same_is_not_compiled_twice(compiled, tmp_path):
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    before = {p: s for p, s in state(path).items() if "plans" in p.parts}
    for wanted in (OPENVINO, RTX):
        assert compile_bundle(path, wanted, quiet).made == 0
    assert {p: s for p, s in state(path).items() if "plans" in p.parts} == before


def test_other_settings_are_compiled_beside_and_a_new_library_replaces(compiled, tmp_path, monkeypatch):
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    assert compile_bundle(path, replace(RTX, compute_capabilities=("12.0",)), quiet).made == 3
    assert len(plans(path)) == 9
    bundle = Bundle.open(path)
    aged = [
        replace(p, target=replace(p.target, version="1.0"), key="0" + p.key[1:]) if p.kind == "openvino" else p
        for p in bundle.manifest.plans
    ]
    (path / "manifest.json").write_text(replace(bundle.manifest, plans=tuple(aged)).to_json())
    assert compile_bundle(path, OPENVINO, quiet).made == 3
    assert len(plans(path)) == 9


def test_plans_for_gpus_that_are_not_here(run, compiled):
    manifest = Bundle.open(compiled).manifest
    rtx = [plan for plan in manifest.plans if plan.kind == "tensorrt-rtx"]
    assert {plan.target.compute_capabilities for plan in rtx} == {("8.6",)}
    assert "tensorrt-rtx" not in {gate.engine for gate in manifest.gates}
    assert "the plans of tensorrt-rtx have not been verified" in run("clapsep-export", "inspect", compiled).stdout
    if this_machine().cuda is None:
        with pytest.raises(EngineUnavailable) as refused:
            Separator(compiled, "tensorrt-rtx")
        assert refused.value.reason == "no-driver"
        done = run("clapsep-export", "verify", compiled, "--engine", "tensorrt-rtx", code=1)
        assert "needs an NVIDIA GPU" in done.stderr


@pytest.mark.skipif(bool(this_machine().gpus), reason="there is a GPU")
def test_without_a_gpu_the_capability_must_be_named(run, copy):
    done = run("clapsep-export", "compile", copy, "--engine", "tensorrt-rtx", code=1)
    assert "--compute-capability" in done.stderr
    assert plans(copy) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--engine", "onnxruntime"], 2, "takes no plans"),
        (["--engine", "openvino", "--precision", "fp16"], 2, "build a bundle with --precision fp16"),
        (["--engine", "tensorrt-rtx", "--compute-capability", "9.0"], 1, "8.9"),
        (["--engine", "tensorrt-rtx", "--compute-capability", "ada"], 1, "ada"),
        (["--engine", "tensorrt"], 1, "pip install"),
        (["--engine", "openvino", "--compute-capability", "8.6"], 2, "leave them out"),
        (["--engine", "tensorrt-rtx", "--compute-capability", "8.6", "--memory", "64"], 1, "memory"),
    ],
)
def test_what_cannot_be_compiled_leaves_the_bundle_as_it_was(run, copy, words, code, message):
    before = state(copy)
    assert message in run("clapsep-export", "compile", copy, *words, code=code).stderr
    assert state(copy) == before


def test_plans_that_fail_their_gates_are_removed(copy):
    manifest = Bundle.open(copy).manifest
    with np.load(copy / "golden.npz") as data:
        arrays = dict(data)
    arrays["target"] = arrays["target"] * 1.01
    np.savez(copy / "golden.npz", **arrays)
    from clapsep.runtime.bundle import describe_file

    (copy / "manifest.json").write_text(replace(manifest, golden=describe_file(copy, "golden.npz")).to_json())
    with pytest.raises(GateError, match="it was not added to the bundle"):
        compile_bundle(copy, OPENVINO, quiet)
    assert plans(copy) == []
    assert Bundle.open(copy).manifest.plans == ()


def test_a_killed_compilation_leaves_the_bundle_and_the_next_one_cleans_up(copy, start):
    before = (copy / "manifest.json").read_bytes()
    words = ["compile", copy, "--engine", "tensorrt-rtx", "--compute-capability", "8.6"]
    process = start("clapsep-export", *words)
    for line in process.stderr:
        if "compiling separator" in line:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert (copy / "manifest.json").read_bytes() == before
    Bundle.open(copy).check_files()
    assert plans(copy), "the first two plans were already made"
    deadline = time.monotonic() + 30
    while "tensorrt_builder" in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout:
        assert time.monotonic() < deadline, "the compiler outlived the command"
        time.sleep(0.2)
    compile_bundle(copy, OPENVINO, quiet)
    assert len(plans(copy)) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_compilation_cleans_up(copy, start, number):
    process = start("clapsep-export", "compile", copy, "--engine", "tensorrt-rtx", "--compute-capability", "8.6")
    for line in process.stderr:
        if "compiling separator" in line:
            break
    time.sleep(0.5)
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "Traceback" not in rest
    assert plans(copy) == []


def test_one_at_a_time(copy):
    with held(copy), pytest.raises(OutputError, match="another process is changing"):
        compile_bundle(copy, OPENVINO, quiet)


def test_a_full_disk(demo_bundle, small_disk):
    size = sum(p.stat().st_size for p in demo_bundle.rglob("*") if p.is_file())
    disk = small_disk(size // 1024 + 4096)
    path = shutil.copytree(demo_bundle, disk / "b.clapsep")
    before = state(path)
    with pytest.raises(ClapsepError, match="free some space"):
        compile_bundle(path, OPENVINO, quiet)
    assert state(path) == before


def test_compiling_needs_neither_torch_nor_onnx(copy):
    code = (
        "import sys; sys.modules.update(torch=None, onnx=None, onnxscript=None, onnx_ir=None, safetensors=None)\n"
        "from clapsep.export.cli import main; main(sys.argv[1:])"
    )
    words = ["compile", copy, "--engine", "tensorrt-rtx", "--compute-capability", "8.6"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(plans(copy)) == 3


def test_a_plan_never_comes_from_outside_the_bundle(compiled, tmp_path):
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    text = json.loads((path / "manifest.json").read_text())
    text["plans"][0]["plan"]["file"] = "../secret"
    (path / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(InputError, match="outside the bundle"):
        Bundle.open(path)


def test_keys_depend_on_everything_that_shapes_a_plan(demo_bundle):
    from clapsep.engines import PlanSettings

    engine, settings = engine_class("tensorrt-rtx"), PlanSettings("fp32", 4, ("8.6",))
    key = module._key(engine, settings, ["a"])
    others = [
        module._key(engine, settings, ["b"]),
        module._key(engine, replace(settings, max_batch=2), ["a"]),
        module._key(engine, replace(settings, compute_capabilities=("8.9",)), ["a"]),
        module._key(engine_class("openvino"), settings, ["a"]),
    ]
    assert len({key, *others}) == 5
    assert module._key(engine, replace(settings, memory=1 << 30), ["a"]) == key
