import numpy as np
import pytest
from clapsep.runtime.dsp import cut, hann, mel_filterbank, multiply_matrices
from hypothesis import given
from hypothesis import strategies as st


def test_hann_is_periodic():
    np.testing.assert_allclose(hann(8), np.hanning(9)[:8], atol=1e-15)


@given(st.integers(1, 9), st.integers(0, 20), st.integers(12, 30))
def test_cut_says_what_the_signal_lacks(n, back, size):
    begin = max(n - back, -12)
    x, out = np.arange(1.0, n + 1), np.zeros(size)
    left, right = cut(x, begin, out)
    wanted = [x[i] if 0 <= i < n else 0 for i in range(begin, begin + size)]
    np.testing.assert_array_equal(out, wanted)
    assert (left, right) == (sum(i < 0 for i in range(begin, begin + size)), sum(i >= n for i in range(begin, begin + size)))


@pytest.mark.parametrize("shape", [(1, 3, 2), (500, 300, 16), (3, 900, 400), (2, 30, 10000)])
def test_products_in_pieces_are_products(rng, shape):
    n, k, m = shape
    a, b, out = rng.standard_normal((n, k)), rng.standard_normal((k, m)), np.full((n, m), np.nan)
    multiply_matrices(a, b, out)
    np.testing.assert_allclose(out, a @ b, atol=1e-11)


def test_products_stay_below_the_size_that_openblas_shares_out(rng, monkeypatch):
    sizes = []
    monkeypatch.setattr(np, "matmul", lambda a, b, **_: sizes.append(a.shape[0] * b.size))
    multiply_matrices(np.zeros((1001, 300)), np.zeros((300, 64)), np.zeros((1001, 64)))
    assert sum(sizes) == 1001 * 300 * 64
    assert max(sizes) <= 65536 * 4  # SMP_THRESHOLD_MIN · GEMM_MULTITHREAD_THRESHOLD in its interface/gemm.c


def test_mel_filters_have_unit_area_and_the_right_limits():
    filters = mel_filterbank(48000, 1024, 64, 50.0, 14000.0)
    width = 48000 / 1024
    assert filters.shape == (513, 64)
    assert filters[: int(50 / width)].sum() == 0
    assert filters[int(14000 / width) + 2 :].sum() == 0
    np.testing.assert_allclose(filters[:, 20:].sum(0) * width, 1, atol=0.1)
