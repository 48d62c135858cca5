"""Waveformer in its four published sizes: file layout → graphs → ONNX Runtime → numpy, against the official outputs."""

from __future__ import annotations

import numpy as np
import pytest
from clapsep.export.checkpoint import read_checkpoint
from clapsep.export.families.waveformer import open_model
from clapsep.runtime.metrics import snr
from waveformers import GOLDEN, META, digest, drive, exported, labels, official_order, official_states, published, write_published

pytestmark = pytest.mark.slow

LIMIT = 110  # dB; the float32 floor of the official code is 124 to 127
MAIN = ("E256_D128", "E512_D256")
SMALL = ("E256_D256", "E512_D128")
EVERY = META["every"]  # of long outputs, which samples are kept
ONE, TWO, ALL = labels(*META["one_hot"]), labels(*META["two_hot"]), labels(*range(41))


@pytest.fixture(scope="module")
def mixture() -> np.ndarray:
    return np.load(GOLDEN / "inputs.npz")["mixture_i16"][None] / np.float32(32768)


def beginning(mixture: np.ndarray, steps: int) -> np.ndarray:
    """So much of the mixture that so many steps do not hear its end."""
    return mixture[:, : 416 * steps + 32]


def golden(tag: str, name: str):
    return np.load(GOLDEN / f"{tag}_{name}.npz")


@pytest.mark.parametrize("tag", MAIN + SMALL)
def test_the_weights_are_those_of_the_golden_data(tag):
    assert digest(published(tag)) == META["models"][tag]["weights_sha256"]


@pytest.mark.parametrize("tag", MAIN)
def test_published_layout(tag, tmp_path):
    checkpoint = read_checkpoint(write_published(tmp_path / "default_ckpt.pt", published(tag)), "checkpoint")
    assert len(checkpoint.tensors) == 115
    model = open_model(None, checkpoint)
    assert model.variant == exported(tag).model.variant
    assert model.query["labels"][2] == "Bark"
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 1000)).astype(np.float32)
    np.testing.assert_array_equal(model.separate(x, ONE[0]), exported(tag).model.separate(x, ONE[0]))


def compare_whole(tag, found):
    """Outputs [3, n] for one label, two and all of them."""
    wanted = golden(tag, "whole")
    for name, y in zip(("onehot", "twohot"), found, strict=False):
        assert snr(wanted[f"wave_{name}_every{EVERY}"], y[::EVERY]) >= LIMIT
        assert snr(wanted[f"wave_{name}_last2000"], y[-2000:]) >= LIMIT
    assert snr(wanted["wave_all_last2000"], found[2, -2000:]) >= LIMIT


@pytest.mark.parametrize("tag", MAIN)
def test_whole_file_in_pytorch(tag, mixture):
    compare_whole(tag, np.concatenate([exported(tag).model.separate(mixture, condition[0]) for condition in (ONE, TWO, ALL)]))


@pytest.mark.parametrize("tag", MAIN)
def test_whole_file_step_by_step_for_several_queries(tag, mixture):
    """424 steps and one frame."""
    together = drive(exported(tag), "split", mixture, np.concatenate([ONE, TWO, ALL]))[:, 0]
    compare_whole(tag, together)
    for route in ("fused", "split"):
        alone = drive(exported(tag), route, beginning(mixture, 96), TWO)[0, 0, : 416 * 96]
        assert snr(alone, together[1, : 416 * 96]) >= 120


@pytest.mark.parametrize("tag", MAIN)
def test_label_embeddings(tag):
    found = exported(tag).engine("film").run({"condition": np.concatenate([ONE, TWO, ALL])})["film"]
    assert snr(golden(tag, "whole")["label_emb"], found[:, official_order(exported(tag))]) >= LIMIT


