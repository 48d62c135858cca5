"""The full-size model: published file layouts → `clapsep-export build` → ONNX Runtime → numpy, against the official outputs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from clapsep.export.checkpoint import read_checkpoint
from clapsep.export.families.clapsep import TUNED, ClapsepModel, open_model
from clapsep.runtime import Separator
from clapsep.runtime.metrics import snr
from clapsep.runtime.resampler import resample_2_3
from published import CASES, GOLDEN, SEED, SHORT, case, manifest, tensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs():
    return np.load(GOLDEN / "inputs.npz")


@pytest.fixture(scope="module")
def mixture(inputs):
    return inputs["mixture_i16"] / np.float32(32768)


@pytest.fixture(scope="module")
def separator(bundle) -> Separator:
    return Separator(bundle)


@pytest.fixture(scope="module")
def model(pair) -> ClapsepModel:
    return open_model(read_checkpoint(pair[0], "clap"), read_checkpoint(pair[1], "checkpoint"))


def test_published_layouts_have_the_published_sizes(pair):
    assert abs(pair[1].stat().st_size - 177_818_986) < 10_000  # the published best_model.ckpt
    assert len(manifest("clapsep_best_model_subset")) == 300
    assert len(manifest("clap_music_audioset_htsat_base")) == 505


@pytest.mark.parametrize("name", [name for name in CASES if name not in SHORT])
def test_every_case_through_the_finished_path(separator, mixture, name):
    halves, normalise, n, part, wanted, mask = case(name)
    condition = separator.family.condition(*halves, normalize=normalise)
    assert snr(wanted, separator.separate(mixture[:n], 32000, condition=condition)[part]) >= 120
    assert snr(mask, separator.mask(mixture[None, :n], condition)[0, ::4, ::3]) >= 100


@pytest.fixture(scope="module")
def waveform(bundle) -> Separator:
    return Separator(bundle, route="waveform")


@pytest.mark.parametrize("name", [name for name in CASES if name not in SHORT])
def test_every_case_through_the_waveform_graph(separator, waveform, mixture, name):
    """Transforms as float32 products instead of numpy's."""
    halves, normalise, n, part, wanted, _ = case(name)
    condition = separator.family.condition(*halves, normalize=normalise)
    by_graph, by_numpy = (s.separate(mixture[:n], 32000, condition=condition) for s in (waveform, separator))
    assert snr(by_numpy, by_graph) >= 110
    assert snr(wanted, by_graph[part]) >= 110


@pytest.mark.parametrize("name", CASES)
def test_every_case_on_the_pytorch_modules(model, mixture, name):
    """The modules also take the short cases, whose frames are fewer than the graphs'."""
    halves, normalise, n, part, wanted, _ = case(name)
    joined = np.concatenate([np.zeros(512, np.float32) if half is None else half for half in halves])
    condition = joined / np.linalg.norm(joined) if normalise else joined
    assert snr(wanted, model.separate(mixture[None, :n], condition.astype(np.float32))[0, part]) >= 120


def test_short_input_is_padded_to_ten_seconds_in_the_graph_path(separator, mixture):
    halves, normalise, n, part, wanted, _ = case("text_P_4s")
    condition = separator.family.condition(*halves, normalize=normalise)
    found = separator.separate(mixture[:n], 32000, condition=condition)
    padded = np.concatenate([mixture[:n], np.zeros(320000 - n, np.float32)])
    np.testing.assert_array_equal(found, separator.separate(padded, 32000, condition=condition)[:n])
    assert snr(wanted, found[part]) < 40  # a different, also legitimate answer


