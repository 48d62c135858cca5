import json
import shutil
from pathlib import Path

import pytest
from clapsep.runtime import Bundle, Separator
from clapsep.runtime import errors as e
from clapsep.runtime.family import open_family
from clapsep.runtime.manifest import parse_manifest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture
def copy(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "copy.clapsep"))


def edit(bundle: Path, change) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_manifest_survives_a_round_trip(demo_bundle):
    text = (demo_bundle / "manifest.json").read_text()
    assert parse_manifest(text, "m").to_json() == text


def test_a_manifest_holds_the_contract_of_names_axes_and_dtypes(demo_bundle):
    m = Bundle.open(demo_bundle).manifest
    g = m.graphs
    shapes = ((16, 256), (16, 256), (64, 128), (256, 64), (1024, 32))
    features = [(f"feature_{i}", "float32", ("batch", *shape)) for i, shape in enumerate(shapes)]
    features.append(("spectrum", "float32", ("batch", 251, 128)))
    assert {n: [(t.name, t.dtype, t.shape) for t in (*e.inputs, *e.outputs)] for n, e in g.items()} == {
        "text_encoder": [
            ("input_ids", "int64", ("batch", 77)),
            ("attention_mask", "int64", ("batch", 77)),
            ("embedding", "float32", ("batch", 128)),
        ],
        "text_encoder_short": [
            ("input_ids", "int64", ("batch", 16)),
            ("attention_mask", "int64", ("batch", 16)),
            ("embedding", "float32", ("batch", 128)),
        ],
        "audio_encoder": [("log_mel", "float32", ("batch", 251, 64)), ("embedding", "float32", ("batch", 128))],
        "separator": [
            ("magnitude", "float32", ("batch", 251, 513)),
            ("log_mel", "float32", ("batch", 251, 64)),
            ("condition", "float32", ("batch", 256)),
            ("mask", "float32", ("batch", 251, 513)),
        ],
        "mixture_encoder": [
            ("magnitude", "float32", ("batch", 251, 513)),
            ("log_mel", "float32", ("batch", 251, 64)),
            *features,
        ],
        "film": [("condition", "float32", ("batch", 256)), ("film", "float32", ("batch", 1472))],
        "mask_decoder": [*features, ("film", "float32", ("batch", 1472)), ("mask", "float32", ("batch", 251, 513))],
        "separator_waveform": [
            ("mixture", "float32", ("batch", 80000)),
            ("condition", "float32", ("batch", 256)),
            ("target", "float32", ("batch", 80000)),
        ],
    }
    assert len({g[n].data for n in ("separator", "mixture_encoder", "film", "mask_decoder", "separator_waveform")}) == 1, "one file"
    assert all(gate.passed and gate.measured is not None for gate in m.gates)
    assert {"torch", "onnx", "onnxruntime"} <= set(m.toolchain)


def test_constants_travel_inside_each_graph(demo_bundle):
    import onnx

    for path in sorted((demo_bundle / "graphs").glob("*.onnx")):
        props = {p.key: json.loads(p.value) for p in onnx.load(path, load_external_data=False).metadata_props}
        assert props["graph"] == path.stem
        assert props["family"] == "clapsep"
        assert props["dsp"]["window_samples"] == 80000
        assert props["condition"]["normalize"] is True


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: m.update(schema_version=99), e.SchemaVersionError),
        (lambda m: m.pop("schema_version"), e.SchemaVersionError),
        (lambda m: m.update(format="zip"), e.ManifestError),
        (lambda m: m.pop("graphs"), e.ManifestError),
        (lambda m: m.update(graphs=[]), e.ManifestError),
        (lambda m: m["graphs"]["separator"].update(opset="20"), e.ManifestError),
        (lambda m: m["graphs"]["separator"]["graph"].update(size=True), e.ManifestError),
        (lambda m: m["graphs"]["separator"]["graph"].update(file="/etc/passwd"), e.UnsafePath),
        (lambda m: m["graphs"]["separator"]["graph"].update(file="../../etc/passwd"), e.UnsafePath),
        (lambda m: m["graphs"]["separator"]["graph"].update(file="graphs\\..\\x"), e.UnsafePath),
        (lambda m: m["graphs"]["separator"]["graph"].update(file="graphs/none.onnx"), e.MissingFile),
        (lambda m: m["graphs"]["separator"]["graph"].update(size=1), e.SizeMismatch),
        (lambda m: m.update(family="nobody"), e.BundleError),
        (lambda m: m["dsp"].update(hop=0), e.ManifestError),
        (lambda m: m["dsp"].update(hop="320"), e.ManifestError),
        (lambda m: m["dsp"].pop("hop"), e.ManifestError),
        (lambda m: m["dsp"].update(window_samples=10**12), e.ManifestError),
        (lambda m: m["dsp"].update(window_samples=2**29), e.ManifestError),
        (lambda m: m["dsp"].update(fmax=float("nan")), e.ManifestError),
        (lambda m: m["condition"].pop("embedding_size"), e.ManifestError),
        (lambda m: m["condition"].update(embedding_size=7), e.ManifestError),
        (lambda m: m["condition"].update(embedding_size=float("inf")), e.ManifestError),
        (lambda m: m["condition"].update(normalize="false"), e.ManifestError),
        (lambda m: m["query"].pop("context"), e.ManifestError),
        (lambda m: m["query"].update(context=-5), e.ManifestError),
        (lambda m: m["query"].update(crop="random"), e.ManifestError),
        (lambda m: m["query"].update(words="rain"), e.ManifestError),
        (lambda m: m["golden"].update(file="\ud800"), e.BundleError),
        (lambda m: m["golden"].update(file="x" * 5000), e.BundleError),
        (lambda m: m["graphs"].pop("text_encoder"), e.BundleError),
        (lambda m: m["graphs"]["film"]["outputs"][0].update(dtype="tensor(string)"), e.ManifestError),
    ],
)
def test_edited_manifests_are_refused_by_type(copy, change, error):
    edit(copy, change)
    with pytest.raises(error) as caught:
        Separator(copy)
    assert type(caught.value) is error
    assert str(copy) in str(caught.value) or "manifest" in str(caught.value) or "bundle" in str(caught.value)


