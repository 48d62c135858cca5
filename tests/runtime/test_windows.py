import itertools

import numpy as np
import pytest
from clapsep.runtime.metrics import snr
from clapsep.runtime.windows import process_windows, window_starts
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1000), st.integers(0, 50), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_identity_reconstructs_every_length_and_overlap(length, overlap, batch, seed):
    x = np.random.default_rng(seed).uniform(-1, 1, length).astype(np.float32)
    assert snr(x, process_windows(x, 100, overlap, lambda w: w[None].copy(), 1, batch)[0]) > 120


@given(st.integers(1, 5000), st.integers(0, 50))
def test_windows_cover_everything_once_and_the_last_is_right_aligned(length, overlap):
    starts = window_starts(length, 100, overlap)
    assert starts[0] == 0
    assert all(0 < b - a <= 100 - overlap for a, b in itertools.pairwise(starts))
    assert starts[-1] == max(0, length - 100)
    assert len(starts) == max(1, -(-(length - overlap) // (100 - overlap)))


def test_short_input_is_filled_with_zeros():
    seen = []
    process_windows(np.ones(30, np.float32), 100, 10, lambda w: seen.append(w) or w[None])
    np.testing.assert_array_equal(seen[0][0], np.concatenate([np.ones(30), np.zeros(70)]))


def test_windows_that_disagree_are_cross_faded_without_a_jump():
    level = iter(range(10))
    out = process_windows(np.zeros(500, np.float32), 100, 20, lambda w: np.full_like(w, next(level))[None])[0]
    assert np.max(np.abs(np.diff(out))) < 0.1
    assert out[0] == 0
    assert out[-1] == pytest.approx(len(window_starts(500, 100, 20)) - 1)
