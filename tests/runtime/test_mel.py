import numpy as np
from clapsep.runtime.dsp import mel_filterbank
from clapsep.runtime.mel import LogMel
from clapsep.runtime.stft import Stft
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([64, 200, 512, 1024]),
    st.integers(1, 600),
    st.integers(1, 80),
    st.integers(513, 30000),
    st.sampled_from([(), (2,), (2, 1)]),
    st.integers(0, 2**32 - 1),
)
def test_log_mel_equals_the_reference(n_fft, hop, n_mels, samples, lead, seed):
    x = np.random.default_rng(seed).uniform(-1, 1, (*lead, samples))
    filters = mel_filterbank(48000, n_fft, n_mels, 50.0, 14000.0)
    padded = np.pad(x, [(0, 0)] * len(lead) + [(n_fft // 2, n_fft // 2)], mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=-1)[..., ::hop, :]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    power = np.abs(np.fft.rfft(frames * window)) ** 2 @ filters.astype(np.float64)
    found = LogMel(Stft(n_fft, hop), filters)(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 10 * np.log10(np.maximum(power, 1e-10)), atol=2e-5)


def test_silence_is_minus_100_db():
    x = np.zeros(4800, np.float32)
    mel = LogMel(Stft(1024, 480), mel_filterbank(48000, 1024, 64, 50.0, 14000.0))(x)
    np.testing.assert_array_equal(mel, np.float32(-100))


def test_log_mel_is_written_where_it_is_told(rng):
    log_mel, x, out = (
        LogMel(Stft(64, 32), mel_filterbank(8000, 64, 8, 50.0, 4000.0)),
        rng.standard_normal(640),
        np.zeros((21, 8), np.float32),
    )
    assert log_mel(x, out) is out
    np.testing.assert_array_equal(out, log_mel(x))
