"""Waveformer (Veluri et al. 2022, arXiv 2211.02250): labels in, one short step of the target out for every step of the mixture.

The graphs hold the arithmetic of one step; what is remembered between steps is held here. Layers of the encoder whose dilation exceeds a
step find their past as two blocks of frames in a delay line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from ...engines import Engine
from ...engines.engine import Arrays
from ..dsp import Float32
from ..errors import QueryError
from ..family import Embed, Facts, StepFamily, Steps, compare_shapes
from ..manifest import GraphEntry, Manifest, decode

if TYPE_CHECKING:
    from ..query import Query

LAYERS = 10  # of the encoder; layer i looks back two dilations of 2**i frames
SHORT = 4  # of them, those whose past is handed on whole
DELAYED = range(SHORT, LAYERS)
CONTEXTS = tuple(f"ctx{i}" for i in range(SHORT))
PASSED = ("z0", "e", "keys", "values")  # from the mixture's graph to the decoder's
BUFFERED = 4  # frames that the output waits for
SUGGESTED = 3


@dataclass(frozen=True)
class WaveformerDsp:
    """Constants as the manifest's `dsp` holds them, in samples.

    A step is 13 frames of `hop` samples. The excerpt for tests and gates is longer than the model's memory of 66,336 samples and ends 8
    samples into a step.
    """

    sample_rate: int = 44100
    window_samples: int = 88200
    step: int = 416
    before: int = 32
    after: int = 32
    hop: int = 32

    def __post_init__(self) -> None:
        if any(type(size) is not int or not 0 < size < 1 << 30 for size in asdict(self).values()):
            raise ValueError(f"dsp sizes must be positive integers: {self}")
        if self.step % self.hop or self.step // self.hop >= 2**SHORT or {self.before, self.after} != {self.hop}:
            raise ValueError(f"dsp sizes do not fit together: {self}")


@dataclass(frozen=True)
class Widths:
    """Channels of the encoder and of the decoder."""

    encoder: int
    decoder: int


@dataclass(frozen=True)
class LabelRule:
    """Names of the labels in the order of the condition."""

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels) or not all(name.isprintable() and not set(name) & set(",+") for name in self.labels):
            raise ValueError("labels must be different, printable, and without , and +")


@dataclass(frozen=True)
class ConditionRule:
    size: int


def _plain(name: str) -> str:
    """A label's name without what people vary: case, and what stands between its words."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


class Labels:
    """Finds labels by their names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find(self, text: str) -> int:
        """The label of an exact name, or of one that differs only in case and in spaces for underscores.

        Raises:
            QueryError: there is none, or more than one.
        """
        if text in self.names:
            return self.names.index(text)
        alike = [i for i, name in enumerate(self.names) if _plain(name) == _plain(text)]
        if len(alike) == 1:
            return alike[0]
        close = [self.names[i] for i in alike] or self._close(_plain(text))
        meant = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise QueryError(f"the model has no label '{text}'{meant}; clapsep-export inspect lists its {len(self.names)} labels")

    def _close(self, text: str) -> list[str]:
        """Labels that share a word with a text, or nearly; failing that, those that look like the whole of it."""
        whole = {_plain(name): name for name in self.names}
        words = sorted({word for plain in whole for word in plain.split() if len(word) > 2})
        near = {match for word in text.split() for match in difflib.get_close_matches(word, words, 2, 0.7)}
        shared = [name for plain, name in whole.items() if near.intersection(plain.split())]
        return (shared or [whole[match] for match in difflib.get_close_matches(text, whole, SUGGESTED)])[:SUGGESTED]


class DelayLine:
    """Past frames of each channel: a ring of whole steps, the first again behind its end, so that as many frames are always one piece."""

    def __init__(self, channels: int, frames: int, span: int, size: int) -> None:
        self._frames, self._length, self._next = frames, -(-span // frames) * frames, 0
        self._ring = np.zeros((channels, self._length + frames, size), np.float32)

    def back(self, frames: int) -> Float32:
        """As many frames as a step has, from so many frames before the next step on; a view for one channel."""
        start = (self._next - frames) % self._length
        return np.ascontiguousarray(self._ring[:, start : start + self._frames])

    def push(self, step: Float32) -> None:
        """The next step's frames [channels, frames, size]; the oldest go."""
        self._ring[:, self._next : self._next + self._frames] = step
        if self._next == 0:
            self._ring[:, self._length :] = step
        self._next = (self._next + self._frames) % self._length


