"""A few inputs of every target, so that the fuzzers stay alive; `python tests/fuzz/run.py` runs more."""

import json

import pytest
from fuzz.session import Session
from fuzz.targets import NAMES

COUNT = 40


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_success_and_typed_errors(demo_bundle, tmp_path, name):
    if name == "onnx_in_openvino":
        pytest.importorskip("openvino")
    found = Session(name, 1, demo_bundle, tmp_path, tmp_path / "saved").run(COUNT, 300)
    assert found["inputs"] == COUNT
    assert found["findings"] == [], json.dumps(found["findings"], indent=1)
    assert found["refused"], "no input was hostile"
