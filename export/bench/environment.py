"""The machine, the software and the bundle that a benchmark is true of."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...engines import this_machine, usable_processors
from ...engines.doctor import installed_packages
from ...runtime.bundle import MANIFEST, Bundle, sha256_of
from .result import Cpu, Environment, Subject, printable

PACKAGES = r"clapsep-export|numpy|soxr|soundfile|tokenizers|onnxruntime(-.+)?|openvino|tensorrt(-.+)?|cuda-(python|bindings)|nvidia-.+"
VARIABLES = ("OMP_", "OPENBLAS_", "MKL_", "KMP_", "GOMP_", "BLIS_", "ORT_", "OV_", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE")
UNKNOWN = "unknown"


def look_around() -> Environment:
    """What can be said of this machine; `unknown` where the system does not say."""
    machine = this_machine()
    return Environment(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=platform.platform(),
        cpu=_cpu(),
        memory=_memory(),
        load=round(os.getloadavg()[0], 2),
        gpus=tuple(f"{g.name}, SM {g.compute_capability}, {g.memory / 2**30:.0f} GiB" for g in machine.gpus),
        driver=f"CUDA {machine.cuda}" if machine.cuda else machine.trouble,
        packages={name: version for name, version in sorted(installed_packages().items()) if re.fullmatch(PACKAGES, name)},
        blas=_blas(),
        variables={name: printable(value) for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    )


class Neighbours:
    """How many cores other programs keep busy, from the system's account of each processor."""

    def __init__(self) -> None:
        self._start, self._busy, self._own = time.perf_counter(), _busy(), _own()

    def __call__(self) -> float | None:
        """On average since this object was made; None where the system does not say."""
        busy = _busy()
        if busy is None or self._busy is None:
            return None
        others = busy - self._busy - (_own() - self._own)
        return max(round(others / (time.perf_counter() - self._start), 3), 0.0)


def _busy() -> float | None:
    """Seconds that the processors which we may use were busy, with stolen time, since the system started."""
    usable = usable_processors()
    counts = [line.split() for line in _read("/proc/stat").splitlines() if re.match(r"cpu\d+ ", line)]
    ticks = [sum(int(n) for n in (*count[1:4], *count[6:9])) for count in counts if int(count[0][3:]) in usable]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def _own() -> float:
    """Seconds of processor time of this process and of the children that ended."""
    return sum(os.times()[:4])


def physical_cores() -> int:
    """Cores that this process may use, counted once each where they run two threads."""
    usable = usable_processors()
    places = {core for processor, core in _processors() if processor in usable}
    return len(places) or len(usable)


def subject(bundle: Bundle) -> Subject:
    """What a bundle is, without its path."""
    m = bundle.manifest
    precisions = sorted({graph.precision for graph in m.graphs.values()})
    name = printable(bundle.path.resolve().name)
    return Subject(name, sha256_of(bundle.path / MANIFEST), m.family, m.weights, ", ".join(precisions))


def _cpu() -> Cpu:
    text = _read("/proc/cpuinfo")
    flags = _field(text, "flags|Features").split()
    model = _field(text, "model name|Processor") or platform.processor() or UNKNOWN
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or UNKNOWN
    quota = _read("/sys/fs/cgroup/cpu.max").strip() or UNKNOWN
    return Cpu(model, tuple(flags), physical_cores(), len(usable_processors()), governor, quota)


def _processors() -> Iterator[tuple[int, tuple[str, str]]]:
    """Each logical processor with its socket and core, where the system tells."""
    for block in _read("/proc/cpuinfo").split("\n\n"):
        number, core = _field(block, "processor"), _field(block, "core id")
        if number.isdigit() and core:
            yield int(number), (_field(block, "physical id"), core)


def _field(text: str, name: str) -> str:
    """The first value of a field of /proc/cpuinfo."""
    found = re.search(rf"^(?:{name})\s*:[ \t]*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _blas() -> str:
    """The library behind numpy's products."""
    config = np.show_config(mode="dicts")
    blas = (config or {}).get("Build Dependencies", {}).get("blas", {})
    return " ".join(filter(None, (blas.get("name"), blas.get("version")))) or UNKNOWN


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
