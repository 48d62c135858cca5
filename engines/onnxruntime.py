"""Engine kind `onnxruntime`: ONNX Runtime on the CPU, with an explicit provider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .engine import Arrays, Engine, EngineOptions, TensorSpec
from .errors import EngineError, EngineUnavailable

PROVIDER = "CPUExecutionProvider"
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


def _specs(nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n.name, DTYPES.get(n.type, str(n.type)), tuple(n.shape)) for n in nodes)


class OnnxRuntimeEngine(Engine):
    """A graph in an ONNX Runtime session whose provider is the one that was asked for, or an error."""

    kind = "onnxruntime"
    library = "onnxruntime"
    install = "pip install 'clapsep-export[cpu]'"
    devices = ("cpu",)

    def __init__(self, path: Path, options: EngineOptions) -> None:
        ort = self.load_library()
        settings = ort.SessionOptions()
        settings.log_severity_level = 3  # errors reach the caller as exceptions
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads starve the numpy DSP beside them
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        try:
            self._session = ort.InferenceSession(str(path), settings, providers=[PROVIDER])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raise EngineError(f"onnxruntime {ort.__version__} cannot load {path}: {str(error).strip()}") from error
        observed = self._session.get_providers()
        if observed != [PROVIDER]:
            raise EngineUnavailable(
                f"onnxruntime runs {path.name} on {observed}, not on {PROVIDER}; run: clapsep-export doctor", "no-provider"
            )
        self.provider = PROVIDER
        self.inputs = _specs(self._session.get_inputs())
        self.outputs = _specs(self._session.get_outputs())

    def _run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        try:
            values = self._session.run(None, dict(inputs))
        except Exception as error:  # as above
            raise EngineError(f"onnxruntime failed while running a graph: {str(error).strip()}") from error
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}  # pyright: ignore[reportReturnType]
