"""Statistics against values worked out by hand, the rules for quoting, and what hostile files may not do."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest
from clapsep.export.bench.compare import compare, comparison_table, differences, require
from clapsep.export.bench.page import page
from clapsep.export.bench.result import Case, Cpu, Environment, Reading, Result, Subject, printable, read_result
from clapsep.export.bench.statistics import quantile, ratios, spread, summarize, warnings
from clapsep.export.bench.table import number, quantity, table
from clapsep.runtime.errors import InputError, RegressionError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CPU = Cpu("Abacus 9", ("beads",), 2, 2, "unknown", "unknown")
ENVIRONMENT = Environment("CPython 3.11.7", "Linux", CPU, 1 << 30, 0.1, (), "no driver", {"numpy": "2.0"}, "openblas", {})
SUBJECT = Subject("a.clapsep", "0" * 64, "clapsep", "demo", "fp32")
QUIET = tuple(Reading(0.5 * i, 0.001 + 1e-6 * (i % 5)) for i in range(40))
OLD = Path("old.json")


def case(observations, name="separate", engine="onnxruntime", audio=10.0, **fields):
    fields = {"unit": "s", "parameters": {"route": "split"}, "calls": 1, "begin": 5.0, "end": 10.0, **fields}
    return Case(name=name, engine=engine, audio_seconds=audio, observations=tuple(map(float, observations)), **fields)


def result(*cases, reference=QUIET, elsewhere=0.0):
    return Result("2026-01-01", "clapsep-export bench", ENVIRONMENT, SUBJECT, {}, ("a note",), elsewhere, tuple(reference), tuple(cases))


STEADY = case([1.00, 1.01, 1.02, 1.03, 1.04])


def test_quantiles_are_interpolated():
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([0, 10], 0.9) == 9
    assert quantile(range(101), 0.99) == 99
    assert spread(range(1, 102)) == pytest.approx(91 / 11)


def test_summary_by_hand():
    (summary,) = summarize(result(case([2, 4, 3, 1, 5])))
    assert summary.p50 == 3
    assert summary.throughput == pytest.approx(10 / 3)
    assert summary.rtf == pytest.approx(0.3)
    assert summary.spread == pytest.approx(4.6 / 1.4)
    (silent,) = summarize(result(case([1, 1, 1], audio=0.0)))
    assert (silent.throughput, silent.rtf) == (None, None)


@pytest.mark.parametrize(("count", "p90", "p99"), [(9, False, False), (10, True, False), (99, True, False), (100, True, True)])
def test_a_quantile_needs_an_observation_beyond_it(count, p90, p99):
    (summary,) = summarize(result(case(range(1, count + 1))))
    assert (summary.p90 is not None, summary.p99 is not None) == (p90, p99)
    if p99:
        assert (summary.p90, summary.p99) == pytest.approx((90.1, 99.01))


def doubts(*args, **kwargs):
    return summarize(result(*args, **kwargs))[0].doubts


def test_doubts():
    assert doubts(STEADY) == ()
    assert doubts(case([1, 1, 1, 1])) == ("few",)
    assert doubts(case([1, 1, 1, 1.5, 1.5])) == ("spread",)
    assert doubts(case([1, 1, 1, 1.19, 1.19])) == ()


def test_a_machine_that_slows_down_is_noticed():
    slow_then = [dataclasses.replace(r, seconds=0.002 if 4 < r.at < 11 else r.seconds) for r in QUIET]
    assert doubts(STEADY, reference=slow_then) == ("machine",)
    assert doubts(case([1] * 5, begin=12.0, end=15.0), reference=slow_then) == (), "it was fast again by then"
    changes = [dataclasses.replace(r, seconds=0.0015 if 7 < r.at < 11 else r.seconds) for r in QUIET]
    assert doubts(STEADY, reference=changes) == ("machine",)
    assert doubts(dataclasses.replace(STEADY, unit="bytes"), reference=slow_then) == (), "memory does not depend on speed"


def test_a_noisy_run_is_warned_of_and_a_quiet_one_is_not():
    assert warnings(result(STEADY)) == ()
    noisy = [dataclasses.replace(r, seconds=r.seconds * (1 + (i % 4) / 4)) for i, r in enumerate(QUIET)]
    first, second = warnings(result(STEADY, reference=noisy))
    assert "too noisy to quote" in first
    assert "1 ms to 1.75 ms" in first
    assert "1 of 1 cases" in second
    (marked,) = warnings(result(STEADY, case([1, 2, 1, 2, 1], name="jumpy")))
    assert "1 of 2 cases must not be quoted (spread 1, machine 0, few 0)" in marked
    (busy,) = warnings(result(STEADY, elsewhere=0.9))
    assert "other programs kept 0.90 cores busy" in busy
    assert warnings(result(STEADY, elsewhere=None)) == ()


def test_ratios_are_taken_within_rounds():
    """The machine halves its speed in the middle: medians are far off, ratios are not."""
    a, b = case([1, 1, 1, 2, 2]), case([1.5, 1.5, 1.5, 3, 3], engine="openvino")
    (ratio,) = ratios(result(a, b))
    assert (ratio.first, ratio.case.engine) == ("onnxruntime", "openvino")
    assert (ratio.p50, ratio.p10, ratio.p90) == (1.5, 1.5, 1.5)
    (uneven,) = ratios(result(case([1, 2, 4]), case([1, 4, 16], engine="openvino")))
    assert (uneven.p10, uneven.p50, uneven.p90) == pytest.approx((1.2, 2, 3.6))
    assert ratios(result(a, case([1], engine="openvino"))) == (), "other rounds"
    assert ratios(result(a, dataclasses.replace(b, parameters={"route": "fused"}))) == (), "another case"


def test_quantities_are_readable():
    assert [quantity(v, "s") for v in (12.345, 1.0, 0.0123456, 3.4e-6, 3.4e-8, None)] == [
        "12.3 s",
        "1 s",
        "12.3 ms",
        "3.4 µs",
        "0.034 µs",
        "–",
    ]
    assert [quantity(v, "bytes") for v in (3 << 30, 5 << 20, 12)] == ["3 GiB", "5 MiB", "12 B"]
    assert [number(v) for v in (1234.5, 99.96, 0.01234, None)] == ["1234", "100", "0.0123", "–"]


def test_table_of_one_and_of_two_engines():
    header, line = table(result(STEADY)).splitlines()
    assert re.split(r"\s{2,}", header) == ["case", "engine", "n", "p50", "p90", "p99", "p90/p10", "audio s/s", "RTF", "do not quote"]
    assert re.split(r"\s{2,}", line) == ["separate, route split", "onnxruntime", "5", "1.02 s", "–", "–", "1.03", "9.8", "0.102"]
    assert "within each round" in table(result(STEADY, case([1] * 5, engine="openvino")))


def test_compare_by_hand():
    old = result(case([1, 2, 3]), case([1, 1, 1], name="gone"), case([4], unit="bytes", name="memory peak"))
    new = result(case([3, 3, 3]), case([5, 5, 5], name="added"), case([2], unit="bytes", name="memory peak"))
    changes = compare(new, old, OLD)
    assert [(c.case.name, c.old, c.new, c.ratio) for c in changes] == [("separate", 2, 3, 1.5), ("memory peak", 4, 2, 0.5)]
    assert [c.verdict(1.15) for c in changes] == ["slower", "smaller"]
    assert [c.verdict(2) for c in changes] == ["", ""], "a ratio equal to the margin is within it"
    assert "margin 1.15" in comparison_table(changes, 1.15)
    with pytest.raises(RegressionError, match=r"1 of 2 cases .* 1.15 .* old.json.*'separate, route split' with onnxruntime \(1.50 times\)"):
        require(changes, 1.15, OLD)
    require(changes, 1.5, OLD)


def test_noise_is_no_regression():
    """A neighbour raises the median and not the best; slower code raises both."""
    old = result(case([1.0, 1.0, 1.0, 1.0, 1.0]))
    assert [c.worse(1.15) for c in compare(result(case([1.0, 1.0, 3.0, 3.0, 3.0])), old, OLD)] == [False]
    assert [c.worse(1.15) for c in compare(result(case([1.2, 1.2, 3.0, 3.0, 3.0])), old, OLD)] == [True]


def test_the_worst_regression_is_named():
    slow, slower = (dataclasses.replace(STEADY, observations=(factor,) * 5) for factor in (2.0, 3.0))
    old = result(STEADY, dataclasses.replace(STEADY, name="other"))
    with pytest.raises(RegressionError, match="2 of 2 cases .*'other, route split'"):
        require(compare(result(slow, dataclasses.replace(slower, name="other")), old, OLD), 1.15, OLD)


def test_cases_match_by_name_engine_and_parameters():
    for changed in ({"name": "other"}, {"engine": "openvino"}, {"parameters": {"route": "fused"}}, {"unit": "bytes"}):
        with pytest.raises(InputError, match="no case in common"):
            compare(result(dataclasses.replace(STEADY, **changed)), result(STEADY), OLD)


def test_equal_circumstances_are_not_remarked_on():
    assert list(differences(result(STEADY), result(STEADY))) == []
    assert any("of the old run: too noisy" in said for said in differences(result(STEADY), result(STEADY, elsewhere=2.0)))


def test_json_comes_back_as_it_was(tmp_path):
    given = result(STEADY, case([1 << 20], unit="bytes", name="memory peak"), elsewhere=None)
    (tmp_path / "b.json").write_text(given.to_json())
    assert read_result(tmp_path / "b.json") == given


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "$\\frac{$", '"><img src=x>', "a & b", "]]>", "x_^{"])
def test_a_page_escapes_every_text(text, caplog):
    hostile = case([1, 2, 3], name=f"separate {text}", engine=text, parameters={text: text, "queries": 1})
    more = dataclasses.replace(hostile, parameters={text: text, "queries": 2})
    environment = dataclasses.replace(ENVIRONMENT, platform=text, packages={text: text}, variables={text: text}, gpus=(text,))
    subject = dataclasses.replace(SUBJECT, name=text)
    made = dataclasses.replace(result(hostile, more), environment=environment, bundle=subject, notes=(text,), command=text, taken=text)
    with caplog.at_level(logging.WARNING):
        html = page(made)
    assert html.count("<svg") == 3
    plain = re.sub(r"<svg.*?</svg>", "", html, flags=re.S)
    if set('<>&"') & set(text):
        assert text not in html
    else:
        assert plain.count(text) > 10
    assert set(re.findall(r"<(\w+)", html)) <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "td", "th", "figure", "figcaption"),
        *("svg", "g", "defs", "path", "use", "text", "clipPath", "rect", "tspan"),
    }


def test_a_page_of_memory_only():
    html = page(result(case([1 << 20], unit="bytes", name="memory peak", audio=0.0)))
    assert html.count("<svg") == 1


def test_what_cannot_be_printed_is_replaced():
    assert printable("a\x1b[2Jb\udce4ü") == "a?[2Jb?ü"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, 1e308, 5e-324, "$", "<b>"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(path):
    """Reading it is refused in one sentence, or everything can be made of it."""
    try:
        read = read_result(path)
    except InputError as error:
        if "\n" in str(error):
            raise AssertionError("more than a sentence") from error
        return False
    assert table(read)
    warnings(read)
    changes = compare(read, read, path)
    assert comparison_table(changes, 1.15)
    require(changes, 1.15, path)
    return True


@FUZZ
@given(JSON)
def test_arbitrary_json_is_refused(tmp_path, value):
    path = tmp_path / "fuzz.json"
    path.write_text(json.dumps(value))
    assert not survives(path)


@FUZZ
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(tmp_path, content):
    path = tmp_path / "fuzz.json"
    path.write_bytes(content)
    assert not survives(path)


@FUZZ
@given(st.data(), JSON)
def test_a_benchmark_with_anything_in_any_place_gives_no_traceback(tmp_path, data, value):
    document = json.loads(result(STEADY, case([1, 2, 3], engine="openvino")).to_json())
    place = document
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    path = tmp_path / "fuzz.json"
    path.write_text(json.dumps(document))
    survives(path)


@pytest.mark.parametrize(
    ("observation", "fine"),
    [(1.0, True), (1e-12, True), (1e15, True), (1e-13, False), (5e-324, False), (1e16, False), (0, False), (-1, False)],
)
def test_observations_must_be_possible(tmp_path, observation, fine):
    path = tmp_path / "b.json"
    document = json.loads(result(STEADY).to_json())
    document["cases"][0]["observations"][2] = observation
    path.write_text(json.dumps(document))
    assert survives(path) == fine
