import threading

import numpy as np
import pytest
from clapsep.runtime.cache import Cache


def test_what_was_asked_for_last_is_kept():
    cache, made = Cache(2), []

    def ask(key):
        return cache.get(key, lambda: made.append(key) or np.full(1, key, np.float32))

    for key in (1, 2, 1, 3, 1, 2):
        assert ask(key) == key
    assert made == [1, 2, 3, 2], "2 went when 3 came, as 1 had been asked for since"
    assert len(cache) == 2


def test_nobody_can_change_what_others_get():
    kept = Cache(1).get("a", lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 1


def test_a_failure_is_not_kept():
    cache = Cache(1)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: np.float32(1 // 0))
    assert cache.get("a", lambda: np.ones(1, np.float32)) == 1


def test_threads_may_compute_at_the_same_time():
    """The lock is not held meanwhile: both are inside `compute` at once, or the barrier breaks."""
    cache, barrier, found = Cache(4), threading.Barrier(2), []

    def compute():
        barrier.wait(20)
        return np.ones(1, np.float32)

    threads = [threading.Thread(target=lambda k=key: found.append(cache.get(k, compute))) for key in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