class WaveformerSteps(Steps):
    """States of the encoder [channels, …], and of the decoder [K · channels, …] with the label embeddings of the present conditions."""

    def __init__(self, family: Waveformer, engine: Callable[[str], Engine], route: str, channels: int) -> None:
        self._engine, self._split, self._channels, self._hop = engine, route == "split", channels, family.dsp.hop
        self._frames, sizes = family.frames, family.sizes
        self._heard = {name: np.zeros((channels, *sizes[name]), np.float32) for name in ("dec_mem", *CONTEXTS)}
        self._lines = {i: DelayLine(channels, self._frames, 2 << i, family.widths.encoder) for i in DELAYED}
        self._made = {name: np.zeros((0, *sizes[name]), np.float32) for name in ("dec_tgt", "out_buf")}
        self._ones = np.ones((channels, self._frames, 1), np.float32)
        self._conditions: Float32 | None = None

    def run(self, x: Float32, conditions: Float32, valid: int) -> Float32:
        if conditions is not self._conditions:
            self._listen(conditions)
        inputs = {"x": np.ascontiguousarray(x), "valid": self._valid(valid), **self._heard}
        for i, line in self._lines.items():
            inputs[f"tap0_{i}"], inputs[f"tap1_{i}"] = line.back(2 << i), line.back(1 << i)
        heard, made = self._run_split(inputs) if self._split else self._run_fused(inputs)
        for states, results in ((self._heard, heard), (self._made, made)):
            for name in states:
                states[name] = results[f"{name}_out"]
        for i, line in self._lines.items():
            line.push(heard[f"in_{i}"])
        return made["y"].reshape(-1, self._channels, made["y"].shape[1])

    def _listen(self, conditions: Float32) -> None:
        """Label embeddings of new conditions; further queries begin with nothing made, and the others go on."""
        rows = self._engine("film").run({"condition": np.ascontiguousarray(conditions, np.float32)})["film"]
        self._film, self._conditions = np.repeat(rows, self._channels, axis=0), conditions
        for name, made in self._made.items():
            kept = made[: len(self._film)]
            self._made[name] = np.concatenate([kept, np.zeros((len(self._film) - len(kept), *made.shape[1:]), np.float32)])

    def _valid(self, samples: int) -> Float32:
        """1 for the frames that begin within the sound, 0 for those behind its end."""
        frames = -(-samples // self._hop)
        return self._ones if frames >= self._frames else self._ones * (np.arange(self._frames) < frames)[:, None].astype(np.float32)

    def _run_fused(self, inputs: Arrays) -> tuple[Arrays, Arrays]:
        """All of the model for every query."""
        engine, n, own = self._engine("separator"), self._channels, {"film": self._film, **self._made}
        starts = range(0, len(self._film), n)
        runs = [engine.run({**inputs, **{name: value[i : i + n] for name, value in own.items()}}) for i in starts]
        names = ("y", "dec_tgt_out", "out_buf_out")
        return runs[0], runs[0] if len(runs) == 1 else {name: np.concatenate([run[name] for run in runs]) for name in names}

    def _run_split(self, inputs: Arrays) -> tuple[Arrays, Arrays]:
        """What does not depend on the labels once, the rest for all queries in one batch."""
        heard, k = self._engine("mixture_encoder").run(inputs), len(self._film) // self._channels
        passed = {"valid": inputs["valid"], **{name: heard[name] for name in PASSED}}
        repeated = passed if k == 1 else {name: np.concatenate([value] * k) for name, value in passed.items()}
        return heard, self._engine("mask_decoder").run({**repeated, "film": self._film, **self._made})


class Waveformer(StepFamily):
    """Waveformer bound to one bundle's constants."""

    facts = Facts(
        title="Waveformer",
        paper="arXiv 2211.02250",
        files="--checkpoint default_ckpt.pt, or another of the four sizes (E256 or E512, D128 or D256)",
        licence="code MIT; of the weights nothing is said",
        queries="one or several of 41 labels; positive only",
        sample_rate=44100,
        causality="causal, 9.4 ms steps, 10.2 ms latency",
        macs="1.4 to 5.3 G per second of sound",
    )

    def __init__(self, manifest: Manifest) -> None:
        missing = [f.name for f in fields(WaveformerDsp) if f.name not in manifest.dsp]
        if missing:  # the defaults are for making models, not for reading them
            raise ValueError(f"dsp lacks {', '.join(missing)}")
        self.dsp = decode(WaveformerDsp, manifest.dsp, "dsp")
        self.widths = decode(Widths, manifest.variant, "variant")
        self.condition_size = decode(ConditionRule, manifest.condition, "condition").size
        self.labels = Labels(decode(LabelRule, manifest.query, "query").labels)
        if len(self.labels.names) != self.condition_size:
            raise ValueError(f"there are {len(self.labels.names)} labels for a condition of {self.condition_size}")
        self.sample_rate, self.window_samples = self.dsp.sample_rate, self.dsp.window_samples
        self.step, self.before, self.after = self.dsp.step, self.dsp.before, self.dsp.after
        self.frames = self.step // self.dsp.hop
        self.vectors = f"a vector of {self.condition_size} values, 1 for each label that is wanted"
        self._compare_with_graphs(manifest.graphs)

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Of everything that the step's graph takes and gives, without the batch."""
        e, d, frames = self.widths.encoder, self.widths.decoder, self.frames
        states = {"dec_mem": (frames, d), "dec_tgt": (frames, d), "out_buf": (BUFFERED, e)}
        states |= {name: (2 << i, e) for i, name in enumerate(CONTEXTS)}
        inputs = {"x": (self.before + self.step + self.after,), "valid": (frames, 1), "film": (e,)}
        lines = {name: (frames, e) for i in DELAYED for name in (f"tap0_{i}", f"tap1_{i}", f"in_{i}")}
        return {**inputs, **states, **lines, **{f"{name}_out": size for name, size in states.items()}, "y": (self.step,)}

    def _compare_with_graphs(self, graphs: Mapping[str, GraphEntry]) -> None:
        sizes, query = self.sizes, {"film", "dec_tgt", "out_buf", "dec_tgt_out", "out_buf_out", "y"}
        compare_shapes(graphs, "film", {"condition": (self.condition_size,), "film": sizes["film"]})
        compare_shapes(graphs, "separator", sizes)
        if {"mixture_encoder", "mask_decoder"} <= set(graphs):
            passed = {t.name: t.shape[1:] for t in graphs["mixture_encoder"].outputs if t.name in PASSED}
            mixture = {name: size for name, size in sizes.items() if name not in query}
            compare_shapes(graphs, "mixture_encoder", {**mixture, **passed})
            compare_shapes(graphs, "mask_decoder", {**{name: sizes[name] for name in query}, "valid": sizes["valid"], **passed})

    def ask(self, positive: Query, negative: Query, embed: Embed, *, normalize: bool | None) -> Float32:  # noqa: ARG002
        """Names of labels between commas or plus signs → a vector with 1 for each of them."""
        if positive.audio:
            raise QueryError("this model is asked by labels, not by example sounds; clapsep-export inspect lists its labels")
        return self.condition(embed(positive) if positive.text is None else self._wanted(positive.text), None, normalize=normalize)

    def _wanted(self, text: str) -> Float32 | None:
        names = [name for part in re.split("[,+]", text) if (name := part.strip())]
        wanted = np.zeros(self.condition_size, np.float32)
        wanted[[self.labels.find(name) for name in names]] = 1
        return wanted if names else None

    def condition(self, positive: Float32 | None, negative: Float32 | None, *, normalize: bool | None) -> Float32:  # noqa: ARG002
        if positive is None:
            raise QueryError("no label was given; clapsep-export inspect lists those that the model has")
        if normalize is not None:
            raise QueryError("this model is asked by labels, and there is nothing to normalise; leave normalize out")
        if not (np.all((positive >= 0) & (positive <= 1)) and positive.any()):
            raise QueryError("the vector is not of numbers from 0 to 1, one for each label, of which at least one is wanted; correct it")
        return positive

    def begin(self, engine: Callable[[str], Engine], route: str, channels: int) -> WaveformerSteps:
        return WaveformerSteps(self, engine, route, channels)


FAMILY = Waveformer
