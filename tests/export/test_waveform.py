"""Transforms as matrix products against numpy's, for sizes that fit and sizes that do not."""

import numpy as np
import pytest
import torch
from clapsep.export.waveform import InverseStft, LogMel, Stft, inverse_dft_matrices
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
    real, imag = Stft(samples, n_fft, hop, n_fft // 2 + 1)(torch.from_numpy(x))
    assert snr(np.stack([wanted.real, wanted.imag]), torch.stack([real, imag]).numpy()) > 120


@pytest.mark.parametrize(("n_fft", "hop", "samples"), SIZES[:5])
def test_inverse_stft(n_fft, hop, samples):
    rng = np.random.default_rng(1)
    shape = (2, samples // hop + 1, n_fft // 2 + 1)
    spectrum = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)
    found = InverseStft(n_fft, hop, samples)(torch.from_numpy(spectrum.real.copy()), torch.from_numpy(spectrum.imag.copy())).numpy()
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


def test_synthesis_inverts_analysis_bin_by_bin():
    real, imag = inverse_dft_matrices(16)
    for k in range(9):
        wanted = np.fft.irfft(np.eye(9)[k], 16)
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(16) / 16)
        np.testing.assert_allclose(real[k], wanted * window, atol=1e-12)
        np.testing.assert_allclose(imag[k], np.fft.irfft(1j * np.eye(9)[k], 16) * window, atol=1e-12)
