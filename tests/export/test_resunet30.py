"""ResUNet30: its checkpoints, what can be wrong with them, and that the folded network is the published one."""

import onnx
import pytest
import torch
from clapsep.export.clap import AudioEncoder, ClapConfig, TextConfig, TextEncoder
from clapsep.export.families import clapsep
from clapsep.export.families.resunet30 import MAPS, ResunetModel, load_network, open_model, recognises
from clapsep.export.htsat import HtsatConfig
from clapsep.runtime.errors import CheckpointError
from clapsep.runtime.families.resunet30 import ResunetDsp
from clapsep.runtime.metrics import snr
from clapsep.runtime.stft import Stft
from resunet import BINS, SIZE, checkpoint, export, generate, published, tiny

DSP = ResunetDsp(window_samples=4000, n_fft=2 * (BINS - 1), hop=100)
CONV = "base.encoder_block3.conv_block1.conv2.weight"
VARIANCE = "base.decoder_block5.bn1.running_var"


def model_of(tensors) -> ResunetModel:
    return ResunetModel(load_network(checkpoint(tensors)), DSP)


@pytest.mark.parametrize("adaptor", [False, True])
@torch.no_grad()
def test_the_folded_network_is_the_published_one(adaptor):
    model = model_of(tiny(adaptor))
    magnitude = 3 * torch.rand(2, 41, BINS, generator=torch.Generator().manual_seed(1))
    condition = torch.from_numpy(model.conditions()[:2])
    assert condition.shape == (2, SIZE + 2 if adaptor else SIZE)
    wanted = model.network(magnitude, condition)
    found = model.separator(magnitude, model.film(condition))
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=0)
    assert all(snr(a.numpy(), b.numpy()) > 105 for a, b in zip(wanted, found, strict=True))  # directions of small vectors are uncertain
    assert not torch.allclose(wanted[0][0], model.network(magnitude[:1], condition[1:])[0][0], atol=1e-3)  # the condition counts


@torch.no_grad()
def test_any_number_of_frames_and_of_conditions():
    model = model_of(tiny())
    for frames in (1, 31, 32, 33):
        magnitude = torch.rand(1, frames, BINS)
        maps = model.network(magnitude, torch.from_numpy(model.conditions()))
        assert all(m.shape == (3, frames, BINS) for m in maps)
        assert torch.equal(maps[0][:, :, -1], torch.full((3, frames), 0.5))
        assert not maps[1][:, :, -1].any()
        assert not maps[2][:, :, -1].any()
        torch.testing.assert_close(maps[1][..., :-1].square() + maps[2][..., :-1].square(), torch.ones(3, frames, BINS - 1))


def test_layouts_of_one_model_are_the_same_model():
    wanted = load_network(checkpoint(tiny())).state_dict()
    bare = {name.removeprefix("ss_model."): value for name, value in tiny().items()}
    half = {f"module.{name}": value.half() for name, value in tiny().items()}
    for tensors, same in ((bare, torch.equal), (half, lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=1e-4))):
        assert recognises(checkpoint(tensors))
        found = load_network(checkpoint(tensors)).state_dict()
        assert found.keys() == wanted.keys()
        assert all(same(found[name], value) for name, value in wanted.items())


def test_who_recognises_what():
    assert recognises(checkpoint(published("audiosep_ss_model")))
    assert not clapsep.recognises(checkpoint(tiny()))
    for lacking in ("ss_model.base.encoder_block1.conv_block1.conv1.weight", "ss_model.film.encoder_block1->conv_block1->beta1.weight"):
        other = {name: value for name, value in tiny().items() if name != lacking}
        assert not recognises(checkpoint(other))
        with pytest.raises(CheckpointError, match="give an AudioSep or USS checkpoint"):
            load_network(checkpoint(other))


def changed(adaptor=False, **changes):
    tensors = {name: value for name, value in tiny(adaptor).items() if changes.get(name, value) is not None}
    return tensors | {name: value for name, value in changes.items() if value is not None}


