import os
import signal
import time
from functools import partial

import pytest
from clapsep.runtime.errors import AudioError, EngineUnavailable, WorkerError
from clapsep.runtime.workers import run_here, run_in_processes


def open_work(trouble=""):
    """Work that squares numbers, and dies of 7, fails of 8 and breaks of 9."""
    if trouble == "broken":
        raise EngineUnavailable("no engine here", "no-gpu")
    if trouble == "dead":
        os.kill(os.getpid(), signal.SIGKILL)

    def work(item, report):
        report(item / 2)
        if item == 7 and trouble == "mortal":
            os.kill(os.getpid(), signal.SIGSEGV)
        if item == 8:
            raise AudioError("eight is no sound")
        if item == 9:
            raise ZeroDivisionError("nine")
        if trouble == "slow":
            time.sleep(60)
        return item * item, os.getpid()

    return work


def open_counted(folder, most):
    """Like `open_work("mortal")`, but not more often than `most` times."""
    (folder / str(os.getpid())).touch()
    return open_work("mortal" if len(os.listdir(folder)) <= most else "dead")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_item_is_begun_and_ends_once(workers):
    told, outcomes = [], []
    run = run_here(open_work, range(10), told.append) if workers == 1 else run_in_processes(open_work, range(10), told.append, workers)
    outcomes = list(run)
    assert sorted(o.item for o in outcomes if o.begun) == list(range(10))
    results = {o.item: o.result[0] for o in outcomes if o.result}
    assert results == {i: i * i for i in range(8)}
    errors = {o.item: o.error for o in outcomes if o.error}
    assert isinstance(errors[8], AudioError)
    assert str(errors[9]) == "unexpected ZeroDivisionError: nine; run it alone with --debug and report it"
    assert len(outcomes) == 20
    assert sorted(told) == [i / 2 for i in range(10)]
    if workers > 1:
        assert os.getpid() not in {o.result[1] for o in outcomes if o.result}


def test_a_worker_that_dies_costs_one_item():
    outcomes = list(run_in_processes(partial(open_work, "mortal"), range(6, 9), print, 2))
    errors = {o.item: o.error for o in outcomes if o.error}
    assert {o.item for o in outcomes if o.result} == {6}
    assert isinstance(errors[7], WorkerError)
    assert "SIGSEGV" in str(errors[7])
    assert isinstance(errors[8], AudioError)


def test_work_that_cannot_be_opened_ends_the_run():
    with pytest.raises(EngineUnavailable, match="no engine here") as caught:
        list(run_in_processes(partial(open_work, "broken"), [1, 2], print, 2))
    assert caught.value.reason == "no-gpu"
    with pytest.raises(WorkerError, match="SIGKILL"):
        list(run_in_processes(partial(open_work, "dead"), [1, 2], print, 2))


def test_a_worker_that_cannot_be_replaced_leaves_the_work_to_the_others(tmp_path):
    """Only two processes may begin; one of them dies of its item."""
    outcomes = list(run_in_processes(partial(open_counted, tmp_path, 2), [7, 1, 2, 3, 4], print, 2))
    assert {o.item for o in outcomes if o.result} == {1, 2, 3, 4}
    assert [o.item for o in outcomes if o.error] == [7]


def test_leaving_early_stops_the_workers():
    run = run_in_processes(partial(open_work, "slow"), [1, 2], print, 2)
    assert next(run).begun
    begin = time.monotonic()
    run.close()
    assert time.monotonic() - begin < 20
