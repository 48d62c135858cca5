"""The Conformer extractor in its full size, with generated weights as no others exist: file → graphs → ONNX Runtime → numpy."""

import numpy as np
import pytest
from clapsep.engines import EngineOptions, open_engine
from clapsep.export.checkpoint import read_checkpoint
from clapsep.export.families.conformer import open_model
from clapsep.runtime.family import open_family
from clapsep.runtime.graph import check_graph
from clapsep.runtime.metrics import snr
from conformer_files import export, write_generated

pytestmark = pytest.mark.slow


def test_the_full_size_through_the_finished_path(tmp_path):
    model = open_model(None, read_checkpoint(write_generated(tmp_path / "conformer.safetensors"), "checkpoint"))
    manifest = export(model, tmp_path)
    nodes = {name: graph.nodes for name, graph in manifest.graphs.items()}
    assert nodes == {"film": 1, "separator": 951, "separator_waveform": 993}
    for graph in manifest.graphs.values():
        check_graph(tmp_path / graph.graph.file, graph)

    def run(name, **inputs):
        engine = open_engine("onnxruntime", tmp_path / manifest.graphs[name].graph.file, EngineOptions(threads=2))
        return next(iter(engine.run(inputs).values()))

    family, condition = open_family(manifest), model.conditions()[0]
    mixture = (0.1 * np.random.default_rng(0).standard_normal((1, 320000))).astype(np.float32)
    film = run("film", condition=condition[None])
    assert film.shape == (1, 8192)
    features, context = family.features(mixture)
    assert features["magnitude"].shape == (1, 626, 513)
    found = family.reconstruct({"mask": run("separator", film=film, **features)}, context)
    assert snr(model.separate(mixture, condition), found) > 100
    assert snr(found, run("separator_waveform", mixture=mixture, film=film)) > 100
