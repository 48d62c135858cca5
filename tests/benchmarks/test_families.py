import families
import family_child
import numpy as np
import onnx
import pytest
import torch
from clapsep.export.families.resunet30 import Network, Sizes
from clapsep.runtime import Bundle, Separator
from clapsep.runtime.metrics import snr
from resunet import WIDTHS, export, generate
from waveformers import tiny, write_published
from work import work

WINDOW, N_FFT = 32000, 640  # the smallest transform that the published hop allows


@pytest.fixture(scope="module")
def waveformer(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("waveformer")
    run("clapsep-export", "build", folder / "w.clapsep", "--checkpoint", write_published(folder / "w.pt", tiny()))
    return folder / "w.clapsep"


@pytest.fixture(scope="module")
def tensors():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Network(Sizes(N_FFT // 2 + 1, WIDTHS, 16)).state_dict().items()}
    return {f"ss_model.{name}": generate(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def model(tensors):
    return families.model_of(tensors, window_samples=WINDOW, n_fft=N_FFT)


@pytest.fixture(scope="module")
def resunet(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("resunet")
    manifest, _ = export(model, folder)
    (folder / manifest.golden.file).touch()
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def one_node(path, kind, x, weight, out, **attributes):
    """A graph of a single product, with a symbolic batch where the input has -1."""
    node = onnx.helper.make_node(kind, ["x", "w"], ["y"], **attributes)
    shapes = {"x": x, "y": out}
    sides = [onnx.helper.make_tensor_value_info(n, 1, ["batch" if size < 0 else size for size in s]) for n, s in shapes.items()]
    values = onnx.numpy_helper.from_array(np.zeros(weight, np.float32), "w")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", sides[:1], sides[1:], [values])), path)
    return path


@pytest.mark.parametrize(
    ("kind", "x", "weight", "out", "attributes", "macs"),
    [
        ("Conv", [-1, 6, 10, 8], [4, 6, 3, 3], [-1, 4, 10, 8], {"pads": [1, 1, 1, 1]}, 4 * 80 * 6 * 9),
        ("Conv", [-1, 6, 20], [6, 1, 3], [-1, 6, 18], {"group": 6}, 6 * 18 * 3),
        ("ConvTranspose", [-1, 6, 5, 4], [6, 3, 2, 2], [-1, 3, 10, 8], {"strides": [2, 2]}, 6 * 20 * 3 * 4),
        ("MatMul", [-1, 5, 7], [7, 3], [-1, 5, 3], {}, 5 * 7 * 3),
        ("Gemm", [-1, 7], [3, 7], [-1, 3], {"transB": 1}, 7 * 3),
    ],
)
def test_multiply_adds(tmp_path, kind, x, weight, out, attributes, macs):
    assert work(one_node(tmp_path / "g.onnx", kind, x, weight, out, **attributes))["operations"] == {"single": 2 * macs}


def test_multiply_adds_of_a_whole_network(resunet, model):
    """PyTorch's own count of the network that was published; the graph's has no more."""
    from torch.utils.flop_counter import FlopCounterMode

    film = model.network.film(torch.rand(1, 16))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.network.base(torch.rand(1, WINDOW // 320 + 1, N_FFT // 2 + 1), film)
    assert sum(work(Bundle.open(resunet).graph("separator"))["operations"].values()) == counter.get_total_flops()


def test_steps(waveformer, monkeypatch):
    monkeypatch.setattr(families, "SETTLED", 3)
    monkeypatch.setattr(families, "CHUNK", 4)
    row = families.time_steps({"tiny": waveformer}, 2, 5)
    ways = row["models"]["tiny"]
    assert {name: len(way["us"]) for name, way in ways.items()} == {
        "fused": 8, "fused, 4 queries": 8, "split": 8, "split, 4 queries": 8, "fused, alone": 8, "split, alone": 8, "fused, paced": 5,
        "split, paced": 5,
    }  # fmt: skip
    assert row["period_ms"] == pytest.approx(9.433, abs=1e-3)
    assert row["latency_ms"] == pytest.approx(10.159, abs=1e-3)
    assert all(way["own_ms"]["median"] > 0 and 0 < way["ms"]["median"] <= way["ms"]["p95"] for way in ways.values())
    families.show_steps(row)


@pytest.mark.parametrize("way", ["endless", "traced"])
def test_memory_of_a_stream_in_a_process_of_its_own(waveformer, way):
    row = families.child(way, waveformer, 2000)
    assert row["sound_s"] == pytest.approx(18.87, abs=0.01)
    assert len(row["mb"]) == 3
    assert row["peak_mb"] <= row["process_peak_mb"]


def test_a_stream_that_keeps_what_it_heard_is_seen(waveformer, monkeypatch):
    kept, push = [], families.Stream.push
    monkeypatch.setattr(families.Stream, "push", lambda stream, block: kept.append(block.copy()) or push(stream, block))
    assert family_child.traced(str(waveformer), 3000)["growth_bytes_per_step"] > 416 * 4


def test_against_eager(resunet, model):
    row = families.against_eager(resunet, model, 1, 1)
    assert {"PyTorch eager", "PyTorch eager, FFTs", "onnxruntime"} <= set(row["seconds"]["wave"])
    for task, found in row["snr_db"].items():
        assert all(value > (30 if "bf16" in name else 95) for name, value in found.items() if value is not None), (task, found)
    families.show_peers(row)


def test_published_order_is_the_reference(model):
    x, asked = family_child.sound(32000, 1.0), np.full(16, 0.25, np.float32)
    with torch.inference_mode():
        found = families.Published(model)(torch.from_numpy(x)[None], torch.from_numpy(asked)[None]).numpy()
    assert snr(model.separate(x[None], asked), found) > 95


def test_bundles_beside_each_other(waveformer, resunet):
    row = families.compare_bundles({"waveformer": waveformer, "resunet": resunet}, 2, 1, 1)
    causal, windows = row["models"]["waveformer"], row["models"]["resunet"]
    assert causal["default_s"] == causal["shortest_s"] == pytest.approx(0.010159, abs=1e-6)
    assert (windows["default_s"], windows["shortest_s"]) == (1.0, pytest.approx(0.35))
    assert causal["macs_10_s"] == pytest.approx(causal["macs_per_call"]["separator"] * 441000 / 416)
    assert windows["macs_10_s"] == 10 * windows["macs_per_call"]["separator"]
    assert all(len(of["seconds"]) == 2 and of["peak_mb"] > 30 for of in row["models"].values())
    families.show_compare(row)


def test_conditions_are_of_the_family(waveformer, resunet):
    labels = family_child.conditions(Separator(waveformer).family, 4)
    assert labels.sum(1).tolist() == [1, 1, 1, 1]
    vectors = family_child.conditions(Separator(resunet).family, 2)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
