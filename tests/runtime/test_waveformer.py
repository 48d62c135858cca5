"""Waveformer at run time: labels, states between steps, queries, on a very small model."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from clapsep.runtime.errors import ManifestError, QueryError
from clapsep.runtime.families.waveformer import DelayLine, Labels, Waveformer
from clapsep.runtime.metrics import snr
from clapsep.runtime.query import Query
from clapsep.runtime.steps import Stepper
from waveformers import drive, exported, labels

NOTHING = Query()


@pytest.fixture(scope="module")
def made():
    return exported("tiny")


@pytest.fixture
def sound(rng):
    return rng.uniform(-0.5, 0.5, (3, 5003)).astype(np.float32)


def ask(made, text, **options):
    return made.family.ask(Query(text=text, **options), NOTHING, lambda _: None, normalize=None)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Bark", [2]),
        (" bark ", [2]),
        ("Bark, Cough", [2, 10]),
        ("Bark+cough", [2, 10]),
        ("Bark,,Bark", [2]),
        ("acoustic guitar", [0]),
        ("Hi-hat, hi hat, HI_HAT", [23]),
        ("violin or_fiddle", [39]),
    ],
)
def test_labels(made, text, wanted):
    np.testing.assert_array_equal(ask(made, text), labels(*wanted)[0])


@pytest.mark.parametrize(
    ("text", "close"),
    [
        ("dog_bark", "Bark?"),
        ("a dog barking", "mean Bark"),
        ("gunshots", "Gunshot_or_gunfire?"),
        ("Bark, fidle", "Violin_or_fiddle?"),
        ("saxofone", "Saxophone?"),
        ("hihat", "Hi-hat?"),
        ("drum", "Bass_drum or Snare_drum?"),
        ("thunder", "label 'thunder';"),
    ],
)
def test_unknown_labels(made, text, close):
    with pytest.raises(QueryError, match=r"has no label '.*clapsep-export inspect lists its 41 labels") as error:
        ask(made, text)
    assert close in str(error.value)


def test_labels_that_differ_only_in_case():
    found = Labels(["bus", "Bus", "car horn", "Car_horn"])
    assert [found.find("bus"), found.find("Bus"), found.find("Car_horn")] == [0, 1, 3]
    with pytest.raises(QueryError, match="did you mean bus or Bus"):
        found.find("BUS")


@pytest.mark.parametrize(
    ("query", "normalize", "message"),
    [
        (Query(), None, "no label was given"),
        (Query(text=" , + "), None, "no label was given"),
        (Query(audio=["bark.wav"]), None, "by labels, not by example sounds"),
        (Query(text="Bark", audio=["bark.wav"]), None, "by labels, not by example sounds"),
        (Query(text="Bark"), False, "nothing to normalise"),
    ],
)
def test_queries_that_labels_cannot_answer(made, query, normalize, message):
    with pytest.raises(QueryError, match=message):
        made.family.ask(query, NOTHING, lambda _: None, normalize=normalize)


def test_a_vector_in_place_of_labels(made):
    weights = np.linspace(0, 1, 41, dtype=np.float32)
    found = made.family.ask(Query(vector=weights), NOTHING, lambda query: query.vector, normalize=None)
    np.testing.assert_array_equal(found, weights)


@pytest.mark.parametrize("route", ["fused", "split"])
def test_in_pieces_of_any_size(made, route, sound):
    stepper = Stepper(made.family, made.family.begin(made.engine, route, 3), 3, labels(2))
    pieces = np.split(sound, [0, 1, 447, 448, 1000, 1003, 4000], axis=1)
    found = np.concatenate([*(stepper.push(piece) for piece in pieces), stepper.finish()], axis=2)
    np.testing.assert_array_equal(found, drive(made, route, sound, labels(2)))


@pytest.mark.parametrize("span", [26, 32, 2048])
def test_a_delay_line_is_a_window_on_what_was_pushed(rng, span):
    steps = rng.standard_normal((2 * span // 13 + 9, 2, 13, 3)).astype(np.float32)
    past = np.concatenate([np.zeros((2, span, 3), np.float32), *steps], axis=1)
    line = DelayLine(2, 13, span, 3)
    for n, step in enumerate(steps):
        for back in (span, span // 2):
            start = span + 13 * n - back
            np.testing.assert_array_equal(line.back(back), past[:, start : start + 13])
        line.push(step)


def test_a_delay_line_of_one_channel_copies_nothing():
    line = DelayLine(1, 13, 64, 3)
    assert np.shares_memory(line.back(64), line._ring)
    assert line.back(64).flags.c_contiguous


@pytest.mark.parametrize("route", ["fused", "split"])
def test_many_times_around_the_delay_lines(made, route, rng):
    """More than two of the longest, against the whole sound at once."""
    x = rng.uniform(-0.5, 0.5, (1, 416 * 340 + 123)).astype(np.float32)
    assert snr(made.model.separate(x, labels(2)[0]), drive(made, route, x, labels(2))[0]) > 110


@pytest.mark.parametrize("n", [1, 31, 32, 33, 415, 416, 417, 448, 449, 832, 1000])
def test_every_length(made, sound, n):
    x = sound[:1, :n]
    wanted = made.model.separate(x, labels(2, 10)[0])
    for route in ("fused", "split"):
        assert snr(wanted, drive(made, route, x, labels(2, 10))[0]) > 100


@pytest.mark.parametrize("route", ["fused", "split"])
def test_channels_and_queries_are_what_each_is_alone(made, route, sound):
    conditions = np.concatenate([labels(2), labels(2, 10), labels(9)])
    together = drive(made, route, sound, conditions)
    assert together.shape == (3, *sound.shape)
    for k, condition in enumerate(conditions):
        for channel, x in enumerate(sound):
            assert snr(drive(made, "fused", x[None], condition[None])[0, 0], together[k, channel]) > 120


def test_both_routes_agree(made, sound):
    fused, split = (drive(made, route, sound, labels(7)) for route in ("fused", "split"))
    assert snr(fused, split) > 120


@pytest.mark.parametrize("route", ["fused", "split"])
def test_another_query_is_complete_after_two_steps(made, route, sound):
    first, second = labels(2), labels(9)
    y = drive(made, route, sound, lambda i: first if i < 4 else second)[0]
    before, after = (drive(made, route, sound, condition)[0] for condition in (first, second))
    np.testing.assert_array_equal(y[:, : 416 * 4], before[:, : 416 * 4])
    assert snr(after[:, 416 * 6 :], y[:, 416 * 6 :]) > 120
    assert snr(after[:, 416 * 4 : 416 * 5], y[:, 416 * 4 : 416 * 5]) < 60


@pytest.mark.parametrize("route", ["fused", "split"])
def test_more_and_fewer_queries_from_a_step_on(made, route, sound):
    few, many = labels(2), np.concatenate([labels(2), labels(9)])
    steps, x = made.family.begin(made.engine, route, 3), np.pad(sound, ((0, 0), (32, 32)))
    results = [steps.run(x[:, 416 * i :][:, :480], many if 3 <= i < 7 else few, 416) for i in range(10)]
    assert [len(y) for y in results] == [1] * 3 + [2] * 4 + [1] * 3
    assert snr(drive(made, route, sound, few)[0, :, : 416 * 10], np.concatenate([y[0] for y in results], axis=1)) > 120
    alone = drive(made, route, sound, labels(9))[0]
    assert snr(alone[:, 416 * 5 : 416 * 7], np.concatenate([y[1] for y in results[5:7]], axis=1)) > 120


def test_label_embeddings_are_computed_once(made, sound):
    calls = []

    def engine(name):
        calls.append(name)
        return made.engine(name)

    drive(dataclasses.replace(made, engine=engine), "fused", sound, labels(2))
    assert calls.count("film") == 1
    assert set(calls) == {"film", "separator"}


def test_memory_does_not_grow(made, sound):
    steps, x, condition = made.family.begin(made.engine, "fused", 1), np.ascontiguousarray(sound[:1, :480]), labels(2)
    for _ in range(200):
        steps.run(x, condition, 416)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(300):
            steps.run(x, condition, 416)
        assert tracemalloc.get_traced_memory()[0] - before < 10_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("dsp", {"step": 400}, "do not fit together"),
        ("dsp", {"hop": None}, "dsp.hop must be a int"),
        ("dsp", {"window_samples": 0}, "positive integers"),
        ("dsp", {"before": 64}, "do not fit together"),
        ("variant", {"encoder": 32}, "graph 'film' has"),
        ("variant", {"decoder": 16}, "graph 'separator' has"),
        ("condition", {"size": 40}, "41 labels for a condition of 40"),
        ("query", {"labels": ["a"]}, "1 labels for a condition of 41"),
        ("query", {"labels": 3}, "query.labels must be a list"),
    ],
)
def test_constants_that_do_not_describe_the_graphs(made, part, change, message):
    manifest = dataclasses.replace(made.manifest, **{part: {**getattr(made.manifest, part), **change}})
    with pytest.raises((ValueError, ManifestError), match=message):
        Waveformer(manifest)


@pytest.mark.parametrize("missing", ["film", "separator"])
def test_graphs_that_are_missing(made, missing):
    graphs = {name: graph for name, graph in made.manifest.graphs.items() if name != missing}
    with pytest.raises(ValueError, match=f"there is no graph '{missing}'"):
        Waveformer(dataclasses.replace(made.manifest, graphs=graphs))


def test_graphs_that_do_not_fit_each_other(made):
    graphs = dict(made.manifest.graphs)
    graphs["mask_decoder"] = dataclasses.replace(graphs["mask_decoder"], inputs=graphs["mask_decoder"].inputs[1:])
    with pytest.raises(ValueError, match="graph 'mask_decoder' has"):
        Waveformer(dataclasses.replace(made.manifest, graphs=graphs))
    with_dsp = {name: value for name, value in made.manifest.dsp.items() if name != "hop"}
    with pytest.raises(ValueError, match="dsp lacks hop"):
        Waveformer(dataclasses.replace(made.manifest, dsp=with_dsp))
