"""The Separator: a bundle, one engine kind, and audio in and out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine, EngineOptions, engine_class, open_engine, this_machine, usable_processors
from .audio import check_rate, check_samples, peak_of
from .audiofile import LIMITS, Limits
from .bundle import Bundle
from .clap import CROPS
from .dsp import Float32
from .errors import AudioError, EngineUnavailable, QueryError
from .family import StepFamily, open_family
from .graph import check_interface
from .plans import SHORT_TEXT, Choice, choose, needs_gpu
from .query import Clip, Query, QueryEncoder, as_query, read_vector
from .routes import MapRoute, Maps, Route, StepRoute, open_route
from .steps import Stepper
from .stream import Stream
from .tokenizer import Tokenizer
from .windows import OVERLAP, Windower, WindowPlan

log = logging.getLogger(__name__)
GPU_CALLERS = 4
BLOCK = 1 << 18  # samples that are handed on at once
Question = Query | str | tuple[Query | str | None, Query | str | None] | Float32


class Engines:
    """The engine of each graph by its name, loaded on first use after its files have been checked.

    It knows nothing of who calls it, so that engines and their memory go at once when their Separator goes.
    """

    def __init__(self, bundle: Bundle, choice: Choice, open_file: Callable[[str, Path, EngineOptions], Engine]) -> None:
        self._bundle, self._choice, self._open_file = bundle, choice, open_file
        self._engines: dict[str, Engine] = {}
        self._lock = Lock()

    def __call__(self, graph: str) -> Engine:
        if graph in self._engines:
            return self._engines[graph]
        with self._lock:  # one load at a time; graphs already loaded do not wait
            if graph not in self._engines:
                self._engines[graph] = self._open(graph)
            return self._engines[graph]

    def _open(self, graph: str) -> Engine:
        if graph not in self._choice.plans and engine_class(self._choice.kind).plans == "required":
            raise EngineUnavailable(f"engine {self._choice.kind} has no plan of {graph}; take another route", "no-plan")
        plan = self._choice.plans.get(graph)
        path = self._bundle.graph(graph) if plan is None else self._bundle.file(plan.plan)
        engine = self._open_file(self._choice.kind, path, self._choice.options)
        check_interface(engine, self._bundle.manifest.graphs[graph])
        return engine


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """A bundle's tokenizer; raises QueryError if it has none."""
    entry = bundle.manifest.tokenizer
    if entry is None:
        raise QueryError(f"{bundle.path} has no tokenizer, so it takes no text queries; give audio queries")
    return Tokenizer(bundle.file(entry), int(bundle.manifest.query["context"]))