@pytest.mark.parametrize("route", ["fused", "split"])
@pytest.mark.parametrize("tag", MAIN)
def test_stream_and_its_states(tag, route, mixture):
    made, wanted, checked = exported(tag), golden(tag, "stream"), []

    def check(count, steps):
        if count not in META["state_snapshots_after_steps"]:
            return
        encoder, decoder, out = official_states(made, steps)
        assert snr(wanted[f"enc_sub_{count}"], encoder[:: META["models"][tag]["ctx_channel_stride"]]) >= LIMIT
        assert snr(wanted[f"dec_{count}"], decoder) >= LIMIT
        assert snr(wanted[f"out_{count}"], out) >= LIMIT
        layers = np.split(encoder, [2 * (2**i - 1) for i in range(1, 10)], axis=1)
        np.testing.assert_allclose([np.linalg.norm(layer) for layer in layers], wanted[f"enc_layer_l2_{count}"], rtol=1e-5)
        checked.append(count)

    steps = META["stream_steps"]
    y = drive(made, route, beginning(mixture, steps), ONE, check)[0, 0]
    assert snr(wanted[f"y_every{EVERY}"], y[: 416 * steps : EVERY]) >= LIMIT
    assert checked == META["state_snapshots_after_steps"]


@pytest.mark.parametrize("route", ["fused", "split"])
@pytest.mark.parametrize("tag", MAIN)
def test_another_query_from_a_step_on(tag, route, mixture):
    first, last = META["switch"]["kept_steps"]
    other = labels(*META["switch"]["label"])
    y = drive(exported(tag), route, beginning(mixture, last), lambda i: ONE if i < META["switch"]["at_step"] else other)[0, 0]
    assert snr(golden(tag, "stream")["switch_y"], y[416 * first : 416 * last]) >= LIMIT


@pytest.mark.parametrize("tag", MAIN)
def test_short_files(tag, mixture):
    wanted = golden(tag, "short")
    for n in META["short_lengths"]:
        x = mixture[:, 30000 : 30000 + n]
        assert snr(wanted[f"len{n}"], exported(tag).model.separate(x, ONE[0])[0]) >= LIMIT
        assert snr(wanted[f"len{n}"], drive(exported(tag), "fused", x, ONE)[0, 0]) >= LIMIT
        assert snr(wanted[f"len{n}"], drive(exported(tag), "split", x, ONE)[0, 0]) >= LIMIT


@pytest.mark.parametrize("tag", SMALL)
def test_the_other_sizes(tag, mixture):
    made, wanted, x = exported(tag), golden(tag, "small"), mixture[:, 30000:46000]
    for y in (made.model.separate(x, ONE[0])[0], *(drive(made, route, x, ONE)[0, 0] for route in ("fused", "split"))):
        assert snr(wanted["wave_onehot_30000_46000"], y) >= LIMIT
    film = made.engine("film").run({"condition": ONE})["film"]
    assert snr(wanted["label_emb"], film[:, official_order(made)]) >= LIMIT


class Spy:
    """An engine whose results are kept."""

    def __init__(self, engine, into):
        self.engine, self.into = engine, into

    def run(self, inputs):
        results = self.engine.run(inputs)
        self.into.update(results)
        return results


@pytest.mark.parametrize("tag", MAIN)
def test_stages_of_a_step(tag, mixture):
    """Where the graph is cut, and what is handed on."""
    made, wanted, found = exported(tag), golden(tag, "step20"), {}

    def check(count, steps):
        steps._engine = (lambda name: Spy(made.engine(name), found)) if count == 20 else made.engine  # for the next step

    y = drive(made, "split", beginning(mixture, 21), ONE, check)[0, 0, : 416 * 21]
    order = official_order(made)
    assert snr(wanted["y"], y[-416:]) >= LIMIT
    assert snr(wanted["in_conv"], found["z0"][0].T[order]) >= LIMIT
    assert snr(wanted["mask_gen_encoder"], found["e"][0].T[order]) >= LIMIT
    assert snr(wanted["mask_gen_proj_e2d_e"], found["dec_mem_out"][0].T) >= LIMIT
    assert snr(wanted["mask_gen_proj_e2d_l"], found["dec_tgt_out"][0].T) >= LIMIT
    assert snr((wanted["in_conv"] * wanted["mask_gen"])[:, -4:], found["out_buf_out"][0].T[order]) >= LIMIT
