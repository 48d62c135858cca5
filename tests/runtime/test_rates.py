import numpy as np
import pytest
from clapsep.runtime.rates import Resampler, fit_length, resample
from hypothesis import given, settings
from hypothesis import strategies as st

RATES = [8000, 11025, 16000, 32000, 44100, 48000, 96000, 192000]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4000), st.sampled_from(RATES))
def test_resampling_there_and_back_keeps_the_length(length, rate):
    x = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
    there = resample(x, rate, 32000)
    assert len(there) == -(-length * 32000 // rate)
    assert len(resample(there, 32000, rate)) >= length


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=8), st.sampled_from(RATES), st.integers(1, 3))
def test_pieces_give_what_the_whole_gives(sizes, rate, channels):
    x = np.random.default_rng(sum(sizes)).uniform(-1, 1, (channels, sum(sizes))).astype(np.float32)
    resampler = Resampler(rate, 32000, channels)
    pieces = [resampler.push(piece) for piece in np.split(x, np.cumsum(sizes)[:-1], axis=1)]
    pieces.append(resampler.push(x[:, :0], last=True))
    whole = Resampler(rate, 32000, channels).push(x, last=True)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    assert whole.shape == (channels, -(-x.shape[1] * 32000 // rate))


@pytest.mark.parametrize("rate", RATES)
def test_no_more_is_held_back_than_is_said(rate):
    resampler, heard, given_back, n = Resampler(rate, 32000, 1), 0, 0, 137
    while heard < 2 * rate:
        given_back += resampler.push(np.ones((1, n), np.float32)).shape[1]
        heard += n
        assert heard / rate - given_back / 32000 <= resampler.delay + n / rate


def test_lengths_are_cut_and_filled_at_the_end():
    np.testing.assert_array_equal(fit_length(np.ones((2, 3)), 2), np.ones((2, 2)))
    np.testing.assert_array_equal(fit_length(np.ones((1, 2)), 3), [[1, 1, 0]])
