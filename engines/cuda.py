"""What running a plan needs of CUDA: memory, a stream, captured launches. Over `cuda.bindings.runtime`, on device 0."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError

Launch = Callable[[Any], None]  # issues work on a stream


def load_api() -> Any:
    """The module of CUDA calls: each returns (status, *values)."""
    return importlib.import_module("cuda.bindings.runtime")  # compiled, without stubs


class Cuda:
    """Calls CUDA, and owns what was allocated through it until `close`.

    Device 0 is the one that CUDA gives to every new thread; CUDA_VISIBLE_DEVICES decides which GPU that is.
    """

    def __init__(self) -> None:
        self.api = load_api()
        self._owned = ExitStack()

    def call(self, name: str, *arguments: Any) -> Any:
        """The value of one call, None where it has none.

        Raises:
            EngineError: the call failed; most CUDA errors last until the process ends.
        """
        status, *values = getattr(self.api, name)(*arguments)
        if status.value != 0:
            raise EngineError(f"the CUDA call {name} failed with {status.name}; start the program again, or run: clapsep-export doctor")
        return values[0] if values else None

    def memory(self, size: int, purpose: str) -> int:
        """The address of `size` bytes on the device.

        Raises:
            EngineError: the device has no room; names the bytes.
        """
        status, address = self.api.cudaMalloc(max(size, 1))  # CUDA answers 0 bytes with no address
        if status.name == "cudaErrorMemoryAllocation":
            known, free, total = self.api.cudaMemGetInfo()
            room = f" ({free:,} of {total:,} are free)" if known.value == 0 else ""
            raise EngineError(f"the GPU has no room for {size:,} bytes of {purpose}{room}; free some, or compile for a smaller batch")
        if status.value != 0:
            raise EngineError(f"the GPU gave no {size:,} bytes of {purpose} ({status.name}); run: clapsep-export doctor")
        self._owned.callback(self.api.cudaFree, address)
        return int(address)

    def pinned(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """An array in host memory that the device reads and writes by itself, so that copies are asynchronous; valid until `close`."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self.call("cudaMallocHost", max(size, 1))
        self._owned.callback(self.api.cudaFreeHost, address)
        return np.asarray(_Foreign(int(address), shape, dtype))

    def stream(self) -> Any:
        """A stream that does not wait for the default one."""
        stream = self.call("cudaStreamCreateWithFlags", self.api.cudaStreamNonBlocking)
        self._owned.callback(self.api.cudaStreamDestroy, stream)
        return stream

    def capture(self, launch: Launch, stream: Any) -> Any:
        """What `launch` issues, recorded instead of run, as a graph for cudaGraphLaunch.

        Raises:
            EngineError: something in it cannot be captured.
        """
        # Thread-local: other threads go on allocating and launching while this one captures.
        self.call("cudaStreamBeginCapture", stream, self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            launch(stream)
        except EngineError:
            self.api.cudaStreamEndCapture(stream)  # or the stream stays unusable
            raise
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            ready = self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.api.cudaGraphDestroy(graph)
        self._owned.callback(self.api.cudaGraphExecDestroy, ready)
        return ready

    def close(self) -> None:
        """Free everything, newest first. What the calls answer is dropped: an error here is an earlier one coming back."""
        self._owned.close()


class _Foreign:
    """Memory that numpy did not allocate, in the form that numpy takes."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, False), "shape": shape, "typestr": np.dtype(dtype).str}


class Buffer:
    """The fixed place of one tensor: `shape` = [rows, ...] on the device at `address`, and the same in pinned host memory."""

    def __init__(self, cuda: Cuda, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self._cuda = cuda
        self._host = cuda.pinned(shape, dtype)
        self.address = cuda.memory(self._host.nbytes, f"tensor '{name}'")

    def upload(self, rows: NDArray[Any], stream: Any) -> None:
        """Start copying [n, ...] to the first n rows on the device."""
        part = self._host[: len(rows)]
        part[...] = rows
        self._copy(self.address, part.__array_interface__["data"][0], part.nbytes, "cudaMemcpyHostToDevice", stream)

    def download(self, rows: int, stream: Any) -> None:
        """Start copying the first rows from the device; `take` has them once the stream is done."""
        part = self._host[:rows]
        self._copy(part.__array_interface__["data"][0], self.address, part.nbytes, "cudaMemcpyDeviceToHost", stream)

    def take(self, rows: int) -> NDArray[Any]:
        """A new array with what `download` brought."""
        return self._host[:rows].copy()

    def _copy(self, to: int, source: int, size: int, direction: str, stream: Any) -> None:
        self._cuda.call("cudaMemcpyAsync", to, source, size, getattr(self._cuda.api.cudaMemcpyKind, direction), stream)


class Replayed:
    """A launch that is captured as a CUDA graph: run as it is the first time, captured the second time, replayed from then on.

    The first run is where TensorRT does the work that it puts off until shapes are known, which a capture must not hold; and a batch
    size that comes once only is not worth a capture. `launch` must issue the same work on the same addresses every time.
    """

    def __init__(self, cuda: Cuda, launch: Launch) -> None:
        self._cuda, self._launch = cuda, launch
        self._warm, self._graph = False, None

    def __call__(self, stream: Any) -> None:
        if not self._warm:
            self._launch(stream)
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._capture(stream)
        self._cuda.call("cudaGraphLaunch", self._graph, stream)

    def _capture(self, stream: Any) -> Any:
        try:
            return self._cuda.capture(self._launch, stream)
        except EngineError as error:
            raise EngineError(f"the plan's launches cannot be captured as a CUDA graph ({error}); run with cuda_graph=False") from error
