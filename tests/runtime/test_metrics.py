import numpy as np
import pytest
from clapsep.runtime.metrics import CEILING_DB, cosine, si_sdr, snr


def test_known_values(rng):
    x = np.sin(np.arange(1000.0))
    assert snr(x, x) == CEILING_DB
    assert snr(x, 0.9 * x) == pytest.approx(20)
    assert si_sdr(x, 0.9 * x) > 200
    noise = np.cos(np.arange(1000.0))
    noise -= x * np.dot(x, noise) / np.dot(x, x)
    noise *= 0.1 * np.linalg.norm(x) / np.linalg.norm(noise)
    assert si_sdr(x, 3 * (x + noise)) == pytest.approx(20)


def test_cosine():
    a, b = np.array([[1.0, 0], [0, 2]]), np.array([[3.0, 0], [0, -1]])
    np.testing.assert_allclose(cosine(a, b), [1, -1])
    assert cosine(np.zeros(3), np.ones(3)) == 0