def test_changed_content_is_noticed_before_it_runs(copy):
    path = copy / "graphs" / "separator.onnx.data"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    separator = Separator(copy)
    with pytest.raises(e.HashMismatch, match=r"separator\.onnx\.data"):
        separator.engine("separator")


@pytest.mark.parametrize("name", ["graphs/separator.onnx", "graphs/text_encoder.onnx.data", "golden.npz", "tokenizer.json"])
def test_truncated_files_are_noticed_at_once(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(e.SizeMismatch, match=path.name):
        Bundle.open(copy)


def test_links_in_a_circle(copy):
    (copy / "golden.npz").unlink()
    (copy / "golden.npz").symlink_to("golden.npz")
    with pytest.raises(e.BundleError):
        Bundle.open(copy)


def test_weights_that_nobody_vouches_for(copy):
    (copy / "graphs" / "hidden.bin").write_bytes(b"x")
    with pytest.raises(e.BundleError, match=r"hidden\.bin is not listed"):
        Bundle.open(copy)


def test_links_out_of_the_bundle_are_refused(copy, tmp_path):
    path = copy / "golden.npz"
    path.rename(tmp_path / "golden.npz")
    path.symlink_to(tmp_path / "golden.npz")
    with pytest.raises(e.UnsafePath):
        Bundle.open(copy)


def test_places_that_are_no_bundles(tmp_path):
    for name in ("none", "x" * 300, "\0"):
        with pytest.raises(e.BundleError, match="not a bundle directory"):
            Bundle.open(tmp_path / name)
    with pytest.raises(e.MissingFile, match=r"no manifest\.json"):
        Bundle.open(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_field_may_hold_anything(demo_bundle, data):
    """Whatever stands in a field, the reader returns a manifest or a typed error."""
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    node, value = manifest, data.draw(json_values)
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = value
        break
    try:
        parsed = parse_manifest(json.dumps(manifest), "m")
        parsed.to_json()
        open_family(parsed)
        for entry in parsed.files():
            Bundle(demo_bundle, parsed).locate(entry)
    except e.BundleError:
        pass


def test_numbers_too_large_for_a_float(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"fmin": 50.0', '"fmin": 1e999'))
    with pytest.raises(e.ManifestError, match="1e999 is not a JSON number"):
        Bundle.open(copy)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(content):
    with pytest.raises(e.ManifestError):
        parse_manifest(content, "m")


def rename(graph, side, old, new):
    def change(data):
        (tensor,) = (t for t in data["graphs"][graph][side] if t["name"] == old)
        tensor["name"] = new

    return change


def reshape(graph, side, name, shape):
    def change(data):
        (tensor,) = (t for t in data["graphs"][graph][side] if t["name"] == name)
        tensor["shape"] = shape

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename("mask_decoder", "outputs", "mask", "foo"), "mask_decoder"),
        (rename("separator", "outputs", "mask", "foo"), "separator"),
        (rename("film", "outputs", "film", "foo"), "film"),
        (rename("mixture_encoder", "outputs", "spectrum", "foo"), "mask_decoder"),
        (reshape("mask_decoder", "outputs", "mask", ["batch", 251, 512]), "mask_decoder"),
        (reshape("mixture_encoder", "inputs", "magnitude", ["batch", 250, 513]), "mixture_encoder"),
        (reshape("separator_waveform", "outputs", "target", ["batch", 1 << 40]), "separator_waveform"),
        (reshape("film", "inputs", "condition", ["batch", 255]), "film"),
        (reshape("text_encoder_short", "inputs", "input_ids", []), "text_encoder_short"),
        (reshape("text_encoder_short", "inputs", "attention_mask", ["batch", "n"]), "text_encoder_short"),
        (lambda m: m["graphs"]["text_encoder_short"].update(inputs=[]), "text_encoder_short"),
        (lambda m: m.update(max_batch=0), "max_batch 0"),
        (lambda m: m["graphs"].update({"../escaped": m["graphs"]["film"]}), "'../escaped'"),
    ],
)
def test_graphs_that_do_not_fit_together_are_refused_when_a_bundle_is_opened(copy, change, words):
    """A decoder whose mask had another name would give the mixture, unmasked."""
    edit(copy, change)
    with pytest.raises(e.ManifestError, match=words.replace(".", r"\.")):
        Separator(copy)
