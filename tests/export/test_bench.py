"""The command, run for real with tiny budgets, and what it measures."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from clapsep.export.bench import GROUPS, cases, starts
from clapsep.export.bench.cases import PROBES, Sweeps
from clapsep.export.bench.environment import Neighbours, physical_cores
from clapsep.export.bench.lab import Lab, Sharing, Variant
from clapsep.export.bench.result import read_result
from clapsep.export.bench.rounds import Budget, Probe, Stopwatch
from clapsep.runtime import Bundle
from clapsep.runtime.bundle import sha256_of
from clapsep.runtime.errors import EngineError, InputError

ORT, OPENVINO = Variant("onnxruntime"), Variant("openvino")
SWEEPS = Sweeps(queries=(1, 3), batches=(1, 2), threads=(1,), callers=(1, 2), seconds=3)
NAMES = {
    *(f"stage {name}" for name in ("resample", "features", "STFT", "log-mel", "ISTFT", "overlap-add")),
    *("text query", "audio query", "separate", "separate long file", "separate many"),
    *("separate in batches", "separate with threads", "separate for callers"),
    *("cold start", "cold start: import", "cold start: open", "cold start: first result", "memory resident", "memory peak"),
}


@pytest.fixture(scope="module")
def measured(run, demo_bundle, tmp_path_factory):
    """One real run: the finished process, its JSON and its page."""
    folder = tmp_path_factory.mktemp("bench")
    outputs = folder / "b.json", folder / "b.html"
    done = run("clapsep-export", "bench", demo_bundle, "--quick", "--json", outputs[0], "--html", outputs[1])
    return SimpleNamespace(done=done, json=outputs[0], html=outputs[1], folder=folder)


@pytest.fixture
def lab(demo_bundle):
    yield Lab(Bundle.open(demo_bundle), (ORT, OPENVINO))
    Sharing.forget()


def copy_with(source, out, change):
    """A benchmark whose JSON `change` has edited."""
    data = json.loads(source.read_text())
    change(data)
    out.write_text(json.dumps(data))
    return out


def scaled(name, factor):
    """Make every case called `name` so many times as long."""

    def change(data):
        for case in data["cases"]:
            if case["name"] == name:
                case["observations"] = [factor * value for value in case["observations"]]

    return change


def test_json_holds_everything(measured, demo_bundle):
    result = read_result(measured.json)
    graphs = {f"graph {name}" for name in Bundle.open(demo_bundle).manifest.graphs}
    assert {case.name for case in result.cases} == NAMES | graphs
    assert {case.parameters["route"] for case in result.cases if case.name == "separate"} == {"fused", "split", "waveform"}
    assert [case.parameters["queries"] for case in result.cases if case.name == "separate many"] == [1, 2, 4, 8]
    texts = [(case.parameters["words"], case.parameters["cached"]) for case in result.cases if case.name == "text query"]
    assert texts == [(3, "no"), (30, "no"), (3, "yes")]
    for case in result.cases:
        assert len(case.observations) == 2, case
        assert case.engine == ("numpy" if case.name.startswith("stage") else "onnxruntime")
        assert case.unit == ("bytes" if case.name.startswith("memory") else "s")
    window = Lab(Bundle.open(demo_bundle), (ORT,)).window_seconds
    assert {c.label: c.audio_seconds for c in result.cases}["separate many, queries 4"] == 4 * window
    environment = result.environment
    assert environment.packages["numpy"] == np.__version__
    assert environment.cpu.model
    assert environment.cpu.cores == physical_cores()
    assert environment.memory > 1 << 28
    assert result.bundle.sha256 == sha256_of(demo_bundle / "manifest.json")
    assert len(result.reference) > 20
    assert "--quick" in result.command
    assert any("memory on a GPU" in note for note in result.notes)


def test_table_and_page_show_every_case(measured):
    result, page = read_result(measured.json), measured.html.read_text()
    for case in result.cases:
        assert f"{case.label}  " in measured.done.stdout
        assert f"<td>{case.label}</td>" in page
    assert page.count("<svg") == 3
    assert result.bundle.sha256 in page
    assert result.environment.cpu.model in page
    assert "--quick" in page
    for group in GROUPS:
        assert f"GiB  {group}\n" in measured.done.stderr
    assert "few" in measured.done.stderr, "two observations may not be quoted"


def test_page_needs_nothing_else(measured):
    page = measured.html.read_text()
    assert "://" not in page
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import", page)
    targets = re.findall(r'href="([^"]*)"|url\(([^)]*)\)', page)
    assert targets
    assert all("".join(target).startswith("#") for target in targets)


def test_what_was_saved_can_be_shown_again(run, measured, tmp_path):
    done = run("clapsep-export", "bench", "--from", measured.json, "--html", tmp_path / "again.html", "--json", tmp_path / "again.json")
    assert done.stdout == measured.done.stdout
    assert (tmp_path / "again.html").read_text() == measured.html.read_text()
    assert (tmp_path / "again.json").read_bytes() == measured.json.read_bytes()


def test_the_same_benchmark_is_no_regression(run, measured):
    done = run("clapsep-export", "bench", "--from", measured.json, "--compare", measured.json)
    assert done.stdout.count("  1.000\n") == len(read_result(measured.json).cases)
    assert "margin 1.15" in done.stdout


@pytest.mark.parametrize(
    ("factor", "words", "code", "mark"),
    [(0.5, [], 1, "slower"), (1 / 1.14, [], 0, ""), (1 / 1.14, ["--margin", 1.1], 1, "slower"), (1.2, [], 0, "faster")],
)
def test_compare_finds_what_got_slower(run, measured, tmp_path, factor, words, code, mark):
    old = copy_with(measured.json, tmp_path / "old.json", scaled("separate long file", factor))
    done = run("clapsep-export", "bench", "--from", measured.json, "--compare", old, *words, code=code)
    line = next(line for line in done.stdout.split("against ")[1].splitlines() if line.startswith("separate long file"))
    assert line.endswith(f"{1 / factor:.3f}  {mark}".rstrip())
    assert ("error: 1 of" in done.stderr) == (code == 1)


def test_compare_says_when_machine_bundle_or_versions_differ(run, measured, tmp_path):
    def change(data):
        data["environment"]["cpu"]["model"] = "Abacus"
        data["environment"]["packages"]["numpy"] = "0.1"
        data["environment"]["variables"]["OMP_NUM_THREADS"] = "77"
        data["bundle"]["sha256"] = "0" * 64
        del data["cases"][0]

    old = copy_with(measured.json, tmp_path / "old.json", change)
    said = run("clapsep-export", "bench", "--from", measured.json, "--compare", old).stderr
    assert "another machine (Abacus" in said
    assert "another bundle" in said
    assert f"numpy 0.1 → {np.__version__}" in said
    assert "OMP_NUM_THREADS 77 → " in said
    assert "1 cases are in one run only" in said
    assert "another machine" not in run("clapsep-export", "bench", "--from", measured.json, "--compare", measured.json).stderr


def nothing_in_common(data):
    for case in data["cases"]:
        case["engine"] = "abacus"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (nothing_in_common, "no case in common"),
        (lambda data: data.update(schema_version=2), "schema version is not 1"),
        (lambda data: data.update(format="clapsep-bundle"), '"format"'),
        (lambda data: data.pop("cases"), "lacks the field 'cases'"),
        (lambda data: data.update(cases=[]), "list of cases"),
        (lambda data: data["cases"].append(data["cases"][0]), "list of cases"),
        (lambda data: data["cases"][0].update(observations=[]), "cannot have been measured"),
        (lambda data: data["cases"][0].update(observations=[-1.0]), "cannot have been measured"),
        (lambda data: data["cases"][0].update(observations=[float("nan")]), "cannot have been measured"),
        (lambda data: data["cases"][0].update(unit="parsec"), "cannot have been measured"),
        (lambda data: data["cases"][0].update(name="\x1b[2J"), "cannot be printed"),
        (lambda data: data["cases"][0]["parameters"].update(n=10**400), "cannot have been measured"),
        (lambda data: data["environment"].update(memory=10**400), "cannot have been measured"),
        (lambda data: data["reference"].clear(), "reference"),
    ],
)
def test_compare_refuses_what_is_no_such_benchmark(run, measured, tmp_path, change, says):
    old = copy_with(measured.json, tmp_path / "old.json", change)
    done = run("clapsep-export", "bench", "--from", measured.json, "--compare", old, code=2)
    assert says in done.stderr
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"[1, 2", b"[" * 100000, b"3", b"{}", b'{"format": "clapsep-bench"}'])
def test_compare_refuses_other_files(run, measured, tmp_path, content):
    old = tmp_path / "old.json"
    if content is not None:
        old.write_bytes(content)
    said = run("clapsep-export", "bench", "--from", measured.json, "--compare", old, code=2).stderr
    assert "give " in said
    assert said.count("error: ") == 1


def test_a_bad_old_file_is_said_before_measuring(run, demo_bundle, tmp_path):
    said = run("clapsep-export", "bench", demo_bundle, "--compare", tmp_path / "none.json", code=2).stderr
    assert "GiB" not in said


def test_existing_outputs_are_kept(run, measured, demo_bundle, tmp_path):
    for option in ("--json", "--html"):
        out = tmp_path / "out"
        out.write_text("mine")
        said = run("clapsep-export", "bench", demo_bundle, option, out, code=2).stderr
        assert "pass --force" in said
        assert "GiB" not in said, "said before measuring"
        assert out.read_text() == "mine"
        run("clapsep-export", "bench", "--from", measured.json, option, out, "--force")
        assert "clapsep" in out.read_text()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "give a bundle to measure"),
        (["BUNDLE", "--from", "b.json"], 2, "not both"),
        (["--from", "b.json", "--quick"], 2, "nothing is measured"),
        (["--from", "b.json", "--threads", "2"], 2, "nothing is measured"),
        (["BUNDLE", "--engine", "abacus"], 2, "no engine kind"),
        (["BUNDLE", "--engine", "openvino:fast"], 2, "no device or precision"),
        (["BUNDLE", "--engine", "onnxruntime:bf16"], 2, "leave the precision out"),
        (["BUNDLE", "--only", "nothing"], 2, "nothing"),
        (["BUNDLE", "--margin", "0.5"], 2, "margin"),
        (["BUNDLE", "--json", "x", "--html", "./x"], 2, "same file"),
        (["BUNDLE", "--json", "no/such/place.json"], 1, "no directory"),
        (["nowhere"], 2, "not a bundle"),
    ],
)
def test_wrong_usage(run, demo_bundle, measured, words, code, says):
    words = [demo_bundle if word == "BUNDLE" else word for word in words]
    done = run("clapsep-export", "bench", *words, code=code, cwd=measured.folder)
    assert says in done.stderr
    assert sorted(path.name for path in measured.folder.iterdir()) == ["b.html", "b.json"]


def test_interrupting_writes_nothing(start, demo_bundle, tmp_path):
    process = start("clapsep-export", "bench", demo_bundle, "--seconds", 0.1, "--json", tmp_path / "b.json", "--html", tmp_path / "b.html")
    with process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.endswith("GiB  graphs\n"))
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


def in_python(code, *words):
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)


def test_measuring_needs_neither_torch_nor_onnx_nor_matplotlib(demo_bundle, tmp_path):
    code = (
        "import sys; sys.modules.update(torch=None, onnx=None, onnxscript=None, safetensors=None, matplotlib=None)\n"
        "from clapsep.export.cli import main; main(['bench', '--quick', '--only', 'routes', '--json', sys.argv[2], sys.argv[1]])"
    )
    done = in_python(code, demo_bundle, tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    assert [case.name for case in read_result(tmp_path / "b.json").cases] == ["separate"] * 3


def test_a_page_without_matplotlib_is_refused_before_measuring(demo_bundle, tmp_path):
    code = "import sys; sys.modules.update(matplotlib=None)\nfrom clapsep.export.cli import main; main(['bench', *sys.argv[1:]])"
    done = in_python(code, demo_bundle, "--html", tmp_path / "b.html")
    assert done.returncode == 1
    assert "pip install 'clapsep-export[bench]'" in done.stderr
    assert "GiB" not in done.stderr


def test_engines_take_turns_and_are_compared(run, demo_bundle, tmp_path):
    words = ["--engine", "onnxruntime", "--engine", "openvino", "--engine", "onnxruntime", "--only", "starts", "--only", "several"]
    done = run("clapsep-export", "bench", demo_bundle, "--quick", "--queries", 2, *words, "--json", tmp_path / "b.json")
    found = read_result(tmp_path / "b.json").cases
    assert {(case.engine, case.label) for case in found} >= {(e, "separate many, queries 2") for e in ("onnxruntime", "openvino")}
    assert re.search(r"\nseparate many, queries 2 +openvino +onnxruntime +\d+\.\d+", done.stdout)
    assert re.search(r"\nmemory peak +openvino +onnxruntime +\d+\.\d+", done.stdout)


def test_a_bundle_without_tokenizer(run, demo_bundle, tmp_path):
    bundle = shutil.copytree(demo_bundle, tmp_path / "mute.clapsep")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": None}))
    words = [word for group in ("graphs", "queries", "starts") for word in ("--only", group)]
    run("clapsep-export", "bench", bundle, "--quick", *words, "--json", tmp_path / "b.json")
    result = read_result(tmp_path / "b.json")
    names = {case.name for case in result.cases}
    assert {"audio query", "cold start", "graph film"} <= names
    assert not {name for name in names if "text" in name}
    assert "text queries were not measured, as the bundle has no tokenizer" in result.notes


def test_groups_and_probes_agree():
    assert (*PROBES, "starts") == GROUPS


def test_neighbouring_probes_are_of_one_case(lab):
    """So that what is compared is measured one after the other."""
    for group in ("graphs", "queries", "routes", "long", "several", "batches", "callers"):
        probes = list(PROBES[group](lab, SWEEPS))
        assert [probe.engine for probe in probes] == ["onnxruntime", "openvino"] * (len(probes) // 2), group
        assert [dataclasses.replace(p, engine="", call=print) for p in probes[::2]] == [
            dataclasses.replace(p, engine="", call=print) for p in probes[1::2]
        ]


def test_graphs_are_given_what_the_runtime_gives_them(lab):
    """A graph's probe computes what its route computes, and leaves the engines as they were."""
    probes = {probe.name: probe for probe in cases.graphs(lab, SWEEPS) if probe.engine == "onnxruntime"}
    assert set(probes) == {f"graph {name}" for name in lab.bundle.manifest.graphs}
    for name, probe in probes.items():
        outputs = probe.call()
        assert isinstance(outputs, dict)
        assert all(np.isfinite(value).all() and value.any() and len(value) == 1 for value in outputs.values()), name
    assert "run" not in vars(lab.separator(ORT).engine("text_encoder"))


