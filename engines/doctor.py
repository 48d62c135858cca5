"""What can run here: every engine kind tried for real in a child process, and what is wrong with the installed packages."""

from __future__ import annotations

import json
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .machine import Gpu, Machine
from .select import KINDS, engine_class
from .trial import MACHINE, Trial

TIMEOUT = 180.0  # seconds for one trial; TensorRT compiles the tiny graph in some
NUMPY = (2, 0)
EVERY_KIND = "all"
# Distributions of each kind, by their normalised names; the rest of what matters is listed with the machine.
PACKAGES = {
    "onnxruntime": r"onnxruntime(-(?!extensions|genai|tools).+)?",
    "openvino": r"openvino",
    "tensorrt": r"tensorrt(-cu\d+)?(-(libs|bindings))?",
    "tensorrt-rtx": r"tensorrt-rtx(-cu\d+)?(-(libs|bindings))?",
    MACHINE: r"numpy|clapsep-export|polygraphy|cuda-(python|bindings)|nvidia-.+",
}


@dataclass(frozen=True)
class Finding:
    """Something wrong with the installation, found without running it: a sentence, and the shell line that repairs it."""

    kind: str
    code: str
    message: str
    repair: str


@dataclass(frozen=True)
class Report:
    """What `doctor` found; `packages` are installed versions by kind and distribution name."""

    machine: Machine
    packages: dict[str, dict[str, str]]
    trials: tuple[Trial, ...]
    findings: tuple[Finding, ...]

    def runs(self, kinds: Sequence[str]) -> bool:
        """Whether all of `kinds` run here on some device; with none named, whether any does."""
        running = {trial.kind for trial in self.trials if trial.status == "ok"}
        return running.issuperset(kinds) if kinds else bool(running)

    def to_json(self) -> str:
        """{machine, engines: one for each kind and device, findings}."""
        python = ".".join(map(str, sys.version_info[:3]))
        machine = asdict(self.machine) | {"python": python, "distributions": self.packages[MACHINE]}
        engines = [asdict(trial) | {"distributions": self.packages[trial.kind]} for trial in self.trials]
        return json.dumps({"machine": machine, "engines": engines, "findings": [asdict(f) for f in self.findings]}, indent=1)


def describe(report: Report) -> str:
    """The report as a table, one line for each kind and device, and the findings with the lines that repair them."""
    machine = report.machine
    gpus = ", ".join(f"{gpu.name} (SM {gpu.compute_capability}, {gpu.memory / 2**30:.0f} GiB)" for gpu in machine.gpus)
    driver = f"NVIDIA driver for CUDA {machine.cuda}; {gpus or machine.trouble}" if machine.cuda else machine.trouble
    rows = [("engine", "device", "status", "version", "ran on, or why not")]
    rows += [(t.kind, t.device, t.status, t.version, t.provider or t.message) for t in report.trials]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]] + [0]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    findings = [line for f in report.findings for line in ("", f"{f.code}: {f.message}", f"    {f.repair}")]
    return "\n".join([f"{machine.os} {machine.architecture}; {driver}", "", *lines, *findings])


def examine(kinds: Sequence[str] = (), timeout: float = TIMEOUT) -> Report:
    """Try `kinds`, or every engine kind; a library that crashes or hangs ends up in the report, not here."""
    chosen = tuple(kind for kind in KINDS if not kinds or kind in kinds)
    machine = probe_machine(timeout)
    installed = installed_packages()
    packages = {name: _matching(pattern, installed) for name, pattern in PACKAGES.items()}
    trials = tuple(trial for kind in chosen for trial in _try_devices(kind, timeout))
    findings = tuple(f for f in find(installed, machine, provider_needs()) if f.kind in (EVERY_KIND, *chosen))
    return Report(machine, packages, trials, findings)


def _try_devices(kind: str, timeout: float) -> Iterable[Trial]:
    """The kind's first device, then the others if the library is any good."""
    for device in engine_class(kind).devices:
        answer = _child(kind, device, timeout)
        if isinstance(answer, str):
            answer = asdict(Trial(kind, device, "broken", message=f"engine {kind} {answer}"))
        if answer is not None:  # this build of the library has the device
            yield Trial(**answer)
        if answer is not None and answer["status"] != "ok":
            return


def probe_machine(timeout: float = TIMEOUT) -> Machine:
    """`this_machine`, in a child."""
    answer = _child(MACHINE, "", timeout)
    if not isinstance(answer, dict):
        return Machine(platform.system().lower(), platform.machine(), trouble=f"looking for the NVIDIA driver {answer}")
    answer["gpus"] = tuple(Gpu(**gpu) for gpu in answer["gpus"])
    return Machine(**answer)


