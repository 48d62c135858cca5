"""CLAPSep's checkpoints: layouts, variants, and everything that can be wrong with them."""

import re

import numpy as np
import pytest
import torch
from clapsep.export.checkpoint import read_checkpoint
from clapsep.export.family import open_model
from clapsep.runtime.errors import CheckpointError
from clapsep.runtime.metrics import snr
from safetensors.torch import load_file, save_file
from tiny import Files, metadata, raw_lightning, read, rewrite, variant

X = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 80000)).astype(np.float32)
C = np.random.default_rng(1).standard_normal(32).astype(np.float32)


def test_sizes_are_inferred_from_the_tensors(files):
    model = open_model(*read(files))
    assert model.config.clap.audio.depths == (2, 1)
    assert model.config.lora_rank == 2
    assert model.variant == {"phase": False, "mask_net": "transformer", "lora_rank": 2}
    assert model.dsp["window_samples"] == 80000
    assert model.separate(X, C).shape == (1, 80000)


def test_all_layouts_of_one_model_are_the_same_model(files, tmp_path):
    wanted = open_model(*read(files)).separate(X, C)
    clap, checkpoint = tmp_path / "clap.pt", tmp_path / "best.ckpt"
    torch.save({"state_dict": load_file(files.clap), "epoch": 1, "loss": np.float64(1)}, clap)
    torch.save(load_file(files.checkpoint), checkpoint)
    hyper = metadata(files.clap)
    for path_clap, path in [(clap, checkpoint), (None, raw_lightning(files, tmp_path / "raw.ckpt"))]:
        pair = None if path_clap is None else read_checkpoint(path_clap, "clap"), read_checkpoint(path, "checkpoint")
        pair[1].metadata.update(hyper)  # what a torch file cannot say about a small model
        np.testing.assert_array_equal(open_model(*pair).separate(X, C), wanted)


def test_lora_and_tuned_biases_count(files):
    wanted = open_model(*read(files)).separate(X, C)
    for pattern in (r"lora_B$", r"^audio_branch.*attn\.(qkv|proj)\.bias$"):
        clap, checkpoint = read(files)
        for name in checkpoint.tensors:
            if re.search(pattern, name):
                checkpoint.tensors[name].zero_()
        assert snr(wanted, open_model(clap, checkpoint).separate(X, C)) < 60


def test_half_precision_storage_is_read(files):
    rewrite(files.checkpoint, lambda t: t.update({k: v.half() for k, v in t.items()}))
    assert np.isfinite(open_model(*read(files)).separate(X, C)).all()


@pytest.mark.parametrize(
    "changes", [{"phase": True}, {"mask_net": "conv"}, {"mask_net": "conv", "phase": True, "mask_kernel": 5}, {"lora_rank": 0}]
)
def test_variants_are_recognised(tmp_path, changes):
    model = open_model(*read(variant(tmp_path, **changes)))
    assert {k: getattr(model.config, k) for k in changes} == changes
    assert np.isfinite(model.separate(X, C)).all()


def test_an_untuned_encoder_is_claps_own(tmp_path):
    files = variant(tmp_path, lora_rank=0)
    rewrite(files.checkpoint, lambda t: [t.pop(name) for name in list(t) if name.startswith("audio_branch.")])
    model = open_model(*read(files))
    torch.testing.assert_close(
        model.separator.get_submodule("audio_branch.layers.0.blocks.0.attn.proj").weight,
        load_file(files.clap)["module.audio_branch.layers.0.blocks.0.attn.proj.weight"],
    )


DECODER = "decoder_model.skip.0.norm.weight"


