import dataclasses

import numpy as np
import pytest
from clapsep.engines.engine import TensorSpec
from clapsep.runtime.clap import ClapFrontEnd
from clapsep.runtime.errors import ManifestError, QueryError
from clapsep.runtime.families.resunet30 import MAPS, Resunet30, ResunetDsp
from clapsep.runtime.family import open_family
from clapsep.runtime.manifest import FileEntry, GraphEntry, Manifest
from clapsep.runtime.metrics import snr

DSP = ResunetDsp(window_samples=16000)
GRID = (DSP.frames, DSP.bins)
GRAPHS = {
    "film": ({"condition": (512,)}, {"film": (40,)}),
    "separator": ({"magnitude": GRID, "film": (40,)}, dict.fromkeys(MAPS, GRID)),
    "separator_waveform": ({"mixture": (16000,), "film": (40,)}, {"target": (16000,)}),
}


TEXT = {"input_ids": (77,), "attention_mask": (77,)}
TOWERS = {"text_encoder": (TEXT, {"embedding": (512,)}), "audio_encoder": ({"log_mel": (1001, 64)}, {"embedding": (512,)})}
QUERY = {"context": 77, "crop": "start", "int16_round_trip": False}
TYPES = dict.fromkeys(TEXT, "int64")


def manifest(dsp=None, condition=None, graphs=GRAPHS, query=None):
    file = FileEntry("x", 0, "")

    def entry(inputs, outputs):
        sides = (
            tuple(TensorSpec(name, TYPES.get(name, "float32"), ("batch", *shape)) for name, shape in side.items())
            for side in (inputs, outputs)
        )
        return GraphEntry(file, None, *sides, precision="fp32", opset=20, nodes=1)

    return Manifest(
        family="resunet30", variant={}, weights="generated", sources=(), toolchain={}, dsp=dsp or dataclasses.asdict(DSP),
        condition=condition or {"size": 512, "normalize": True}, query=query or {}, max_batch=1,
        graphs={name: entry(*sides) for name, sides in graphs.items()}, tokenizer=None, golden=file, gates=(),
    )  # fmt: skip


@pytest.fixture
def family():
    return open_family(manifest())


def sound(seed=0, batch=2):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, DSP.window_samples)).astype(np.float32)


def maps(seed=1):
    random = np.random.default_rng(seed)
    angle = random.uniform(0, 7, (2, *GRID)).astype(np.float32)
    made = {"mask": random.random((2, *GRID), np.float32), "mask_cos": np.cos(angle), "mask_sin": np.sin(angle)}
    made["mask_cos"][..., -1] = made["mask_sin"][..., -1] = 0
    return made


def official(x, parts):
    """The published order of operations in float64: limited magnitude, its phase, rotation, overlap-add."""
    n, hop, half = DSP.n_fft, DSP.hop, DSP.n_fft // 2
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)
    padded = np.pad(x.astype(np.float64), half, mode="reflect")
    spectrum = np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, n)[::hop] * window)
    magnitude = np.sqrt(np.maximum(np.abs(spectrum) ** 2, 1e-10))
    cos, sin = spectrum.real / magnitude, spectrum.imag / magnitude
    mask, turn_cos, turn_sin = (parts[name].astype(np.float64) for name in MAPS)
    real, imag = cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin
    frames = np.fft.irfft(np.maximum(magnitude * mask, 0) * (real + 1j * imag), n) * window
    total, power = np.zeros((2, (len(frames) - 1) * hop + n))
    for t, frame in enumerate(frames):
        total[t * hop : t * hop + n] += frame
        power[t * hop : t * hop + n] += window**2
    return magnitude, (total / np.maximum(power, 1e-11))[half : half + len(x)]


def test_published_constants():
    assert (ResunetDsp().frames, ResunetDsp().bins) == (1001, 1025)


def test_features_and_waves_are_those_of_the_published_arithmetic(family):
    x, parts = sound(), maps()
    x[1, 4000:9000] = 0  # whole frames of digital silence
    x[1, 9000:] *= 1e-6  # below the limit of the magnitude
    features, context = family.features(x)
    found = family.reconstruct(parts, context)
    assert (found.dtype, found.shape) == (np.float32, x.shape)
    assert list(features) == ["magnitude"]
    for row in range(2):
        magnitude, wave = official(x[row], {name: part[row] for name, part in parts.items()})
        assert snr(magnitude, features["magnitude"][row]) > 120
        np.testing.assert_allclose(features["magnitude"][row], magnitude, rtol=1e-3, atol=1e-5)
        assert snr(wave, found[row]) > 115
    quiet = official(x[1], {name: part[1] for name, part in parts.items()})[1][12000:]
    assert snr(quiet, found[1, 12000:]) > 100


