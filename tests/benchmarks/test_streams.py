import numpy as np
import pytest
import stream as bench
from clapsep.runtime import Separator
from clapsep.runtime.windows import WindowPlan


def test_lags_are_counted_from_when_a_sample_was_recorded():
    came = [(11.5, 100), (12.53, 200), (12.6, 250)]  # moment, samples so far
    row = bench._lags(came, 10.0, 100, 1.5)
    assert row["lags"] == pytest.approx([1.5, 1.53, 0.6])
    assert row["largest"] == pytest.approx(1.53)
    assert row["dropouts"] == {"0.02": 1, "0.05": 0, "0.1": 0, "0.2": 0}


def test_seams_see_a_jump_at_a_hand_over_and_nowhere_else():
    plan, random = WindowPlan(10_000, 8000, 2000), np.random.default_rng(0)
    out = random.normal(0, 0.01, 50_000).astype(np.float32)
    quiet = bench.seams(out, plan, 0)
    assert quiet["n"] == len(plan.ends(50_000)) - 1
    assert quiet["max"] < 2
    end = plan.ends(50_000)[1]
    out[end - plan.discard :] += 1
    assert bench.seams(out, plan, 0)["max"] > 10
    assert bench.seams(out, plan, 3000)["max"] < 2


def test_the_command_beside_a_clock(demo_bundle):
    small = bench.Bench(Separator(demo_bundle, threads=1), 1)
    row = bench.clock(demo_bundle, small, 0.5, 0.25, 2, 1)
    assert 0.6 < row["largest"] < 5
    assert len(row["lags"]) >= 4
    assert "latency 0.75 s" in row["said"][0]
