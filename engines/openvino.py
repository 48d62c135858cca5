"""Engine kind `openvino`: OpenVINO on the CPU, in float32 or, where the processor has it, in bfloat16."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .engine import Arrays, Engine, EngineOptions, TensorSpec
from .errors import EngineError, EngineUnavailable
from .machine import Machine, this_machine
from .plan import PlanSettings, Progress, Target

PLAN_FORMAT = "clapsep-openvino-plan"
HINTS = {None: "f32", "fp32": "f32", "fp16": "f32", "bf16": "bf16"}  # fp16 graphs too: asked for f16, OpenVINO 2026.4 took bf16
PRECISION_CAPABILITIES = frozenset({"FP32", "FP16", "BF16", "INT8", "INT4"})


class OpenVinoEngine(Engine):
    """A graph in OpenVINO's CPU plugin, from an ONNX file or from a plan.

    A plan is one line of JSON (format, precision, size and SHA-256 of the rest), then the model as OpenVINO exports it. Left to
    itself, OpenVINO refuses what it cannot parse and computes with weights that are damaged.
    """

    kind = "openvino"
    library = "openvino"
    install = "pip install 'clapsep-export[openvino]'"
    devices = ("cpu",)
    precisions = ("bf16",)
    plans = "optional"
    plan_suffix = ".blob"

    def __init__(self, path: Path, options: EngineOptions) -> None:
        self.load_library()
        if path.suffix == self.plan_suffix:
            hint, blob = _read_plan(path, options)
            self._compiled = _import(path, blob, _config(hint, options.threads))
        else:
            hint = HINTS[options.precision]
            self._compiled = _compile(path, _config(hint, options.threads))
        _require_observed(self._compiled, hint, path)
        self.provider = f"CPU {hint}"
        self.inputs, self.outputs = _specs(self._compiled.inputs), _specs(self._compiled.outputs)
        self._idle: list[Any] = []  # infer requests; each belongs to one caller at a time, as their tensors are their own

    @classmethod
    def load_library(cls) -> Any:
        """Without its telemetry, which would report the import over the network."""
        with _without_telemetry():
            return super().load_library()

    @classmethod
    def version(cls) -> str:
        """Without the build's commit, such as "2026.4.1"."""
        return str(cls.load_library().__version__).split("-")[0]

    @classmethod
    def preflight(cls, options: EngineOptions, machine: Machine) -> None:
        super().preflight(options, machine)
        if options.precision == "bf16" and "BF16" not in capabilities():
            here = ", ".join(capabilities())
            raise EngineUnavailable(f"this processor does not compute in bf16 (it has {here}); leave the precision out", "wrong-precision")

    @classmethod
    def check_plan(cls, target: Target, machine: Machine) -> None:
        super().check_plan(target, machine)
        if target.cpu and set(target.cpu) != set(capabilities()):  # OpenVINO itself takes no other instruction set, not even a lesser one
            here, there = ", ".join(capabilities()), ", ".join(target.cpu)
            raise EngineUnavailable(f"the plan was compiled for a processor with {there} and this one has {here}", "other-cpu")

    @classmethod
    def target(cls, settings: PlanSettings, machine: Machine) -> Target:
        cls.load_library()
        return replace(super().target(settings, machine), cpu=capabilities())

    @classmethod
    def compile(cls, model: Path, out: Path, settings: PlanSettings, progress: Progress) -> Target:
        target = cls.target(settings, this_machine(gpus_too=False))
        hint = HINTS[settings.precision]
        progress(f"openvino {cls.version()} compiles {model.name} in {hint}")
        compiled = _compile(model, _config(hint, None))
        _require_observed(compiled, hint, model)
        _write_plan(out, hint, _export(compiled))
        return target

    def _run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        try:
            request = self._idle.pop()
        except IndexError:  # every request is with a caller
            request = None
        try:
            request = request or self._compiled.create_infer_request()
            request.infer(dict(inputs), share_outputs=True)
            result = {spec.name: request.get_output_tensor(i).data.copy() for i, spec in enumerate(self.outputs)}
        except Exception as error:  # mostly RuntimeError, but its texts may also fail to decode
            raise EngineError(f"openvino failed while running a graph: {_reason(error)}") from error
        self._idle.append(request)
        return result