BROKEN = {
    "missing": ({f"ss_model.{CONV}": None}, [f"{CONV} is missing"]),
    "surplus": ({"ss_model.base.encoder_block7.conv_block1.bn1.weight": torch.ones(1)}, ["encoder_block7.conv_block1.bn1.weight is not part"]),
    "mis-shaped": ({f"ss_model.{CONV}": torch.ones(8, 8, 1, 1)}, [f"{CONV} has shape [8, 8, 1, 1] instead of [8, 8, 3, 3]"]),
    "stereo": ({"ss_model.base.pre_conv.weight": torch.ones(4, 2, 1, 1)}, ["pre_conv.weight has shape [4, 2, 1, 1] instead of [4, 1, 1, 1]"]),
    "not finite": ({f"ss_model.{CONV}": torch.full((8, 8, 3, 3), torch.inf)}, [f"{CONV} has NaN"]),
    "variance of 0": ({f"ss_model.{VARIANCE}": torch.zeros(8)}, [f"{VARIANCE} has variances that are not positive"]),
    "variance of NaN": ({f"ss_model.{VARIANCE}": torch.full((8,), torch.nan)}, [f"{VARIANCE} has NaN"]),
    "several": ({f"ss_model.{CONV}": None, f"ss_model.{VARIANCE}": -torch.ones(8)}, ["in 2 tensors", CONV, VARIANCE]),
    "another condition": ({"ss_model.film.encoder_block2->conv_block1->beta1.weight": torch.ones(4, 3)}, ["[4, 3] instead of [4, 16]"]),
    "half an adaptor": ({"query_net.fc1.weight": torch.ones(3, 5)}, ["query_net.fc1.bias is missing", "query_net.fc2.weight is missing"]),
    "no size": ({"ss_model.base.bn0.weight": None}, ["base.bn0.weight is missing"]),
    "empty": ({"ss_model.base.bn0.weight": torch.ones(0)}, ["base.bn0.weight has shape [0]"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_listed(name):
    changes, words = BROKEN[name]
    with pytest.raises(CheckpointError) as caught:
        load_network(checkpoint(changed(**changes)))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("extra", [{"window_samples": 0}, {"window_samples": "1"}, {"weights": "stolen"}, {"color": 3}])
def test_impossible_metadata(extra):
    with pytest.raises(CheckpointError, match="metadata"):
        open_model(None, checkpoint(tiny(), **extra))


def test_impossible_sizes():
    with pytest.raises(CheckpointError, match="do not fit together"):
        open_model(None, checkpoint(published_bins(), window_samples=2048))
    odd = {f"ss_model.base.bn0.{n}": torch.ones(101) for n in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(CheckpointError, match="do not fit together"):
        open_model(None, checkpoint(changed(**odd)))


def published_bins():
    """The very small network with the published transform."""
    vectors = {f"ss_model.base.bn0.{n}": generate(f"base.bn0.{n}", (1025,)) for n in ("weight", "bias", "running_mean", "running_var")}
    return changed(**vectors)


def test_what_a_model_says_of_itself():
    model = open_model(None, checkpoint(published_bins(), window_samples=32000, weights="generated"))
    assert (model.weights, model.towers, model.query) == ("generated", None, {})
    assert model.dsp == {"sample_rate": 32000, "window_samples": 32000, "n_fft": 2048, "hop": 320}
    assert model.condition == {"size": SIZE, "normalize": False}
    assert model.separate(torch.zeros(2, 1100).numpy(), model.conditions()[0]).shape == (2, 1100)


CLAP = ClapConfig(
    text=TextConfig(vocab=64, hidden=16, layers=1, heads=2, ffn=16, positions=80, context=77),
    audio=HtsatConfig(embed=8, depths=(1, 1), heads=(1, 2)),
    embedding=SIZE,
)
CLAP_SIZES = {"context": 77, "text_head_dim": 8}


def clap():
    """Tensors of very small towers."""
    torch.manual_seed(1)
    towers = {**TextEncoder(CLAP).state_dict(), **AudioEncoder(CLAP, 1001).state_dict()}
    return {name: value for name, value in towers.items() if name != "resize"} | {"logit_scale_a": torch.tensor(1.0)}


def test_a_model_that_is_asked_through_clap_needs_it():
    films = {name: value.repeat(1, 32) for name, value in tiny().items() if ".film." in name and name.endswith("weight")}
    with pytest.raises(CheckpointError, match="holds no CLAP towers; give the CLAP checkpoint with --clap"):
        open_model(None, checkpoint({**published_bins(), **films}))


def test_towers_of_either_file_are_the_same_towers():
    inside = {**published_bins(), **{f"query_encoder.model.{name}": value for name, value in clap().items()}}
    outside = checkpoint({f"module.{name}": value for name, value in clap().items()}, **CLAP_SIZES)
    models = open_model(None, checkpoint(inside, **CLAP_SIZES)), open_model(outside, checkpoint(published_bins()))
    for model in models:
        assert model.condition == {"size": SIZE, "normalize": True}
        assert model.query == {"context": 77, "crop": "start", "int16_round_trip": False}
    states = [model.towers.text.state_dict() | model.towers.audio.state_dict() for model in models]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert [spec.name for spec in models[0].towers.graphs()] == ["text_encoder", "audio_encoder"]


def test_towers_that_do_not_fit():
    outside = checkpoint(clap(), **CLAP_SIZES)
    films = {name: value[:, :1].repeat(1, 17) for name, value in tiny().items() if ".film." in name and name.endswith("weight")}
    with pytest.raises(CheckpointError, match="takes 17 numbers as its condition and CLAP gives 16"):
        open_model(outside, checkpoint({**published_bins(), **films}))
    with pytest.raises(CheckpointError, match="holds the CLAP that it was trained with; leave --clap out"):
        open_model(outside, checkpoint({**published_bins(), **{f"query_encoder.model.{name}": value for name, value in clap().items()}}))
    with pytest.raises(CheckpointError, match="text_branch.pooler.dense.bias is missing"):
        open_model(
            checkpoint({n: v for n, v in clap().items() if "pooler.dense.bias" not in n}, **CLAP_SIZES), checkpoint(published_bins())
        )
    with pytest.raises(CheckpointError, match="do not fit together"):
        open_model(checkpoint(clap(), text_head_dim=8), checkpoint(published_bins()))  # 512 tokens do not fit into 80 positions


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(model_of(tiny()), tmp_path_factory.mktemp("tiny"))


def test_the_graphs_are_lean(exported):
    found = {name: entry.nodes for name, entry in exported.manifest.graphs.items()}
    assert found["film"] == 1
    assert found["separator"] <= 173
    assert found["separator_waveform"] <= 235
    nodes = onnx.load(exported.root / "graphs/separator.onnx", load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert [kinds.count(kind) for kind in ("Conv", "ConvTranspose", "LeakyRelu")] == [38, 6, 32]
    assert kinds.count("Mul") == 15  # bn0, the seven encoders' bn1, the first decoder's, the six conv_block2's
    assert "BatchNormalization" not in kinds


def test_every_form_of_the_model_gives_the_same_wave(exported, rng):
    model = model_of(tiny())
    mixture, conditions = rng.uniform(-1, 1, (2, 4000)).astype("f4"), model.conditions()[:2]
    mixture[1, 1000:3000] = 0
    wanted = torch.cat([torch.from_numpy(model.separate(x[None], c)) for x, c in zip(mixture, conditions, strict=True)]).numpy()
    film = exported.run("film", condition=conditions)
    features, context = exported.family.features(mixture)
    maps = exported.run("separator", **features, **film)
    assert list(maps) == list(MAPS)
    assert snr(wanted, exported.family.reconstruct(maps, context)) > 100
    assert snr(wanted, exported.run("separator_waveform", mixture=mixture, **film)["target"]) > 100


def test_silence_stays_silent(exported):
    silence = torch.zeros(1, 4000).numpy()
    model = model_of(tiny())
    film = exported.run("film", condition=model.conditions()[:1])
    assert not exported.run("separator_waveform", mixture=silence, **film)["target"].any()
    assert not model.separate(silence, model.conditions()[0]).any()


def test_the_highest_frequency_is_taken_away(exported):
    """A mixture with nothing but the Nyquist frequency has nothing left in that bin."""
    tone = (0.5 * torch.cos(torch.pi * torch.arange(4000)))[None].numpy()
    model = model_of(tiny())
    film = exported.run("film", condition=model.conditions()[:1])
    features, context = exported.family.features(tone)
    target = exported.family.reconstruct(exported.run("separator", **features, **film), context)
    assert abs(Stft(256, 100).forward(tone)[0, 20, -1]) > 50
    assert abs(Stft(256, 100).forward(target)[0, 2:-2, -1]).max() < abs(Stft(256, 100).forward(target)[0, 2:-2, -2]).max()
    torch.testing.assert_close(*(torch.from_numpy(x) for x in (target, model.separate(tone, model.conditions()[0]))), atol=1e-5, rtol=0)
