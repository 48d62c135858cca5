"""All routes through a bundle give the same target; those that are left out are refused."""

import numpy as np
import pytest
from clapsep.engines import EngineUnavailable
from clapsep.runtime import Query, Separator
from clapsep.runtime.errors import BundleError, QueryError
from clapsep.runtime.metrics import snr
from clapsep.runtime.routes import CACHE_SIZE, Split, available, plan_routes

QUESTIONS = ["rain", ("a dog barking", "rain"), (None, "wind"), Query("a siren")]
ALL = ("separator", "mixture_encoder", "film", "mask_decoder", "separator_waveform", "text_encoder")


def noise(n, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, n).astype(np.float32)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def routes(request, demo_bundle):
    return {route: Separator(demo_bundle, request.param, route=route) for route in ("fused", "split", "waveform")}


@pytest.mark.parametrize(("route", "least"), [("split", 120), ("waveform", 110)])
def test_routes_agree(routes, route, least):
    x = noise(80000)
    for question in QUESTIONS:
        wanted, found = (routes[name].separate_many(x, 32000, [question])[0] for name in ("fused", route))
        assert snr(wanted, found) > least


@pytest.mark.parametrize("route", ["fused", "split", "waveform"])
def test_many_queries_are_each_alone(routes, route):
    separator = routes[route]
    x = np.stack([noise(100001, 1), noise(100001, 2)])
    many = separator.separate_many(x, 44100, QUESTIONS)
    assert many.shape == (4, 2, 100001)
    for question, found in zip(QUESTIONS, many, strict=True):
        positive, negative = question if isinstance(question, tuple) else (question, None)
        np.testing.assert_array_equal(separator.separate(x, 44100, positive, negative), found)


def test_conditions_are_questions_too(routes):
    separator = routes["split"]
    condition = separator.condition("rain", "wind")
    found = separator.separate_many(noise(1000), 32000, [condition, ["rain", "wind"]])  # as from JSON
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(separator.separate(noise(1000), 32000, condition=condition.tolist()), found[0])


def test_a_mixture_is_encoded_once_and_a_condition_projected_once(demo_bundle, monkeypatch):
    separator = Separator(demo_bundle)
    runs: dict[str, int] = {}
    for graph in ("film", *Split.graphs):
        engine = separator.engine(graph)

        def count(inputs, run=engine.run, graph=graph):
            runs[graph] = runs.get(graph, 0) + 1
            return run(inputs)

        monkeypatch.setattr(engine, "run", count)
    separator.separate_many(noise(80000), 32000, QUESTIONS)
    separator.separate_many(noise(80000, 3), 32000, QUESTIONS)
    assert runs == {"mixture_encoder": 2, "film": 4, "mask_decoder": 8}


def test_cached_projections_are_bounded(separator, rng):
    route = Split(separator.family, separator.engine)
    for row in rng.standard_normal((CACHE_SIZE + 5, 256)).astype(np.float32):
        route._film(row)
    assert len(route._films) == CACHE_SIZE


@pytest.mark.parametrize("batch", [2, 3])
def test_windows_in_batches(demo_bundle, separator, batch):
    x = noise(80000 * 5 + 7)
    together = Separator(demo_bundle, batch=batch).separate_many(x, 32000, QUESTIONS[:2])
    assert snr(separator.separate_many(x, 32000, QUESTIONS[:2]), together) > 110


@pytest.mark.parametrize(
    "queries",
    [[], "rain", None, Query("rain"), {"rain": "rain"}, iter(["rain"]), [None], [("rain", None, "wind")], [3], [np.zeros(5, np.float32)]],
)
def test_questions_that_are_none(separator, queries):
    with pytest.raises(QueryError):
        separator.separate_many(noise(100), 32000, queries)


def test_where_the_routes_lead():
    assert plan_routes(ALL, None, "cpu", None) == ("split", "split")
    assert plan_routes(ALL, None, "cuda", None) == ("waveform", "split")
    assert plan_routes(("separator",), None, "cuda", None) == ("fused", "fused")
    assert plan_routes(("separator", "separator_waveform"), None, "cuda", None) == ("waveform", "fused")
    assert plan_routes(ALL, "fused", "cuda", "bf16") == ("fused", "fused")
    assert plan_routes(ALL, None, "cpu", None, causal=True) == ("fused", "split")
    assert available(("separator", "film")) == ["fused"]


def test_routes_that_cannot_be_taken(demo_bundle):
    with pytest.raises(QueryError, match="no route 'direct'; choose one of: fused, split, waveform"):
        Separator(demo_bundle, route="direct")
    with pytest.raises(QueryError, match="no route"):
        Separator(demo_bundle, route=["split"])
    with pytest.raises(BundleError, match="no graphs for the route 'split', only for fused"):
        plan_routes(("separator",), "split", "cpu", None)
    with pytest.raises(EngineUnavailable, match="compute its transforms in bf16") as refused:
        plan_routes(ALL, "waveform", "cpu", "bf16")
    assert refused.value.reason == "wrong-precision"
    waveform = Separator(demo_bundle, route="waveform")
    with pytest.raises(QueryError, match="there are no masks"):
        waveform.mask(np.zeros((1, 80000), np.float32), waveform.condition("rain"))
    for batch in (0, -1, "2", 1.5):
        with pytest.raises(QueryError, match="batch is"):
            Separator(demo_bundle, batch=batch)


def test_short_texts_take_the_short_graph(demo_bundle, monkeypatch):
    """With the same result; long ones take the long graph."""
    separator = Separator(demo_bundle)
    asked = []
    original = separator.engine

    def spy(graph):
        asked.append(graph)
        return original(graph)

    monkeypatch.setattr(separator.queries, "_engine", spy)
    texts = ["rain", "a dog barking and a bird singing and a man speaking and a car passing by the house"]
    embeddings = separator.encode_text(texts)
    assert asked == ["text_encoder_short", "text_encoder"]
    ids, mask = separator.queries.tokenizer.encode(texts)
    full = original("text_encoder").run({"input_ids": ids, "attention_mask": mask})["embedding"]
    np.testing.assert_allclose(embeddings, full, atol=1e-6)


def test_engines_go_with_their_separator(demo_bundle):
    """Without waiting for the garbage collector: a graph may hold gigabytes."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        separator = Separator(demo_bundle)
        separator.separate(noise(100), 32000, "rain")
        engine = weakref.ref(separator.engine("mask_decoder"))
        del separator
        assert engine() is None
    finally:
        gc.enable()