def test_stages_are_those_of_the_family(lab, rng):
    windows = rng.uniform(-0.5, 0.5, (1, lab.window)).astype(np.float32)
    inputs, spectrum = lab.family.features(windows)
    calls = lab.family.stages(windows, {"mask": np.ones(spectrum.shape, np.float32)})
    np.testing.assert_array_equal(calls["log-mel"](), inputs["log_mel"])
    np.testing.assert_array_equal(np.abs(calls["STFT"]()).astype(np.float32), inputs["magnitude"])
    np.testing.assert_allclose(calls["ISTFT"](), windows, atol=1e-5)
    default = super(type(lab.family), lab.family).stages(windows, {"mask": np.ones(spectrum.shape, np.float32)})
    np.testing.assert_array_equal(default["reconstruct"](), calls["ISTFT"]())
    np.testing.assert_array_equal(default["features"]()[0]["log_mel"], inputs["log_mel"])


def test_new_queries_are_new(lab):
    clips = lab.clips()
    for length in (3, 30):
        texts = lab.texts(length)
        found = {next(texts) for _ in range(1000)}
        assert len(found) == 1000
        assert {len(text.split()) for text in found} == {length}
    assert not lab.separator(ORT).queries.tokenizer.truncates(next(lab.texts(30)))
    assert len({next(clips)[0].tobytes() for _ in range(100)}) == 100


