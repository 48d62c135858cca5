"""The check for NVIDIA machines: the real script on this one, and the parts that only a GPU would reach, on stand-ins."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_steps
import numpy as np
import pytest
from clapsep.engines import KINDS
from gpu_check import Check, Row

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
    return gpu_steps.gpu_state() is not None


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
    for engine in controls:
        assert all(gate["passed"] for gate in steps[engine, "verify"]["data"]["gates"])
        graphs = steps[engine, "two inputs"]["data"]["graphs"]
        assert set(graphs) == {"separator", "text_encoder", "audio_encoder"}
        assert all(len(graph["plain"]) == len(gpu_steps.ORDERS) * gpu_steps.ROUNDS for graph in graphs.values())
        calls = steps[engine, "latency"]["data"]["plain"]["calls"]
        assert set(calls) == {"graph b1", "graph b4", "window"}
        assert all(call["min"] <= call["median"] <= call["p90"] <= call["max"] and call["n"] >= 10 for call in calls.values())
        assert (engine, "compile") in steps or engine == "onnxruntime"


def test_on_a_bare_machine_it_says_what_is_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    done = script("--json", tmp_path / "out.json", "--seconds", 0.05, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    reasons = {(row["step"], row["engine"]): (row["status"], row["reason"]) for row in found["rows"]}
    assert reasons["doctor", ""] == ("skipped", "click is not installed")
    assert reasons["build", ""] == ("skipped", "onnx is not installed")
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
        ("import time; time.sleep(60)", "did not end within 1 s"),
    ],
)
def test_a_step_that_crashes_or_hangs_is_a_row(check, body, reason, tmp_path, monkeypatch):
    (tmp_path / "step.py").write_text(f"import sys\n{body}\n")
    monkeypatch.setattr(gpu_check, "STEPS", tmp_path / "step.py")
    monkeypatch.setattr(gpu_check, "TIMEOUT", 1)
    start = time.monotonic()
    row = check.run(Row("latency", engine="tensorrt"))
    assert (row.status, row.reason) == ("failed", reason)
    assert time.monotonic() - start < 20
    assert json.loads(check.out.read_text())["rows"][0]["reason"] == reason


@pytest.fixture
def task(demo_bundle) -> dict[str, object]:
    """For a kind with CUDA graphs."""
    return {"step": "two inputs", "path": str(demo_bundle), "engine": "tensorrt", "device": "cuda", "precision": "fp32", "seconds": 0.01}


@pytest.fixture
def stand_in(monkeypatch):
    """ONNX Runtime on the CPU in place of the engine; `stale` answers every replay with the last result of the same batch."""
    real = gpu_steps.open_bundle

    def use(stale: bool) -> None:
        def open_bundle(task, cuda_graph):
            separator, golden = real({**task, "engine": "onnxruntime", "device": "cpu"}, cuda_graph)
            if stale and cuda_graph:
                engine = separator.engine("separator")
                run, last = engine.run, {}
                engine.run = lambda inputs: last.setdefault(len(inputs["condition"]), run(inputs))
            return separator, golden

        monkeypatch.setattr(gpu_steps, "open_bundle", open_bundle)

    return use


def test_cuda_graphs_are_tried_on_and_off(task, stand_in):
    stand_in(stale=False)
    status, _, data = gpu_steps.attempt(task)
    assert status == "ok"
    assert all(set(graph) == {"CUDA graph", "no CUDA graph", gpu_steps.APART} for graph in data["graphs"].values())
    status, reason, data = gpu_steps.attempt({**task, "step": "latency"})
    assert status == "ok"
    assert "; no CUDA graph: graph b1 " in reason
    assert data["CUDA graph"]["calls"]["window"]["n"] >= 10


def test_results_of_the_input_before_are_found(task, stand_in):
    stand_in(stale=True)
    status, reason, data = gpu_steps.attempt(task)
    assert (status, reason) == ("failed", "not the result of a single run: separator, CUDA graph")
    assert max(data["graphs"]["separator"]["no CUDA graph"]) <= data["limit"]


@pytest.mark.parametrize("found", [{gpu_steps.APART: 1e-4, "plain": [0.0]}, {gpu_steps.APART: 0.5, "plain": [0.0, None]}])
def test_results_that_prove_nothing_fail(found):
    with pytest.raises(gpu_steps.Verdict):
        gpu_steps.judge_two_inputs({"limit": 1e-4, "graphs": {"separator": found}})


def test_pytorch_is_measured(task, monkeypatch):
    monkeypatch.setattr(gpu_steps, "REPETITIONS", 2)
    monkeypatch.setattr(gpu_steps, "WARM_UP", 1)
    status, reason, data = gpu_steps.attempt({**task, "step": "pytorch", "device": "cpu"})
    assert status == "ok", reason
    assert set(data["calls"]) == {"on device", "with copies"}


def test_the_state_of_the_gpu_is_read(tmp_path, monkeypatch):
    values = "NVIDIA X, 580.1, 9.0, 143771, 512, 345, 3201, 1980, [N/A]"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{values}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    state = gpu_steps.gpu_state()
    assert state
    assert (state["name"], state["compute_cap"], state["memory.used"]) == ("NVIDIA X", "9.0", "512")


def test_every_kind_is_checked():
    assert {engine for engine, _ in gpu_check.GPU_ENGINES + gpu_check.CONTROLS} == set(KINDS)
