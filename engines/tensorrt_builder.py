"""The compiler of the engine kinds `tensorrt` and `tensorrt-rtx`, through polygraphy, which serves one of the libraries per process."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .child import LESS_MEMORY, Child, Fields, Write, make_file, peak_memory, serve
from .errors import EngineError, EngineUnavailable
from .machine import this_machine
from .plan import PlanSettings, Progress, Target
from .select import engine_class
from .tensorrt import TensorRtEngine

LEVELS = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
PAUSE = 2.0  # seconds at least between progress messages within a phase


@dataclass(frozen=True)
class BuildReport:
    """What was compiled.

    layers: of the parsed network, all of them supported. half_share: of the layer outputs with a floating type, those in half precision.
    seconds: of parsing and compiling. size: of the plan in bytes. memory: most that the compiler had resident, in bytes; 0 if unknown.
    """

    target: Target
    layers: int
    half_share: float
    seconds: float
    size: int
    memory: int


@dataclass(frozen=True)
class Request:
    """What the child is to compile, with which Python module; the rest is as in PlanSettings, the compute capabilities in order."""

    library: str
    model: str
    precision: str
    max_batch: int
    compute_capabilities: tuple[str, ...]
    compatibility: str
    version_compatible: bool
    workspace: int | None
    timing_cache: str | None


def build(kind: str, model: Path, out: Path, settings: PlanSettings, progress: Progress) -> BuildReport:
    """Compile the ONNX file `model` into the plan `out`, which appears when it is complete.

    Raises:
        EngineUnavailable: the library, or a GPU to compile for, is not there.
        EngineError: the compiler refused the graph, crashed or ran out of memory; `out` is as it was.
    """
    engine = engine_class(kind)
    assert issubclass(engine, TensorRtEngine), kind
    target = engine.target(settings, this_machine())
    if not model.is_file():
        raise EngineError(f"there is no graph {model} to compile; build the bundle again")
    if find_spec("polygraphy") is None:
        raise EngineUnavailable(f"compiling for engine {kind} needs polygraphy; run: pip install polygraphy", "not-installed")
    request = Request(
        library=engine.library,
        model=str(model.resolve()),
        precision=settings.precision,
        max_batch=settings.max_batch,
        compute_capabilities=target.compute_capabilities if settings.compute_capabilities else (),
        compatibility=settings.compatibility,
        version_compatible=settings.version_compatible,
        workspace=settings.workspace,
        timing_cache=str(settings.timing_cache.resolve()) if settings.timing_cache else None,
    )
    environment = {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if engine.library == "tensorrt_rtx" else "0"}
    child = Child("clapsep.engines.tensorrt_builder", environment, settings.memory)
    return BuildReport(target, **make_file(out, child, asdict(request), progress))


# From here on: in the child.


def work(fields: Fields, progress: Progress, write: Write) -> dict[str, Any]:
    """Serve a Request; returns the fields of the BuildReport."""
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.exception import PolygraphyException

    request, started, messages = Request(**fields), time.monotonic(), _collect_messages()
    trt = import_module(request.library)
    progress("parsing the graph")
    builder, network, parser = _parse(trt, request, messages)
    half_share = _half_share(network)
    if request.precision == "fp32" and half_share:
        raise EngineError(f"{request.model} computes in half precision, not in fp32; give the precision that it was built with")
    monitor = _monitor(trt, progress)  # TensorRT does not keep it
    cache = request.timing_cache if request.library == "tensorrt" else None  # TensorRT-RTX measures nothing
    try:
        config = _config(trt, builder, network, request, monitor)
        plan = EngineBytesFromNetwork((builder, network, parser), config=config, save_timing_cache=cache)()
    except PolygraphyException as error:
        raise _refusal(request, " ".join(messages) or str(error)) from error
    seconds = time.monotonic() - started
    progress("writing the plan")
    size = write(plan)
    return {"layers": network.num_layers, "half_share": half_share, "seconds": seconds, "size": size, "memory": peak_memory()}


def _collect_messages() -> list[str]:
    """A list that grows by every error that the library logs; nothing is printed."""
    from polygraphy.logger import G_LOGGER

    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.ERROR:  # above it polygraphy only says that something failed
                messages.append(" ".join(record.getMessage().removeprefix("[E] ").split()))

    G_LOGGER.use_python_logging_system = True
    logger = logging.getLogger("Polygraphy")
    logger.addHandler(Collect())
    logger.propagate = False
    return messages


def _parse(trt: Any, request: Request, messages: list[str]) -> tuple[Any, Any, Any]:
    """Builder, network and parser. Not by polygraphy's own loader, which keeps the parser's errors to itself."""
    from polygraphy.backend.trt import CreateNetwork, get_trt_logger

    builder, network = CreateNetwork(strongly_typed=True)()
    parser = trt.OnnxParser(network, get_trt_logger())
    if parser.parse_from_file(request.model):
        return builder, network, parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    nodes = [f"{e.node_operator()} (node '{e.node_name()}')" for e in errors if e.node_operator()]
    what = f"{request.library} {trt.__version__} cannot parse {request.model}"
    if not nodes:
        raise EngineError(f"{what}: {' '.join(messages)[:1000]}; build the bundle again")
    more = f" and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    raise EngineError(f"{what}: it does not support {', '.join(nodes[:8])}{more}; use another engine for this graph")


def _half_share(network: Any) -> float:
    layers = (network.get_layer(index) for index in range(network.num_layers))
    types = Counter(layer.get_output(i).dtype.name for layer in layers for i in range(layer.num_outputs))
    return types["HALF"] / max(types["HALF"] + types["FLOAT"] + types["BF16"], 1)


def _config(trt: Any, builder: Any, network: Any, request: Request, monitor: Any) -> Any:
    workspace = None if request.workspace is None else {trt.MemoryPoolType.WORKSPACE: request.workspace}
    common = {"profiles": [_profile(network, request)], "progress_monitor": monitor, "memory_pool_limits": workspace}
    if request.library == "tensorrt_rtx":
        config = _rtx_config(trt, request, common)(builder, network)
    else:
        config = _trt_config(trt, request, common)(builder, network)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32; polygraphy leaves it on for TensorRT-RTX
    return config


def _rtx_config(trt: Any, request: Request, common: dict[str, Any]) -> Any:
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    capabilities = [tuple(map(int, text.split("."))) for text in request.compute_capabilities]
    create = CreateConfigRTX(use_gpu=not capabilities, compute_capabilities=capabilities or None, **common)

    def capturable(builder: Any, network: Any) -> Any:
        config = create(builder, network)
        if "REQUIRE_USER_ALLOCATION" in trt.BuilderFlag.__members__:  # from 1.2 on; what allocates as it runs cannot be captured
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config

    return capturable


def _trt_config(trt: Any, request: Request, common: dict[str, Any]) -> Any:
    from polygraphy.backend.trt import CreateConfig

    level = None
    if request.compatibility != "none":
        level = trt.HardwareCompatibilityLevel.__members__.get(LEVELS[request.compatibility])
        if level is None:
            raise EngineError(f"TensorRT {trt.__version__} has no hardware compatibility {request.compatibility}; update it")
    return CreateConfig(
        hardware_compatibility_level=level,
        version_compatible=request.version_compatible,
        load_timing_cache=request.timing_cache,
        **common,
    )


def _profile(network: Any, request: Request) -> Any:
    """Batches of 1 to `max_batch`, best at `max_batch`: long recordings come in full batches, and those are what takes the time."""
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        first, *rest = tensor.shape
        if first != -1 or -1 in rest:
            shape = list(tensor.shape)
            raise EngineError(f"input '{tensor.name}' of {request.model} is {shape}; only its first axis may and must be symbolic")
        profile.add(tensor.name, *((batch, *rest) for batch in (1, request.max_batch, request.max_batch)))
    return profile


def _refusal(request: Request, said: str) -> EngineError:
    advice = "use another engine for this graph"
    if "workspace" in said:
        advice = "allow a larger workspace"
    elif "FP32 GEMM is not supported" in said:  # Turing
        advice = "compile a bundle that was built with --precision fp16"
    elif "bad_alloc" in said or "temporarily unavailable" in said or "OutOfMemory" in said:
        advice = LESS_MEMORY
    return EngineError(f"{request.library} cannot compile {request.model}: {said[:1000]}; {advice}")


def _monitor(trt: Any, progress: Progress) -> Any:
    """Says what the compiler is at: each of its outer phases, and every few seconds how far it is in an inner one."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._depth: dict[str | None, int] = {None: 0}
            self._last = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._depth[phase_name] = self._depth.get(parent_phase, 0) + 1
            if self._depth[phase_name] <= 2:
                self._say(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self._last > PAUSE:
                self._say(f"{phase_name}, {100 * (step + 1) // max(self._steps.get(phase_name, 1), 1)} %")
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

        def _say(self, text: str) -> None:
            self._last = time.monotonic()
            progress(text[:1].lower() + text[1:])

    return Monitor()


if __name__ == "__main__":
    serve(work)
