"""The Conformer extractor's network against its formulas, its graphs against the network, and everything that can be wrong with a file."""

import dataclasses
import math

import numpy as np
import onnx
import pytest
import torch
from clapsep.engines import EngineOptions, open_engine
from clapsep.export.checkpoint import read_checkpoint
from clapsep.export.families.conformer import (
    Attention,
    ConformerConfig,
    Extractor,
    Film,
    FoldedAttention,
    Separator,
    open_model,
    recognises,
)
from clapsep.runtime.errors import CheckpointError
from clapsep.runtime.family import open_family
from clapsep.runtime.graph import check_graph
from clapsep.runtime.metrics import snr
from conformer_files import TINY, WINDOW, checkpoint, export, generated, model, write_generated

OPTIONS = [
    {},
    {"position": "abs_sin"},
    {"position": "none", "cond_residual": True},
    {"norm": "layer"},
    {"heads": 4, "kernel": 1, "layers": 1},
]
X = np.random.default_rng(0).uniform(-0.5, 0.5, (2, WINDOW)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("conformer")
    made = model()
    return root, made, export(made, root)


def run(root, manifest, graph, **inputs):
    engine = open_engine("onnxruntime", root / manifest.graphs[graph].graph.file, EngineOptions())
    return next(iter(engine.run(inputs).values()))


def by_numpy(root, made, manifest):
    """The mixture X through the finished path, asked for the first condition."""
    family = open_family(manifest)
    film = np.repeat(run(root, manifest, "film", condition=made.conditions()[:1]), 2, axis=0)
    features, context = family.features(X)
    return family.reconstruct({"mask": run(root, manifest, "separator", film=film, **features)}, context)


@pytest.mark.parametrize(
    ("condition", "position", "count"),
    [(512, "rel_pos", 31995137), (512, "none", 30938369), (1024, "rel_pos", 36189441), (1024, "abs_sin", 35132673)],
)
def test_the_full_size_has_the_parameters_of_the_definition(condition, position, count):
    with torch.device("meta"):
        parameters = dict(Extractor(ConformerConfig(condition=condition, position=position)).named_parameters())
    assert sum(p.numel() for p in parameters.values()) == count
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    assert shapes["blocks.15.cond.gamma.weight"] == (256, condition)
    assert shapes["blocks.0.conv.pw1.weight"] == (512, 256, 1)
    assert shapes["blocks.0.conv.dw.weight"] == (256, 1, 31)
    assert (shapes.get("blocks.0.attn.pos_u") == (4, 64)) == (position == "rel_pos")


def test_relative_attention_is_the_formula():
    """Term by term in float64, on distances of both signs."""
    n, heads, size = 7, 2, 8
    torch.manual_seed(0)
    attention = Attention(TINY).requires_grad_(False)
    for bias in (attention.pos_u, attention.pos_v):
        bias.normal_()
    x = torch.randn(1, n, heads * size)
    folded = FoldedAttention(attention, n)(x)[0].detach()
    attention, x = attention.double(), x.double()
    z = attention.norm(x)[0]
    q, k, v = (linear(z).reshape(n, heads, size) for linear in (attention.q, attention.k, attention.v))
    wanted = torch.zeros(n, heads, size).double()
    for h in range(heads):
        for i in range(n):
            scores = torch.zeros(n).double()
            for j in range(n):
                angles = [(i - j) * 10000 ** (-2 * c / 16) for c in range(8)]
                encoding = torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)], dtype=torch.float64)
                position = (attention.pos.weight @ encoding).reshape(heads, size)[h]
                scores[j] = ((q[i, h] + attention.pos_u[h]) @ k[j, h] + (q[i, h] + attention.pos_v[h]) @ position) / math.sqrt(size)
            wanted[i, h] = scores.softmax(0) @ v[:, h]
    wanted = attention.out(wanted.flatten(1))
    assert snr(wanted.numpy(), attention(x)[0].numpy()) > 250
    assert snr(wanted.numpy(), folded.numpy()) > 120


