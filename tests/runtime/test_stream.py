import tracemalloc
from threading import Event, Thread

import numpy as np
import pytest
from clapsep.runtime import Separator
from clapsep.runtime.errors import AudioError, EngineError, QueryError, StreamError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HOP, OVERLAP = 1.0, 0.25


def noise(n, channels=None, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, n if channels is None else (channels, n)).astype(np.float32)


def pieces(x, sizes):
    return np.split(x, np.cumsum(sizes), axis=-1)


@pytest.fixture(scope="module")
def live(demo_bundle):
    return Separator(demo_bundle, hop=HOP, overlap=OVERLAP)


@pytest.mark.parametrize(("rate", "channels"), [(32000, None), (44100, 2), (8000, 1)])
@pytest.mark.parametrize("settings", [{}, {"hop": HOP, "overlap": OVERLAP}])
def test_a_stream_gives_what_the_whole_gives_sample_for_sample(demo_bundle, rate, channels, settings):
    separator, x = Separator(demo_bundle, **settings), noise(5 * rate + 77, channels)
    stream = separator.stream("rain", "a dog barking", sample_rate=rate, channels=channels)
    ready = [stream.push(piece) for piece in pieces(x, [1, 333, 0, rate, 7777, 2 * rate])]
    y = np.concatenate([*ready, stream.finish()], axis=-1)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, separator.separate(x, rate, "rain", "a dog barking"))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 60_000), max_size=6), st.sampled_from([None, 1, 2]), st.sampled_from([16000, 48000]))
def test_blocks_of_any_size_give_back_as_many_samples(separator, sizes, channels, rate):
    x = noise(sum(sizes), channels)
    stream = separator.stream("rain", sample_rate=rate, channels=channels)
    ready = [stream.push(piece) for piece in pieces(x, sizes[:-1])]
    y = np.concatenate([*ready, stream.finish()], axis=-1)
    assert y.shape == x.shape
    assert (stream.state.received, stream.state.returned) == (sum(sizes), sum(sizes))
    if y.size:
        np.testing.assert_array_equal(y, separator.separate(x, rate, "rain"))


@pytest.mark.parametrize("rate", [32000, 44100])
def test_results_are_ready_within_the_latency(live, rate):
    stream, block = live.stream("rain", sample_rate=rate), rate // 100
    assert HOP + OVERLAP <= stream.latency < HOP + OVERLAP + 0.1
    for piece in pieces(noise(4 * rate), range(0)) and np.split(noise(4 * rate), 400):
        stream.push(piece)
        assert (stream.state.received - stream.state.returned - block) / rate <= stream.latency


def test_several_queries_and_a_peak_above_1(separator):
    x = 4 * noise(100_000)
    stream = separator.stream_many(["rain", ("a siren", "rain")], 32000, peak=float(np.abs(x).max()))
    y = np.concatenate([stream.push(x[:70_000]), stream.push(x[70_000:]), stream.finish()], axis=-1)
    np.testing.assert_array_equal(y, separator.separate_many(x, 32000, ["rain", ("a siren", "rain")]))
    with pytest.raises(StreamError, match="several queries"):
        separator.stream_many(["rain"]).ask("wind")


def test_a_block_much_longer_than_a_window_needs_no_more_memory_than_its_results(separator):
    """20,000 samples of 100 Hz are 200 seconds: 26 MB at the model's rate, if they were resampled at once."""
    stream = separator.stream("rain", sample_rate=100)
    tracemalloc.start()
    try:
        ready = stream.push(noise(20_000))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert len(ready) + len(stream.finish()) == 20_000


def test_sound_louder_than_was_announced_is_said_once(separator, caplog):
    stream = separator.stream("rain", peak=2)
    for level in (1.9, 3.0, 3.0):
        stream.push(np.full(10, level))
    assert caplog.text.count("samples reach 3 and a peak of 2 was announced") == 1


def test_another_query_from_the_next_window_on(live):
    x, n = noise(6 * 32000), 3 * 32000
    stream = live.stream("rain")
    first = stream.push(x[:n])
    stream.ask("a siren", "rain")
    y = np.concatenate([first, stream.push(x[n:]), stream.finish()])
    rain, siren = live.separate_many(x, 32000, ["rain", ("a siren", "rain")])
    np.testing.assert_array_equal(y[: len(first)], rain[: len(first)])
    complete = len(first) + stream.plan.fade
    np.testing.assert_array_equal(y[complete:], siren[complete:])


def test_a_block_that_is_refused_was_not_heard(separator):
    stream, x = separator.stream("rain", channels=2), noise(5000, 2)
    before = [stream.push(x[:, :3000])]
    for block, reason in (
        (np.zeros(5), "takes \\[2, n\\]"),
        (np.zeros((3, 5)), "takes"),
        (np.full((2, 5), np.nan), "NaN"),
        (None, "shape"),
        ([[1, 2], [3]], "no array"),
    ):
        with pytest.raises(AudioError, match=reason):
            stream.push(block)
    y = np.concatenate([*before, stream.push(x[:, 3000:]), stream.finish()], axis=1)
    np.testing.assert_array_equal(y, separator.separate(x, 32000, "rain"))


def test_a_stream_ends(separator):
    stream = separator.stream("rain")
    stream.push(noise(10))
    assert stream.finish().shape == (10,)
    for again in (lambda: stream.push(noise(10)), stream.finish, lambda: stream.ask("wind")):
        with pytest.raises(StreamError, match="finished; open another"):
            again()


def test_a_stream_whose_engine_fails_says_so_from_then_on(separator, monkeypatch):
    def fail(windows, conditions):
        raise EngineError("out of memory")

    monkeypatch.setattr(separator, "separate_windows", fail)
    stream = separator.stream("rain")
    with pytest.raises(EngineError):
        stream.push(noise(200_000))
    monkeypatch.undo()
    with pytest.raises(StreamError, match="failed \\(out of memory"):
        stream.push(noise(5))


def test_two_threads_in_one_stream_are_told(separator, monkeypatch):
    inside, leave = Event(), Event()

    def wait(windows, conditions):
        inside.set()
        leave.wait(10)
        return windows[None]

    monkeypatch.setattr(separator, "separate_windows", wait)
    stream = separator.stream("rain")
    thread = Thread(target=stream.push, args=(noise(90_000),))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(StreamError, match="two threads"):
        stream.push(noise(5))
    leave.set()
    thread.join()
    assert stream.push(noise(5)).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({}, QueryError), ({"positive": "a", "condition": np.zeros(256)}, QueryError), ({"positive": "a", "channels": 0}, AudioError),
     ({"positive": "a", "channels": 65}, AudioError), ({"positive": "a", "sample_rate": 0}, AudioError),
     ({"positive": "a", "peak": float("nan")}, AudioError), ({"positive": "a", "peak": "loud"}, AudioError), ({"positive": "a", "peak": 10**400}, AudioError),
     ({"positive": "a", "hop": 3}, QueryError), ({"positive": "a", "overlap": -1}, QueryError)],
)  # fmt: skip
def test_streams_that_cannot_be(separator, arguments, error):
    with pytest.raises(error):
        separator.stream(**arguments)
