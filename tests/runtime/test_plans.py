"""Which engine may run a bundle here, decided from the manifest and what the machine says of itself."""

from dataclasses import replace

import numpy as np
import pytest
from clapsep.engines import EngineOptions, EngineUnavailable, Target, engine_class, this_machine
from clapsep.engines.machine import Gpu
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.manifest import Plan, parse_manifest
from clapsep.runtime.plans import choose

HERE = this_machine()
ADA = replace(HERE, cuda="13.0", trouble="", gpus=(Gpu("a card", "8.9", 24 << 30),))
ANY = EngineOptions()
GRAPHS = ("text_encoder", "audio_encoder", "mixture_encoder", "film", "mask_decoder", "separator_waveform")  # what a GPU runs


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def target():
    version = engine_class("tensorrt-rtx").version()
    return Target(version, HERE.os, HERE.architecture, cuda="13.0", compute_capabilities=("8.6", "8.9"))


def with_plans(bundle, target, precision="fp32", graphs=GRAPHS, kind="tensorrt-rtx"):
    plans = tuple(Plan(g, kind, precision, target, "0" * 64, bundle.manifest.golden) for g in graphs)  # any file that is there
    return Bundle(bundle.path, replace(bundle.manifest, plans=plans))


def test_a_plan_for_this_machine_is_taken(bundle, target):
    choice = choose(with_plans(bundle, target), "tensorrt-rtx", ANY, ADA)
    assert (choice.kind, choice.options) == ("tensorrt-rtx", ANY)
    assert {graph: plan and plan.graph for graph, plan in choice.plans.items()} == {g: g for g in GRAPHS}
    assert (choice.one, choice.several) == ("waveform", "split")


def test_of_several_plans_the_newest_that_fits_is_taken(bundle, target):
    plans = [with_plans(bundle, replace(target, compute_capabilities=c)).manifest.plans for c in (("8.9",), ("8.6", "8.9"), ("12.0",))]
    several = Bundle(bundle.path, replace(bundle.manifest, plans=tuple(plan for group in plans for plan in group)))
    taken = choose(several, "tensorrt-rtx", ANY, ADA).plans["mask_decoder"]
    assert taken.target.compute_capabilities == ("8.6", "8.9")


@pytest.mark.parametrize(
    ("change", "machine", "reason"),
    [
        ({"compute_capabilities": ("8.6", "12.0")}, ADA, "other-gpu"),
        ({"version": "1.2.3"}, ADA, "other-version"),
        ({"os": "windows"}, ADA, "other-system"),
        ({"architecture": "aarch64"}, ADA, "other-system"),
        ({}, replace(ADA, gpus=()), "no-gpu"),
        ({}, replace(ADA, cuda=None, trouble="there is no NVIDIA driver", gpus=()), "no-driver"),
        ({}, replace(ADA, cuda="11.8"), "driver-too-old"),
    ],
)
def test_refusals_have_a_reason_and_name_the_bundle_or_the_machine(bundle, target, change, machine, reason):
    with pytest.raises(EngineUnavailable) as refused:
        choose(with_plans(bundle, replace(target, **change)), "tensorrt-rtx", ANY, machine)
    assert refused.value.reason == reason
    if change:
        assert f"run: clapsep-export compile {bundle.path} --engine tensorrt-rtx" in str(refused.value)


@pytest.mark.parametrize("plans", [{"graphs": ()}, {"precision": "fp16"}, {"graphs": GRAPHS[1:]}])
def test_no_plan(bundle, target, plans):
    with pytest.raises(EngineUnavailable, match="there is no fp32 plan") as refused:
        choose(with_plans(bundle, target, **plans), "tensorrt-rtx", ANY, ADA)
    assert refused.value.reason == "no-plan"


def test_an_optional_plan_that_does_not_fit_is_said_and_left(bundle, target, caplog):
    foreign = replace(target, version="2020.1", compute_capabilities=())
    assert not any(choose(with_plans(bundle, foreign, kind="openvino"), "openvino", ANY, HERE).plans.values())
    assert caplog.text.count("compiled by openvino 2020.1") == 1
    caplog.clear()
    assert not any(choose(bundle, "openvino", ANY, HERE).plans.values())
    assert not caplog.text, "a bundle without plans is nothing to speak of"


def test_auto_takes_the_fastest_that_passes_and_says_why(bundle, target):
    cpu = replace(HERE, cuda=None, trouble="there is no NVIDIA driver", gpus=())
    choice = choose(bundle, "auto", ANY, cpu)
    assert (choice.kind, choice.options.device) == ("openvino", "cpu")
    assert "not tensorrt on cuda (not-installed), tensorrt-rtx on cuda (no-driver)" in choice.why
    gpu = choose(with_plans(bundle, target), "auto", ANY, ADA)
    assert gpu.kind == "tensorrt-rtx"
    assert "can run here, by the route waveform (split for several queries); not tensorrt on cuda (not-installed);" in gpu.why
    assert "its plans could not be verified where" in gpu.why
    assert choose(with_plans(bundle, target), "auto", EngineOptions(device="cpu"), ADA).kind == "openvino"


def test_routes_for_which_no_plans_are_made(bundle, target):
    with pytest.raises(EngineUnavailable, match="plans are not made for the route fused with engine tensorrt-rtx; leave") as refused:
        choose(with_plans(bundle, target), "tensorrt-rtx", ANY, ADA, "fused")
    assert refused.value.reason == "no-plan"
    assert choose(with_plans(bundle, target), "tensorrt-rtx", ANY, ADA, "split").one == "split"


def test_auto_without_anything(bundle):
    with pytest.raises(EngineUnavailable, match=r"no engine can run .* here, not tensorrt on cuda \(.*clapsep-export doctor") as refused:
        choose(bundle, "auto", EngineOptions(device="cuda"), replace(HERE, cuda=None, trouble="", gpus=()))
    assert refused.value.reason == "no-driver"


def test_asking_for_the_precision_that_is_there(bundle):
    assert choose(bundle, "onnxruntime", EngineOptions(precision="fp32"), HERE).options.precision is None


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("tensorflow", ANY, "unknown-engine"),
        ("openvino", EngineOptions(device="cuda"), "wrong-device"),
        ("tensorrt-rtx", EngineOptions(device="cpu"), "wrong-device"),
        ("onnxruntime", EngineOptions(precision="bf16"), "wrong-precision"),
        ("tensorrt", ANY, "not-installed"),
    ],
)
def test_what_a_kind_cannot_do(bundle, kind, options, reason):
    with pytest.raises(EngineUnavailable) as refused:
        choose(bundle, kind, options, ADA)
    assert refused.value.reason == reason


def test_the_separator_refuses_before_it_loads_anything(demo_bundle):
    with pytest.raises(EngineUnavailable) as refused:
        Separator(demo_bundle, "tensorrt-rtx")
    assert refused.value.reason == ("no-plan" if HERE.gpus else "no-driver")


def test_the_same_answer_from_every_engine_on_this_processor(demo_bundle, rng):
    x = rng.uniform(-0.3, 0.3, 50000).astype(np.float32)
    condition = Separator(demo_bundle).condition("a siren")
    wanted = Separator(demo_bundle).separate(x, 32000, condition=condition)
    separator = Separator(demo_bundle, "auto", device="cpu")
    np.testing.assert_allclose(separator.separate(x, 32000, condition=condition), wanted, atol=2e-5)
    assert separator.engine_name == "openvino cpu"


def test_plans_survive_the_manifest(bundle, target):
    manifest = with_plans(bundle, target).manifest
    assert parse_manifest(manifest.to_json(), "m").plans == manifest.plans
