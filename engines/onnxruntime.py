"""Engine kind `onnxruntime`: ONNX Runtime on the CPU or, with the GPU package, on CUDA, with exactly one explicit provider."""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Arrays, Engine, EngineOptions, TensorSpec
from .errors import EngineError, EngineUnavailable
from .machine import Machine

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PROVIDER_OPTIONS = {"cpu": {}, "cuda": {"device_id": "0", "use_tf32": "0"}}  # TF32 keeps 10 of 23 bits, so it is no fp32
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}
IDLE_BUFFERS = 8  # sets of device buffers that wait for the next call of their batch size; the oldest go
DRIVER = "libcuda.so"
INSTALL_GPU = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'clapsep-export[gpu]'"
INSTALL_CUDA = "pip install 'onnxruntime-gpu[cuda,cudnn]'"


class OnnxRuntimeEngine(Engine):
    """A graph in an ONNX Runtime session whose provider is the one that was asked for, or an error."""

    kind = "onnxruntime"
    library = "onnxruntime"
    install = "pip install 'clapsep-export[cpu]'  # or [gpu]"
    devices = ("cpu", "cuda")

    def __init__(self, path: Path, options: EngineOptions) -> None:
        ort = self.load_library()
        device = self.device(options)
        self._session = _open(ort, path, device, options.threads)
        observed = self._session.get_providers()
        if observed[0] != PROVIDERS[device]:  # after CUDA the list has the CPU too; no node may go there
            raise EngineUnavailable(
                f"onnxruntime runs {path.name} on {observed[0]}, not on {PROVIDERS[device]}; run: clapsep-export doctor", "no-provider"
            )
        self.provider = observed[0]
        self.inputs = _specs(self._session.get_inputs())
        self.outputs = _specs(self._session.get_outputs())
        self._bound = BoundRunner(ort, self._session, device, self.inputs, self.outputs) if device == "cuda" else None

    @classmethod
    def preflight(cls, options: EngineOptions, machine: Machine) -> None:
        super().preflight(options, machine)  # without a GPU no other package would help, so that is said first
        if cls.device(options) == "cuda":
            _require_cuda_provider(cls.load_library(), machine)

    def _run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        try:
            if self._bound is not None:
                return self._bound.run(inputs)
            values = self._session.run(None, dict(inputs))
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types
            raise EngineError(f"onnxruntime failed while running a graph: {str(error).strip()}") from error
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}


class BoundRunner:
    """Runs a session on buffers that stay on `device`, so that no call allocates device memory or moves data twice.

    Each concurrent caller has a set of its own, kept for its next call: with one set and a lock, callers would wait for each
    other's copies to and from the device. A set whose run failed is not used again.
    """

    def __init__(self, ort: Any, session: Any, device: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._ort, self._session, self._device, self._inputs, self._outputs = ort, session, device, inputs, outputs
        self._idle: list[_Buffers] = []
        self._lock = Lock()

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name, as new arrays; `inputs` must have the declared dtypes and shapes."""
        sizes = [pair for spec in self._inputs for pair in zip(spec.shape, inputs[spec.name].shape, strict=True)]
        axes = {axis: size for axis, size in sizes if isinstance(axis, str)}
        buffers = self._take(axes)
        result = buffers.run(inputs)
        with self._lock:
            self._idle = [*self._idle, buffers][-IDLE_BUFFERS:]
        return result

    def _take(self, axes: Mapping[str, int]) -> _Buffers:
        with self._lock:
            for index, buffers in enumerate(self._idle):
                if buffers.axes == axes:
                    return self._idle.pop(index)
        return _Buffers(self._ort, self._session, self._device, self._inputs, self._outputs, axes)


class _Buffers:
    """One set of input and output buffers for given sizes of the symbolic axes, bound to a session."""

    def __init__(
        self,
        ort: Any,
        session: Any,
        device: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        axes: Mapping[str, int],
    ) -> None:
        self.axes, self._session, self._binding = axes, session, session.io_binding()

        def allocate(spec: TensorSpec) -> Any:
            shape = [axes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(spec.dtype), device, 0)

        self._inputs = {spec.name: allocate(spec) for spec in inputs}
        self._outputs = {spec.name: allocate(spec) for spec in outputs}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(inputs[name]))
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        return {name: np.array(value.numpy()) for name, value in self._outputs.items()}  # numpy() may be a view of the buffer


def missing_cuda_library(ort: Any) -> str | None:
    """What the system's loader says about ONNX Runtime's CUDA library, such as the name of a missing one; None if it loads.

    Only for when ONNX Runtime has failed to load it: the library must not start before ONNX Runtime has prepared it.
    """
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return None if "undefined symbol: Provider_GetHost" in str(error) else str(error)
    return None


def cuda_trouble(ort: Any) -> str | None:
    """What keeps the CUDA provider from loading besides the NVIDIA driver, None if nothing does; for a process that will not run it."""
    _preload(ort)
    missing = missing_cuda_library(ort)
    return None if missing is None or DRIVER in missing else missing


def _open(ort: Any, path: Path, device: str, threads: int | None) -> Any:
    """A session on the device's provider alone.

    Raises:
        EngineUnavailable: a library that the provider needs is missing.
        EngineError: the graph cannot be loaded.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # errors reach the caller as exceptions
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads starve the numpy DSP beside them
    if threads is not None:
        settings.intra_op_num_threads = threads
    if device == "cuda":
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        _preload(ort)
    try:
        # Without enable_fallback=0 a provider that fails is replaced by the CPU's, with a line on stdout.
        return ort.InferenceSession(str(path), settings, providers=[(PROVIDERS[device], PROVIDER_OPTIONS[device])], enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types
        missing = missing_cuda_library(ort) if device == "cuda" else None
        if missing:
            repair = "install the NVIDIA driver" if DRIVER in missing else f"run: {INSTALL_CUDA}"
            message = f"onnxruntime {ort.__version__} cannot load its CUDA provider ({missing}); {repair}"
            raise EngineUnavailable(message, "not-loadable") from error
        raise EngineError(
            f"onnxruntime {ort.__version__} cannot load {path}: {str(error).strip()}; build or copy the bundle again"
        ) from error


def _preload(ort: Any) -> None:
    """Load CUDA and cuDNN from pip's NVIDIA packages, where there are any; what is missing is found by the session."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()


def _require_cuda_provider(ort: Any, machine: Machine) -> None:
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        message = f"this onnxruntime {ort.__version__} is not the GPU package, and the two overwrite each other; run: {INSTALL_GPU}"
        raise EngineUnavailable(message, "no-provider")
    built = getattr(ort, "cuda_version", "")
    if built and machine.cuda and int(built.split(".")[0]) > int(machine.cuda.split(".")[0]):
        raise EngineUnavailable(
            f"onnxruntime {ort.__version__} was built for CUDA {built} and the NVIDIA driver supports CUDA {machine.cuda} at most; "
            "update the driver, or install an onnxruntime-gpu that was built for it",
            "driver-too-old",
        )


def _specs(nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n.name, DTYPES.get(n.type, str(n.type)), tuple(n.shape)) for n in nodes)
