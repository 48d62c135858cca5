import numpy as np
import pytest
import torch
from clapsep.export import torch_dsp
from clapsep.runtime.clap import ClapFrontEnd
from clapsep.runtime.dsp import hann, istft, log_mel, mel_filterbank, resample_2_3, stft
from clapsep.runtime.metrics import snr
from hypothesis import given, settings
from hypothesis import strategies as st
from published import GOLDEN


@settings(max_examples=40, deadline=None)
@given(st.integers(513, 9000), st.sampled_from([160, 256, 320, 512]), st.integers(0, 2**32 - 1))
def test_istft_inverts_stft_for_every_length_and_hop(length, hop, seed):
    x = np.random.default_rng(seed).uniform(-1, 1, length).astype(np.float32)
    assert snr(x, istft(stft(x, 1024, hop), 1024, hop, length)) > 130


def test_stft_equals_its_defining_sum(rng):
    x = rng.standard_normal(2000)
    padded = np.pad(x, 512, mode="reflect")
    k = np.arange(1024)
    for t, f in [(0, 0), (1, 5), (3, 512), (6, 77)]:
        wanted = np.sum(padded[t * 320 + k] * hann(1024) * np.exp(-2j * np.pi * k * f / 1024))
        assert stft(x, 1024, 320)[t, f] == pytest.approx(wanted, abs=1e-9)


def test_frames_are_centred_and_batched(rng):
    x = rng.standard_normal((2, 3, 3200)).astype(np.float32)
    whole = stft(x, 1024, 320)
    assert whole.shape == (2, 3, 11, 513)
    np.testing.assert_array_equal(whole[1, 2], stft(x[1, 2], 1024, 320))


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


def test_numpy_and_torch_paths_agree(rng):
    x = rng.uniform(-1, 1, (2, 9600)).astype(np.float32)
    t = torch.from_numpy(x)
    spectrum = stft(x, 1024, 320)
    assert snr(spectrum.view(float), torch_dsp.stft(t, 1024, 320).numpy().astype(complex).view(float)) > 120
    again = torch_dsp.istft(torch.from_numpy(spectrum), 1024, 320, 9600).numpy()
    assert snr(again, istft(spectrum, 1024, 320, 9600)) > 120
    front_end = ClapFrontEnd()
    np.testing.assert_allclose(front_end.log_mel(x), torch_dsp.log_mel(t, front_end).numpy(), atol=1e-3)


def test_mel_filters_have_unit_area_and_the_right_limits():
    filters = mel_filterbank(48000, 1024, 64, 50.0, 14000.0)
    width = 48000 / 1024
    assert filters.shape == (513, 64)
    assert filters[: int(50 / width)].sum() == 0
    assert filters[int(14000 / width) + 2 :].sum() == 0
    np.testing.assert_allclose(filters[:, 20:].sum(0) * width, 1, atol=0.1)


def test_silence_is_minus_100_db():
    x = np.zeros(4800, np.float32)
    mel = log_mel(stft(x, 1024, 480), mel_filterbank(48000, 1024, 64, 50.0, 14000.0))
    np.testing.assert_array_equal(mel, np.float32(-100))


def test_short_queries_are_repeated_then_filled_with_zeros(rng):
    front_end = ClapFrontEnd(clip_samples=1000)
    x = rng.uniform(-1, 1, 300).astype(np.float32)
    (clip,) = front_end.clips(x, "start", int16=False)
    np.testing.assert_array_equal(clip[:900], np.tile(x, 3))
    np.testing.assert_array_equal(clip[900:], 0)


def test_crop_policies_are_deterministic_and_differ(rng):
    front_end = ClapFrontEnd(clip_samples=1000)
    x = (rng.uniform(-1, 1, 2600) * np.linspace(0.1, 1, 2600)).astype(np.float32)
    np.testing.assert_array_equal(front_end.clips(x, "start", int16=False), x[None, :1000])
    np.testing.assert_array_equal(front_end.clips(x, "center", int16=False), x[None, 800:1800])
    np.testing.assert_array_equal(front_end.clips(x, "loudest", int16=False), x[None, 1600:2600])
    np.testing.assert_array_equal(front_end.clips(x, "average", int16=False), x[:2000].reshape(2, 1000))


def test_int16_round_trip_truncates_towards_zero():
    x = np.array([0.6 / 32767, -0.6 / 32767, 1.7, -1.7], np.float32)
    (clip,) = ClapFrontEnd(clip_samples=4).clips(x, "start", int16=True)
    np.testing.assert_array_equal(clip, np.array([0, 0, 1, -1], np.float32))