def broken(files: Files):
    """name → (change, words in the message)"""
    c, k = files.checkpoint, files.clap

    def nan(t):
        t[DECODER][0] = float("nan")

    return {
        "missing": (c, lambda t: t.pop(DECODER), [f"{DECODER} is missing"]),
        "surplus": (c, lambda t: t.update({"decoder_model.extra": torch.zeros(1)}), ["decoder_model.extra is not part"]),
        "surplus in CLAP": (
            k,
            lambda t: t.update({"module.text_branch.extra": torch.zeros(1)}),
            ["text_branch.extra is not part"],
        ),
        "mis-shaped": (c, lambda t: t.update({DECODER: torch.zeros(5)}), [f"{DECODER} has shape [5] instead of [16]"]),
        "not finite": (c, nan, [f"{DECODER} has NaN"]),
        "integers": (c, lambda t: t.update({DECODER: torch.zeros(16, dtype=torch.int64)}), ["int64 instead of floating"]),
        "several": (
            c,
            lambda t: (t.pop(DECODER), t.pop("decoder_model.skip.1.norm.bias")),
            ["in 2 tensors", DECODER, "decoder_model.skip.1.norm.bias"],
        ),
        "half a LoRA": (
            c,
            lambda t: t.pop("audio_branch.layers.0.blocks.1.attn.qkv.lora_A"),
            ["blocks.1.attn.qkv.lora_A is missing"],
        ),
        "no size": (c, lambda t: t.pop("decoder_model.spec_norm.weight"), ["spec_norm.weight is missing"]),
        "absurd size": (k, lambda t: t.update({"module.audio_branch.bn0.weight": torch.zeros(7)}), ["do not make a model"]),
    }


@pytest.mark.parametrize("name", broken(Files(None, None, None)))  # type: ignore[arg-type]
def test_what_is_wrong_is_listed(files, name):
    path, change, words = broken(files)[name]
    rewrite(path, change)
    with pytest.raises(CheckpointError) as caught:
        open_model(*read(files))
    assert all(word in str(caught.value) for word in words), caught.value


def test_wrong_files_are_recognised(files, tmp_path):
    clap, checkpoint = read(files)
    with pytest.raises(CheckpointError, match="--checkpoint clap.* looks like a CLAP checkpoint.*give it as --clap"):
        open_model(None, clap)
    with pytest.raises(CheckpointError, match="--clap clapsep.* looks like a checkpoint of CLAPSep.*give it as --checkpoint"):
        open_model(checkpoint, checkpoint)
    with pytest.raises(CheckpointError, match="holds no CLAP towers; give the CLAP checkpoint with --clap"):
        open_model(None, checkpoint)
    for name, what in {
        "roberta.encoder.layer.0.output.dense.weight": "a RoBERTa checkpoint",
        "conv1.weight": r"1 tensors under conv1\.weight \(1\)",
    }.items():
        save_file({name: torch.zeros(2)}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=what):
            open_model(clap, read_checkpoint(tmp_path / "x.safetensors", "checkpoint"))
        with pytest.raises(CheckpointError, match=what):
            open_model(read_checkpoint(tmp_path / "x.safetensors", "clap"), checkpoint)


def test_the_wrong_clap_for_this_checkpoint_is_noticed(files):
    """The published file repeats CLAP's own biases; they tell whether the pair belongs together."""
    name = "audio_branch.layers.0.blocks.0.attn.qkv.bias"
    rewrite(files.checkpoint, lambda t: t.update({"clap_model.model." + name: load_file(files.clap)["module." + name]}))
    open_model(*read(files))
    rewrite(files.checkpoint, lambda t: t["clap_model.model." + name].add_(1))
    with pytest.raises(CheckpointError, match=r"was trained on another CLAP than --clap clap\.safetensors: 1 tensors"):
        open_model(*read(files))


@pytest.mark.parametrize(
    "hyper",
    [
        {"spec_size": -1},
        {"color": 3},
        {"spec_size": float("inf")},
        {"spec_size": 2**17},
        {"lora_alpha": float("nan")},
        {"weights": "stolen"},
        {"words": "rain"},
        {"words": [1]},
        {"context": "77"},
        {"mask_heads": 3},
        {"window_samples": 10**7},
    ],
)
def test_impossible_metadata(files, hyper):
    clap, checkpoint = read(files)
    checkpoint.metadata.update(hyper)
    with pytest.raises(CheckpointError):
        open_model(clap, checkpoint)


def test_a_short_context_needs_no_graph_for_short_texts(files, monkeypatch):
    from clapsep.export.families import clapsep

    assert [spec.name for spec in open_model(*read(files)).towers.derived()] == ["text_encoder_short"]
    monkeypatch.setattr(clapsep, "SHORT", 77)
    assert open_model(*read(files)).towers.derived() == []
