"""Plans: added whole or not at all, made once, for this machine or for GPUs that are not here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clapsep.engines import EngineUnavailable, PlanSettings, engine_class, this_machine
from clapsep.export.compile import compile_bundle, plan_key
from clapsep.export.publish import held
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.errors import BundleError, ClapsepError, GateError, HashMismatch, InputError, OutputError, SizeMismatch

OPENVINO, RTX = ("openvino", PlanSettings()), ("tensorrt-rtx", PlanSettings(compute_capabilities=("8.6",)))
QUERIES, SPLIT = ("text_encoder", "audio_encoder"), ("mixture_encoder", "film", "mask_decoder")
GRAPHS = (*QUERIES, "text_encoder_short", *SPLIT)  # of engines on the CPU
ON_GPU = (*QUERIES, *SPLIT, "separator_waveform")


@pytest.fixture
def copy(demo_bundle, tmp_path):
    return shutil.copytree(demo_bundle, tmp_path / "copy.clapsep")


@pytest.fixture(scope="module")
def compiled(demo_bundle, tmp_path_factory):
    """A bundle with plans of two kinds; tests must not change it."""
    path = shutil.copytree(demo_bundle, tmp_path_factory.mktemp("compiled") / "demo.clapsep")
    for wanted in (OPENVINO, RTX):
        compile_bundle(path, *wanted, quiet)
    return path


def quiet(_stage: str) -> None:
    pass


def plans(path):
    return sorted(str(p.relative_to(path)) for p in (path / "plans").rglob("*") if p.is_file()) if (path / "plans").exists() else []


def aged_key(plan):
    return ("0" if plan.key[0] != "0" else "1") + plan.key[1:]


def state(path):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*") if p.is_file()}


def test_the_command_adds_plans_and_proves_them(run, copy):
    graphs = {p: p.read_bytes() for p in (copy / "graphs").iterdir()}
    done = run("clapsep-export", "compile", copy, "--engine", "openvino")
    assert done.stdout.count("✓") == 58
    manifest = Bundle.open(copy).manifest
    assert [plan.graph for plan in manifest.plans] == list(GRAPHS)
    assert [plan.plan.file for plan in manifest.plans] == [f for g in GRAPHS for f in plans(copy) if f"/{g}." in f]
    assert {gate.engine for gate in manifest.gates} == {"onnxruntime", "openvino"}
    assert {p: p.read_bytes() for p in (copy / "graphs").iterdir()} == graphs
    run("clapsep-export", "verify", copy, "--engine", "openvino")
    assert "plan       mask_decoder: openvino fp32" in run("clapsep-export", "inspect", copy).stdout


def test_a_plan_is_what_runs(compiled, tmp_path):
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    (entry,) = (p for p in Bundle.open(path).manifest.plans if (p.graph, p.kind) == ("mask_decoder", "openvino"))
    file = path / entry.plan.file
    file.write_bytes(file.read_bytes()[:-9] + bytes(9))
    with pytest.raises(HashMismatch, match=r"mask_decoder\.fp32"):
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
        assert compile_bundle(path, *wanted, quiet).made == 0
    assert {p: s for p, s in state(path).items() if "plans" in p.parts} == before


def test_unless_somebody_insists(compiled, tmp_path):
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    assert compile_bundle(path, *OPENVINO, quiet, force=True).made == len(GRAPHS)
    assert plans(path) == plans(compiled)


def test_other_settings_are_compiled_beside_and_a_new_library_replaces(compiled, tmp_path, monkeypatch):
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    assert compile_bundle(path, "tensorrt-rtx", PlanSettings(compute_capabilities=("12.0",)), quiet).made == len(ON_GPU)
    everything = len(GRAPHS) + 2 * len(ON_GPU)
    assert len(plans(path)) == everything
    bundle = Bundle.open(path)
    aged = [
        replace(p, target=replace(p.target, version="1.0"), key=aged_key(p)) if p.kind == "openvino" else p for p in bundle.manifest.plans
    ]
    (path / "manifest.json").write_text(replace(bundle.manifest, plans=tuple(aged)).to_json())
    assert compile_bundle(path, *OPENVINO, quiet).made == len(GRAPHS)
    assert len(Bundle.open(path).manifest.plans) == everything


def test_plans_for_gpus_that_are_not_here(run, compiled):
    manifest = Bundle.open(compiled).manifest
    rtx = [plan for plan in manifest.plans if plan.kind == "tensorrt-rtx"]
    assert {plan.target.compute_capabilities for plan in rtx} == {("8.6",)}
    assert "tensorrt-rtx" not in {gate.engine for gate in manifest.gates}
    assert "the plans of tensorrt-rtx could not be verified" in run("clapsep-export", "inspect", compiled).stdout
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
    assert not (copy / "plans").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--engine", "onnxruntime"], 2, "takes no plans"),
        (["--engine", "openvino", "--precision", "fp16"], 2, "build a bundle with --precision fp16"),
        (["--engine", "tensorrt-rtx", "--compute-capability", "9.0"], 2, "8.9"),
        (["--engine", "tensorrt-rtx", "--compute-capability", "ada"], 2, "ada"),
        (["--engine", "tensorrt"], 1, "pip install"),
        (["--engine", "openvino", "--compute-capability", "8.6"], 2, "has no --compute-capability;"),
        (["--engine", "openvino", "--memory", "1000", "--workspace", "10"], 2, "has no --workspace and no --memory;"),
        (["--engine", "tensorrt-rtx", "--compute-capability", "8.6", "--compatibility", "ampere-plus"], 2, "has no --compatibility;"),
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
    with pytest.raises(GateError, match="it is not in the bundle"):
        compile_bundle(copy, *OPENVINO, quiet)
    assert plans(copy) == []
    assert Bundle.open(copy).manifest.plans == ()


def test_a_killed_compilation_leaves_the_bundle_and_the_next_one_cleans_up(copy, start):
    before = (copy / "manifest.json").read_bytes()
    words = ["compile", copy, "--engine", "tensorrt-rtx", "--compute-capability", "8.6"]
    process = start("clapsep-export", *words)
    for line in process.stderr:
        if "compiling mixture_encoder" in line:
            break
    children = []
    while not children:  # the compiler
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout.split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert (copy / "manifest.json").read_bytes() == before
    Bundle.open(copy).check_files()
    assert plans(copy), "the first two plans were already made"
    deadline = time.monotonic() + 30
    while any(Path("/proc", child).exists() for child in children):
        assert time.monotonic() < deadline, "the compiler outlived the command"
        time.sleep(0.2)
    compile_bundle(copy, *OPENVINO, quiet)
    assert len(plans(copy)) == len(GRAPHS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_compilation_cleans_up(copy, start, number):
    process = start("clapsep-export", "compile", copy, "--engine", "tensorrt-rtx", "--compute-capability", "8.6")
    for line in process.stderr:
        if "compiling mixture_encoder" in line:
            break
    time.sleep(0.5)
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "Traceback" not in rest
    assert plans(copy) == []


def test_one_at_a_time(copy):
    with held(copy), pytest.raises(OutputError, match="another process is changing"):
        compile_bundle(copy, *OPENVINO, quiet)


def test_a_full_disk(demo_bundle, small_disk):
    size = sum(p.stat().st_size for p in demo_bundle.rglob("*") if p.is_file())
    disk = small_disk(size // 1024 + 4096)
    path = shutil.copytree(demo_bundle, disk / "b.clapsep")
    before = state(path)
    with pytest.raises(ClapsepError, match="free some space"):
        compile_bundle(path, *OPENVINO, quiet)
    assert state(path) == before


def test_compiling_needs_neither_torch_nor_onnx(copy):
    code = (
        "import sys; sys.modules.update(torch=None, onnx=None, onnxscript=None, onnx_ir=None, safetensors=None)\n"
        "from clapsep.export.cli import main; main(sys.argv[1:])"
    )
    words = ["compile", copy, "--engine", "tensorrt-rtx", "--compute-capability", "8.6"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(plans(copy)) == len(ON_GPU)


def test_a_plan_never_comes_from_outside_the_bundle(compiled, tmp_path):
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    text = json.loads((path / "manifest.json").read_text())
    text["plans"][0]["plan"]["file"] = "../secret"
    (path / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(InputError, match="outside the bundle"):
        Bundle.open(path)


def test_keys_depend_on_everything_that_shapes_a_plan():
    machine = this_machine()
    settings = PlanSettings("fp32", 4, ("8.6",))
    target = engine_class("tensorrt-rtx").target(settings, machine)
    key = plan_key("tensorrt-rtx", settings, target, ["a"])
    others = [
        plan_key("tensorrt-rtx", settings, target, ["b"]),
        plan_key("tensorrt-rtx", replace(settings, max_batch=2), target, ["a"]),
        plan_key("tensorrt-rtx", replace(settings, workspace=1 << 20), target, ["a"]),
        plan_key("tensorrt-rtx", settings, replace(target, architecture="aarch64"), ["a"]),
        plan_key("tensorrt-rtx", settings, replace(target, version="1.0"), ["a"]),
        plan_key("openvino", settings, replace(target, cpu=("FP32",)), ["a"]),
    ]
    assert len({key, *others}) == 7
    assert plan_key("tensorrt-rtx", replace(settings, memory=1 << 30), target, ["a"]) == key
    both = [
        engine_class("tensorrt-rtx").target(replace(settings, compute_capabilities=c), machine) for c in (("8.6", "8.9"), ("8.9", "8.6"))
    ]
    assert both[0] == both[1], "the order in which they are named says nothing"


def test_a_processor_with_other_instructions_gets_plans_of_its_own(run, copy):
    run("clapsep-export", "compile", copy, "--engine", "openvino")
    lesser = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run("clapsep-export", "compile", copy, "--engine", "openvino", env=lesser)
    assert len(plans(copy)) == 2 * len(GRAPHS)
    for environment in (os.environ, lesser):
        run("clapsep-export", "verify", copy, "--engine", "openvino", env=environment)


def test_links_under_plans_lead_nowhere(copy, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "separator.fp32.0123456789ab.blob").write_text("mine")
    (copy / "plans").mkdir()
    (copy / "plans/openvino").symlink_to(victim)
    with pytest.raises(BundleError, match="is a link"):
        compile_bundle(copy, *OPENVINO, quiet)
    assert [p.read_text() for p in victim.iterdir()] == ["mine"]


def test_only_plans_are_swept(copy):
    folder = copy / "plans/openvino"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "separator.fp32.0123456789ab.blob").write_text("left over")
    compile_bundle(copy, *OPENVINO, quiet)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "separator.fp32.0123456789ab.blob").exists()


def test_a_damaged_plan_is_compiled_again_and_stops_nobody_else(run, compiled, tmp_path):
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    (entry,) = (p for p in Bundle.open(path).manifest.plans if (p.graph, p.kind) == ("mask_decoder", "openvino"))
    (path / entry.plan.file).write_bytes(b"broken")
    Separator(path, "onnxruntime").mask(np.zeros((1, 80000)), np.zeros(256, np.float32))
    with pytest.raises(SizeMismatch):
        Separator(path, "openvino")
    assert compile_bundle(path, *OPENVINO, quiet).made == 1
    run("clapsep-export", "verify", path, "--engine", "openvino")


def test_gates_of_superseded_plans_are_forgotten(compiled, tmp_path):
    """Gates speak of the plans that are listed with them."""
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    manifest = Bundle.open(path).manifest
    proven = tuple(replace(gate, engine="tensorrt-rtx") for gate in manifest.gates if gate.engine == "openvino")
    aged = tuple(replace(p, key=aged_key(p)) if p.kind == "tensorrt-rtx" else p for p in manifest.plans)
    (path / "manifest.json").write_text(replace(manifest, gates=manifest.gates + proven, plans=aged).to_json())
    compile_bundle(path, *RTX, quiet)
    assert "tensorrt-rtx" not in {gate.engine for gate in Bundle.open(path).manifest.gates}


def test_those_who_have_opened_superseded_plans_can_still_read_them(compiled, tmp_path):
    path = shutil.copytree(compiled, tmp_path / "b.clapsep")
    bundle = Bundle.open(path)
    aged = [
        replace(p, key=aged_key(p), plan=replace(p.plan, file=p.plan.file.replace(p.key[:12], aged_key(p)[:12])))
        for p in bundle.manifest.plans
    ]
    for old, new in zip(bundle.manifest.plans, aged, strict=True):
        os.rename(path / old.plan.file, path / new.plan.file)
    (path / "manifest.json").write_text(replace(bundle.manifest, plans=tuple(aged)).to_json())
    reader = Separator(path, "openvino")
    assert compile_bundle(path, *OPENVINO, quiet).made == len(GRAPHS)
    assert reader.mask(np.zeros((1, 80000)), np.zeros(256, np.float32)).shape[0] == 1


def test_building_with_a_kind_that_needs_plans(run, tmp_path):
    out = tmp_path / "b.clapsep"
    run("clapsep-export", "build", out, "--demo", "--engine", "tensorrt-rtx", "--compute-capability", "8.6", "--precision", "fp16")
    manifest = Bundle.open(out).manifest
    assert [plan.precision for plan in manifest.plans] == ["fp16"] * len(ON_GPU)
    assert {gate.engine for gate in manifest.gates} == {"strict", "onnxruntime"}, "the graphs are proven even if the plans cannot be"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("words", [["--engine", "tensorrt"], ["--engine", "tensorrt-rtx"], ["--compute-capability", "8.6"]])
@pytest.mark.skipif(bool(this_machine().gpus), reason="there is a GPU")
def test_a_build_that_cannot_end_well_does_not_begin(run, tmp_path, words):
    begun = time.monotonic()
    done = run("clapsep-export", "build", tmp_path / "b.clapsep", "--demo", *words, code=2 if words[0] == "--compute-capability" else 1)
    assert "exporting" not in done.stderr
    assert time.monotonic() - begun < 60
