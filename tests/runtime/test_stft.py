from unittest import mock

import numpy as np
import pytest
import torch
from clapsep.export import torch_dsp
from clapsep.runtime import stft as module
from clapsep.runtime.dsp import hann
from clapsep.runtime.metrics import snr
from clapsep.runtime.stft import Stft
from hypothesis import given, settings
from hypothesis import strategies as st


def reference(x, n_fft, hop):
    """The transform of [..., n], all frames at once in float64."""
    padded = np.pad(x.astype(np.float64), [(0, 0)] * (x.ndim - 1) + [(n_fft // 2, n_fft - n_fft // 2)], mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=-1)[..., ::hop, :]
    return np.fft.rfft(frames * hann(n_fft))


def reference_inverse(spectrum, n_fft, hop, length):
    """Frame by frame in float64: [frames, bins] → [length], and the overlapped windows' power [length]."""
    total, power = np.zeros((2, len(spectrum) * hop + n_fft + length))
    for t, frame in enumerate(np.fft.irfft(spectrum.astype(np.complex128), n_fft)):
        total[t * hop : t * hop + n_fft] += frame * hann(n_fft)
        power[t * hop : t * hop + n_fft] += hann(n_fft) ** 2
    inside = slice(n_fft // 2, n_fft // 2 + length)
    return total[inside] / np.maximum(power[inside], 1e-11), power[inside]


@st.composite
def cases(draw, largest_hop=1.0):
    """A transform in small blocks, and a shape [..., samples]."""
    n_fft = draw(st.one_of(st.integers(2, 300), st.just(1024)))
    hop = draw(st.integers(1, max(1, int(largest_hop * n_fft))))
    samples = (n_fft + 1) // 2 + draw(st.integers(1, 40 * hop))
    with mock.patch.object(module, "BLOCK", draw(st.integers(1, 12)) * n_fft):
        stft = Stft(n_fft, hop)
        assert stft.block <= 12
    x = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).uniform(-1, 1, (*draw(st.sampled_from([(), (1,), (3,), (2, 2)])), samples))
    return stft, x.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(cases(largest_hop=2.0))
def test_forward_equals_the_reference(case):
    stft, x = case
    found = stft.forward(x)
    assert (found.dtype, found.shape) == (np.complex64, (*x.shape[:-1], stft.frames(x.shape[-1]), stft.bins))
    wanted = reference(x, stft.n_fft, stft.hop)
    np.testing.assert_allclose(found, wanted, atol=1e-6 * (1e-3 + np.max(np.abs(wanted))))


@settings(max_examples=30, deadline=None)
@given(cases(largest_hop=0.5), st.sampled_from([0, 1, 3]), st.sampled_from([np.float32, np.float64, np.float16]))
def test_inverse_equals_the_reference(case, parts, dtype):
    stft, x = case
    random, length = np.random.default_rng(len(x)), x.shape[-1]
    spectrum = stft.forward(x)
    mask = [random.uniform(-1, 1, spectrum.shape).astype(dtype) for _ in range(parts)]
    factor = {0: 1, 1: mask[0] if mask else 1, 3: mask[0] * (mask[1] + 1j * mask[2].astype(np.float64)) if parts == 3 else 1}[parts]
    found = stft.inverse(spectrum, length, *mask)
    assert (found.dtype, found.shape) == (np.float32, x.shape)
    for row in np.ndindex(x.shape[:-1]):
        wanted, power = reference_inverse((spectrum * factor)[row], stft.n_fft, stft.hop, length)
        noise = 1e-6 / np.sqrt(np.maximum(power, 1e-11))  # the last samples may lie under the edge of the last window alone
        assert np.all(np.abs(found[row] - wanted) <= noise + 5e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(513, 200000), st.sampled_from([160, 256, 320, 400]), st.integers(0, 2**32 - 1))
def test_inverse_of_forward_is_the_signal_for_every_length_and_hop(length, hop, seed):
    x = np.random.default_rng(seed).uniform(-1, 1, length).astype(np.float32)
    stft = Stft(1024, hop)
    assert snr(x, stft.inverse(stft.forward(x), length)) > 130


def test_forward_equals_its_defining_sum(rng):
    x = rng.standard_normal(2000)
    padded, spectrum = np.pad(x, 512, mode="reflect"), Stft(1024, 320).forward(x)
    k = np.arange(1024)
    for t, f in [(0, 0), (1, 5), (3, 512), (6, 77)]:
        wanted = np.sum(padded[t * 320 + k] * hann(1024) * np.exp(-2j * np.pi * k * f / 1024))
        assert spectrum[t, f] == pytest.approx(wanted, rel=2e-7, abs=1e-9)


def test_a_row_of_a_batch_is_that_row_alone(rng):
    x = rng.standard_normal((2, 3, 3200)).astype(np.float32)
    stft = Stft(1024, 320)
    whole = stft.forward(x)
    assert whole.shape == (2, 3, 11, 513)
    np.testing.assert_array_equal(whole[1, 2], stft.forward(x[1, 2]))
    np.testing.assert_array_equal(stft.inverse(whole, 3200)[1, 2], stft.inverse(whole[1, 2], 3200))


def test_an_interrupted_call_leaves_nothing_behind(rng):
    with mock.patch.object(module, "BLOCK", 4096):
        stft = Stft(1024, 320)
        assert stft.block == 4
    spectrum = stft.forward(rng.standard_normal(9600))
    wanted, irfft = stft.inverse(spectrum, 9600), np.fft.irfft
    with (
        mock.patch.object(np.fft, "irfft", side_effect=[irfft(spectrum[:4]).astype(np.float32), KeyboardInterrupt]),
        pytest.raises(KeyboardInterrupt),
    ):
        stft.inverse(spectrum, 9600)
    np.testing.assert_array_equal(stft.inverse(spectrum, 9600), wanted)


def test_samples_that_no_frame_reaches_are_zero():
    spectrum = np.random.default_rng(2).standard_normal((2, 10)).view(complex).astype(np.complex64)
    found = Stft(8, 20).inverse(spectrum, 40)
    assert np.all(found[4:16] == 0)
    assert np.all(found[24:] == 0)
    assert np.any(found[16:24] != 0)


def test_numpy_and_torch_transforms_agree(rng):
    x = rng.uniform(-1, 1, (2, 9600)).astype(np.float32)
    stft = Stft(1024, 320)
    spectrum = stft.forward(x)
    assert (
        snr(spectrum.view(np.float32), torch.view_as_real(torch_dsp.stft(torch.from_numpy(x), 1024, 320)).numpy().reshape(2, 31, -1)) > 120
    )
    again = torch_dsp.istft(torch.from_numpy(spectrum), 1024, 320, 9600).numpy()
    assert snr(again, stft.inverse(spectrum, 9600)) > 120


def test_what_does_not_fit_is_refused():
    stft = Stft(1024, 320)
    with pytest.raises(ValueError, match="512 samples are too few"):
        stft.forward(np.zeros(512, np.float32))
    spectrum = stft.forward(np.zeros((2, 9600), np.float32))
    with pytest.raises(ValueError, match="do not fit a spectrum"):
        stft.inverse(spectrum, 9600, np.ones((1, 31, 513), np.float32))
