"""Sound of any length through the demo model: right in shape, without seams, and as well separated as one window."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import quality
import stream as bench
from clapsep.runtime import Separator

RATE, WINDOW = 32000, 80000
MIXTURES = 6
DEFAULT, LIVE = (None, 1.0), (1.0, 0.25)  # hop, overlap


@pytest.fixture(scope="module")
def long(demo_bundle):
    """Mixtures of 12 to 20 s; without espeak-ng they hold no speech."""
    if shutil.which("espeak-ng") is None:
        quality.CLASSES = tuple(name for name in quality.CLASSES if name != "speech")
    return bench.Bench(Separator(demo_bundle), MIXTURES)


@pytest.fixture(scope="module")
def tried(long):
    """Rows of every mixture by hop and overlap; those without an overlap are single windows, one after the other."""
    return {setting: [bench.try_setting(long, i, *setting) for i in range(MIXTURES)] for setting in (DEFAULT, LIVE, (None, 0.0))}


LENGTHS = [1, 2, 319, 320, 1023, 16000, WINDOW - 1, WINDOW, WINDOW + 1, 3 * 48000 + 32000, 3 * 48000 + 32001, 7 * RATE + 7, 61 * RATE]


@pytest.mark.parametrize(
    ("rate", "channels", "lengths"), [(RATE, None, LENGTHS), (44100, 2, [1, 5, 44100 * 3 + 1]), (8000, 1, [1, 61 * 8000])]
)
def test_every_length_has_a_result_and_the_stream_gives_the_same(separator, rate, channels, lengths):
    condition = separator.condition("rain", "a dog barking")
    for n in lengths:
        random = np.random.default_rng(n)
        x = random.uniform(-0.5, 0.5, n if channels is None else (channels, n)).astype(np.float32)
        y = separator.separate(x, rate, condition=condition)
        assert y.shape == x.shape
        assert np.isfinite(y).all()
        opened = separator.stream(condition=condition, sample_rate=rate, channels=channels)
        blocks = np.split(x, np.sort(random.integers(0, n + 1, 9)), axis=-1)
        streamed = np.concatenate([*(opened.push(block) for block in blocks), opened.finish()], axis=-1)
        np.testing.assert_array_equal(streamed, y, err_msg=f"{n} samples")


@pytest.mark.parametrize("setting", [DEFAULT, LIVE])
def test_hand_overs_do_not_jump(tried, setting):
    """Against the 99.9th percentile of all jumps around them; hard cuts between single windows do."""
    assert max(row["seams"][bench.OURS]["max"] for row in tried[setting]) <= 1.2
    assert max(row["seams"]["cut"]["max"] for row in tried[None, 0.0]) > 2


@pytest.mark.parametrize("setting", [DEFAULT, LIVE])
def test_long_mixtures_are_separated_as_well_as_single_windows(tried, setting):
    joined, single = ([row["sdri"][name] for row in tried[which]] for which, name in ((setting, bench.OURS), ((None, 0.0), "cut")))
    assert np.mean(joined) >= np.mean(single) - 0.1
    assert np.mean(joined) >= 8
