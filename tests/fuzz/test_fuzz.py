"""A few inputs of every target, so that the fuzzers stay alive; `python tests/fuzz/run.py` runs more."""

import json

import pytest
from fuzz.session import Session
from fuzz.targets import NAMES

COUNT = 40
# Wrong constants in a plain graph still reach the engines' kernels; see docs/reliability.md.
KNOWN = {"onnx_in_onnxruntime": {"crash", "memory"}, "onnx_in_openvino": {"crash", "memory"}}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_success_and_typed_errors(demo_bundle, tmp_path, name):
    if name == "onnx_in_openvino":
        pytest.importorskip("openvino")
    found = Session(name, 1, demo_bundle, tmp_path, tmp_path / "saved").run(COUNT, 300)
    assert found["inputs"] == COUNT
    new = [finding for finding in found["findings"] if finding["kind"] not in KNOWN.get(name, ())]
    assert new == [], json.dumps(new, indent=1)
    assert found["refused"], "no input was hostile"