class Separator:
    """Runs a bundle.

    Args:
        bundle: directory written by `clapsep-export build`.
        engine: engine kind; there is no fallback to another. `auto` takes the fastest that can run here; `choice.why` says which.
        device: `cpu` or `cuda` where the engine kind has both; its first by default.
        precision: compute in `bf16` where the engine kind offers it; the graphs' own precision by default.
        threads: engine threads on the CPU, None for one per physical core.
        cuda_graph: let TensorRT kinds capture their launches once and replay them.
        host_code: let version-compatible TensorRT plans run the host code that they bring; only for bundles that you trust as programs.
        normalize: override the bundle's rule whether the condition is a unit vector.
        crop: override the bundle's rule for audio queries longer than the model's window: start, center, loudest, average.
        overlap: seconds in which one window hands over to the next; 1 by default, or half a window if that is less.
        hop: seconds from one window to the next; the longest that fits (window less overlap) by default. A shorter one costs more and
            makes the results of a stream ready sooner; `windows.PRESETS` has pairs of both (docs/reliability.md). A causal model has
            steps of its own, and takes neither.
        batch: windows of a long mixture that one engine call takes; 1 on the CPU by default, as many as plans are made for on a GPU.
        route: take these graphs (`split`, `waveform` or `fused`; docs/performance.md) and not those that are fastest on the device.
        limits: what audio files may have at most.
        concurrency: calls into the network that run at once, each with working memory of its own; further threads wait. One per processor
            by default, on a GPU four.

    Graphs are loaded when first used. One instance may be shared by threads, and gives each what it would give it alone.

    Raises:
        BundleError, EngineUnavailable, EngineError
    """

    _open_file: Callable[[str, Path, EngineOptions], Engine] = staticmethod(open_engine)

    def __init__(
        self,
        bundle: str | Path | Bundle,
        engine: str = "onnxruntime",
        *,
        device: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        cuda_graph: bool = True,
        host_code: bool = False,
        normalize: bool | None = None,
        crop: str | None = None,
        overlap: float | None = None,
        hop: float | None = None,
        batch: int | None = None,
        route: str | None = None,
        limits: Limits = LIMITS,
        concurrency: int | None = None,
    ) -> None:
        for name, value in (("threads", threads), ("batch", batch), ("concurrency", concurrency)):
            if value is not None and not (type(value) is int and value > 0):
                raise QueryError(f"{name} is {value!r}; give a positive integer or None")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.family = open_family(self.bundle.manifest)
        if crop is not None and crop not in CROPS:
            raise QueryError(f"there is no crop policy '{crop}'; choose one of: {', '.join(CROPS)}")
        self._normalize = normalize
        options = EngineOptions(threads, device, precision, cuda_graph, host_code)
        self.choice = choose(self.bundle, engine, options, this_machine(needs_gpu(engine, options)), route)
        log.info("%s", self.choice.why)
        self._windowing = hop, overlap
        self.plan = self._plan(hop, overlap)
        self.engine = Engines(self.bundle, self.choice, self._open_file)
        self._routes = {name: open_route(name, self.family, self.engine) for name in {self.choice.one, self.choice.several}}
        on_gpu = engine_class(self.choice.kind).device(self.choice.options) == "cuda"
        self._slots = BoundedSemaphore(concurrency or (GPU_CALLERS if on_gpu else len(usable_processors())))
        if batch is not None and isinstance(self.family, StepFamily):
            raise QueryError("a batch is of windows, and this model has none; leave it out")
        self.batch = batch or (self.bundle.manifest.max_batch if on_gpu else 1)
        self.limits = limits
        self._queries: QueryEncoder | None = None
        if towers := self.family.towers:
            tokenizer = partial(open_tokenizer, self.bundle)
            self._queries = QueryEncoder(towers, tokenizer, self.engine, crop, self._short_context(), limits)
        elif crop is not None:
            raise QueryError(f"the crop policy '{crop}' is for audio queries, which {self.bundle.path} does not take; leave it out")

    @property
    def queries(self) -> QueryEncoder:
        """What embeds texts and examples; raises QueryError if the bundle has no encoders."""
        if self._queries is None:
            raise QueryError(f"{self.bundle.path} has no encoders for texts or examples; give a query as {self.family.vectors}")
        return self._queries

    @property
    def precision(self) -> str:
        """What the engine computes in: `fp32`, `fp16` or `bf16`."""
        return self.choice.options.precision or self.bundle.manifest.graphs["separator"].precision

    @property
    def engine_name(self) -> str:
        """Engine kind, and device and precision where they were asked for, as gates and tables call it."""
        options = self.choice.options
        return " ".join(filter(None, (self.choice.kind, options.device, options.precision)))

    def encode_text(self, texts: Sequence[str]) -> Float32:
        """n texts → unit embeddings [n, embedding]."""
        return self.queries.text(texts)

    def encode_audio(self, clips: Sequence[Clip]) -> Float32:
        """n clips, each a path or (samples, sample rate) → unit embeddings [n, embedding]."""
        return self.queries.audio(clips)

    def condition(self, positive: Query | str | None = None, negative: Query | str | None = None) -> Float32:
        """The family's condition vector [condition_size] for a query pair.

        Raises:
            QueryError: both queries are empty, or of a kind that the bundle does not take.
        """
        asked, unwanted = as_query(positive), as_query(negative)
        if not (self.family.signed or unwanted.empty):
            name = self.bundle.manifest.family
            raise QueryError(f"a negative query was given and {name} models take positive ones only; leave it out")
        return self.family.ask(asked, unwanted, self._embed, normalize=self._normalize)

    def _embed(self, query: Query) -> Float32 | None:
        if query.empty:
            return None
        return self.queries.embed(query) if query.vector is None else read_vector(query.vector, self.family.embedding_size)

    def mask(self, windows: NDArray[Any], condition: Float32) -> Float32:
        """Mask [B, frames, bins] for windows [B, window_samples] at the model's rate; QueryError if the model has none."""
        windows = check_samples(windows, "the windows")
        if windows.ndim != 2 or windows.shape[1] != self.family.window_samples:
            raise AudioError(f"windows must be [B, {self.family.window_samples}], not {list(windows.shape)}; cut or pad them")
        return self.maps(windows, self._checked_condition(condition))["mask"]

    def separate(
        self,
        mixture: NDArray[Any],
        sample_rate: int,
        positive: Query | str | None = None,
        negative: Query | str | None = None,
        *,
        condition: Float32 | None = None,
    ) -> Float32:
        """Extract what `positive` asks for and `negative` does not from `mixture`.

        Args:
            mixture: [n] or [channels, n], float in [-1, 1] or signed integers, n ≥ 1; never modified.
            sample_rate: of mixture and result, in Hz.
            condition: a precomputed condition in place of the two queries.

        Returns:
            float32 of the mixture's shape; every channel is separated with the same condition.

        Raises:
            AudioError, QueryError, EngineError
        """
        return self.separate_many(mixture, sample_rate, [self.ask(positive, negative, condition)])[0]

    def separate_many(self, mixture: NDArray[Any], sample_rate: int, queries: Sequence[Question]) -> Float32:
        """Ask one mixture several questions; what does not depend on the question is computed once (the `split` graphs).

        Args:
            mixture, sample_rate: as for `separate`.
            queries: K of: a positive query (text or Query), a pair (positive, negative) of which one may be None, or a condition vector.

        Returns:
            float32 [K, n] or [K, channels, n], in the order of `queries`.

        Raises:
            AudioError, QueryError, EngineError
        """
        samples, sample_rate = check_samples(mixture, "the mixture"), check_rate(sample_rate, "the mixture")
        channels = samples.shape[0] if samples.ndim == 2 else None
        stream = self.stream_many(queries, sample_rate, channels=channels, peak=peak_of(samples), batch=self.batch)
        out, done = np.empty((len(queries), *samples.shape), np.float32), 0
        for begin in range(0, samples.shape[-1] + BLOCK, BLOCK):  # one step more, to finish
            ready = stream.push(samples[..., begin : begin + BLOCK]) if begin < samples.shape[-1] else stream.finish()
            out[..., done : done + ready.shape[-1]] = ready
            done += ready.shape[-1]
        return out

    def stream(
        self,
        positive: Query | str | None = None,
        negative: Query | str | None = None,
        *,
        condition: Float32 | None = None,
        sample_rate: int | None = None,
        channels: int | None = None,
        hop: float | None = None,
        overlap: float | None = None,
        peak: float = 1.0,
    ) -> Stream:
        """Separate sound that arrives in blocks.

        Args:
            positive, negative, condition: as for `separate`.
            sample_rate: of blocks and results, in Hz; the model's by default.
            channels: None for mono blocks [n], else blocks are [channels, n].
            hop, overlap: in seconds, in place of the separator's; they set the latency (`Stream.latency`). Not for causal models.
            peak: the largest magnitude that will come; above 1 everything is scaled for the model as `separate` does. Louder samples than
                was said are not clipped.

        Raises:
            AudioError, QueryError, EngineError
        """
        asked = self.ask(positive, negative, condition)[None]
        return Stream(self, self._plan(hop, overlap), asked, sample_rate, channels, peak=peak)

    def stream_many(
        self,
        queries: Sequence[Question],
        sample_rate: int | None = None,
        *,
        channels: int | None = None,
        hop: float | None = None,
        overlap: float | None = None,
        peak: float = 1.0,
        batch: int = 1,
    ) -> Stream:
        """Like `stream` for several queries at once, as `separate_many` takes them; results are [K, n] or [K, channels, n].

        With a `batch` of several windows results are ready that many hops later.
        """
        if not (isinstance(batch, int) and batch > 0):
            raise QueryError(f"batch is {batch!r}; give a positive integer")
        if not isinstance(queries, list | tuple | np.ndarray) or not len(queries):
            raise QueryError("queries must be a list of at least one question; put a single query into a list")
        asked = np.stack([self._numbered(i, question) for i, question in enumerate(queries, 1)])
        return Stream(self, self._plan(hop, overlap), asked, sample_rate, channels, peak=peak, single=False, batch=batch)

    def ask(self, positive: Query | str | None, negative: Query | str | None, condition: Float32 | None) -> Float32:
        """The condition that was given, checked, or that of the query pair.

        Raises:
            QueryError: both were given, or neither.
        """
        if condition is None:
            return self._checked_condition(self.condition(positive, negative))
        if positive is not None or negative is not None:
            raise QueryError("both a condition and a query were given; give one of them")
        return self._checked_condition(condition)

    def drive(self, plan: WindowPlan | None, channels: int, conditions: Float32, batch: int) -> Windower | Stepper:
        """What takes a sound at the model's rate through it, window by window or step by step; conditions [K, condition_size]."""
        route = self._route(len(conditions))
        if isinstance(route, StepRoute):
            return route.start(channels, conditions, self._slots)
        assert plan is not None
        return Windower(plan, channels, conditions, self.separate_windows, batch)

    def _route(self, queries: int) -> Route:
        return self._routes[self.choice.one if queries == 1 else self.choice.several]

    def _plan(self, hop: float | None, overlap: float | None) -> WindowPlan | None:
        family, (own_hop, own_overlap) = self.family, self._windowing
        hop, overlap = own_hop if hop is None else hop, own_overlap if overlap is None else overlap
        if not isinstance(family, StepFamily):
            usual = min(OVERLAP, family.window_samples / family.sample_rate / 2)
            return WindowPlan.of(family.window_samples, family.sample_rate, usual if overlap is None else overlap, hop)
        if hop is not None or overlap is not None:
            step = f"steps of {1000 * family.step / family.sample_rate:.3g} ms"
            raise QueryError(f"hop and overlap are for models with windows and this one goes in {step}; leave them out")
        return None

    def _short_context(self) -> int:
        entry = self.bundle.manifest.graphs.get(SHORT_TEXT) if SHORT_TEXT in self.choice.plans else None
        return int(entry.inputs[0].shape[1]) if entry else 0

    def _numbered(self, number: int, question: Question) -> Float32:
        try:
            return self._condition_of(question)
        except QueryError as error:
            raise QueryError(f"query {number}: {error}") from error

    def _condition_of(self, question: Question) -> Float32:
        if isinstance(question, np.ndarray):
            return self._checked_condition(question)
        positive, negative = question if isinstance(question, tuple | list) and len(question) == 2 else (question, None)
        return self._checked_condition(self.condition(positive, negative))  # pyright: ignore[reportArgumentType]

    def separate_windows(self, windows: Float32, conditions: Float32) -> Float32:
        """Windows [B, window_samples] at the model's rate, conditions [K, condition] → targets [K, B, window_samples], no scaling."""
        with self._slots:
            return self._route(len(conditions)).targets(windows, conditions)

    @property
    def has_maps(self) -> bool:
        """Whether there are masks outside the graphs."""
        return isinstance(self._routes[self.choice.several], MapRoute)

    def maps(self, windows: Float32, condition: Float32) -> Maps:
        """The network's maps by name, [B, frames, bins] each, for windows [B, window_samples] at the model's rate.

        Raises:
            QueryError: the model has none, or the route was set to `waveform`, which has none outside its graph.
        """
        route = self._routes[self.choice.several]
        if not isinstance(route, MapRoute):
            why = "goes from waveform to waveform" if isinstance(route, StepRoute) else "was opened by the route 'waveform'; leave it out"
            raise QueryError(f"there are no masks, as the model {why}")
        inputs, _ = route.family.features(windows)
        return route.decode(route.encode(inputs), condition)

    def _checked_condition(self, condition: NDArray[Any]) -> Float32:
        """A copy, as causal models take the same array for the same question."""
        try:
            vector = np.array(condition)
        except ValueError as error:
            raise QueryError(f"a condition is no array ({error}); use Separator.condition") from error
        return read_vector(vector, self.family.condition_size)
