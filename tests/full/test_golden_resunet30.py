"""ResUNet30 of the published size: file layout → graphs → ONNX Runtime → numpy, against the official outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clapsep.export.families import resunet30
from clapsep.export.families.resunet30 import ResunetModel, load_network
from clapsep.runtime.families.resunet30 import FLOOR, ResunetDsp
from clapsep.runtime.metrics import snr
from clapsep.runtime.stft import Stft
from resunet import GOLDEN, MAPS, META, checkpoint, digest, export, published

pytestmark = pytest.mark.slow
WINDOWS = [name for name, case in META["cases"].items() if case["frames"] == 1001]
MIXTURE = np.load(GOLDEN / "inputs.npz")["mixture_i16"] / np.float32(32768)


def case(name):
    """Mixture [n], condition [size], what is wanted, and where the wanted wave is."""
    wanted, facts = np.load(GOLDEN / f"case_{name}.npz"), META["cases"][name]
    begin = facts["wave_from"]
    return MIXTURE[slice(*facts["samples"])], wanted["cond"][0], wanted, slice(begin, begin + len(wanted["wave"]))


def check_maps(wanted, maps):
    for name in MAPS:
        found = maps[name][0, ::8, ::7]
        assert snr(wanted[f"{name}_sub"], found) >= 100


def check_wave(wanted, found, limit=95):
    assert snr(wanted["wave"], found) >= limit


@pytest.fixture(scope="module")
def audiosep() -> ResunetModel:
    tensors = published("audiosep_ss_model")
    assert digest(tensors) == META["weights_sha256_audiosep"]
    return ResunetModel(load_network(checkpoint(tensors)), ResunetDsp())


@pytest.fixture(scope="module")
def uss() -> ResunetModel:
    tensors = published("uss_at_soft_527_ss_model")
    assert digest(tensors) == META["weights_sha256_uss527"]
    return ResunetModel(load_network(checkpoint(tensors)), ResunetDsp())


@pytest.fixture(scope="module")
def exported(audiosep, tmp_path_factory):
    return export(audiosep, tmp_path_factory.mktemp("audiosep"))


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_through_the_graphs(exported, name):
    mixture, condition, wanted, part = case(name)
    features, context = exported.family.features(mixture[None])
    film = exported.run("film", condition=condition[None])
    maps = exported.run("separator", **features, **film)
    check_maps(wanted, maps)
    target = exported.family.reconstruct(maps, context)[0]
    check_wave(wanted, target[part])
    whole = exported.run("separator_waveform", mixture=mixture[None], **film)["target"][0]
    check_wave(wanted, whole[part])
    assert snr(target, whole) >= 100


@torch.inference_mode()
def maps_of(model, mixture, condition):
    """By the folded modules, from numpy's features."""
    magnitude = torch.from_numpy(np.maximum(np.abs(Stft(2048, 320).forward(mixture[None])), np.float32(FLOOR)))
    return dict(zip(MAPS, map(torch.Tensor.numpy, model.separator(magnitude, model.film(torch.from_numpy(condition[None])))), strict=True))


@pytest.mark.parametrize("name", [name for name in META["cases"] if name not in WINDOWS])
def test_other_lengths_on_the_pytorch_modules(audiosep, uss, name):
    model = uss if name.startswith("uss") else audiosep
    mixture, condition, wanted, part = case(name)
    check_maps(wanted, maps_of(model, mixture, condition))
    check_wave(wanted, model.separate(mixture[None], condition)[0, part])


def test_betas(audiosep):
    _, condition, wanted, _ = case("c0_10s")
    names = [name for name in wanted if name.startswith("beta_")]
    assert len(names) == 3
    for name in names:
        linear = audiosep.network.film[name.removeprefix("beta_").replace(".", "->")]
        np.testing.assert_allclose(linear(torch.from_numpy(condition)).numpy(), wanted[name], atol=1e-6)


def test_the_adaptor_of_uss():
    tensors = published("uss_at_soft_527_ss_model") | published("uss_adaptor_527")
    model = ResunetModel(load_network(checkpoint(tensors)), ResunetDsp())
    golden = np.load(GOLDEN / "case_uss_adaptor.npz")
    with torch.inference_mode():
        found = model.network.query_net(torch.from_numpy(golden["bottleneck"]))
        np.testing.assert_allclose(found.numpy(), golden["output"], atol=1e-6)
        film = model.film(torch.from_numpy(golden["bottleneck"]))
    plain = load_network(checkpoint(published("uss_at_soft_527_ss_model")))
    torch.testing.assert_close(film, ResunetModel(plain, ResunetDsp()).film(torch.from_numpy(golden["output"])), atol=1e-5, rtol=1e-5)


def test_typical_mistakes_are_seen(audiosep, monkeypatch):
    mixture, condition, wanted, part = case("c1_tiny")

    def measured():
        return snr(wanted["wave"], audiosep.separate(mixture[None], condition)[0, part])

    assert measured() >= 95
    mistakes = {"EPS": (resunet30, 1e-3), "SLOPE": (resunet30, 0.02), "avg_pool2d": (torch.nn.functional, torch.nn.functional.max_pool2d)}
    for name, (where, value) in mistakes.items():
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert measured() < 75
    bn0 = audiosep.network.base.bn0  # rows of zeros before it instead of after it
    late = torch.nn.Sequential(torch.nn.ZeroPad2d((0, 0, 0, 25)), bn0)
    with monkeypatch.context() as patch:
        patch.setitem(audiosep.network.base._modules, "bn0", late)
        patch.setattr(resunet30, "ROWS", 1)
        assert measured() < 75
