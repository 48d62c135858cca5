"""A TensorRT or TensorRT-RTX plan on the GPU: deserialised, asked for its tensors, and executed."""

from __future__ import annotations

import re
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda import Buffer, Cuda, Launch, Replayed
from .engine import Arrays, TensorSpec
from .errors import EngineError

COMPILE_AGAIN = "compile it again: clapsep-export compile"
# Bits of what `Runtime.get_engine_validity` answers. Bit 2, "unsupported compute capability", is left to deserialisation, as it is also
# set for GPUs that the library then runs on.
INVALID = {
    1: "it was compiled by another version of the library",
    4: "the NVIDIA driver is too old for it",
    8: "the CUDA runtime is too old for it",
    16: "the GPU has too little memory for it",
    32: "it is truncated, or no plan at all",
    64: "CUDA does not answer",
}


class OpenPlan:
    """A deserialised plan. `trt` is the Python module, `name` the library's name and version for errors.

    `host_code` lets the plan bring code for the host too, as version-compatible ones do. There must be a driver and a GPU.

    Raises:
        EngineError: the file cannot be read, or is no plan that runs here.
    """

    def __init__(self, trt: Any, name: str, path: Path, host_code: bool) -> None:
        self._trt, self._name, self._log = trt, name, collecting_logger(trt)
        self._generates = hasattr(trt, "DynamicShapesKernelSpecializationStrategy")  # kernels, where it runs: TensorRT-RTX
        self._runtime = trt.Runtime(self._log)
        self._runtime.engine_host_code_allowed = host_code
        self._engine = self._deserialise(path)
        self.inputs, self.outputs = self._specs("INPUT", path), self._specs("OUTPUT", path)
        self.max_batch = min(self._engine.get_tensor_profile_shape(spec.name, 0)[2][0] for spec in self.inputs)
        self.scratch = int(self._engine.device_memory_size_v2)  # bytes that an execution context works in
        self._config, self._cache = self._runtime_config()

    def new_context(self) -> Any:
        """An execution context without scratch memory; `set_device_memory` gives it some.

        Raises:
            EngineError: TensorRT made none.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy if self._config is None else self._config)
        if context is None:
            raise self.failure("made no execution context")
        return context

    def failure(self, what: str, advice: str = "run: clapsep-export doctor") -> EngineError:
        """An error that says all that TensorRT logged since the last one."""
        said = " ".join(self._log.messages) or "it does not say why"
        self._log.messages.clear()
        if re.search("out ?of ?memory", said, re.IGNORECASE):
            advice = "free GPU memory, or compile for a smaller batch"
        return EngineError(f"{self._name} {what}: {said}; {advice}")

    def _deserialise(self, path: Path) -> Any:
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise EngineError(f"cannot read the plan {path}: {error.strerror}; {COMPILE_AGAIN}") from error
        self._check_header(plan, path)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.failure(f"cannot load the plan {path}", COMPILE_AGAIN)
        return engine

    def _check_header(self, plan: bytes, path: Path) -> None:
        """TensorRT-RTX can say what is wrong with a plan; TensorRT just does not load it."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        header = plan[: self._runtime.engine_header_size]
        complete = len(header) == self._runtime.engine_header_size
        bits = self._runtime.get_engine_validity(header)[1] if complete else 32
        wrong = [meaning for bit, meaning in INVALID.items() if bits & bit]
        if wrong:
            raise EngineError(f"{self._name} cannot run the plan {path}: {', '.join(wrong)}; {COMPILE_AGAIN}")

    def _specs(self, mode: str, path: Path) -> tuple[TensorSpec, ...]:
        engine, wanted = self._engine, getattr(self._trt.TensorIOMode, mode)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        specs = []
        for name in (name for name in names if engine.get_tensor_mode(name) == wanted):
            first, *rest = engine.get_tensor_shape(name)
            if any(size < 0 for size in rest):
                raise EngineError(f"tensor '{name}' of the plan {path} varies in more than its first axis; {COMPILE_AGAIN}")
            dtype = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name))).name
            specs.append(TensorSpec(name, dtype, ("batch" if first < 0 else first, *rest)))
        return tuple(specs)

    def _runtime_config(self) -> tuple[Any, Any]:
        """With TensorRT-RTX all contexts share the kernels that it generates, and have the final ones before a graph is captured.

        The cache is kept by us, since the configuration does not keep it: without a reference to it the process crashes.
        """
        if not self._generates:
            return None, None
        config = self._engine.create_runtime_config()
        cache_ = config.create_runtime_cache()
        config.set_runtime_cache(cache_)
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return config, cache_


class Lane:
    """What one caller needs at a time: a stream, every tensor's memory for `max_batch` rows, and an execution context per batch size.

    A context per batch size, because a captured graph is undefined once its context takes another shape; they share the scratch memory,
    since only one of them runs at a time.

    Raises:
        EngineError: the GPU has no room.
    """

    def __init__(self, plan: OpenPlan, replay: bool) -> None:
        self._plan, self._replay, self._cuda = plan, replay, Cuda()
        self._launches: dict[int, Launch] = {}
        try:
            self._scratch = self._cuda.memory(plan.scratch, "scratch")
            self._buffers = {spec.name: self._buffer(spec) for spec in (*plan.inputs, *plan.outputs)}
            self._stream = self._cuda.stream()
        except BaseException:  # also an interrupt: the GPU's memory is not this process's to lose
            self._cuda.close()
            raise

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Execute once for [B, ...] with B up to `max_batch`; returns new arrays.

        Raises:
            EngineError: TensorRT or CUDA failed; the lane is of no more use.
        """
        batch = len(next(iter(inputs.values())))
        if batch not in self._launches:
            self._launches[batch] = self._launch(batch)
        # Copies stay outside the captured launches, on the same stream: whatever is replayed reads this call's inputs.
        for name, value in inputs.items():
            self._buffers[name].upload(value, self._stream)
        self._launches[batch](self._stream)
        for spec in self._plan.outputs:
            self._buffers[spec.name].download(batch, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return {spec.name: self._buffers[spec.name].take(batch) for spec in self._plan.outputs}

    def close(self) -> None:
        """Free everything, once what is under way has ended."""
        self._cuda.api.cudaStreamSynchronize(self._stream)  # fails where a run failed, which was reported there
        self._launches.clear()
        self._cuda.close()

    def _buffer(self, spec: TensorSpec) -> Buffer:
        return Buffer(self._cuda, spec.name, (self._plan.max_batch, *map(int, spec.shape[1:])), spec.dtype)

    def _launch(self, batch: int) -> Launch:
        """A context whose shapes and addresses are set once and stay, as a function that issues its work on a stream."""
        plan, context = self._plan, self._plan.new_context()
        context.set_device_memory(self._scratch, plan.scratch)
        done = [context.set_input_shape(spec.name, (batch, *spec.shape[1:])) for spec in plan.inputs]
        done += [context.set_tensor_address(name, buffer.address) for name, buffer in self._buffers.items()]
        if not all(done):
            raise plan.failure(f"takes no batch of {batch}")

        def launch(stream: Any) -> None:
            if not context.execute_async_v3(int(stream)):
                raise plan.failure("failed while running a plan")

        return Replayed(self._cuda, launch) if self._replay else launch


@cache
def collecting_logger(trt: Any) -> Any:
    """A logger that keeps the last errors in `messages`. One per library, for ever: TensorRT holds on to the first that it gets."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.messages.append(message)

    return Log()
