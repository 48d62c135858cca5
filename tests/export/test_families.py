"""Every family goes through the same doors: build, gates, engines, files, folders, job lists, streams, benchmarks; and so does bad input."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from clapsep.export.build import Request, build
from clapsep.export.checkpoint import read_checkpoint
from clapsep.export.family import open_model
from clapsep.runtime import Bundle, Query, Separator
from clapsep.runtime.errors import CheckpointError, EngineError, InputError, QueryError
from clapsep.runtime.family import family_class, family_names
from clapsep.runtime.metrics import snr
from clapsep.runtime.windows import PRESETS
from family_cases import CASES, CONFORMER, RESUNET, WAVEFORMER, Case, write_clap, write_tokenizer, write_trained
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
RATE, LENGTH = 44100, 90011
X = np.random.default_rng(0).uniform(-0.5, 0.5, (2, LENGTH)).astype(np.float32)
CLIP = np.random.default_rng(1).uniform(-0.5, 0.5, 40000).astype(np.float32)


class Made:
    """A family's bundle in a folder with its checkpoint and with what it can be asked."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.path = case, folder, folder / f"{case.family}.clapsep"
        self.checkpoint, self.asked = case.write(folder), case.ask(folder)

    @cached_property
    def separator(self) -> Separator:
        return Separator(self.path)

    @property
    def queries(self) -> list[Query]:
        return [asked.query for asked in self.asked]


@pytest.fixture(scope="module")
def bundles(run, tmp_path_factory):
    """The bundle of a case, built once by the real command; tests must not change it."""

    @cache
    def get(case: Case) -> Made:
        made = Made(case, tmp_path_factory.mktemp(case.family))
        run("clapsep-export", "build", made.path, "--checkpoint", made.checkpoint)
        return made

    return get


@pytest.fixture(params=CASES, ids=lambda case: case.family)
def made(request, bundles) -> Made:
    return bundles(request.param)


@pytest.fixture
def waveformer(bundles) -> Made:
    return bundles(WAVEFORMER)


@pytest.fixture
def mix(tmp_path) -> Path:
    """A file of 44.1 kHz stereo."""
    return write(tmp_path / "mix.wav", X)