def test_text_embeddings(separator, inputs):
    found = separator.engine("text_encoder").run({"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})
    wanted = np.load(GOLDEN / "embeddings.npz")["text_embed"]
    np.testing.assert_allclose(found["embedding"], wanted, atol=1e-5)
    np.testing.assert_allclose(case("text_P")[0][0], found["embedding"][0], atol=1e-5)


def test_audio_embeddings(separator, inputs):
    clips = [(inputs[name], 48000) for name in ("query48_10s_i16", "query48_3s_i16")]
    wanted = np.load(GOLDEN / "embeddings.npz")["audio_embed_10s_3s"]
    np.testing.assert_allclose(separator.encode_audio(clips), wanted, atol=1e-5)
    np.testing.assert_allclose(case("audio10_P")[0][0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(case("textP_audio3N")[0][1], wanted[1], atol=1e-5)


def bn0(log_mel, module):
    return module.audio_branch.bn0(torch.from_numpy(log_mel)).numpy()


def test_log_mel_after_bn0(separator, model, mixture, inputs):
    wanted = np.load(GOLDEN / "case_text_P.npz")["logmel_bn0"]
    front_end = separator.family.towers.front_end  # type: ignore[attr-defined]
    found = bn0(front_end.log_mel(resample_2_3(mixture)), model.separator)
    np.testing.assert_allclose(found, wanted[:1001], atol=1e-3 / 20)  # bn0 divides dB by about 20
    padding = bn0(np.full((1, 64), -100, np.float32), model.separator)
    np.testing.assert_allclose(wanted[1001:], np.repeat(padding, 23, 0), atol=1e-5)
    embeddings = np.load(GOLDEN / "embeddings.npz")
    resized = model.towers.audio.get_buffer("resize").numpy()
    for name, clip in (("10s", "query48_10s_i16"), ("3s", "query48_3s_i16")):
        rows = bn0(separator.family.towers.features(inputs[clip] / np.float32(32768), 48000, None)[0], model.towers.audio)
        wanted = embeddings[f"query_logmel_bn0_{name}_sub"]
        closest = min(np.max(np.abs(x[::4] - wanted)) for x in (rows, resized @ rows) if x[::4].shape == wanted.shape)
        assert closest < 1e-3 / 20


def test_dropping_lora_and_tuned_biases_is_seen(pair, mixture):
    checkpoint = read_checkpoint(pair[1], "checkpoint")
    for name in [name for name in checkpoint.tensors if TUNED.search(name)]:
        del checkpoint.tensors[name]
    untuned = open_model(read_checkpoint(pair[0], "clap"), checkpoint)
    halves, _, n, part, wanted, _ = case("text_P")
    condition = np.concatenate([halves[0], np.zeros(512, np.float32)])
    assert 15 < snr(wanted, untuned.separate(mixture[None, :n], condition)[0, part]) < 25


def test_a_raw_training_checkpoint_gives_the_same_model(model, mixture, tmp_path):
    path = tmp_path / "epoch.ckpt"
    torch.save({"epoch": 1, "state_dict": tensors("clapsep_lightning_full", SEED), "optimizer_states": []}, path)
    assert len(manifest("clapsep_lightning_full")) == 1024
    raw = open_model(None, read_checkpoint(path, "checkpoint"))
    for one, other in ((model.towers.text, raw.towers.text), (model.towers.audio, raw.towers.audio), (model.separator, raw.separator)):
        ours, theirs = one.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_graphs_are_lean_static_and_optimisation_proof(bundle):
    import onnx

    for name, limit in {"separator": 760, "audio_encoder": 530, "text_encoder": 345, "separator_waveform": 830}.items():
        model = onnx.load(bundle / "graphs" / f"{name}.onnx", load_external_data=False)
        found = Counter(node.op_type for node in model.graph.node)
        assert sum(found.values()) < limit
        assert not {"Shape", "If", "Loop", "Conv"} & set(found)
        assert model.opset_import[0].version == 20
    code = (
        "import sys, numpy as np, onnxruntime as ort; path = sys.argv[1]; found = []\n"
        "for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):\n"
        "    o = ort.SessionOptions(); o.graph_optimization_level = level\n"
        "    s = ort.InferenceSession(path, o, providers=['CPUExecutionProvider']); r = np.random.default_rng(0)\n"
        "    x = {i.name: r.random((1, *i.shape[1:]), np.float32) for i in s.get_inputs()}\n"
        "    found.append(s.run(None, x)[0])\n"
        "print(np.max(np.abs(found[0] - found[1])))"
    )
    path = str(bundle / "graphs" / "separator.onnx")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-5
