"""One Separator, many threads: every caller gets what it would get alone. TensorRT kinds: tests/engines/test_tensorrt.py, simulated."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import numpy as np
import pytest
from clapsep.engines import EngineUnavailable
from clapsep.runtime import Separator

QUERIES = ["rain", "a siren", "a dog barking", "wind"]
THREADS = 8


def calls(separator):
    """Calls of every sort, as (key, call)."""
    random = np.random.default_rng(2)
    for i, length in enumerate((1, 5000, 90_000, 200_000)):
        x, rate, query = random.uniform(-1.5, 1.5, length).astype(np.float32), (32000, 44100)[i % 2], QUERIES[i]
        yield f"separate {i}", lambda x=x, rate=rate, query=query: separator.separate(x, rate, query, "speech")
        yield f"many {i}", lambda x=x, rate=rate: separator.separate_many(x, rate, QUERIES[:2])
        yield f"stream {i}", lambda x=x, rate=rate, query=query: streamed(separator, x, rate, query)
        yield f"text {i}", lambda query=query: separator.encode_text([query, query + " far away"])
    clip = (random.uniform(-1, 1, 40_000), 48000)
    yield "audio", lambda: separator.encode_audio([clip])


def streamed(separator, x, rate, query):
    stream = separator.stream(query, sample_rate=rate, peak=1.5)
    return np.concatenate([*(stream.push(piece) for piece in np.array_split(x, 7)), stream.finish()])


@pytest.mark.parametrize("options", [{"engine": "onnxruntime"}, {"engine": "onnxruntime", "route": "waveform"},
                                     {"engine": "openvino"}, {"engine": "openvino", "precision": "bf16"}], ids=str)  # fmt: skip
def test_threads_that_share_a_separator_get_what_each_would_get_alone(demo_bundle, options):
    try:
        alone, shared = (Separator(demo_bundle, threads=1, **options) for _ in range(2))
        wanted = {key: call() for key, call in calls(alone)}
    except EngineUnavailable as error:
        pytest.skip(str(error))
    start = Barrier(THREADS)

    def work(seed):
        start.wait(30)  # the graphs are loaded by all of them at once, too
        order = list(calls(shared))
        np.random.default_rng(seed).shuffle(order)
        return [(key, call()) for key, call in order]

    with ThreadPoolExecutor(THREADS) as pool:
        for results in pool.map(work, range(THREADS)):
            for key, result in results:
                np.testing.assert_array_equal(result, wanted[key], err_msg=key)


def test_no_more_calls_run_at_once_than_was_said(demo_bundle):
    separator = Separator(demo_bundle, threads=1, concurrency=2)
    route, running, most, lock = separator._routes[separator.choice.one], 0, 0, Lock()
    inner = route.targets

    def counted(windows, conditions):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return inner(windows, conditions)
        finally:
            with lock:
                running -= 1

    route.targets = counted
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda seed: separator.separate(np.full(9, seed / 9), 32000, "rain"), range(12)))
    assert most == 2