@pytest.mark.parametrize("options", OPTIONS)
def test_folded_is_unfolded(options):
    config = dataclasses.replace(TINY, **options)
    extractor = Extractor(config).eval().requires_grad_(False)
    extractor.load_state_dict(generated(config, seed=3))
    magnitude, condition = torch.rand(2, 21, 33) * 4, torch.nn.functional.normalize(torch.randn(2, 12))
    wanted = extractor(magnitude, condition).numpy()
    assert snr(wanted, Separator(extractor, 21)(magnitude, Film(extractor)(condition)).detach().numpy()) > 110
    assert snr(wanted, extractor(magnitude, -condition).numpy()) < 40  # the query counts
    assert np.ptp(wanted) > 0.2


def test_later_frames_differ_by_their_position_alone():
    """Of equal frames far from the ends, only absolute positions make a difference."""
    for position, differ in {"none": False, "rel_pos": False, "abs_sin": True}.items():
        config = dataclasses.replace(TINY, position=position, layers=1)
        extractor = Extractor(config).eval()
        extractor.load_state_dict(generated(config))
        mask = extractor(torch.ones(1, 41, 33), torch.ones(1, 12)).detach()[0]
        assert (float((mask[20] - mask[19]).abs().max()) > 1e-3) == differ


@pytest.mark.parametrize("options", OPTIONS)
def test_graphs_in_onnx_runtime_are_the_reference(tmp_path, options):
    made = model(dataclasses.replace(TINY, **{"layers": 1, **options}))
    manifest = export(made, tmp_path, derived=False)
    wanted, found = made.separate(X, made.conditions()[0]), by_numpy(tmp_path, made, manifest)
    assert snr(wanted, found) > 100
    assert snr(wanted, made.separate(X, made.conditions()[1])) < 60


def test_the_waveform_graph_is_the_path_through_numpy(exported):
    root, made, manifest = exported
    film = np.repeat(run(root, manifest, "film", condition=made.conditions()[:1]), 2, axis=0)
    assert snr(by_numpy(*exported), run(root, manifest, "separator_waveform", mixture=X, film=film)) > 100


def test_graphs_are_plain_and_lean(exported):
    root, _, manifest = exported
    for name, limit in {"film": 1, "separator": 8 + 2 * 59, "separator_waveform": 50 + 2 * 59}.items():
        check_graph(root / manifest.graphs[name].graph.file, manifest.graphs[name])
        assert manifest.graphs[name].nodes <= limit
    assert [node.op_type for node in onnx.load(root / "graphs" / "film.onnx").graph.node] == ["Gemm"]


def test_silence_stays_silence(exported):
    root, made, manifest = exported
    silence, film = np.zeros_like(X), run(root, manifest, "film", condition=made.conditions()[:2])
    assert not made.separate(silence, made.conditions()[0]).any()
    assert not run(root, manifest, "separator_waveform", mixture=silence, film=film).any()


def test_the_reference_takes_any_length(exported):
    _, made, _ = exported
    assert made.separate(X[:, :333], made.conditions()[0]).shape == (2, 333)
    assert made.separate(np.repeat(X, 3, axis=1), made.conditions()[0]).shape == (2, 3 * WINDOW)