def test_separators_share_engines_until_they_are_forgotten(lab):
    one, two = lab.separator(ORT, batch=1), lab.separator(ORT, batch=2)
    assert one.engine("film") is two.engine("film")
    assert one.engine("film") is not lab.separator(ORT, threads=1).engine("film")
    Sharing.forget()
    assert one.engine("film") is not lab.separator(ORT).engine("film")


def test_rounds_go_through_all_probes_by_turns():
    order = []

    def call(name):
        order.append(name)
        time.sleep(0.002)  # long enough to be an observation

    found = Stopwatch().measure([Probe(name, "numpy", partial(call, name)) for name in "ab"], Budget(0.0, 7))
    assert [(case.calls, len(case.observations)) for case in found] == [(1, 7), (1, 7)]
    assert "".join(order) == "aabb" + 7 * "ab", "two calls each to warm up"


def test_short_calls_are_repeated_for_one_observation():
    calls = []
    (case,) = Stopwatch().measure([Probe("tick", "numpy", lambda: calls.append(0))], Budget(0.0, 3))
    assert case.calls > 10
    assert len(calls) == 3 * case.calls + 2, "two more to warm up"


def test_a_budget_is_used_but_not_for_ever():
    stopwatch = Stopwatch()
    (case,) = stopwatch.measure([Probe("tick", "numpy", lambda: None)], Budget(0.1, 2))
    assert 2 < len(case.observations) <= 300
    assert any(case.begin <= reading.at <= case.end for reading in stopwatch.reference)