def write(path: Path, x: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    sf.write(path, x.T, RATE, subtype="FLOAT")
    return path


def read(path: Path) -> np.ndarray:
    return sf.read(path, dtype="float32", always_2d=True)[0].T


# ---- builds


def test_builds_recognise_the_family_and_pass_every_gate(made, run):
    manifest = Bundle.open(made.path).manifest
    assert manifest.family == made.case.family
    assert all(gate.passed for gate in manifest.gates)
    assert {gate.stage.split()[0] for gate in manifest.gates} == set(made.case.routes)
    assert manifest.tokenizer is None
    said = run("clapsep-export", "inspect", made.path).stdout
    assert f"gates      onnxruntime: {len(manifest.gates)} of {len(manifest.gates)} passed" in said
    assert ("labels     Acoustic_guitar, Applause, Bark, " in said) == made.case.labels
    assert json.loads(run("clapsep-export", "inspect", made.path, "--json").stdout)["family"] == made.case.family


def test_a_named_family_is_the_recognised_one(made):
    checkpoint = read_checkpoint(made.checkpoint, "checkpoint")
    assert open_model(None, checkpoint, made.case.family).family == open_model(None, checkpoint).family == made.case.family
    for other in set(family_names()) - {made.case.family}:
        with pytest.raises(CheckpointError, match=rf"{made.checkpoint.name} .* and not of .*; leave --family out"):
            open_model(None, checkpoint, other)


def test_families_are_listed_with_all_their_facts(run):
    names = ["clapsep", "conformer", "resunet30", "waveformer"]
    said, table = run("clapsep-export", "families").stdout, json.loads(run("clapsep-export", "families", "--json").stdout)
    assert list(table) == names
    for name in names:
        facts = asdict(family_class(name).facts)
        assert table[name] == facts
        assert all(facts.values())
        assert all(str(value) in said for value in facts.values())


@pytest.fixture
def other(tmp_path) -> Path:
    """A checkpoint of no family."""
    torch.save(
        {"state_dict": {"layer.weight": torch.ones(3), "layer.bias": torch.ones(3), "head.0.bias": torch.ones(2)}}, tmp_path / "a.pt"
    )
    return tmp_path / "a.pt"


def test_a_checkpoint_of_no_family_is_described(run, other, tmp_path):
    done = run("clapsep-export", "build", tmp_path / "x.clapsep", "--checkpoint", other, code=2)
    assert re.search(r"error: --checkpoint a.pt looks like 3 tensors under layer.weight \(1\), .*name its --family\n$", done.stderr)
    for name in family_names():
        assert family_class(name).facts.title in done.stderr
        with pytest.raises(CheckpointError):
            open_model(None, read_checkpoint(other, "checkpoint"), name)


def test_builds_refuse_what_a_family_does_not_take(made, tmp_path):
    out, clap, tokenizer = tmp_path / "x.clapsep", str(write_clap(tmp_path)), str(write_tokenizer(tmp_path))
    own = str(made.checkpoint)
    refused = {
        Request(checkpoint=own, family="wavenet"): "no family 'wavenet'; choose one of: clapsep, conformer, resunet30, waveformer",
        Request(checkpoint=own, tokenizer=tokenizer): f"--tokenizer is for text queries, which this {made.case.family} model does not take",
        Request(checkpoint=own, clap=own): "not like a CLAP checkpoint; give it as --checkpoint",
        Request(checkpoint=clap): "--checkpoint clap.pt looks like a CLAP checkpoint, .*; give it as --clap",
        Request(demo=True, family=made.case.family): "is a checkpoint of CLAPSep, and not of .*; leave --family out",
    }
    if made.case is not RESUNET:  # which may have towers
        refused[Request(checkpoint=own, clap=clap)] = "leave --clap out"
    for request, words in refused.items():
        with pytest.raises(InputError, match=words):
            build(out, request, lambda _: None)
    assert not out.exists()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("case", [RESUNET, pytest.param(WAVEFORMER, marks=pytest.mark.slow), CONFORMER], ids=lambda case: case.family)
def test_gates_pass_with_every_engine_of_this_machine(run, bundles, case, engine):
    gates = json.loads(run("clapsep-export", "verify", bundles(case).path, "--engine", engine, "--json").stdout)
    assert len(gates) >= 26
    assert all(gate["passed"] and gate["engine"] == engine for gate in gates)
    assert {gate["stage"].split()[0] for gate in gates} == set(case.routes)


@pytest.mark.slow
def test_float16(run, made, tmp_path):
    out = tmp_path / "half.clapsep"
    run("clapsep-export", "build", out, "--checkpoint", made.checkpoint, "--precision", "fp16")
    manifest = Bundle.open(out).manifest
    assert all(gate.passed for gate in manifest.gates)
    assert {gate.engine for gate in manifest.gates} == {"onnxruntime", "strict"}
    assert {graph.precision for graph in manifest.graphs.values()} == {"fp16"}
    query = made.queries[0]
    assert snr(made.separator.separate(X[0], RATE, query), Separator(out).separate(X[0], RATE, query)) > 40


@pytest.mark.slow
def test_plans_for_a_gpu_that_is_not_here(run, made, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    copy = shutil.copytree(made.path, tmp_path / "copy.clapsep")
    run("clapsep-export", "compile", copy, "--engine", "tensorrt-rtx", "--compute-capability", "8.9")
    plans = Bundle.open(copy).manifest.plans
    assert {"separator" if "waveform" in made.case.routes else "mixture_encoder", "film"} <= {plan.graph for plan in plans}
    assert all("SM 8.9" in str(plan.target) for plan in plans)
    assert "could not be verified where they were compiled" in run("clapsep-export", "inspect", copy).stdout


@pytest.mark.slow
def test_benchmarks_run(run, made, tmp_path):
    run("clapsep-export", "bench", made.path, "--quick", "--json", tmp_path / "b.json")
    cases = json.loads((tmp_path / "b.json").read_text())["cases"]
    assert {case["parameters"]["route"] for case in cases if case["name"] == "separate"} == set(made.case.routes)
    graphs = Bundle.open(made.path).manifest.graphs
    assert {case["name"] for case in cases if case["name"].startswith("graph ")} == {f"graph {name}" for name in graphs}
    assert {"separate long file", "separate many", "separate for callers", "cold start", "memory peak"} <= {case["name"] for case in cases}


# ---- files, folders, job lists


def test_a_file(run, made, mix, tmp_path):
    for asked in made.asked[:2]:
        run("clapsep", "separate", made.path, mix, *asked.options, "-o", tmp_path / "out.wav", "--force")
        np.testing.assert_allclose(read(tmp_path / "out.wav"), made.separator.separate(X, RATE, asked.query), atol=1e-6)
        info = sf.info(tmp_path / "out.wav")
        assert (info.samplerate, info.channels, info.frames, info.subtype) == (RATE, 2, LENGTH, "FLOAT")
    assert snr(*(made.separator.separate(X, RATE, query) for query in made.queries[:2])) < 30  # the query counts


def test_a_folder_and_the_rest_of_it(run, made, tmp_path):
    sounds = {"a.wav": X, "b.wav": X[:1, 7777:]}
    for name, x in sounds.items():
        write(tmp_path / "in" / name, x)
    words = ["separate", made.path, tmp_path / "in", *made.asked[0].options, "-o", tmp_path / "out"]
    assert "2 done, 0 failed, 0 skipped" in run("clapsep", *words).stderr
    (tmp_path / "out" / "b.wav").unlink()
    assert "1 done, 0 failed, 1 skipped" in run("clapsep", *words, "--resume").stderr
    for name, x in sounds.items():
        np.testing.assert_allclose(read(tmp_path / "out" / name), made.separator.separate(x, RATE, made.queries[0]), atol=1e-6)


def test_a_job_list_that_asks_in_every_line(run, made, mix, tmp_path):
    lines = [{"input": mix.name, "output": f"{i}.wav", **asked.fields} for i, asked in enumerate(made.asked)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("clapsep", "separate", made.path, tmp_path / "jobs.jsonl", "-o", tmp_path / "out")
    for i, query in enumerate(made.queries):
        np.testing.assert_allclose(read(tmp_path / "out" / f"{i}.wav"), made.separator.separate(X, RATE, query), atol=1e-6)


def test_several_labels_of_one_file(run, waveformer, mix, tmp_path):
    named = {"bark": "Bark", "two": "Cough + meow"}
    targets = [word for name, text in named.items() for word in ("--target", f"{name}={text}")]
    run("clapsep", "separate", waveformer.path, mix, *targets, "-o", tmp_path / "out")
    wanted = waveformer.separator.separate_many(X, RATE, list(named.values()))
    for name, target in zip(named, wanted, strict=True):
        np.testing.assert_allclose(read(tmp_path / "out" / f"mix.{name}.wav"), target, atol=1e-6)


def test_many_queries_give_what_each_gives_alone(made):
    together = made.separator.separate_many(X, RATE, made.queries)
    for query, target in zip(made.queries, together, strict=True):
        assert snr(made.separator.separate(X, RATE, query), target) > 110


# ---- streams


def test_a_pipe(made):
    words = ["stream", made.path, *made.asked[0].options, "--rate", RATE, "--channels", 2, "--format", "f32le"]
    done = subprocess.run(
        [sys.executable, "-m", "clapsep.runtime", *map(str, words)], input=X.T.tobytes(), capture_output=True, check=True, timeout=600
    )
    found = np.frombuffer(done.stdout, "<f4").reshape(-1, 2).T
    settings = {} if made.separator.plan is None else PRESETS["balanced"]
    stream = made.separator.stream(made.queries[0], sample_rate=RATE, channels=2, **settings)
    np.testing.assert_allclose(found, np.concatenate([stream.push(X), stream.finish()], axis=1), atol=1e-6)
    assert f"latency {stream.latency:.3g} s" in done.stderr.decode()


def pieces(stream, x, places=(0, 1, 999, 30000, 30001, 70000)) -> np.ndarray:
    return np.concatenate([*(stream.push(piece) for piece in np.split(x, places, axis=1)), stream.finish()], axis=1)


def test_a_stream_in_pieces_is_the_whole_file(made):
    stream = made.separator.stream(made.queries[0], sample_rate=RATE, channels=2)
    np.testing.assert_array_equal(pieces(stream, X), made.separator.separate(X, RATE, made.queries[0]))


def test_another_question_in_the_middle_of_a_stream(made):
    first, second = (made.separator.separate(X, RATE, query) for query in made.queries[:2])
    stream = made.separator.stream(made.queries[0], sample_rate=RATE, channels=2)
    begin = stream.push(X[:, :60000])
    stream.ask(made.queries[1])
    found = np.concatenate([begin, stream.push(X[:, 60000:]), stream.finish()], axis=1)
    np.testing.assert_array_equal(found[:, :4000], first[:, :4000])
    assert snr(second[:, -4000:], found[:, -4000:]) > 110


def test_the_latency_of_windows(made):
    if made.separator.plan is None:
        pytest.skip("a causal model has none")
    stream = made.separator.stream(made.queries[0], hop=0.5, overlap=0.25)
    assert stream.latency == pytest.approx(0.75)
    assert set(stream.delays) == {"hop", "overlap", "resampling"}


def test_a_causal_model_has_its_own_steps(run, waveformer, mix):
    separator, query = waveformer.separator, waveformer.queries[0]
    stream = separator.stream(query)
    assert (stream.latency, stream.period, stream.plan) == (448 / 44100, 416 / 44100, None)
    for call in (
        lambda: Separator(waveformer.path, hop=0.5),
        lambda: separator.stream(query, overlap=0.1),
        lambda: separator.stream_many([query], hop=1.0),
    ):
        with pytest.raises(QueryError, match=r"goes in steps of 9.43 ms; leave them out"):
            call()
    for words in (["--preset", "live"], ["--hop", "1"], ["--overlap", "0.2"]):
        done = run("clapsep", "separate", waveformer.path, mix, "--positive", "Bark", *words, "-o", mix.parent / "out.wav", code=2)
        assert "goes in steps of 9.43 ms; leave them out" in done.stderr


def test_a_causal_model_has_no_batches_of_windows(waveformer):
    with pytest.raises(QueryError, match="a batch is of windows"):
        Separator(waveformer.path, batch=2)


def test_nothing_that_is_not_finite_leaves_a_stream(made, monkeypatch):
    stream = made.separator.stream(made.queries[0])
    monkeypatch.setattr(stream._driver, "push", lambda x: np.full((1, len(x), 5), np.nan, np.float32))
    with pytest.raises(EngineError, match="values that are not finite"):
        stream.push(X[0])


def test_a_causal_model_has_no_masks(waveformer):
    with pytest.raises(QueryError, match="there are no masks, as the model goes from waveform to waveform"):
        waveformer.separator.mask(np.zeros((1, 88200), np.float32), waveformer.separator.condition("Bark"))


# ---- what is refused


def bad_vectors(folder: Path, size: int) -> dict[str, str]:
    """Files that are no vector for a model, and what is said of them."""
    arrays = {
        "short": (np.ones(size - 1), "short.npy is float64"),
        "nan": (np.full(size, np.nan), f"takes {size} finite numbers"),
        "huge": (np.full(size, 1e300), f"takes {size} finite numbers"),
        "words": (np.array(["rain"] * size), f"takes {size} finite numbers"),
        "objects": (np.array([{}] * size, object), "objects.npy is not a vector"),
    }
    for name, (array, _) in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    files = {"pickle": pickle.dumps([1.0] * size), "text": b"rain"}
    for name, content in files.items():
        (folder / f"{name}.npy").write_bytes(content)
    np.savez(folder / "archive.npz", np.ones(size))
    with (folder / "endless.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    said = {f"{name}.npy": words for name, (_, words) in arrays.items()}
    return said | {f"{name}.npy": "is not a vector" for name in ("pickle", "text", "endless", "none")} | {"archive.npz": "is not a vector"}


def test_vectors_that_are_none(run, made, mix, tmp_path):
    for name, words in bad_vectors(tmp_path, made.case.size).items():
        with pytest.raises(QueryError, match=words) as error:
            made.separator.condition(Query(vector=tmp_path / name))
        assert not re.search("unsafe|allow_pickle", str(error.value))  # no advice to trust the file
    done = run("clapsep", "separate", made.path, mix, "--positive-vector", tmp_path / "archive.npz", "-o", tmp_path / "out.wav", code=2)
    assert re.search(r"^error: .*archive.npz is not a vector \(.*; give an .npy file of \d+ numbers\n$", done.stderr, re.MULTILINE)


def questions(made: Made, clip: Path) -> dict[tuple[str, ...], str]:
    """Options that a bundle without towers refuses, and what is said."""
    asked, vector = made.asked[0].options, str(made.folder / "0.npy")
    np.save(vector, np.ones(made.case.size))
    negative = f"a negative query was given and {made.case.family} models take positive ones only; leave it out"
    refused = {
        (*asked, "--negative", "rain"): negative,
        (*asked, "--negative-vector", vector): negative,
        (*asked, "--negative-audio", str(clip)): negative,
        ("--negative", "rain"): negative,
        (*asked, "--positive-audio", str(clip)): "by labels, not by example sounds" if made.case.labels else "give one or the other",
        (*asked, "--crop", "center"): "the crop policy 'center' is for audio queries",
        (): "say what to extract",
    }
    if made.case.labels:
        words = {(): "no label was given", ("--positive", "Bark, dog barkin"): "no label 'dog barkin' (did you mean Bark?)"}
        return {**refused, **words, (*asked, "--normalize"): "nothing to normalise", (*asked, "--no-normalize"): "nothing to normalise"}
    none = "has no encoders for texts or examples; give a query as"
    return {**refused, ("--positive", "rain"): none, ("--positive-audio", str(clip)): none, ("--target", "a=rain"): none}


def test_questions_that_a_family_cannot_answer(run, made, mix, tmp_path):
    for options, words in questions(made, mix).items():
        done = run("clapsep", "separate", made.path, mix, *options, "-o", tmp_path / "results", code=2)
        (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert words in said
        assert said == done.stderr.splitlines()[-1]
    assert not list((tmp_path / "results").rglob("*.wav"))


def test_presets_and_negatives_of_the_family_with_both(run, demo_bundle, mix):
    """The same words, understood where they mean something."""
    words = ["--positive", "rain", "--negative", "a dog", "--preset", "fast", "--crop", "center", "--no-normalize"]
    run("clapsep", "separate", demo_bundle, mix, *words, "-o", mix.parent / "out.wav")
    wanted = Separator(demo_bundle, **PRESETS["fast"], normalize=False).separate(X, RATE, "rain", "a dog")
    np.testing.assert_allclose(read(mix.parent / "out.wav"), wanted, atol=1e-6)


# ---- query towers of another family


@pytest.fixture(scope="module")
def towered(run, tmp_path_factory):
    """A bundle with CLAP given beside the checkpoint."""
    folder = tmp_path_factory.mktemp("towered")
    words = ["--clap", write_clap(folder), "--checkpoint", RESUNET.write(folder), "--tokenizer", write_tokenizer(folder)]
    run("clapsep-export", "build", folder / "t.clapsep", *words, "--family", "resunet30")
    return folder / "t.clapsep"


def check_towers(path: Path) -> Separator:
    """Texts, examples and both, as the towers of the bundle embed them."""
    separator = Separator(path)
    assert all(gate.passed for gate in separator.bundle.manifest.gates)
    assert {"text_encoder", "audio_encoder"} < {gate.stage for gate in separator.bundle.manifest.gates}
    (text,), (audio,) = separator.encode_text(["Rain On A Roof"]), separator.encode_audio([(CLIP, 32000)])
    mixed = 0.3 * audio + 0.7 * text
    asked = [Query("Rain On A Roof"), Query(audio=[(CLIP, 32000)]), Query("Rain On A Roof", [(CLIP, 32000)], 0.3)]
    for query, wanted in zip(asked, (text, audio, mixed / np.linalg.norm(mixed)), strict=True):
        np.testing.assert_allclose(separator.condition(query), wanted, atol=1e-6)
    with pytest.raises(QueryError, match="resunet30 models take positive ones only"):
        separator.condition("rain", "a dog")
    return separator


def test_towers_of_another_file(run, towered, mix, tmp_path):
    separator = check_towers(towered)
    assert [source.role for source in separator.bundle.manifest.sources] == ["clap", "checkpoint"]
    clip = tmp_path / "clip.wav"
    sf.write(clip, CLIP, 32000, subtype="FLOAT")
    words = ["--positive", "Rain On A Roof", "--positive-audio", clip, "--alpha", "0.3", "--crop", "center"]
    run("clapsep", "separate", towered, mix, *words, "-o", tmp_path / "out.wav")
    wanted = separator.separate(X, RATE, Query("Rain On A Roof", [clip], 0.3))
    np.testing.assert_allclose(read(tmp_path / "out.wav"), wanted, atol=1e-6)


def test_texts_reach_the_tokenizer_as_they_are(towered):
    separator, backend = Separator(towered), Tokenizer.from_file(str(towered / "tokenizer.json"))
    for text in ("Rain On A Roof", "rain on a roof", " a dog"):
        ids = np.ones((1, 512), np.int64)
        known = backend.encode(text).ids
        ids[0, : len(known)] = known
        mask = (np.arange(512) < len(known))[None].astype(np.int64)
        wanted = separator.engine("text_encoder").run({"input_ids": ids, "attention_mask": mask})["embedding"]
        np.testing.assert_allclose(separator.encode_text([text]), wanted, atol=1e-6)
    upper, lower = separator.encode_text(["Rain On A Roof", "rain on a roof"])
    assert np.abs(upper - lower).max() > 1e-3


@pytest.mark.slow
def test_towers_inside_a_training_checkpoint(run, tmp_path):
    """Without metadata the window is the published one."""
    words = ["--checkpoint", write_trained(tmp_path), "--tokenizer", write_tokenizer(tmp_path)]
    run("clapsep-export", "build", tmp_path / "t.clapsep", *words)
    separator = check_towers(tmp_path / "t.clapsep")
    assert separator.family.window_samples == 320000
    assert separator.separate(X, RATE, "rain").shape == X.shape
    with pytest.raises(CheckpointError, match="holds the CLAP that it was trained with; leave --clap out"):
        build(tmp_path / "x.clapsep", Request(str(write_clap(tmp_path)), str(words[1]), str(words[3])), lambda _: None)


# ---- architecture


def test_no_family_is_named_outside_its_own_files():
    named = re.compile("resunet|waveformer|conformer|audiosep", re.IGNORECASE)
    files = [path for room in ("engines", "runtime", "export") for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 70
    found = [str(path.relative_to(ROOT)) for path in files if path.parent.name != "families" and named.search(path.read_text())]
    assert found == []
