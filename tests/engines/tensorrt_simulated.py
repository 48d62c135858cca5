"""A simulated GPU for tests: stands for `cuda.bindings.runtime` and for the TensorRT-RTX module, in numpy. It proves nothing about either.

What it is strict about is what goes wrong on a real one: work is queued on a stream and done when the stream is waited for; a captured graph
is a list of recorded operations on the addresses that they had; a context that takes another shape after it was captured spoils the graph;
a capture right after a change of shape fails; a context writes to its scratch memory while it runs.

The plan is y = gain * x + 1 with `x` [batch, 4] and `gain` [batch, 1].
"""

from __future__ import annotations

import json
import threading
import time
from enum import Enum
from types import ModuleType, SimpleNamespace

import numpy as np

SCRATCH = 4096


class Status(Enum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


OK = Status.cudaSuccess


class SimulatedStream:
    def __init__(self):
        self.queue, self.recorded = [], None

    def __int__(self):
        return id(self)

    def issue(self, operation):
        (self.queue if self.recorded is None else self.recorded).append(operation)


class SimulatedCuda:
    """`capacity` bytes of device memory; `captures` and `launches` count graphs."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="to device", cudaMemcpyDeviceToHost="to host")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")

    def __init__(self, capacity=2**24):
        self.capacity, self.device, self.host = capacity, {}, {}
        self.streams, self.graphs, self.captures, self.launches = {}, set(), 0, 0
        self.uncapturable = False
        self.lock = threading.Lock()

    def view(self, address, size, places):
        """Bytes [size] of a block in `places`; reading past its end is an error."""
        for start, block in list(places.items()):
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise AssertionError(f"illegal address {address}")

    def held(self):
        """How much is not yet given back: device and host blocks, streams, graphs."""
        return len(self.device) + len(self.host) + len(self.streams) + len(self.graphs)

    def cudaMalloc(self, size):
        with self.lock:
            if sum(map(len, self.device.values())) + size > self.capacity:
                return Status.cudaErrorMemoryAllocation, None
            return OK, self._new(size, self.device)

    def cudaMallocHost(self, size):
        return OK, self._new(size, self.host)

    def _new(self, size, places):
        block = np.full(size, 0xEE, np.uint8)
        address = block.__array_interface__["data"][0]
        places[address] = block
        return address

    def cudaFree(self, address):
        del self.device[address]
        return (OK,)

    def cudaFreeHost(self, address):
        del self.host[address]
        return (OK,)

    def cudaMemGetInfo(self):
        return OK, self.capacity - sum(map(len, self.device.values())), self.capacity

    def cudaStreamCreateWithFlags(self, _flags):
        stream = SimulatedStream()
        self.streams[int(stream)] = stream
        return OK, stream

    def cudaStreamDestroy(self, stream):
        del self.streams[int(stream)]
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        while stream.queue:
            stream.queue.pop(0)()
        return (OK,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        places = (self.device, self.host) if kind == "to device" else (self.host, self.device)

        def copy():
            self.view(to, size, places[0])[:] = self.view(source, size, places[1])

        stream.issue(copy)
        return (OK,)

    def cudaStreamBeginCapture(self, stream, _mode):
        stream.recorded = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        recorded, stream.recorded = stream.recorded, None
        return (Status.cudaErrorStreamCaptureUnsupported, None) if self.uncapturable else (OK, tuple(recorded))

    def cudaGraphInstantiate(self, graph, _flags):
        ready = SimpleNamespace(operations=graph)
        self.captures += 1
        self.graphs.add(id(ready))
        return OK, ready

    def cudaGraphDestroy(self, _graph):
        return (OK,)

    def cudaGraphExecDestroy(self, ready):
        self.graphs.remove(id(ready))
        return (OK,)

    def cudaGraphLaunch(self, ready, stream):
        self.launches += 1
        for operation in ready.operations:
            stream.issue(operation)
        return (OK,)


class SimulatedLogger:
    Severity = Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    def __init__(self):
        pass


def simulated_tensorrt(cuda, rtx=True):
    """The surface of TensorRT-RTX, or what TensorRT has of it, on `cuda`; counts the contexts that were made."""
    trt = ModuleType("simulated_tensorrt")
    trt.__version__, trt.contexts, trt.nptype = "1.7.1.116", 0, np.dtype
    trt.ILogger = SimulatedLogger
    trt.TensorIOMode = Enum("TensorIOMode", ["INPUT", "OUTPUT"])
    trt.ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"])
    if rtx:
        trt.DynamicShapesKernelSpecializationStrategy = Enum("DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER"])
    trt.Runtime = lambda logger: (SimulatedRtxRuntime if rtx else SimulatedRuntime)(trt, cuda, logger)
    return trt


def simulated_plan(max_batch=4, header=b"SIMPLAN1"):
    return header + json.dumps({"max_batch": max_batch}).encode() + b"END"


class SimulatedRuntime:
    def __init__(self, trt, cuda, logger):
        self.trt, self.cuda, self.logger = trt, cuda, logger

    def deserialize_cuda_engine(self, plan):
        if not plan.endswith(b"END"):
            self.logger.log(self.logger.Severity.INFO, "Loaded engine size: 0 MiB")
            self.logger.log(self.logger.Severity.ERROR, "Serialization assertion plan.header.size == blobSize failed.")
            return None
        return SimulatedEngine(self.trt, self.cuda, self.logger, json.loads(plan[8:-3])["max_batch"])


class SimulatedRtxRuntime(SimulatedRuntime):
    engine_header_size = 8

    def get_engine_validity(self, header):
        assert len(header) == 8
        bits = {b"SIMPLAN1": 0, b"SIMPLAN0": 1, b"SIMPLAN2": 2}.get(bytes(header), 32)
        return ("INVALID" if bits else "VALID"), bits


class SimulatedEngine:
    device_memory_size_v2 = SCRATCH
    tensors = (("x", "INPUT", (-1, 4)), ("gain", "INPUT", (-1, 1)), ("y", "OUTPUT", (-1, 4)))
    num_io_tensors = 3

    def __init__(self, trt, cuda, logger, max_batch):
        self.trt, self.cuda, self.logger, self.max_batch = trt, cuda, logger, max_batch

    def get_tensor_name(self, index):
        return self.tensors[index][0]

    def _tensor(self, name):
        return next(tensor for tensor in self.tensors if tensor[0] == name)

    def get_tensor_mode(self, name):
        return self.trt.TensorIOMode[self._tensor(name)[1]]

    def get_tensor_shape(self, name):
        return self._tensor(name)[2]

    def get_tensor_dtype(self, _name):
        return "float32"

    def get_tensor_profile_shape(self, name, _profile):
        rest = self._tensor(name)[2][1:]
        return [(batch, *rest) for batch in (1, self.max_batch, self.max_batch)]

    def create_runtime_config(self):
        calls = {"create_runtime_cache": object, "set_runtime_cache": lambda _cache: True}
        return SimpleNamespace(**calls, set_execution_context_allocation_strategy=lambda _strategy: None)

    def create_execution_context(self, given):
        if hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy"):
            assert given.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
        else:
            assert given.name == "USER_MANAGED"
        self.trt.contexts += 1
        return SimulatedContext(self)


class SimulatedContext:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.scratch = engine, {}, {}, None
        self.settled = self.captured = self.spoilt = False

    def set_device_memory(self, address, size):
        assert size >= SCRATCH
        self.scratch = address

    def set_input_shape(self, name, shape):
        if shape[0] > self.engine.max_batch:
            return False
        self.shapes[name], self.settled, self.spoilt = shape, False, self.captured
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle):
        stream = self.engine.cuda.streams[handle]
        if stream.recorded is not None:
            if not self.settled:
                self.engine.logger.log(self.engine.logger.Severity.ERROR, "shape changes are not settled while capturing")
                return False
            self.captured = True
        self.settled = True
        batch, addresses, scratch = self.shapes["x"][0], dict(self.addresses), self.scratch
        stream.issue(lambda: self._compute(batch, addresses, scratch))
        return True

    def _compute(self, batch, addresses, scratch):
        cuda = self.engine.cuda

        def tensor(address, columns):
            return cuda.view(address, batch * columns * 4, cuda.device).view(np.float32).reshape(batch, columns)

        inside = tensor(scratch, 4)
        inside[...] = tensor(addresses["x"], 4) * tensor(addresses["gain"], 1)
        time.sleep(0.002)
        tensor(addresses["y"], 4)[...] = np.nan if self.spoilt else inside + 1
