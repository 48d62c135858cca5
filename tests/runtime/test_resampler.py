import numpy as np
import torch
from clapsep.export import torch_dsp
from clapsep.runtime.metrics import snr
from clapsep.runtime.resampler import resample_2_3
from hypothesis import given, settings
from hypothesis import strategies as st
from published import GOLDEN


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_resampler_agrees_with_the_torch_one_for_every_length(length, seed):
    x = np.random.default_rng(seed).uniform(-1, 1, length).astype(np.float32)
    y = resample_2_3(x)
    assert y.shape == (-(-3 * length // 2),)
    np.testing.assert_allclose(y, torch_dsp.resample_2_3(torch.from_numpy(x)[None])[0].numpy(), atol=2e-6)


def test_resampler_keeps_a_tone(rng):
    t = np.arange(32000) / 32000
    y = resample_2_3(np.sin(2 * np.pi * 1000 * t).astype(np.float32))
    wanted = np.sin(2 * np.pi * 1000 * np.arange(48000) / 48000)
    assert snr(wanted[100:-100], y[100:-100]) > 60


def test_resampler_equals_the_official_one():
    x = np.load(GOLDEN / "inputs.npz")["mixture_i16"].astype(np.float32) / np.float32(32768)
    wanted = np.load(GOLDEN / "embeddings.npz")["mix48_segment"]
    y = resample_2_3(x)
    assert y.shape == (480000,)
    best = min(np.max(np.abs(y[o : o + len(wanted)] - wanted)) for o in (0, 48000, 96000, 100000, 150000, 240000))
    assert best < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40000), st.lists(st.integers(1, 2), max_size=2), st.integers(0, 2**32 - 1))
def test_resampler_equals_its_defining_sum(length, lead, seed):
    """Three interleaved convolutions of the signal with zeros around it, in float64; more than one block."""
    x = np.random.default_rng(seed).uniform(-1, 1, (*lead, length)).astype(np.float32)
    impulse = np.zeros((8, 16), np.float32)
    impulse[:, 8] = 1  # filters are read off impulses at an even and an odd sample
    even, odd = (resample_2_3(np.roll(impulse[0], shift)).astype(np.float64) for shift in (0, 1))
    spread = np.zeros((*lead, 3 * length + 48))
    padded = np.concatenate([x, np.zeros((*lead, length % 2))], -1)
    for step in range(24):
        for phase, response in ((0, even), (1, odd)):
            values = padded[..., phase::2] * response[step]
            spread[..., step : step + 3 * values.shape[-1] : 3] += values
    wanted = spread[..., 12 : 12 + -(-3 * length // 2)]
    np.testing.assert_allclose(resample_2_3(x), wanted, atol=2e-6)


def test_resampler_writes_where_it_is_told(rng):
    x, out = rng.uniform(-1, 1, 999).astype(np.float32), np.full(1499, np.nan, np.float32)
    assert resample_2_3(x, out) is out
    np.testing.assert_array_equal(out, resample_2_3(x))
