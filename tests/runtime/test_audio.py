import numpy as np
import pytest
from clapsep.runtime.audio import check_rate, check_samples, headroom_gain, peak_of, to_mono
from clapsep.runtime.errors import AudioError


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros((2, 2, 2), np.float32), "3 axes"),
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros((0, 5), np.float32), "no samples"),
        (np.zeros(5, np.uint8), "uint8"),
        (np.array(["a"]), "type"),
        (np.zeros(5, np.complex64), "complex"),
        (np.full(5, 1e300), "infinite"),
        (np.full(5, -1e30), "as large as 1e.30"),
        (np.zeros((16000, 2), np.float32), "transpose"),
        ([[1.0, 2.0], [3.0]], "no array"),
        (None, "0 axes"),
    ],
)
def test_arrays_that_cannot_be_audio(samples, reason):
    with pytest.raises(AudioError, match=reason):
        check_samples(samples, "it")


@pytest.mark.parametrize("rate", [0, -1, 10**7, 44100.0, None, "8000"])
def test_rates_that_cannot_be(rate):
    with pytest.raises(AudioError, match="sample rate"):
        check_rate(rate, "it")
    assert check_rate(np.int64(8000), "it") == 8000


def test_integers_are_scaled_by_their_range():
    np.testing.assert_array_equal(check_samples(np.array([-32768, 16384], np.int16), "it"), [-1, 0.5])


def test_headroom():
    assert headroom_gain(1.0) == 1
    assert headroom_gain(3.0) == pytest.approx(0.3)


def test_mono_is_the_mean_of_the_channels():
    np.testing.assert_array_equal(to_mono(np.array([[1, 2], [3, 4]], np.float32)), [2, 3])


def test_the_peak_is_the_largest_magnitude():
    assert peak_of(np.array([[0.5, -3.0], [2.0, 0.0]], np.float32)) == 3
