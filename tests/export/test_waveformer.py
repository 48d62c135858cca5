"""Waveformer's checkpoints, its reference and its graphs, on a very small model."""

import dataclasses

import numpy as np
import pytest
import torch
from clapsep.export.checkpoint import read_checkpoint
from clapsep.export.families.waveformer import FRAMES, open_model, positions, recognises
from clapsep.runtime.errors import CheckpointError
from clapsep.runtime.graph import check_graph
from clapsep.runtime.metrics import snr
from waveformers import as_checkpoint, drive, exported, labels, tiny, write_published

NAMES = ["a", "b", "c"]


def test_published_layout(tmp_path):
    checkpoint = read_checkpoint(write_published(tmp_path / "default_ckpt.pt", tiny()), "checkpoint")
    assert recognises(checkpoint)
    model = open_model(None, checkpoint)
    assert (model.variant, model.weights) == ({"encoder": 16, "decoder": 8}, "checkpoint")
    assert model.query["labels"][:3] == ["Acoustic_guitar", "Applause", "Bark"]
    assert len(set(model.query["labels"])) == 41
    assert sorted(model.query["labels"]) == model.query["labels"]


def test_a_file_with_two_sets_of_tensors_is_ambiguous(tmp_path):
    torch.save({"model_state_dict": tiny(), "average": tiny()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds no state dict of tensors"):
        read_checkpoint(tmp_path / "a.pt", "checkpoint")


def test_metadata():
    model = open_model(None, as_checkpoint(tiny(3), labels=NAMES, weights="generated"))
    assert (model.weights, model.query, model.condition) == ("generated", {"labels": NAMES}, {"size": 3})
    np.testing.assert_array_equal(model.conditions(), [[0, 0, 1], [0, 1, 1], [1, 0, 0]])
    assert exported("tiny").model.conditions().sum(1).tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "knows 3 labels, whose names its metadata must list"),
        ({"labels": ["a", "b"]}, "must have 3 different labels"),
        ({"labels": ["a", "b", "b"]}, "must have 3 different labels"),
        ({"labels": ["a", "b", "c,d"]}, "must have 3 different labels"),
        ({"labels": ["a", "b", 3]}, "must have 3 different labels"),
        ({"labels": "abc"}, "must have 3 different labels"),
        ({"labels": NAMES, "weights": "best"}, "weights of checkpoint, demo, generated"),
        ({"labels": NAMES, "size": 3}, "has size; it may set labels and weights"),
    ],
)
def test_metadata_that_do_not_fit(metadata, message):
    with pytest.raises(CheckpointError, match=message):
        open_model(None, as_checkpoint(tiny(3), **metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("in_conv.0.weight"), "in_conv.0.weight is missing"),
        (lambda t: t.update({"label_embedding.0.weight": torch.zeros(3)}), r"label_embedding.0.weight has shape \[3\]"),
        (lambda t: t.update({"mask_gen.proj_e2d_e.0.weight": torch.zeros(6, 2, 1)}), "widths 16 and 6 do not make a Waveformer"),
        (lambda t: t.update({"mask_gen.proj_e2d_e.0.weight": torch.zeros(1 << 20, 1, 1)}), "do not make a Waveformer"),
        (lambda t: t.pop("mask_gen.encoder.dcc_layers.dcc_7.layers.3.bias"), r"in 1 tensors.*\n.*dcc_7.layers.3.bias is missing"),
        (lambda t: t.update({"out_conv.0.weight": torch.zeros(16, 1, 96)}), r"has shape \[16, 1, 96\] instead of \[16, 1, 160\]"),
        (
            lambda t: t.update({"mask_gen.decoder.tf_dec_layers.1.norm1.bias": torch.zeros(8)}),
            "layers.1.norm1.bias is not part of the model",
        ),
        (lambda t: t["mask_gen.decoder.tf_dec_layers.0.norm1.bias"].fill_(np.nan), "norm1.bias has NaN or infinite values"),
        (lambda t: t.update({"label_embedding.0.bias": torch.zeros(24, dtype=torch.int64)}), "int64 instead of floating point"),
    ],
)
def test_wrong_tensors_are_told(change, message):
    tensors = {name: value.clone() for name, value in tiny().items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        open_model(None, as_checkpoint(tensors))


def test_a_clap_checkpoint_is_not_wanted():
    with pytest.raises(CheckpointError, match="leave --clap out"):
        open_model(as_checkpoint({}), as_checkpoint(tiny()))


def test_other_files_are_not_recognised():
    assert not recognises(as_checkpoint({"in_conv.0.weight": torch.zeros(1)}))


def test_the_positional_encoding_of_the_paper():
    place, pair = 17, 3
    angle = place * np.exp(-2 * pair * np.log(10000) / 8)
    np.testing.assert_allclose(positions(8)[place, 2 * pair : 2 * pair + 2], [np.sin(angle), np.cos(angle)], rtol=1e-5)
    assert positions(8).shape == (2 * FRAMES, 8)


def test_the_reference_takes_any_length_and_pads_nothing_audible(rng):
    model = exported("tiny").model
    x = rng.uniform(-0.5, 0.5, (2, 3000)).astype(np.float32)
    for n in (1, 33, 416, 2999):
        y = model.separate(x[:, :n], labels(3)[0])
        assert (y.shape, y.dtype) == ((2, n), np.float32)
        np.testing.assert_allclose(y[1:], model.separate(x[1:, :n], labels(3)[0]), atol=1e-6)


def test_what_comes_later_than_the_look_ahead_changes_nothing(rng):
    model = exported("tiny").model
    x = rng.uniform(-0.5, 0.5, (1, 416 * 6)).astype(np.float32)
    changed = x.copy()
    changed[:, 416 * 3 + 32 :] = 0
    y, z = (model.separate(sound, labels(3)[0])[0, : 416 * 3] for sound in (x, changed))
    assert snr(y, z) > 110


def test_graphs_are_lean_and_plain():
    made = exported("tiny")
    assert {name: graph.nodes for name, graph in made.manifest.graphs.items()} == pytest.approx(
        {"film": 8, "separator": 239, "mixture_encoder": 167, "mask_decoder": 72}, abs=6
    )
    for graph in made.manifest.graphs.values():
        check_graph(made.root / graph.graph.file, graph)
    weights = {name: graph.data for name, graph in made.manifest.graphs.items() if graph.data}
    assert weights.get("mixture_encoder") == weights.get("separator") == weights.get("mask_decoder")


def test_every_group_size(rng):
    """Encoders as wide as the decoder, and four times as wide."""
    from clapsep.export.families.waveformer import LabelEmbedding, Step, regrouped

    x = rng.uniform(-0.5, 0.5, (1, 480)).astype(np.float32)
    for encoder in (8, 32):
        model = open_model(None, as_checkpoint(tiny(encoder=encoder)))
        tensors = regrouped(model.network.state_dict(), 8)
        film = LabelEmbedding(tensors)(torch.from_numpy(labels(4)))
        inputs = {name: torch.zeros(1, *value.shape[1:]) for name, value in model.graphs()[1].inputs.items()}
        inputs |= {"x": torch.nn.functional.pad(torch.from_numpy(x[:, :448]), (32, 0)), "valid": torch.ones(1, 13, 1), "film": film}
        with torch.inference_mode():
            y = Step(tensors, 8)(*inputs.values())[0].numpy()
        assert snr(model.separate(x, labels(4)[0])[0, :416], y[0]) > 110


def test_the_reference_and_the_steps_agree(rng):
    made = exported("tiny")
    x = rng.uniform(-0.5, 0.5, (2, 5003)).astype(np.float32)
    for condition in made.model.conditions():
        assert snr(made.model.separate(x, condition), drive(made, "fused", x, condition[None])[0]) > 110


def test_a_variant_is_described_by_its_sizes():
    made = exported("tiny")
    assert made.model.dsp == dataclasses.asdict(made.family.dsp)
    assert made.model.towers is None