def test_conditions_are_unit_vectors(exported):
    _, made, _ = exported
    assert made.conditions().shape == (4, 12)
    assert made.conditions().dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(made.conditions(), axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(made.conditions(), made.conditions())


def test_it_says_of_itself_what_it_is(exported):
    _, made, _ = exported
    assert made.weights == "generated"
    assert made.variant["position"] == "rel_pos"
    assert made.variant["norm"] == "batch"
    assert "no published weights" in made.variant["definition"]
    assert made.dsp == {"sample_rate": 32000, "window_samples": WINDOW, "n_fft": 64, "hop": 32}
    assert made.towers is None


def test_a_file_is_read_and_recognised(tmp_path):
    read = read_checkpoint(write_generated(tmp_path / "c.safetensors", TINY, WINDOW), "checkpoint")
    assert recognises(read)
    assert open_model(None, read).config == TINY
    condition = model().conditions()[0]
    np.testing.assert_array_equal(open_model(None, read).separate(X, condition), model().separate(X, condition))
    for name in ("in_proj.weight", "blocks.0.cond.gamma.weight", "blocks.0.attn.q.weight"):
        other = checkpoint()
        del other.tensors[name]
        assert not recognises(other)
    with pytest.raises(CheckpointError, match="has not the tensors in_proj"):
        open_model(None, other)
    with pytest.raises(CheckpointError, match="leave --clap out"):
        open_model(read, read)


@pytest.mark.parametrize("options", OPTIONS)
def test_choices_are_inferred_or_told(options):
    config = dataclasses.replace(TINY, **options)
    assert model(config).config == config


def test_what_is_usual_need_not_be_told():
    told = checkpoint()
    told.metadata.clear()
    told.metadata["window_samples"] = WINDOW
    assert open_model(None, told).config == TINY
    assert open_model(None, told).weights == "checkpoint"
    told.metadata.clear()  # 10 s of a transform of 64 samples
    with pytest.raises(CheckpointError, match="whole hops"):
        open_model(None, told)


def test_counters_and_half_precision_are_read():
    half = checkpoint()
    half.tensors.update({name: value.half() for name, value in half.tensors.items()})
    half.tensors["blocks.0.conv.bn.num_batches_tracked"] = torch.tensor(9)
    assert np.isfinite(open_model(None, half).separate(X, model().conditions()[0])).all()


NORM = "blocks.1.attn.norm.weight"
BROKEN = {
    "missing": (lambda t: t.pop(NORM), f"{NORM} is missing"),
    "surplus": (lambda t: t.update({"blocks.0.extra": torch.zeros(1)}), "blocks.0.extra is not part"),
    "mis-shaped": (lambda t: t.update({NORM: torch.ones(5)}), r"weight has shape \[5\] instead of \[16\]"),
    "not finite": (lambda t: t[NORM].fill_(float("nan")), f"{NORM} has NaN"),
    "integers": (lambda t: t.update({NORM: torch.ones(16, dtype=torch.int64)}), "int64 instead of floating"),
    "a block less": (lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.1.ff")], "in 12 tensors"),
    "half a position": (lambda t: t.pop("blocks.1.attn.pos_v"), "pos_v is missing"),
    "no position": (lambda t: [t.pop(name) for name in list(t) if ".pos" in name], "position is abs_sin or none"),
    "even kernel": (lambda t: t.update({"blocks.0.conv.dw.weight": torch.ones(16, 1, 4)}), "do not make a model"),
    "nothing": (lambda t: t.update({"in_proj.weight": torch.ones(0, 33)}), "do not make a model"),
    "one bin": (lambda t: t.update({"in_proj.weight": torch.ones(16, 1)}), "do not make a model"),
    "a scalar": (lambda t: t.update({"blocks.0.attn.pos_u": torch.tensor(1.0)}), r"do not make a model|pos_u has shape \[\]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_said(name):
    change, words = BROKEN[name]
    broken = checkpoint()
    if name == "no position":
        del broken.metadata["position"]
    change(broken.tensors)
    with pytest.raises(CheckpointError, match=words):
        open_model(None, broken)


@pytest.mark.parametrize(
    "metadata",
    [
        {"color": 3},
        {"words": ["rain"]},
        {"heads": 3},
        {"heads": 0},
        {"heads": "2"},
        {"heads": 4},
        {"position": "rope"},
        {"position": "none"},
        {"position": "absolute"},
        {"cond_residual": 1},
        {"weights": "stolen"},
        {"window_samples": 650},
        {"window_samples": 32},
        {"window_samples": 10**9},
        {"window_samples": float("inf")},
    ],
)
def test_impossible_metadata(metadata):
    with pytest.raises(CheckpointError):
        open_model(None, checkpoint(**metadata))
