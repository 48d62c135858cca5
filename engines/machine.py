"""What this machine is, as far as engines care: system, NVIDIA driver, GPUs. Nothing here can crash without a driver."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from functools import cache
from typing import Any

MISSING = "cuda-python is not installed"


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; `compute_capability` such as "8.9", memory in bytes."""

    name: str
    compute_capability: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """`cuda` is the CUDA version that the driver supports, such as "13.0", None without one; `trouble` says why.

    `blind`: nobody can tell, as cuda-python is missing.
    """

    os: str
    architecture: str
    cuda: str | None = None
    trouble: str = ""
    gpus: tuple[Gpu, ...] = ()
    blind: bool = False


@cache
def this_machine(gpus_too: bool = True) -> Machine:
    """Look once. The driver is probed before any TensorRT library is touched: some of them crash without one.

    Without `gpus_too` the driver is left alone: a process that has started it cannot fork children that use CUDA.
    """
    cuda, trouble, gpus = _probe_cuda() if gpus_too else (None, "nobody has looked for a driver", ())
    return Machine(platform.system().lower(), platform.machine(), cuda, trouble, gpus, trouble.startswith(MISSING))


def _probe_cuda() -> tuple[str | None, str, tuple[Gpu, ...]]:
    try:
        driver = importlib.import_module("cuda.bindings.driver")  # compiled, without stubs
    except ImportError as error:
        return None, f"{MISSING}, so that the driver cannot be asked ({error})", ()
    try:
        (status,) = driver.cuInit(0)
        none = status == driver.CUresult.CUDA_ERROR_NO_DEVICE  # a driver, and no GPU that it may use
        if status != driver.CUresult.CUDA_SUCCESS and not none:
            return None, f"the NVIDIA driver does not start ({status.name})", ()
        version = _value(driver.cuDriverGetVersion())
        gpus = () if none else tuple(_gpu(driver, index) for index in range(_value(driver.cuDeviceGetCount())))
    except Exception as error:  # the loader's own type where libcuda.so.1 is missing, RuntimeError from a failed call
        missing = type(error).__name__ == "DynamicLibNotFoundError"
        return None, "there is no NVIDIA driver" + ("" if missing else f" that works ({str(error).splitlines()[0]})"), ()
    return f"{version // 1000}.{version % 1000 // 10}", "" if gpus else "the NVIDIA driver sees no GPU", gpus


def _value(answer: tuple[object, object]) -> int:
    """The value of a driver call's (status, value); raises RuntimeError if the call failed."""
    status, value = answer
    if getattr(status, "value", status) != 0:
        raise RuntimeError(f"CUDA call failed: {getattr(status, 'name', status)}")
    return int(value)  # pyright: ignore[reportArgumentType]


def _gpu(cu: Any, index: int) -> Gpu:
    attribute = cu.CUdevice_attribute
    device = cu.cuDeviceGet(index)[1]
    major = _value(cu.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    minor = _value(cu.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    name = cu.cuDeviceGetName(256, device)[1].split(b"\0")[0].decode()
    return Gpu(name, f"{major}.{minor}", _value(cu.cuDeviceTotalMem(device)))


def usable_processors() -> set[int]:
    """Logical processors that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