def _child(kind: str, device: str, timeout: float) -> dict[str, Any] | str | None:
    """What `trial.py` wrote in a process of its own, or a string: how that process ended."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "trial.json"), Path(folder, "stderr")
        words = [sys.executable, "-P", "-m", f"{__package__}.trial", kind, device, str(out)]  # -P: the current directory holds no modules
        with errors.open("wb") as stderr:
            code = _wait(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr), timeout)
        if code == 0 and out.exists():
            return json.loads(out.read_text())
        return _ending(code, errors.read_text(errors="replace"), timeout)


def _wait(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """Exit status, None if it took too long and was killed; the compilers that it may have started end with it."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()
        process.wait()


def _ending(code: int | None, stderr: str, timeout: float) -> str:
    if code is None:
        return f"did not end within {timeout:g} s"
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    last = stderr.strip().splitlines()[-1:] or ["no message"]
    return f"ended with exit status {code}: {last[0]}"


def installed_packages() -> dict[str, str]:
    """Versions of all installed distributions by normalised name; the first on the path counts."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:  # what a half-removed package leaves has none
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def _matching(pattern: str, packages: Mapping[str, str]) -> dict[str, str]:
    return {name: version for name, version in sorted(packages.items()) if re.fullmatch(pattern, name)}


def provider_needs() -> str | None:
    """Major version of the TensorRT library that ONNX Runtime's own TensorRT provider asks the loader for, None without one."""
    spec = find_spec("onnxruntime")
    library = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_tensorrt.so" if spec and spec.origin else None
    if library is None or not library.is_file():
        return None
    name = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes())
    return name[1].decode() if name else None


def find(packages: Mapping[str, str], machine: Machine, needs: str | None) -> list[Finding]:
    """Everything that is known to go wrong between installed packages; `needs` as from `provider_needs`."""
    findings = [*_both_wheels(packages, machine), *_provider_clash(packages, needs), *_old_numpy(packages), *_no_cuda_python(packages)]
    for kind in ("tensorrt", "tensorrt-rtx"):
        findings += _mixed_tensorrt(kind, packages)
    return findings


def _both_wheels(packages: Mapping[str, str], machine: Machine) -> Iterable[Finding]:
    names = _matching(PACKAGES["onnxruntime"], packages)
    if len(names) > 1:
        wanted = "onnxruntime-gpu" if machine.gpus or machine.blind else "onnxruntime"
        yield Finding(
            "onnxruntime",
            "both-wheels",
            f"{_listed(names)} are installed and have overwritten each other's files; only one of them can be right",
            f"pip uninstall -y {' '.join(names)} && pip install {wanted}",
        )


def _provider_clash(packages: Mapping[str, str], needs: str | None) -> Iterable[Finding]:
    installed = packages.get("tensorrt")
    if installed and needs and installed.split(".")[0] != needs:
        yield Finding(
            "tensorrt",
            "tensorrt-clash",
            f"tensorrt {installed} is installed and ONNX Runtime's TensorRT provider loads libnvinfer.so.{needs}; "
            "the engine kinds of this package do not use that provider, but other programs here may",
            f"pip install 'tensorrt=={needs}.*'",
        )


def _mixed_tensorrt(kind: str, packages: Mapping[str, str]) -> Iterable[Finding]:
    names = _matching(PACKAGES[kind], packages)
    versions = {version.split(".")[0] for version in names.values()}
    cudas = {match[0] for name in names if (match := re.search(r"cu\d+", name))}
    if len(versions) > 1 or len(cudas) > 1:
        yield Finding(
            kind,
            "tensorrt-mixed",
            f"{_listed(names)} do not belong together: they are of different major versions, of TensorRT or of CUDA",
            f"pip uninstall -y {' '.join(names)} && pip install {kind}",
        )


def _old_numpy(packages: Mapping[str, str]) -> Iterable[Finding]:
    version = packages.get("numpy")
    if version and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < NUMPY:
        needed = ".".join(map(str, NUMPY))
        yield Finding(EVERY_KIND, "old-numpy", f"numpy {version} is installed and {needed} is needed", f"pip install 'numpy>={needed}'")


def _no_cuda_python(packages: Mapping[str, str]) -> Iterable[Finding]:
    present = {"onnxruntime-gpu", "tensorrt", "tensorrt-rtx"} & packages.keys()
    if present and not {"cuda-python", "cuda-bindings"} & packages.keys():
        named = ", ".join(sorted(present))
        message = f"{named} is installed without cuda-python, through which the NVIDIA driver and GPU are found"
        yield Finding(EVERY_KIND, "no-cuda-python", message, "pip install 'cuda-python>=12.6'")


def _listed(packages: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in packages.items())
