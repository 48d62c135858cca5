"""Other people's converters, each in a process of its own; needs no clapsep, so that any interpreter runs it.

Usage: python converter_worker.py TOOL MODEL OUT [DATA]

TOOL is one of TOOLS. DATA is a folder of NPZ files with the model's inputs. The last line of output is JSON. Exit codes: 3 the tool
is not installed, 4 the tool failed; the last line then says why.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
ACCURACY_DB = 46.0  # what auto_mixed_precision must reach, the bar of export/precision.py


def _save(model: Any, out: Path) -> None:
    import onnx

    onnx.save(model, str(out), save_as_external_data=True, all_tensors_to_one_file=True, location=f"{out.name}.data")


def onnxruntime_float16(model: Path, out: Path, _: Path | None) -> Facts:
    """The default block list; inputs and outputs stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    _save(convert_float_to_float16(onnx.load(str(model)), keep_io_types=True), out)
    return {"version": version("onnxruntime")}


def onnxconverter_float16(model: Path, out: Path, _: Path | None) -> Facts:
    import onnx
    from onnxconverter_common.float16 import convert_float_to_float16

    _save(convert_float_to_float16(onnx.load(str(model)), keep_io_types=True), out)
    return {"version": version("onnxconverter-common")}


def onnxconverter_auto(model: Path, out: Path, data: Path | None) -> Facts:
    """Leaves nodes out until ONNX Runtime's CPU engine reaches ACCURACY_DB on the first signal."""
    import numpy as np
    import onnx
    from onnxconverter_common.auto_mixed_precision import auto_convert_mixed_precision

    def accurate(wanted: list[Any], found: list[Any]) -> bool:
        noise = max(float(np.sum((w - f) ** 2.0) / np.sum(w**2.0)) for w, f in zip(wanted, found, strict=True))
        return noise <= 10 ** (-ACCURACY_DB / 10)

    assert data is not None
    feeds = dict(np.load(min(data.glob("*.npz"))))
    _save(auto_convert_mixed_precision(onnx.load(str(model)), feeds, accurate, keep_io_types=True), out)
    return {"version": version("onnxconverter-common")}


def modelopt_autocast(model: Path, out: Path, data: Path | None) -> Facts:
    """Defaults, with calibration data in place of random numbers."""
    from modelopt.onnx.autocast import convert_to_mixed_precision

    made = convert_to_mixed_precision(str(model), low_precision_type="fp16", keep_io_types=True, calibration_data=str(data))
    _save(made, out)
    return {"version": version("nvidia-modelopt")}


def onnxruntime_int8(model: Path, out: Path, _: Path | None) -> Facts:
    """Weights as int8, activations quantised at run time. The quantiser transposes weights and trips over their recorded shapes."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    loaded = onnx.load(str(model))
    loaded.graph.ClearField("value_info")
    quantize_dynamic(loaded, str(out), use_external_data_format=True)
    return {"version": version("onnxruntime")}


Tool = Callable[[Path, Path, Path | None], Facts]
TOOLS: dict[str, tuple[str, Tool]] = {  # module that must be installed
    "onnxruntime.transformers.float16": ("onnxruntime", onnxruntime_float16),
    "onnxconverter_common.float16": ("onnxconverter_common", onnxconverter_float16),
    "onnxconverter_common.auto_mixed_precision": ("onnxconverter_common", onnxconverter_auto),
    "modelopt.onnx.autocast": ("modelopt", modelopt_autocast),
    "onnxruntime.quantization int8": ("onnxruntime", onnxruntime_int8),
}


def main(tool: str, model: Path, out: Path, data: Path | None) -> int:
    logging.disable(logging.WARNING)
    module, work = TOOLS[tool]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed")
        return 3
    begin = time.monotonic()
    try:
        facts = work(model, out, data)
    except Exception as error:  # whatever somebody else's tool raises belongs in the table
        print(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        return 4
    print(json.dumps({"seconds": time.monotonic() - begin} | facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) > 4 else None))
