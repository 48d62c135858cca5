import json
import logging

import numpy as np
import pytest
from clapsep.export.vocabulary import read_tokenizer
from clapsep.runtime import Query, Separator
from clapsep.runtime.errors import AudioError, BundleError, CheckpointError, QueryError
from clapsep.runtime.tokenizer import Tokenizer


def clips(n, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.uniform(-0.5, 0.5, int(rng.integers(2000, 60000))).astype(np.float32), 48000) for _ in range(n)]


def side(kind, shots, seed):
    text = f"sound number {seed}" if kind in ("text", "both") else None
    return Query(text, clips(shots, seed) if kind in ("audio", "both") else ())


@pytest.mark.parametrize("shots", [1, 5, 10])
@pytest.mark.parametrize("sides", ["P", "N", "PN"])
@pytest.mark.parametrize("kind", ["text", "audio", "both"])
def test_every_cell_of_the_query_table(separator, kind, sides, shots):
    positive = side(kind, shots, 1) if "P" in sides else None
    negative = side(kind, shots, 2) if "N" in sides else None
    condition = separator.condition(positive, negative)
    halves = []
    for query in (positive, negative):
        expected = np.zeros(128, np.float32)
        if query is not None:
            text = separator.encode_text([query.text])[0] if query.text else None
            audio = separator.encode_audio(query.audio).mean(0) if query.audio else None
            expected = audio if text is None else text if audio is None else 0.5 * audio + 0.5 * text
        halves.append(expected)
    joined = np.concatenate(halves)
    np.testing.assert_allclose(condition, joined / np.linalg.norm(joined), atol=1e-6)
    out = separator.separate(np.random.default_rng(3).uniform(-0.5, 0.5, 8000).astype(np.float32), 32000, positive, negative)
    assert out.shape == (8000,)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
def test_alpha_weighs_audio_against_text(separator, alpha):
    (clip,) = clips(1)
    text, audio = separator.encode_text(["rain"])[0], separator.encode_audio([clip])[0]
    mixed = alpha * audio + (1 - alpha) * text
    got = separator.condition(Query("rain", [clip], alpha))
    np.testing.assert_allclose(got[:128], mixed / np.linalg.norm(mixed), atol=1e-6)
    np.testing.assert_array_equal(got[128:], 0)


def test_normalize_can_be_overridden(demo_bundle, separator):
    raw = Separator(demo_bundle, normalize=False).condition("rain", "a dog")
    assert np.linalg.norm(raw) == pytest.approx(2**0.5, abs=1e-5)
    np.testing.assert_allclose(raw / 2**0.5, separator.condition("rain", "a dog"), atol=1e-6)


@pytest.mark.parametrize("positive", [None, "", "  \n", Query(), Query("")])
@pytest.mark.parametrize("negative", [None, ""])
def test_a_pair_of_empty_queries_is_refused(separator, positive, negative):
    with pytest.raises(QueryError, match="neither a positive nor a negative"):
        separator.condition(positive, negative)


def test_an_empty_query_is_zeros_not_the_embedding_of_nothing(separator):
    np.testing.assert_array_equal(separator.condition("rain", "")[128:], 0)
    np.testing.assert_array_equal(separator.condition("", "rain")[:128], 0)


def test_long_and_strange_texts(separator, caplog):
    with caplog.at_level(logging.WARNING):
        long = separator.condition("a dog " * 1667)
    assert "longer than 77 tokens" in caplog.text
    assert np.linalg.norm(long) == pytest.approx(1, abs=1e-5)
    for text in ("🐶🔊", "\x00", "כלב נובח", "a\ud800b", "<s></s><pad>"):
        assert np.isfinite(separator.condition(text)).all()
    assert not np.allclose(separator.condition("🐶"), separator.condition("🔊"))


def test_embeddings_are_unit_vectors_and_computed_once(demo_bundle):
    separator = Separator(demo_bundle)
    ran = []
    engine = separator.engine("text_encoder_short")
    run = engine.run
    engine.run = lambda inputs: ran.append(1) or run(inputs)
    first = separator.encode_text(["rain", "wind", "rain"])
    again = separator.encode_text(["rain"])
    assert len(ran) == 2
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)