def test_silence(family):
    features, context = family.features(np.zeros((1, DSP.window_samples), np.float32))
    assert np.all(features["magnitude"] == np.float32(1e-5))
    assert not family.reconstruct({name: part[:1] for name, part in maps().items()}, context).any()


def test_the_highest_bin_is_gone(family):
    tone = 0.5 * np.cos(np.pi * np.arange(DSP.window_samples, dtype=np.float32))[None]
    features, context = family.features(tone)
    assert features["magnitude"][0, 20, -1] > 100
    parts = {name: np.zeros((1, *GRID), np.float32) for name in MAPS}
    parts["mask"][..., -1] = 0.5  # what the network gives, with a rotation of 0 and 0
    assert not family.reconstruct(parts, context).any()


def test_conditions(family):
    e = np.arange(512, dtype=np.float32)
    unit = family.condition(e, None, normalize=None)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, e / np.linalg.norm(e), rtol=1e-6)
    np.testing.assert_array_equal(family.condition(e, None, normalize=False), e)
    with pytest.raises(QueryError, match="is zero"):
        family.condition(0 * e, None, normalize=True)
    plain = open_family(manifest(condition={"size": 512, "normalize": False}))
    np.testing.assert_array_equal(plain.condition(e, None, normalize=None), e)
    with pytest.raises(QueryError, match="leave the negative query out"):
        family.condition(e, e, normalize=None)
    with pytest.raises(QueryError, match="no query was given"):
        family.condition(None, None, normalize=None)


def test_what_a_family_says_of_itself(family):
    assert isinstance(family, Resunet30)
    assert (family.signed, family.towers, family.condition_size) == (False, None, 512)
    assert (family.sample_rate, family.window_samples) == (32000, 16000)
    assert "LAION-CLAP" in family.vectors
    tags = open_family(manifest(condition={"size": 527, "normalize": False}, graphs=sized(527)))
    assert "AudioSet" in tags.vectors
    assert "7 numbers" in open_family(manifest(condition={"size": 7, "normalize": False}, graphs=sized(7))).vectors
    assert set(family.stages(sound(), maps())) == {"features", "STFT", "ISTFT"}
    for call in family.stages(sound(), maps()).values():
        call()


def test_towers():
    towers = open_family(manifest(query=QUERY, graphs={**GRAPHS, **TOWERS})).towers
    assert (towers.embedding_size, towers.rule.context) == (512, 77)
    x = sound()[0]
    features = towers.features(x, 48000, None)
    assert features.shape == (1, 1001, 64)
    np.testing.assert_array_equal(features, ClapFrontEnd().log_mel(ClapFrontEnd().clips(x, "start", int16=False)))
    for graphs in (GRAPHS, {**GRAPHS, **TOWERS, "audio_encoder": ({"log_mel": (1001, 64)}, {"embedding": (511,)})}):
        with pytest.raises(ManifestError):
            open_family(manifest(query=QUERY, graphs=graphs))


def sized(size):
    return {**GRAPHS, "film": ({"condition": (size,)}, {"film": (40,)})}


@pytest.mark.parametrize(
    "change",
    [
        {"dsp": {"sample_rate": 32000, "window_samples": 16000, "n_fft": 2048}},
        {"dsp": {**dataclasses.asdict(DSP), "hop": 0}},
        {"dsp": {**dataclasses.asdict(DSP), "hop": True}},
        {"dsp": {**dataclasses.asdict(DSP), "hop": 1025}},
        {"dsp": {**dataclasses.asdict(DSP), "n_fft": 2000}},
        {"dsp": {**dataclasses.asdict(DSP), "window_samples": 2048}},
        {"dsp": {**dataclasses.asdict(DSP), "window_samples": 32000}},
        {"condition": {"size": 511, "normalize": True}},
        {"condition": {"size": 512}},
        {"graphs": {name: GRAPHS[name] for name in ("film", "separator_waveform")}},
        {"graphs": {name: GRAPHS[name] for name in ("separator", "separator_waveform")}},
        {"graphs": {**GRAPHS, "separator": ({"magnitude": GRID, "film": (40,)}, {"mask": GRID})}},
        {"graphs": {**GRAPHS, "separator": ({"magnitude": GRID, "film": (41,)}, dict.fromkeys(MAPS, GRID))}},
        {"graphs": {**GRAPHS, "separator_waveform": ({"mixture": (16001,), "film": (40,)}, {"target": (16000,)})}},
    ],
)
def test_manifests_that_describe_no_such_model(change):
    with pytest.raises(ManifestError):
        open_family(manifest(**change))
