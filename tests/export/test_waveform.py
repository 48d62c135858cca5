"""Transforms as matrix products against numpy's, for sizes that fit and sizes that do not."""

import numpy as np
import pytest
import torch
from clapsep.export.waveform import InverseStft, LogMel, Stft, in_halves, in_order
from clapsep.runtime import stft as numpy_stft
from clapsep.runtime.families.clapsep import ClapsepDsp
from clapsep.runtime.metrics import snr
from clapsep.runtime.resampler import resample_2_3

SIZES = [(1024, 320, 8000), (1024, 320, 8123), (512, 160, 4000), (512, 200, 2999), (1024, 256, 5120), (256, 256, 1024), (64, 60, 1000)]


def noise(n, batch=2):
    return np.random.default_rng(n).uniform(-1, 1, (batch, n)).astype(np.float32)


@pytest.mark.parametrize(("n_fft", "hop", "samples"), SIZES)
def test_stft(n_fft, hop, samples):
    x = noise(samples)
    wanted = numpy_stft.Stft(n_fft, hop).forward(x)
    bins = n_fft // 2 + 1
    real, imag = (in_order(part, bins) for part in Stft(samples, n_fft, hop, bins)(torch.from_numpy(x)).unbind(2))
    assert snr(np.stack([wanted.real, wanted.imag]), torch.stack([real, imag]).numpy()) > 120


@pytest.mark.parametrize(("n_fft", "hop", "samples"), SIZES[:5])
def test_inverse_stft(n_fft, hop, samples):
    rng = np.random.default_rng(1)
    shape = (2, samples // hop + 1, n_fft // 2 + 1)
    spectrum = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)
    parts = torch.stack([in_halves(torch.from_numpy(part.copy())) for part in (spectrum.real, spectrum.imag)], dim=2)
    found = InverseStft(n_fft, hop, samples)(parts).numpy()
    assert found.shape == (2, samples)
    covered = (samples // hop) * hop  # beyond the last frame's centre the window's foot is divided by
    assert snr(numpy_stft.Stft(n_fft, hop).inverse(spectrum, samples)[:, :covered], found[:, :covered]) > 115


@pytest.mark.parametrize("samples", [32000, 32160, 31998])
def test_log_mel(samples):
    x = 0.1 * noise(samples)
    x[1] = 0
    dsp = ClapsepDsp(window_samples=samples)
    wanted = dsp.front_end.log_mel(resample_2_3(x))
    found = LogMel(samples, dsp.front_end)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    np.testing.assert_allclose(found[1], -100, atol=2e-5)


@pytest.mark.parametrize("bins", [8, 9])
def test_bins_in_order_and_in_halves(bins):
    rows = torch.arange(2 * 3 * bins).reshape(2, 3, bins).float()
    halves = in_halves(rows)
    assert halves.shape == (2, 2, 3, 5 if bins == 9 else 4)
    assert torch.equal(in_order(halves, bins), rows)
    assert halves[0, 1, 0, 0] == rows[0, 0, 1]


@pytest.mark.parametrize("lowest", [10, 33])
def test_the_lowest_bins_alone(lowest):
    x = torch.from_numpy(noise(640))
    whole, few = (in_order(Stft(640, 128, 32, bins)(x)[:, :, 1], lowest) for bins in (65, lowest))
    torch.testing.assert_close(few, whole, atol=1e-5, rtol=1e-5)