def test_audio_queries_from_files_arrays_channels_and_rates_agree(separator, tmp_path):
    import soundfile as sf

    x = np.sin(np.arange(48000) * 0.05).astype(np.float32) * 0.5
    sf.write(tmp_path / "q.wav", np.stack([x, x], 1), 48000, subtype="FLOAT")
    from_file, mono = separator.encode_audio([tmp_path / "q.wav", (x, 48000)])
    whole = (x * 32768).astype(np.int16)
    stereo, integers, quantised = separator.encode_audio(
        [(np.stack([x, x]), 48000), (whole, 48000), (whole.astype(np.float32) / np.float32(32768), 48000)]
    )
    np.testing.assert_array_equal(from_file, mono)
    np.testing.assert_allclose(stereo, mono, atol=1e-6)
    np.testing.assert_array_equal(integers, quantised)


def test_crop_policies_reach_the_embedding(demo_bundle):
    rng = np.random.default_rng(0)
    clip = (
        np.concatenate([0.01 * rng.standard_normal(200000), 0.5 * np.sin(np.arange(200000) * 0.1)]).astype(np.float32),
        48000,
    )
    found = {crop: Separator(demo_bundle, crop=crop).encode_audio([clip])[0] for crop in ("start", "center", "loudest", "average")}
    assert not np.allclose(found["start"], found["loudest"], atol=1e-3)
    np.testing.assert_array_equal(found["start"], Separator(demo_bundle).encode_audio([clip])[0])
    with pytest.raises(QueryError, match="choose one of: start"):
        Separator(demo_bundle, crop="random")


def test_queries_that_make_no_sense(separator):
    with pytest.raises(QueryError, match="alpha is 2"):
        Query("rain", alpha=2)
    with pytest.raises(QueryError, match="list of clips"):
        Query(audio="rain.wav")
    with pytest.raises(QueryError, match="not int"):
        separator.condition(3)
    with pytest.raises(QueryError, match="list of clips"):
        Query(audio=None)
    with pytest.raises(QueryError, match="alpha is 0.5"):
        Query("rain", alpha="0.5")
    with pytest.raises(QueryError, match="int; give a str"):
        Query(5)
    for texts in ("dog", [None]):
        with pytest.raises(QueryError, match="list of str"):
            separator.encode_text(texts)
    with pytest.raises(QueryError, match="not ndarray"):
        separator.encode_audio([np.zeros(5)])
    assert separator.encode_text([]).shape == separator.encode_audio([]).shape == (0, 128)
    with pytest.raises(AudioError, match="NaN"):
        separator.condition(Query(audio=[(np.full(100, np.nan, np.float32), 48000)]))


def test_tokenizer_frames_pads_and_truncates(demo_bundle):
    tokenizer = Tokenizer(demo_bundle / "tokenizer.json", 77)
    ids, mask = tokenizer.encode(["", "a dog", "a dog " * 200])
    assert ids.shape == mask.shape == (3, 77)
    assert list(ids[0, :3]) == [0, 2, 1]
    assert mask.sum(1)[0] == 2
    assert ids[2, 0] == 0
    assert ids[2, 76] == 2
    np.testing.assert_array_equal(mask, (ids != 1).astype(np.int64))


def test_words_that_the_model_has_never_seen_are_named_once(demo_bundle, caplog):
    separator = Separator(demo_bundle)
    with caplog.at_level(logging.WARNING):
        separator.condition("a dog barking", "Zebra, xylophone")
        separator.condition("a zebra")
        separator.condition("the sound of rain")
    assert [record.getMessage() for record in caplog.records] == ["the model has never seen the words: xylophone, zebra"]


def test_a_tokenizer_on_which_the_library_panics(demo_bundle, tmp_path):
    """A panic in Rust is a BaseException, which no `except Exception` sees."""
    content = json.loads((demo_bundle / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    merged = "".join(content["model"]["merges"][-1])
    vocab[""] = vocab.pop(merged)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json", 77)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tokenizer(tmp_path / "tokenizer.json", 1 << 20)
