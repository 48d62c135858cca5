"""The Conformer extractor's signal path in numpy, and manifests that cannot be its."""

import dataclasses

import numpy as np
import pytest
from clapsep.engines.engine import TensorSpec
from clapsep.runtime.errors import ManifestError, QueryError
from clapsep.runtime.families.conformer import Conformer
from clapsep.runtime.family import open_family
from clapsep.runtime.manifest import FileEntry, GraphEntry, Manifest
from clapsep.runtime.metrics import snr

DSP = {"sample_rate": 32000, "window_samples": 16384, "n_fft": 1024, "hop": 512}
FRAMES, BINS, SIZE, FILM = 33, 513, 16, 64


def entry(inputs, outputs):
    def specs(shapes):
        return tuple(TensorSpec(name, "float32", ("batch", *shape)) for name, shape in shapes.items())

    return GraphEntry(FileEntry("graphs/x.onnx", 1, ""), None, specs(inputs), specs(outputs), "fp32", 20, 1)


def manifest(dsp=DSP, condition=None, **graphs):
    window, film, rows = (16384,), {"film": (FILM,)}, (FRAMES, BINS)
    known = {
        "film": entry({"condition": (SIZE,)}, film),
        "separator": entry({"magnitude": rows, **film}, {"mask": rows}),
        "separator_waveform": entry({"mixture": window, **film}, {"target": window}),
    }
    return Manifest(
        family="conformer",
        variant={},
        weights="generated",
        sources=(),
        toolchain={},
        dsp=dsp,
        condition=condition or {"size": SIZE, "normalize": True},
        query={},
        max_batch=4,
        graphs={name: graph for name, graph in {**known, **graphs}.items() if graph is not None},
        tokenizer=None,
        golden=FileEntry("golden.npz", 0, ""),
        gates=(),
    )


@pytest.fixture
def family():
    return open_family(manifest())


@pytest.fixture
def windows():
    return np.random.default_rng(0).uniform(-1, 1, (2, 16384)).astype(np.float32)


def test_features_are_the_transform_of_the_definition(family, windows):
    features, spectrum = family.features(windows)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    padded = np.pad(windows.astype(np.float64), ((0, 0), (512, 512)), mode="reflect")
    exact = np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, 1024, axis=1)[:, ::512] * hann)
    assert list(features) == ["magnitude"]
    assert features["magnitude"].shape == (2, FRAMES, BINS)
    assert features["magnitude"].dtype == np.float32
    assert snr(np.abs(exact), features["magnitude"]) > 130
    assert snr(exact.view(np.float64), spectrum.view(np.float32)) > 130


def test_a_mask_of_ones_gives_the_mixture_back_and_a_half_halves_it(family, windows):
    _, spectrum = family.features(windows)
    for gain in (1.0, 0.5):
        found = family.reconstruct({"mask": np.full(spectrum.shape, gain, np.float32)}, spectrum)
        assert snr(gain * windows, found) > 120


def test_silence_stays_silence(family, windows):
    features, spectrum = family.features(np.zeros_like(windows))
    assert not features["magnitude"].any()
    assert not family.reconstruct({"mask": np.ones(spectrum.shape, np.float32)}, spectrum).any()


def test_a_condition_is_a_unit_vector_unless_said(family):
    vector = np.arange(SIZE, dtype=np.float32)
    found = family.condition(vector, None, normalize=None)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, vector / np.linalg.norm(vector), atol=1e-7)
    np.testing.assert_array_equal(family.condition(vector, None, normalize=False), vector)
    plain = open_family(manifest(condition={"size": SIZE, "normalize": False}))
    np.testing.assert_array_equal(plain.condition(vector, None, normalize=None), vector)
    np.testing.assert_allclose(plain.condition(vector, None, normalize=True), found)
    assert "16 values" in family.vectors
    with pytest.raises(QueryError, match="is zero"):
        family.condition(0 * vector, None, normalize=None)


def test_there_is_one_positive_query(family):
    vector = np.ones(SIZE, np.float32)
    for pair in ((None, None), (None, vector), (vector, vector)):
        with pytest.raises(QueryError, match="one positive query"):
            family.condition(*pair, normalize=None)
    assert not family.signed
    assert family.towers is None


def test_the_waveform_graph_may_be_missing():
    assert isinstance(open_family(manifest(separator_waveform=None)), Conformer)


IMPOSSIBLE = {
    "no hop": {"dsp": {name: value for name, value in DSP.items() if name != "hop"}},
    "another hop": {"dsp": {**DSP, "hop": 256}},
    "a part of a hop": {"dsp": {**DSP, "window_samples": 16385}},
    "too few": {"dsp": {**DSP, "window_samples": 512}},
    "too many": {"dsp": {**DSP, "window_samples": 512 << 13}},
    "odd transform": {"dsp": {**DSP, "n_fft": 1025}},
    "no rate": {"dsp": {**DSP, "sample_rate": 0}},
    "not a number": {"dsp": {**DSP, "n_fft": "1024"}},
    "another size": {"condition": {"size": 5, "normalize": True}},
    "no rule": {"condition": {"size": SIZE}},
    "no separator": {"separator": None},
    "no film": {"film": None},
    "other frames": {"separator": entry({"magnitude": (34, BINS), "film": (FILM,)}, {"mask": (34, BINS)})},
    "other film": {"separator": entry({"magnitude": (FRAMES, BINS), "film": (65,)}, {"mask": (FRAMES, BINS)})},
    "rotation": {"separator": entry({"magnitude": (FRAMES, BINS), "film": (FILM,)}, {"mask": (FRAMES, BINS), "mask_cos": (FRAMES, BINS)})},
    "other window": {"separator_waveform": entry({"mixture": (1,), "film": (FILM,)}, {"target": (1,)})},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_manifests_that_describe_no_such_model(name):
    with pytest.raises(ManifestError):
        open_family(manifest(**IMPOSSIBLE[name]))


def test_the_facts_say_that_no_weights_exist():
    assert "no published weights" in Conformer.facts.title
    assert dataclasses.astuple(Conformer.facts)
