"""Queries: what to extract or to remove, said by text, by example sounds, by both, or by a vector that somebody else has computed."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .audio import check_rate, check_samples, to_mono
from .audiofile import LIMITS, Limits, read_audio
from .cache import Cache
from .clap import ClapTowers
from .dsp import Float32
from .errors import LimitError, QueryError
from .npy import read_array
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..engines import Engine

log = logging.getLogger(__name__)
Clip = str | Path | tuple[NDArray[Any], int]
VECTOR_LIMIT = 1 << 20  # bytes of a file
LARGEST = 1e4  # of a vector's values; real ones are below 100, and what is far above makes networks overflow
CACHE_SIZE = 1024  # embeddings; 2 kB each


@dataclass(frozen=True)
class Query:
    """One side of a question.

    `text`: a caption such as "a dog barking"; `audio`: example clips, each a path or (samples [n] or [channels, n], sample
    rate); several are averaged (the paper's multi-shot query). With both, the embedding is alpha · audio + (1 - alpha) · text.
    `vector`: an embedding in place of both, as an array or an .npy file. Models of labels take a text for one or several labels.
    """

    text: str | None = None
    audio: Sequence[Clip] = ()
    alpha: float = 0.5
    vector: str | Path | NDArray[Any] | None = None

    def __post_init__(self) -> None:
        single = isinstance(self.audio, tuple) and len(self.audio) == 2 and isinstance(self.audio[1], int)
        if single or not isinstance(self.audio, list | tuple):
            raise QueryError("Query.audio must be a list of clips; put a single clip into a list")
        if not (self.text is None or isinstance(self.text, str)):
            raise QueryError(f"Query.text is {type(self.text).__name__}; give a str")
        if not isinstance(self.alpha, float | int) or not 0 <= self.alpha <= 1:
            raise QueryError(f"alpha is {self.alpha}; give a weight from 0 (text only) to 1 (audio only)")

        if not (self.vector is None or isinstance(self.vector, str | Path | np.ndarray)):
            raise QueryError(f"Query.vector is {type(self.vector).__name__}; give an array or the path of an .npy file")
        if self.vector is not None and (self.text is not None or self.audio):
            raise QueryError("a query has a vector and a text or examples too; give one or the other")

    @property
    def empty(self) -> bool:
        """Nothing asked: a missing query is a zero vector, never the embedding of an empty text."""
        return not (self.text and self.text.strip()) and not self.audio and self.vector is None


def read_vector(vector: str | Path | NDArray[Any], size: int) -> Float32:
    """A query's vector [size], from its array or file; files are not unpickled.

    Raises:
        QueryError: it cannot be read, or is not of so many finite numbers.
    """
    name = "the vector" if isinstance(vector, np.ndarray) else str(vector)
    try:
        array = vector if isinstance(vector, np.ndarray) else _read_file(Path(vector))
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused
            values = array.astype(np.float32) if array.dtype.kind in "fiu" else np.empty(0, np.float32)
    except Exception as error:  # headers of hostile files raise many types
        raise QueryError(f"{name} is not a vector ({error}); give an .npy file of {size} numbers") from error
    if values.shape != (size,) or not np.abs(values).max(initial=0) <= LARGEST:  # nor NaN
        raise QueryError(f"{name} is {array.dtype} {list(array.shape)}; this model takes {size} finite numbers of at most {LARGEST:g}")
    return values


def _read_file(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    if path.stat().st_size > VECTOR_LIMIT:
        raise ValueError(f"it is larger than {VECTOR_LIMIT >> 10} KiB")
    return read_array(path.read_bytes())


def as_query(value: Query | str | None) -> Query:
    """A plain text is a text query, None is an empty one."""
    if isinstance(value, Query):
        return value
    if value is None or isinstance(value, str):
        return Query(text=value)
    raise QueryError(f"a query is a text or a Query, not {type(value).__name__}")


class QueryEncoder:
    """Embeds queries with a bundle's two towers; every embedding is computed once. Safe for several threads."""

    def __init__(
        self,
        towers: ClapTowers,
        tokenizer: Callable[[], Tokenizer],
        engine: Callable[[str], Engine],
        crop: str | None = None,
        short_context: int = 0,
        limits: Limits = LIMITS,
    ) -> None:
        self.towers, self._open_tokenizer, self._engine, self._crop = towers, tokenizer, engine, crop
        self._limits = limits
        self._short_context = short_context  # tokens that the graph for short texts takes; 0 if there is none
        self._words = None if towers.rule.words is None else set(towers.rule.words)  # those that a small model was trained on
        self._cache = Cache(CACHE_SIZE)
        self._lock = Lock()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded on first use."""
        return self._open_tokenizer()

    def text(self, texts: Sequence[str]) -> Float32:
        """Unit embeddings [n, embedding] of n texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise QueryError("texts must be a list of str; put a single text into a list")
        return self._stack([self._cache.get("text:" + text, lambda t=text: self._encode_text(t)) for text in texts])

    def audio(self, clips: Sequence[Clip]) -> Float32:
        """Unit embeddings [n, embedding] of n clips."""
        return self._stack([self._audio(clip) for clip in clips])

    def _stack(self, rows: list[Float32]) -> Float32:
        return np.stack(rows) if rows else np.zeros((0, self.towers.embedding_size), np.float32)

    def embed(self, query: Query) -> Float32 | None:
        """Embedding [embedding] of a query, None for an empty one. Mixed and averaged vectors are not normalised again."""
        has_text = bool(query.text and query.text.strip())
        if query.empty:
            return None
        text = self.text([query.text or ""])[0] if has_text and not (query.audio and query.alpha == 1) else None
        audio = self.audio(query.audio).mean(0) if query.audio and not (has_text and query.alpha == 0) else None
        if text is None or audio is None:
            return text if audio is None else audio
        return (query.alpha * audio + (1 - query.alpha) * text).astype(np.float32)

    def _warn_of_unknown_words(self, text: str) -> None:
        """Say once of each word that the model has never seen it."""
        if self._words is None:
            return
        with self._lock:
            unknown = sorted(set(re.findall(r"\w+", text.lower())) - self._words)
            self._words.update(unknown)
        if unknown:
            log.warning("the model has never seen the words: %s", ", ".join(unknown))

    def _encode_text(self, text: str) -> Float32:
        self._warn_of_unknown_words(text)
        tokenizer = self.tokenizer
        if tokenizer.truncates(text):
            log.warning(
                "query of %d characters is longer than %d tokens; only its beginning counts",
                len(text),
                tokenizer.context,
            )
        ids, mask = tokenizer.encode([text])
        n = self._short_context
        short = bool(n) and not mask[:, n:].any()  # padding is masked, so leaving it out changes nothing
        engine = self._engine("text_encoder_short" if short else "text_encoder")
        inputs = {"input_ids": ids[:, :n], "attention_mask": mask[:, :n]} if short else {"input_ids": ids, "attention_mask": mask}
        return engine.run({name: np.ascontiguousarray(value) for name, value in inputs.items()})["embedding"][0]

    def _audio(self, clip: Clip) -> Float32:
        if isinstance(clip, str | Path):
            samples, rate = read_audio(clip, self._limits)
        else:
            if not (isinstance(clip, tuple) and len(clip) == 2):
                raise QueryError(f"a clip is a path or (samples, sample rate), not {type(clip).__name__}")
            samples, rate = check_samples(clip[0], "an audio query"), check_rate(clip[1], "an audio query")
            if samples.shape[-1] > self._limits.example_seconds * rate:
                raise LimitError(f"an audio query is longer than {self._limits.example_seconds:g} s; a few seconds are enough")
        mono = np.ascontiguousarray(to_mono(samples))
        key = f"audio:{rate}:{hashlib.sha256(mono.tobytes()).hexdigest()}"
        return self._cache.get(key, lambda: self._encode_audio(mono, rate))

    def _encode_audio(self, mono: Float32, rate: int) -> Float32:
        log_mels = self.towers.features(mono, rate, self._crop)
        engine = self._engine("audio_encoder")
        embeddings = [engine.run({"log_mel": log_mel[None]})["embedding"][0] for log_mel in log_mels]
        return np.stack(embeddings).mean(0)
