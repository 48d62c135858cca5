import threading

import numpy as np
import pytest
from clapsep.runtime import Separator
from clapsep.runtime.errors import AudioError, EngineUnavailable, QueryError
from clapsep.runtime.metrics import snr


def noise(n, seed=0, level=0.5):
    return np.random.default_rng(seed).uniform(-level, level, n).astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 319, 512, 513, 79999, 80000, 80001, 200000])
def test_any_length_in_the_same_length_out(separator, n):
    out = separator.separate(noise(n), 32000, "rain")
    assert out.shape == (n,)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 192000])
def test_any_rate_in_the_same_rate_out(separator, rate):
    n = rate + 7
    out = separator.separate(noise(n), rate, "rain")
    assert out.shape == (n,)
    assert np.isfinite(out).all()


def test_channels_are_separated_with_the_same_condition(separator):
    x = np.stack([noise(9000, seed) for seed in range(8)])
    condition = separator.condition("rain", "a dog")
    out = separator.separate(x, 32000, condition=condition)
    assert out.shape == (8, 9000)
    # one gain serves all channels, so a channel alone gives the same as long as no peak exceeds 1
    np.testing.assert_allclose(out[5], separator.separate(x[5], 32000, condition=condition), atol=1e-6)


def test_short_input_is_what_zero_padding_to_the_window_gives(separator):
    x = noise(30000)
    padded = np.concatenate([x, np.zeros(50000, np.float32)])
    np.testing.assert_array_equal(separator.separate(x, 32000, "rain"), separator.separate(padded, 32000, "rain")[:30000])


def test_silence_stays_silent(separator):
    np.testing.assert_array_equal(separator.separate(np.zeros(20000, np.float32), 32000, "rain"), 0)


def test_a_peak_above_one_is_lowered_and_raised_again(separator):
    x = noise(40000)
    x /= np.max(np.abs(x))
    loud = separator.separate(5 * x, 32000, "rain")
    quiet = separator.separate(0.9 * x, 32000, "rain")
    assert snr(quiet / 0.9, loud / 5) > 90


def test_input_is_never_modified_and_integers_are_accepted(separator):
    x = (noise(20000) * 32767).astype(np.int16)
    before = x.copy()
    out = separator.separate(x, 32000, "rain")
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(out, separator.separate(x.astype(np.float32) / np.float32(32768), 32000, "rain"))
    frozen = noise(1000)
    frozen.setflags(write=False)
    separator.separate(frozen, 32000, "rain")


def test_the_query_matters(separator):
    x = noise(80000)
    assert snr(separator.separate(x, 32000, "rain"), separator.separate(x, 32000, "a dog barking")) < 40
    assert snr(separator.separate(x, 32000, "rain"), separator.separate(x, 32000, None, "rain")) < 40


def test_mask_is_the_engines(separator):
    windows = np.stack([noise(80000, 1), noise(80000, 2)])
    mask = separator.mask(windows, separator.condition("rain"))
    assert mask.shape == (2, 251, 513)
    assert mask.min() >= 0
    assert mask.max() <= 1


@pytest.mark.parametrize("bad", [np.zeros(5), np.full(256, np.nan), np.zeros((1, 256))])
def test_conditions_of_the_wrong_shape(separator, bad):
    with pytest.raises(QueryError, match="256 finite numbers"):
        separator.separate(noise(100), 32000, condition=bad)


def test_condition_and_query_contradict_each_other(separator):
    with pytest.raises(QueryError, match="both a condition and a query"):
        separator.separate(noise(100), 32000, "rain", condition=np.zeros(256, np.float32))


def test_bad_arrays_and_engines(demo_bundle, separator):
    with pytest.raises(AudioError, match="2 NaN"):
        separator.separate(np.array([0, np.nan, np.inf]), 32000, "rain")
    with pytest.raises(EngineUnavailable, match="no engine kind"):
        Separator(demo_bundle, engine="cuda")
    with pytest.raises(AudioError, match="windows must be"):
        separator.mask(np.zeros((1, 5), np.float32), np.zeros(256, np.float32))
    for threads in (0, -3, "2", 2.5):
        with pytest.raises(QueryError, match="threads is"):
            Separator(demo_bundle, threads=threads)
    with pytest.raises(QueryError, match="overlap of 9"):
        Separator(demo_bundle, overlap=9)


def test_threads_share_one_separator(demo_bundle, separator):
    shared = Separator(demo_bundle)
    jobs = [(noise(30000 + 999 * i, i), f"sound {i % 3}") for i in range(6)]
    results: dict[int, np.ndarray] = {}

    def work(i):
        results[i] = shared.separate(jobs[i][0], 32000, jobs[i][1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (x, text) in enumerate(jobs):
        np.testing.assert_allclose(results[i], separator.separate(x, 32000, text), atol=1e-6)
