import itertools

import numpy as np
import pytest
from clapsep.runtime.errors import QueryError
from clapsep.runtime.metrics import snr
from clapsep.runtime.windows import Windower, WindowPlan
from hypothesis import given, settings
from hypothesis import strategies as st

W = 100
ONE = np.zeros((1, 1), np.float32)  # condition


@st.composite
def plans(draw):
    overlap = draw(st.integers(0, W // 2))
    return WindowPlan(W, draw(st.integers(1, W - overlap)), overlap)


def join(x, plan, process, targets=1, batch=1, sizes=()):
    """All results [targets, channels, n] for [channels, n], pushed in pieces of `sizes`."""
    windower = Windower(plan, len(x), np.zeros((targets, 1), np.float32), lambda windows, _: process(windows), batch)
    pieces = [windower.push(piece) for piece in np.split(x, np.cumsum(sizes, dtype=int), axis=1)]
    return np.concatenate([*pieces, windower.finish()], axis=2)


@settings(max_examples=300, deadline=None)
@given(plans(), st.integers(1, 700), st.lists(st.integers(0, 300), max_size=5), st.integers(1, 3), st.integers(1, 5))
def test_identity_reconstructs_every_length_in_every_plan_and_pieces(plan, length, sizes, channels, batch):
    x = np.random.default_rng(length).uniform(-1, 1, (channels, length)).astype(np.float32)
    y = join(x, plan, lambda windows: np.stack([windows, -windows]), 2, batch, sizes)
    assert y.shape == (2, channels, length)
    assert snr(x, y[0]) > 120
    assert snr(-x, y[1]) > 120


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(1, 700), st.lists(st.integers(0, 300), max_size=5), st.integers(1, 4))
def test_results_do_not_depend_on_pieces_or_batches(plan, length, sizes, batch):
    x = np.random.default_rng(length).uniform(-1, 1, (1, length)).astype(np.float32)

    def process(windows):
        return (windows * np.abs(windows).max(axis=1, keepdims=True))[None]  # every window has a result of its own

    np.testing.assert_array_equal(join(x, plan, process, 1, batch, sizes), join(x, plan, process))


@given(st.integers(1, 5000), st.integers(0, 50))
def test_offline_windows_are_as_few_as_can_be_and_the_last_is_right_aligned(length, overlap):
    plan, seen = WindowPlan(W, W - overlap, overlap), []
    join(np.arange(length, dtype=np.float32)[None], plan, lambda windows: seen.append(windows[0, 0]) or windows[None])
    assert len(seen) == max(1, -(-(length - overlap) // (W - overlap))) == len(plan.ends(length))
    assert seen[0] == 0
    assert all(0 < b - a <= W - overlap for a, b in itertools.pairwise(seen))
    assert seen[-1] == max(0, length - W)


@given(plans(), st.integers(1, 700))
def test_results_are_ready_within_the_latency(plan, length):
    windower, ready = Windower(plan, 1, ONE, lambda windows, _: windows[None]), 0
    for heard in range(1, length + 1):
        ready += windower.push(np.zeros((1, 1), np.float32)).shape[2]
        assert heard - ready < plan.latency


@given(plans())
def test_windows_hand_over_where_both_have_heard_enough(plan):
    """No result comes from within `discard` samples of an end of a window, but at the ends of the sound."""
    position = np.arange(W, dtype=np.float32)
    y = join(np.zeros((1, 5 * W), np.float32), plan, lambda windows: np.broadcast_to(position, windows.shape)[None])[0, 0]
    middle = y[plan.first : -W]
    assert middle.max(initial=0) < W - plan.discard
    if plan.hop + plan.overlap == W:
        assert middle.min(initial=W) >= plan.discard - 1


def test_short_input_is_filled_with_zeros():
    seen = []
    join(np.ones((1, 30), np.float32), WindowPlan(W, 90, 10), lambda windows: seen.append(windows) or windows[None])
    np.testing.assert_array_equal(seen[0][0], np.concatenate([np.ones(30), np.zeros(70)]))


def test_no_sound_gives_no_result():
    assert join(np.ones((2, 0), np.float32), WindowPlan(W, 90, 10), pytest.fail).shape == (1, 2, 0)


def test_windows_that_disagree_are_cross_faded_without_a_jump():
    level = iter(range(10))
    plan = WindowPlan(W, 80, 20)
    out = join(np.zeros((1, 500), np.float32), plan, lambda windows: np.full_like(windows, next(level))[None])[0, 0]
    assert np.max(np.abs(np.diff(out))) < 0.11
    assert out[0] == 0
    assert out[-1] == pytest.approx(len(plan.ends(500)) - 1)


def test_the_state_is_as_large_after_a_long_sound_as_before():
    windower = Windower(WindowPlan(W, 30, 20), 1, ONE, lambda windows, _: windows[None])
    for _ in range(50):
        windower.push(np.zeros((1, 77), np.float32))
    state = windower.state
    assert (state.heard.shape, state.waiting) == ((1, W + 30), [])
    assert state.tail.shape[2] <= 20
    assert state.received == 3850
    assert state.received - state.emitted < sum(windower.delays.values())


@pytest.mark.parametrize(
    ("overlap", "hop", "reason"),
    [(-1, None, "overlap of -1"), (0.6, None, "0 to 0.5 s"), (float("nan"), None, "nan"), ("1", None, "overlap of 1"),
     (0.5, 0.6, "at most 0.5 s"), (0.1, 10**400, "hop of 1000"), (0.1, 0, "hop of 0 s"), (0.1, float("nan"), "hop of nan"), (0.1, "1", "hop of 1 s")],
)  # fmt: skip
def test_plans_that_cannot_be(overlap, hop, reason):
    with pytest.raises(QueryError, match=reason):
        WindowPlan.of(W, W, overlap, hop)


@pytest.mark.parametrize("overlap", [0, 0.28, 1.12, 2.49, 4.999, np.float32(0.5), 1])
def test_a_hop_that_fits_exactly_is_the_longest(overlap):
    window, rate = 320_000, 32_000
    assert WindowPlan.of(window, rate, overlap, 10 - float(overlap)) == WindowPlan.of(window, rate, overlap)
