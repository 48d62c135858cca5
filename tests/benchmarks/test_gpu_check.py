"""The check for NVIDIA machines: the real script on this one, and the parts that only a GPU would reach, on stand-ins."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu_ceilings
import gpu_check
import gpu_latency
import gpu_pytorch
import gpu_steps
import gpu_tables
import gpu_task
import gpu_two_inputs
import numpy as np
import onnx
import pytest
import torch
from clapsep.engines import KINDS, EngineError
from clapsep.runtime import Bundle
from clapsep.runtime.plans import graphs_of
from gpu_check import Check, Row
from tiny import variant
from work import work

WINDOWS = {"window waveform", "window split"}
QUERIES = {"queries 1", "queries 2", "queries 4", "queries 8", "text query", "audio query"}
RATES = {"products": {"float16": 4e12, "float32": 1e12}, "copies": {"on device": 1e12, "to device": 1e10, "from device": 2e10}}
NETWORK = {"flop": 1e9, "weights": 20_000_000}
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
BARE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"click", "soundfile", "polygraphy", "onnx"}:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path[:] = [Refuse(), *(f for f in sys.meta_path if "editable" not in str(getattr(f, "__module__", "")))]
"""


def script(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", SCRIPT, *map(str, words)], capture_output=True, text=True, check=False, env=variables, timeout=600)


def has_gpu() -> bool:
    return gpu_task.gpu_state() is not None


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def check(tmp_path) -> Check:
    (tmp_path / "scratch").mkdir()
    return Check(tmp_path / "out.json", tmp_path / "scratch", 0.01)


@pytest.mark.slow
@pytest.mark.skipif(has_gpu(), reason="says what happens without a GPU")
def test_without_a_gpu_the_controls_run_and_the_rest_says_why_not(demo_bundle, tmp_path):
    before = digest(demo_bundle)
    done = script("--bundle", demo_bundle, "--json", tmp_path / "out.json", "--seconds", 0.05)
    assert done.returncode == 0, done.stdout + done.stderr
    assert digest(demo_bundle) == before
    found = json.loads((tmp_path / "out.json").read_text())
    rows, table = found["rows"], done.stdout.splitlines()
    assert found["complete"]
    assert found["environment"]["packages"]["numpy"] == np.__version__
    assert table[-1].startswith(f"{sum(r['status'] == 'ok' for r in rows)} ok, 0 failed, ")
    assert [line.split()[0] for line in table[:-1]] == [row["status"] for row in rows]
    assert all(row["reason"] for row in rows if row["status"] == "skipped")
    assert rows[0]["step"] == "doctor"
    assert rows[0]["data"]["report"]["engines"]
    assert {row["engine"] for row in rows if row["status"] == "skipped"} >= {"tensorrt", "tensorrt-rtx"}
    assert {row["engine"] for row in rows} == {"", "pytorch", *KINDS}
    steps = {(row["engine"], row["step"]): row for row in rows if row["status"] == "ok"}
    controls = ["onnxruntime", *(["openvino"] if ("openvino", "preflight") in steps else [])]
    assert set(steps["", "ceilings"]["data"]["rates"]["products"]) == {"float32", "numpy float32", "bfloat16"}
    for engine in controls:
        assert all(gate["passed"] for gate in steps[engine, "verify"]["data"]["gates"])
        graphs = steps[engine, "two inputs"]["data"]["graphs"]
        assert set(graphs) == {"text_encoder", "text_encoder_short", "audio_encoder", "mixture_encoder", "film", "mask_decoder"}
        assert all(len(graph["plain"]) == len(gpu_two_inputs.ORDERS) * gpu_two_inputs.ROUNDS for graph in graphs.values())
        calls = steps[engine, "latency"]["data"]["plain"]["calls"]
        assert set(calls) == {"b1", "b2", "b4", *WINDOWS, *QUERIES}
        assert all(
            call["min"] <= call["p10"] <= call["median"] <= call["p90"] <= call["max"] and call["n"] >= 10 for call in calls.values()
        )
        assert all(0 < calls[name]["shares"]["float32"] < 1.5 for name in ("b1", "b2", "b4"))
        assert (engine, "compile") in steps or engine == "onnxruntime"
    made = subprocess.run(
        [sys.executable, SCRIPT.with_name("gpu_tables.py"), tmp_path / "out.json"], capture_output=True, text=True, check=True
    )
    assert f"| {demo_bundle.stem} fp32 | onnxruntime cpu, plain | b4 | " in made.stdout


def test_on_a_bare_machine_it_says_what_is_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    done = script("--json", tmp_path / "out.json", "--seconds", 0.05, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    reasons = {(row["step"], row["engine"]): (row["status"], row["reason"]) for row in found["rows"]}
    assert reasons["doctor", ""] == ("skipped", "click is not installed")
    assert reasons["build", ""] == ("skipped", "onnx is not installed")
    assert reasons["ceilings", ""][0] == "ok"  # of the CPU, which come last
    assert reasons["preflight", "onnxruntime"][0] == "ok"
    assert reasons["all", "onnxruntime"] == ("skipped", "there is no bundle to run")
    links = found["environment"]["PYTHONPATH"].removesuffix(f":{tmp_path}")
    assert links != str(tmp_path)
    assert not Path(links).exists()


def test_a_signal_leaves_what_was_done_and_no_processes(tmp_path):
    out = tmp_path / "out.json"
    variables = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(["bash", SCRIPT, "--json", out], env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    process.stdout.readline()  # the doctor is done, the next step is under way
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait(60) == 128 + signal.SIGTERM
    found = json.loads(out.read_text())
    assert not found["complete"]
    assert [row["step"] for row in found["rows"]] == ["doctor"]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # no scratch, no link


def test_what_cannot_be_read_is_a_failed_row(check, tmp_path):
    assert list(gpu_check.bundles(check, [tmp_path / "none.clapsep"])) == []
    assert check.rows[0].status == "failed"
    assert "cannot be read as a bundle" in check.rows[0].reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('so far'); import os, signal; sys.stdout.flush(); os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV: so far"),
        ("sys.exit('no more')", "ended with exit code 1: no more"),
        ("print('all is well')", "ended without an answer: all is well"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
    ],
)
def test_a_step_that_crashes_or_hangs_is_a_row(check, body, reason, tmp_path, monkeypatch):
    (tmp_path / "step.py").write_text(f"import sys\n{body}\n")
    monkeypatch.setattr(gpu_check, "STEPS", tmp_path / "step.py")
    monkeypatch.setattr(gpu_check, "TIMEOUT", 1)
    start = time.monotonic()
    row = check.run(Row("two inputs", engine="tensorrt"))
    assert (row.status, row.reason) == ("failed", reason)
    assert time.monotonic() - start < 20
    assert json.loads(check.out.read_text())["rows"][0]["reason"] == reason


@pytest.fixture
def task(demo_bundle) -> dict[str, object]:
    """For a kind with CUDA graphs."""
    return {"step": "two inputs", "path": str(demo_bundle), "engine": "tensorrt", "device": "cuda", "precision": "fp32", "seconds": 0.01}


@pytest.fixture
def stand_in(monkeypatch):
    """ONNX Runtime on the CPU in place of the engine, with the graphs that a GPU runs; `change` may alter each separator."""
    real = gpu_task.open_bundle

    def use(change=lambda *_: None) -> None:
        def open_bundle(task, cuda_graph, route=None):
            separator, golden = real({**task, "engine": "onnxruntime", "device": "cpu"}, cuda_graph, route)
            graphs = graphs_of(separator.bundle.manifest.graphs, "cuda", "waveform", "split")
            separator.choice = replace(separator.choice, plans=dict.fromkeys(graphs))
            change(separator, cuda_graph)
            return separator, golden

        monkeypatch.setattr(gpu_task, "open_bundle", open_bundle)

    return use


@pytest.fixture
def few(monkeypatch):
    """As few repetitions as show that a call is repeated."""
    monkeypatch.setattr(gpu_task, "REPETITIONS", 2)
    monkeypatch.setattr(gpu_task, "WARM_UP", 1)


def test_cuda_graphs_are_tried_on_and_off(task, stand_in):
    stand_in()
    status, _, data = gpu_steps.attempt(task)
    assert status == "ok"
    graphs = {"text_encoder", "audio_encoder", "separator_waveform", "mixture_encoder", "film", "mask_decoder"}
    assert set(data["graphs"]) == graphs
    assert all(set(graph) == {"CUDA graph", "no CUDA graph", gpu_two_inputs.APART} for graph in data["graphs"].values())


@pytest.mark.parametrize("graph", ["separator_waveform", "film"])
def test_results_of_the_input_before_are_found(graph, task, stand_in):
    def stale(separator, cuda_graph):
        """Answers every replay with the last result of the same batch."""
        if cuda_graph:
            engine = separator.engine(graph)
            run, last = engine.run, {}
            engine.run = lambda inputs: last.setdefault(len(inputs["condition"]), run(inputs))

    stand_in(stale)
    status, reason, data = gpu_steps.attempt(task)
    assert (status, reason) == ("failed", f"not the result of a single run: {graph}, CUDA graph")
    assert max(data["graphs"][graph]["no CUDA graph"]) <= data["limit"]


@pytest.mark.parametrize("found", [{gpu_two_inputs.APART: 1e-4, "plain": [0.0]}, {gpu_two_inputs.APART: 0.5, "plain": [0.0, None]}])
def test_results_that_prove_nothing_fail(found):
    with pytest.raises(gpu_task.Verdict):
        gpu_two_inputs.judge({"limit": 1e-4, "graphs": {"separator": found}})


def test_differences_count_in_units_of_large_outputs():
    alone = [{"y": np.array([[80.0, 0.0]])}, {"y": np.array([[0.5, 0.0]])}]
    assert gpu_two_inputs.furthest({"y": np.array([[80.0, 0.8]])}, alone, (0,)) == pytest.approx(0.01)
    assert gpu_two_inputs.furthest({"y": np.array([[0.5, 0.25]])}, alone, (1,)) == 0.25
    assert gpu_two_inputs.furthest({"y": np.array([[np.inf, 0.0]])}, alone, (0,)) is None


def test_latency_says_what_was_reached_of_what_is_aimed_at(task, stand_in, few, monkeypatch):
    monkeypatch.setattr(gpu_latency, "BATCH", 4)
    stand_in()
    status, reason, data = gpu_steps.attempt({**task, "step": "latency", "rates": RATES, "network": NETWORK})
    assert status == "ok", reason
    for mode in ("CUDA graph", "no CUDA graph"):
        calls = data[mode]["calls"]
        assert set(calls) == {"b1", "b2", "b4", *WINDOWS, *QUERIES}
        assert calls["b4"]["shares"]["float16"] == pytest.approx(4e9 / 4e12 / calls["b4"]["median"] * 1000)
        assert calls["queries 8"]["audio seconds per second"] == pytest.approx(8 * 2.5 / calls["queries 8"]["median"] * 1000)
    window, share = data["aims"].values()
    assert window == {"measured": data["CUDA graph"]["calls"]["window waveform"]["median"], "wanted": "<= 3", "met": False}
    assert share["measured"] == max(data[mode]["calls"]["b4"]["shares"]["float16"] for mode in ("CUDA graph", "no CUDA graph"))
    assert not share["met"]
    assert f"; b4, of the float16 products {share['measured']:.3g} (aim >= 0.4); CUDA graph: b1 " in reason


def test_a_batch_that_does_not_fit_is_told_and_the_rest_measured(task, stand_in, few, capsys):
    def full(separator, cuda_graph):
        engine = separator.engine("separator_waveform")
        run = engine.run

        def refuse(inputs):
            if len(inputs["mixture"]) == 4:
                raise EngineError("the GPU is full")
            return run(inputs)

        engine.run = refuse

    stand_in(full)
    status, reason, data = gpu_steps.attempt({**task, "step": "latency"})
    assert status == "failed"
    assert reason.startswith("2 of the calls, CUDA graph, b4 first: the GPU is full; ms")
    assert set(data["no CUDA graph"]["calls"]) == {"b1", "b2", *WINDOWS, *QUERIES}
    assert data["CUDA graph"]["calls"]["b2"]["shares"] == {}  # there are no ceilings
    row = {"step": "latency", "bundle": "demo", "precision": "fp32", "engine": "tensorrt", "device": "cuda", "data": data}
    gpu_tables.show({"rows": [row]})
    assert "| demo fp32 | tensorrt cuda, CUDA graph | b2 | " in capsys.readouterr().out


def test_shares_of_the_ceilings():
    task = {"rates": RATES, "network": NETWORK}
    found = gpu_ceilings.shares(1.0, 2, {"to device": 1_000_000, "from device": 2_000_000}, task)
    assert found == pytest.approx({"float16": 0.5, "float32": 2.0, "weights read once": 0.02, "host copies": 0.2})
    assert set(gpu_ceilings.shares(1.0, 2, {"to device": 1}, {"rates": RATES, "network": {}})) == {"host copies"}
    assert gpu_ceilings.shares(1.0, 2, {"to device": 1}, {}) == {}


def test_ceilings_of_the_cpu(task, few):
    status, reason, data = gpu_steps.attempt({**task, "step": "ceilings", "device": "cpu"})
    assert status == "ok", reason
    rates = data["rates"]
    assert set(rates["products"]) == {"float32", "numpy float32", "bfloat16"}
    assert 1e9 < rates["products"]["float32"] < 1e14
    assert 1e8 < rates["copies"]["on device"] < 1e13


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("step", ["ceilings", "pytorch"])
def test_pytorch_without_a_gpu_is_skipped(step, task):
    status, reason, _ = gpu_steps.attempt({**task, "step": step})
    assert (status, reason) == ("skipped", f"PyTorch {torch.__version__} sees no GPU")


def test_operations_are_those_that_pytorch_counts(task):
    from clapsep.export import demo
    from clapsep.export.checkpoint import read_checkpoint
    from clapsep.export.family import open_model
    from torch.utils.flop_counter import FlopCounterMode

    model = open_model(read_checkpoint(demo.CLAP, "clap"), read_checkpoint(demo.CHECKPOINT, "checkpoint"))
    spec = next(spec for spec in model.graphs() if spec.name == "separator")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        spec.module(*(value[:1] for value in spec.inputs.values()))
    _, _, found = gpu_steps.attempt({**task, "step": "operations"})
    assert found["flop"] == counter.get_total_flops() > 1e8
    entry = Bundle.open(task["path"]).manifest.graphs["separator"]
    assert found["weights"] == entry.graph.size + entry.data.size


def test_products_of_unknown_shape_are_not_guessed(tmp_path):
    tensor = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    sides = [tensor("x", 1, ["batch", 4]), tensor("w", 1, [4, "columns"])]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", sides, [tensor("y", 1, ["batch", "columns"])])), tmp_path / "g")
    with pytest.raises(ValueError, match="shapes of the product y are not known"):
        work(tmp_path / "g")


def test_pytorch_is_measured_and_says_what_it_does_not_compile(task, few, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError("no compiler\nis there")

    monkeypatch.setattr(torch, "compile", lambda _module, **_options: refuse)
    status, reason, data = gpu_steps.attempt({**task, "step": "pytorch", "device": "cpu"})
    assert status == "ok", reason
    assert set(data["calls"]) == {"b1 PyTorch eager", "b1 PyTorch autocast bfloat16"}
    assert data["left out"] == {"b1 torch.compile": "RuntimeError: no compiler is there"}
    assert data["snr_db"]["b1 PyTorch autocast bfloat16"] > 30
    assert reason.endswith("; left out b1 torch.compile: RuntimeError: no compiler is there")


def test_pytorch_runs_the_files_that_are_given_in_batches(task, few, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda module, **_options: module)
    monkeypatch.setattr(gpu_pytorch, "BATCHES", {"cpu": (1, 2)})
    files = variant(tmp_path)
    checkpoints = [str(files.clap), str(files.checkpoint)]
    assert gpu_check.parse(["--json", str(tmp_path / "out.json"), "--checkpoints", *checkpoints]).checkpoints == checkpoints
    status, reason, data = gpu_steps.attempt({**task, "step": "pytorch", "device": "cpu", "checkpoints": checkpoints})
    assert status == "ok", reason
    assert set(data["calls"]) == {f"b{n} {way}" for n in (1, 2) for way in ("PyTorch eager", "torch.compile", "PyTorch autocast bfloat16")}
    assert data["snr_db"]["b2 PyTorch autocast bfloat16"] > 30
    assert data["calls"]["b2 PyTorch eager"]["audio seconds per second"] == pytest.approx(
        2 * 2.5 / data["calls"]["b2 PyTorch eager"]["median"] * 1000
    )


def test_pytorch_that_runs_nothing_has_failed(task, monkeypatch):
    monkeypatch.setattr("peers.fetched", lambda _call: lambda: torch.zeros(1) @ torch.zeros(2))
    status, reason, data = gpu_steps.attempt({**task, "step": "pytorch", "device": "cpu"})
    assert status == "failed"
    assert reason.startswith("PyTorch does not run it: RuntimeError: ")
    assert len(data["left out"]) == 3


@pytest.mark.slow
def test_pytorch_compiles_it(task, few):
    status, reason, data = gpu_steps.attempt({**task, "step": "pytorch", "device": "cpu"})
    assert status == "ok", reason
    assert data["left out"] or data["snr_db"]["b1 torch.compile"] > 100


@pytest.mark.slow
def test_the_demo_bundle_is_built_for_large_batches(task, tmp_path):
    status, reason, _ = gpu_steps.attempt({**task, "step": "build", "precision": "fp16", "path": str(tmp_path / "demo.clapsep")})
    assert status == "ok", reason
    assert Bundle.open(tmp_path / "demo.clapsep").manifest.max_batch == 64


def test_how_the_memory_grew_is_said(task):
    states = {"waveform": {"memory.used": "900"}, "split": {"memory.used": "[N/A]"}}
    data = {"gpu before": {"memory.used": "512"}, "no CUDA graph": {"gpu": states}}
    assert gpu_latency.memory(data, task) == "; GPU memory 512 to 900 (waveform), [N/A] (split) MiB"
    assert gpu_latency.memory({**data, "gpu before": None}, task) == ""


def test_the_state_of_the_gpu_is_read(tmp_path, monkeypatch):
    values = "NVIDIA X, 580.1, 9.0, 143771, 512, 345, 3201, 1980, [N/A]"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{values}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    state = gpu_task.gpu_state()
    assert state
    assert (state["name"], state["compute_cap"], state["memory.used"]) == ("NVIDIA X", "9.0", "512")


def test_every_kind_is_checked():
    assert {engine for engine, _ in gpu_check.GPU_ENGINES + gpu_check.CONTROLS} == set(KINDS)
