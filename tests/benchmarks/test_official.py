"""The official way of computing, as the benchmarks' baseline: the same numbers as our modules, and as the official outputs."""

import numpy as np
import onnx
import pytest
import torch
from clapsep.export.families.clapsep import load_modules, split
from clapsep.runtime.clap import ClapFrontEnd
from clapsep.runtime.metrics import snr
from official import naive_export, official, read_official
from official_audio import LoRALinear, Resampler
from published import CASES, GOLDEN, case, write_pair
from tiny import DSP, TINY, read, variant


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The official modules and ours, with the same parameters."""
    parts = split(*read(variant(tmp_path_factory.mktemp("tiny"))))
    towers, separator = load_modules(parts, TINY, DSP)
    return official(parts, TINY, DSP), [module.eval() for module in (towers.text, towers.audio, separator)]


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32))


@torch.inference_mode()
def test_the_separator_is_ours(tiny):
    (_, _, separator), (_, _, ours) = tiny
    magnitude, log_mel, condition = noise(2, DSP.frames, DSP.bins).abs(), noise(2, DSP.frames, DSP.n_mels) * 60 - 50, noise(2, 32, seed=1)
    wanted = ours(magnitude, log_mel, condition).numpy()
    assert wanted.std() > 0.1
    assert snr(wanted, separator.network(magnitude, log_mel, condition).numpy()) >= 110


@torch.inference_mode()
def test_the_text_encoder_is_ours(tiny):
    (text, _, _), (ours, _, _) = tiny
    ids = torch.full((2, TINY.clap.text.context), 1)
    ids[0, :3], ids[1, :5] = torch.tensor([0, 7, 2]), torch.tensor([0, 9, 8, 300, 2])
    mask = (ids != 1).long()
    assert snr(ours(ids, mask).numpy(), text(ids, mask).numpy()) >= 110


@torch.inference_mode()
def test_the_audio_encoder_is_ours(tiny):
    (_, audio, _), (_, ours, _) = tiny
    log_mel = noise(2, DSP.frames, DSP.n_mels) * 60 - 50
    assert snr(ours(log_mel).numpy(), audio.network(log_mel).numpy()) >= 110
    wave = noise(1, DSP.front_end.clip_samples)
    front_end = torch.from_numpy(DSP.front_end.log_mel(wave.numpy()))
    assert snr(ours(front_end).numpy(), audio(wave).numpy()) >= 100


@torch.inference_mode()
@pytest.mark.parametrize("n", [DSP.window_samples, 50001, 513])
def test_waveforms_of_any_length_that_fits(tiny, n):
    (_, _, separator), _ = tiny
    x, condition = noise(1, n), noise(1, 32)
    assert separator(x, condition).shape == (1, n)
    everything = separator.istft(*separator.stft(x), n)
    assert snr(x.numpy(), everything.numpy()) > 110
    assert Resampler()(x).shape == (1, -(-3 * n // 2))


def test_merging_adds_what_was_unfolded(tiny):
    layer = LoRALinear(6, 4, 2, 1.0).requires_grad_(False)
    layer.lora_B.copy_(noise(4, 2))
    x = noise(3, 6)
    wanted = layer(x)
    for _ in range(2):
        layer.merge()
        torch.testing.assert_close(layer(x), wanted)
    assert not torch.allclose(torch.nn.functional.linear(x, layer.weight - 0.5 * layer.lora_B @ layer.lora_A, layer.bias), wanted)


def test_a_missing_tensor_is_told(tmp_path):
    clap, checkpoint = read(variant(tmp_path))
    parts = split(clap, checkpoint)
    del parts.separator["decoder_model.film.norm.bias"]
    with pytest.raises(ValueError, match=r"lacks 1 tensors of OfficialSeparator, decoder_model\.film\.norm\.bias"):
        official(parts, TINY, DSP)


def test_the_naive_graph(tiny, tmp_path):
    (_, _, separator), _ = tiny
    path = tmp_path / "naive.onnx"
    nodes = naive_export(separator, path, DSP.frames)
    graph = onnx.load(path).graph
    assert nodes == len(graph.node) > 200
    assert [value.name for value in graph.input] == ["magnitude", "log_mel", "condition"]
    assert any(isinstance(module, LoRALinear) and not module.merged for module in separator.modules())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return read_official(*write_pair(tmp_path_factory.mktemp("published")))


@pytest.fixture(scope="module")
def inputs():
    return np.load(GOLDEN / "inputs.npz")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_every_official_waveform(full, inputs, name):
    halves, normalise, n, part, wanted, _ = case(name)
    joined = np.concatenate([np.zeros(512, np.float32) if half is None else half for half in halves])[None]
    condition = joined / np.linalg.norm(joined) if normalise else joined
    mixture = inputs["mixture_i16"][None, :n] / np.float32(32768)
    found = full.separator(torch.from_numpy(mixture), torch.from_numpy(condition))
    assert snr(wanted, found[0, part].numpy()) >= 120


@pytest.mark.slow
@torch.inference_mode()
def test_official_embeddings(full, inputs):
    wanted = np.load(GOLDEN / "embeddings.npz")
    found = full.text(torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"]))
    np.testing.assert_allclose(found.numpy(), wanted["text_embed"], atol=1e-5)
    clips = [ClapFrontEnd().clips(inputs[name] / np.float32(32768), "start", int16=True) for name in ("query48_10s_i16", "query48_3s_i16")]
    found = full.audio(torch.from_numpy(np.concatenate(clips)))
    np.testing.assert_allclose(found.numpy(), wanted["audio_embed_10s_3s"], atol=1e-5)