@cache
def capabilities() -> tuple[str, ...]:
    """What this processor computes in, and the instruction set where OpenVINO names it, sorted."""
    core = _core()
    names = set(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")) & PRECISION_CAPABILITIES
    compiled = core.compile_model(_smallest_model(), "CPU", _config("f32", 1))
    if "RUNTIME_REQUIREMENTS" in compiled.get_property("SUPPORTED_PROPERTIES"):
        names.update(re.findall(r"isa=([^;]+)", compiled.get_property("RUNTIME_REQUIREMENTS")))
    return tuple(sorted(names))


@cache
def _core() -> Any:
    return OpenVinoEngine.load_library().Core()


def _smallest_model() -> Any:
    ov = OpenVinoEngine.load_library()
    value = ov.opset8.parameter([1], ov.Type.f32)
    return ov.Model([ov.opset8.relu(value)], [value])


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """OpenVINO takes a stub in place of a telemetry module that it cannot import."""
    name = "openvino_telemetry"
    if name in sys.modules:  # somebody else wants it
        yield
        return
    sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        sys.modules.pop(name, None)


def _config(hint: str, threads: int | None) -> dict[str, str]:
    config = {
        "INFERENCE_PRECISION_HINT": hint,  # by default OpenVINO takes bfloat16 wherever it can
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": "NO",  # it pins the caller, and all processes of a pool to the same first cores
    }
    return config | ({"INFERENCE_NUM_THREADS": str(threads)} if threads is not None else {})


def _compile(path: Path, config: dict[str, str]) -> Any:
    try:
        return _core().compile_model(str(path), "CPU", config)
    except Exception as error:  # mostly RuntimeError, but its texts may also fail to decode
        raise EngineError(f"openvino {OpenVinoEngine.version()} cannot load {path}: {_reason(error)}") from error


def _import(path: Path, blob: bytes, config: dict[str, str]) -> Any:
    try:
        return _core().import_model(blob, "CPU", config)
    except Exception as error:  # as above
        raise EngineError(f"openvino {OpenVinoEngine.version()} cannot load the plan {path}: {_reason(error)}; compile it again") from error


def _export(compiled: Any) -> bytes:
    stream = io.BytesIO()
    try:
        compiled.export_model(stream)
    except Exception as error:  # as above
        raise EngineError(f"openvino {OpenVinoEngine.version()} cannot export a plan: {_reason(error)}") from error
    return stream.getvalue()


def _reason(error: Exception) -> str:
    """OpenVINO's message in one line, without the addresses in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("Exception from", "Check '"))) or str(error).strip()


def _require_observed(compiled: Any, hint: str, path: Path) -> None:
    """OpenVINO may run in another precision than it was asked for, or elsewhere, without a word."""
    observed, devices = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(), compiled.get_property("EXECUTION_DEVICES")
    if observed != hint or list(devices) != ["CPU"]:
        message = f"openvino runs {path.name} in {observed} on {', '.join(devices)}, not in {hint} on the CPU; run: clapsep-export doctor"
        raise EngineUnavailable(message, "wrong-precision")


def _read_plan(path: Path, options: EngineOptions) -> tuple[str, bytes]:
    """Precision hint and model of a plan, once its bytes are known to be those that were written.

    Raises:
        EngineUnavailable: another precision was asked for.
        EngineError: the file is damaged, or no plan.
    """
    try:
        with path.open("rb") as file:
            header, blob = file.readline(1024), file.read()
        fields = json.loads(header)
        whole = (fields["format"], fields["size"], fields["sha256"]) == (PLAN_FORMAT, len(blob), hashlib.sha256(blob).hexdigest())
        hint = str(fields["precision"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EngineError(f"{path} cannot be read as a plan for OpenVINO ({type(error).__name__}); compile it again") from error
    if not whole:
        raise EngineError(f"the plan {path} is damaged: its size or SHA-256 is not what its first line says; compile it again")
    if HINTS[options.precision] != hint:
        message = f"the plan {path} computes in {hint}, not in {HINTS[options.precision]}; compile one that does"
        raise EngineUnavailable(message, "wrong-precision")
    return hint, blob


def _write_plan(out: Path, hint: str, blob: bytes) -> None:
    header = {"format": PLAN_FORMAT, "precision": hint, "size": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            file.write(blob)
        os.replace(temporary, out)
    except OSError as error:
        raise EngineError(f"{out} cannot be written ({error.strerror or error}); choose another place or free some space") from error
    finally:
        temporary.unlink(missing_ok=True)


def _specs(ports: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """OpenVINO knows a symbolic axis only as one without a length; the graphs' only one is the batch, first."""
    return tuple(TensorSpec(_name(p), str(p.get_element_type().to_dtype()), _shape(p.get_partial_shape())) for p in ports)


def _name(port: Any) -> str:
    """A port takes on the names of the casts and identities that OpenVINO removed; its node keeps the graph's own."""
    own = port.get_node().get_friendly_name().removesuffix("/sink_port_0")
    return own if own in port.get_names() else port.get_any_name()


def _shape(shape: Any) -> tuple[int | str, ...]:
    return tuple(("batch" if i == 0 else f"axis{i}") if axis.is_dynamic else axis.get_length() for i, axis in enumerate(shape))
