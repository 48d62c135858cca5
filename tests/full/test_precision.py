"""The full-size model in float16 and bfloat16, and its TensorRT-RTX plans, compiled here for GPUs that are not here."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import quality
from clapsep.engines import EngineOptions, PlanSettings, this_machine
from clapsep.engines.openvino import capabilities
from clapsep.engines.tensorrt_builder import BuildReport, build
from clapsep.export.strict import StrictSeparator
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.metrics import snr
from published import CASES, GOLDEN, SHORT, case

pytestmark = pytest.mark.slow
GRAPHS = ("text_encoder", "audio_encoder", "separator_waveform")
CAPABILITIES = ("8.6", "8.9", "12.0")
SCENES = 40


@pytest.fixture(scope="module")
def mixture():
    return np.load(GOLDEN / "inputs.npz")["mixture_i16"] / np.float32(32768)


@pytest.fixture(scope="module")
def separators(half_bundle, bundle):
    made = {"strict": StrictSeparator(half_bundle), "onnxruntime": Separator(half_bundle), "openvino": Separator(half_bundle, "openvino")}
    if "BF16" in capabilities():
        made["bf16"] = Separator(bundle, "openvino", precision="bf16")
    return made


@pytest.mark.parametrize("engine", ["strict", "onnxruntime", "openvino", "bf16"])
def test_every_official_case_keeps_its_decibels(separators, mixture, engine):
    if engine not in separators:
        pytest.skip("this processor has no bfloat16")
    separator, found = separators[engine], {}
    for name in [name for name in CASES if name not in SHORT]:
        halves, normalise, n, part, wanted, _ = case(name)
        condition = separator.family.condition(*halves, normalize=normalise)
        found[name] = snr(wanted, separator.separate(mixture[:n], 32000, condition=condition)[part])
    assert min(found.values()) >= (40 if engine == "bf16" else 55), found


def test_few_casts_and_few_nodes_in_float32(half_bundle, bundle):
    whole = Bundle.open(bundle).manifest
    for name, graph in Bundle.open(half_bundle).manifest.graphs.items():
        assert graph.precision == "fp16"
        assert len(graph.fp32_nodes) <= 24
        assert graph.nodes - whole.graphs[name].nodes <= 30, "casts"
        assert graph.data.size < 0.52 * whole.graphs[name].data.size
        assert (graph.inputs, graph.outputs) == (whole.graphs[name].inputs, whole.graphs[name].outputs)


@pytest.fixture(scope="module")
def reports(half_bundle, bundle, tmp_path_factory) -> dict[tuple[str, str], BuildReport]:
    out = tmp_path_factory.mktemp("plans")
    made = {}
    for precision, path in (("fp32", bundle), ("fp16", half_bundle)):
        for graph in GRAPHS:
            settings = PlanSettings(precision, 4, CAPABILITIES)
            made[graph, precision] = build(
                "tensorrt-rtx", path / f"graphs/{graph}.onnx", out / f"{graph}.{precision}", settings, lambda _: None
            )
            (out / f"{graph}.{precision}").unlink()  # they are large
    return made


def test_every_graph_compiles_for_three_generations_of_gpus(reports):
    assert len(reports) == 6
    assert reports["separator_waveform", "fp32"].layers < 2100, "the naive network alone becomes more than 5,000"
    for report in reports.values():
        assert report.target.compute_capabilities == CAPABILITIES
        assert report.size > 1e6


def test_float16_graphs_compile_to_float16_layers(reports):
    for (_, precision), report in reports.items():
        assert report.half_share == 0 if precision == "fp32" else report.half_share > 0.85, "transforms stay in float32"


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_plan_is_the_same_when_it_is_compiled_again(half_bundle, tmp_path, graph):
    """With a fixed batch; where it varies, TensorRT-RTX 1.7 numbers some internal buffers differently from run to run."""
    settings, plans = PlanSettings("fp16", 1, ("8.9",)), [tmp_path / name for name in "ab"]
    for plan in plans:
        build("tensorrt-rtx", half_bundle / f"graphs/{graph}.onnx", plan, settings, lambda _: None)
    assert plans[0].read_bytes() == plans[1].read_bytes()


@pytest.mark.skipif(bool(this_machine().gpus), reason="there is a GPU")
def test_no_engine_pretends_to_run_them(half_bundle):
    from clapsep.engines import EngineUnavailable, open_engine

    with pytest.raises(EngineUnavailable) as refused:
        open_engine("tensorrt-rtx", half_bundle / "graphs/separator.onnx", EngineOptions())
    assert refused.value.reason == "no-driver"


@pytest.fixture(scope="module")
def demo_half(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("half") / "demo.clapsep"
    run("clapsep-export", "build", out, "--demo", "--precision", "fp16")
    return out


def test_float16_loses_nothing_of_what_the_demo_model_can(demo_bundle, demo_half):
    """SI-SDR over unseen mixtures, the float16 graphs run with every value rounded."""
    if shutil.which("espeak-ng") is None:
        quality.CLASSES = tuple(name for name in quality.CLASSES if name != "speech")
    judges = [quality.Judge(separator) for separator in (Separator(demo_bundle), StrictSeparator(demo_half), Separator(demo_half))]
    scenes = [quality.make_scene(i, 2, 0.0, judges[0].samples) for i in range(SCENES)]
    whole, strict, engine = (np.mean([judge.ask(scene, "text", "PN")["si_sdri"] for scene in scenes]) for judge in judges)
    assert whole > 8
    assert whole - strict <= 0.02
    assert whole - engine <= 0.02