def test_what_other_programs_take_is_seen():
    """A child that has not ended counts as somebody else."""
    neighbours = Neighbours()
    if neighbours() is None:
        pytest.skip("this system does not say how busy its processors are")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(0.5)
        found = neighbours()
        other.kill()
    assert found is not None
    assert found > 0.05


def test_variants_are_read_from_words():
    assert Variant.parse("openvino") == Variant("openvino")
    assert Variant.parse("openvino:bf16", "cpu") == Variant("openvino", "cpu", "bf16")
    assert Variant.parse("onnxruntime:cuda", "cpu", "bf16") == Variant("onnxruntime", "cuda", "bf16")
    with pytest.raises(InputError, match="no device or precision"):
        Variant.parse("openvino:")


def test_a_process_that_fails_is_reported(lab, tmp_path):
    lab.bundle = SimpleNamespace(path=tmp_path / "gone", manifest=lab.bundle.manifest)
    with pytest.raises(EngineError, match=r"fresh process with engine openvino failed .*not a bundle directory.*doctor"):
        starts._start(lab, OPENVINO)


def test_threads_are_powers_of_two_up_to_the_cores(monkeypatch):
    for cores, wanted in {1: (1,), 2: (1, 2), 6: (1, 2, 4, 6), 8: (1, 2, 4, 8)}.items():
        monkeypatch.setattr(cases, "physical_cores", lambda cores=cores: cores)
        assert Sweeps().engine_threads() == wanted
    assert Sweeps(threads=(3,)).engine_threads() == (3,)
