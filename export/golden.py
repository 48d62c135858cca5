"""golden.npz: a few inputs and what the PyTorch reference makes of them, so that every machine can check itself."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.dsp import Float32
from ..runtime.errors import BundleError
from ..runtime.family import Family
from ..runtime.npy import read_array
from ..runtime.tokenizer import Ids, Tokenizer
from . import signals

if TYPE_CHECKING:  # torch makes golden data but is not needed to check against it
    from torch.nn import Module

    from .family import Model

CAPTIONS = (
    "a dog barking",
    "rain on a roof",
    "a siren passes by",
    "the sound of a man speaking",
    "someone plays the guitar",
    "waves at the beach",
)
SIZE_LIMIT = 256 << 20  # bytes of all arrays; those of the published sizes have 20 MB
CLIPS = (1, 2)  # seeds of the two query clips


@dataclass(frozen=True)
class Golden:
    """Inputs and outputs of the reference in float32; waveforms as int16 where they are inputs.

    text: ids and mask [n, context], embedding [n, e]. audio: log-mel [k, frames, mels], embedding [k, e]. Both without rows for bundles
    without query towers. Pairs [p, 2]: rows of the positive and negative embedding, text before audio, -1 for none; condition [p, c],
    target [p, window] of the mixture. Hard signals: [h, window] int16, target [h, window] with the first pair's condition.
    """

    captions: NDArray[Any]
    input_ids: Ids
    attention_mask: Ids
    text_embedding: Float32
    clip: NDArray[np.int16]
    clip_length: NDArray[np.int64]
    log_mel: Float32
    audio_embedding: Float32
    pairs: NDArray[np.int64]
    condition: Float32
    mixture: NDArray[np.int16]
    target: Float32
    hard_names: NDArray[Any]
    hard: NDArray[np.int16]
    hard_target: Float32

    @property
    def tokens(self) -> dict[str, Ids]:
        """The text encoder's inputs."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def save(self, path: Path) -> None:
        np.savez_compressed(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path, *, towers: bool = True) -> Golden:
        """Read golden.npz, of a bundle with query towers or without, without unpickling.

        Raises:
            BundleError: the file is damaged or lacks an array.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > SIZE_LIMIT:
                    raise ValueError(f"it unpacks to more than {SIZE_LIMIT >> 20} MiB")
                golden = cls(**{f.name: read_array(archive.read(f"{f.name}.npy")) for f in fields(cls)})
            golden._check(towers)
        except Exception as error:  # zip, header and dtype errors of hostile files have many types
            raise BundleError(f"{path} is not a golden.npz ({error}); build the bundle again") from error
        return golden

    def _check(self, towers: bool) -> None:
        """A file that would measure nothing, or something else, is refused with ValueError."""
        rows = [
            (self.captions, self.input_ids, self.attention_mask, self.text_embedding),
            (self.clip, self.clip_length, self.log_mel, self.audio_embedding),
            (self.pairs, self.condition, self.target),
            (self.hard_names, self.hard, self.hard_target),
        ]
        embeddings = len(self.captions) + len(self.clip)
        complete = (
            all(len({len(array) for array in group}) == 1 for group in rows)
            and [bool(len(group[0])) for group in rows] == [towers, towers, True, True]
            and list(self.hard_names) == list(signals.HARD)
            and self.pairs.shape[1:] == (2,)
            and np.all((self.pairs >= -1) & (self.pairs < embeddings))
            and np.all((self.clip_length > 0) & (self.clip_length <= self.clip.shape[1]))
            and all(np.isfinite(a).all() for a in (self.text_embedding, self.audio_embedding, self.target, self.hard_target))
        )
        if not complete:
            raise ValueError("its arrays do not belong together")


def as_float(samples: NDArray[np.int16]) -> Float32:
    return samples.astype(np.float32) / np.float32(32768)


def clips_of(golden: Golden) -> list[Float32]:
    """The query clips at the audio encoder's rate, [length] each."""
    return [as_float(row[:length]) for row, length in zip(golden.clip, golden.clip_length, strict=True)]


def _clips(size: int, rate: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    lengths = np.array([size, 3 * size // 10])  # the second is repeated three times and filled with zeros
    rows = np.zeros((len(CLIPS), size), np.int16)
    for row, length, seed in zip(rows, lengths, CLIPS, strict=True):
        row[:length] = signals.query(int(length), rate, seed)
    return rows, lengths


def _run(module: Module, *inputs: NDArray[Any]) -> Float32:
    import torch

    with torch.inference_mode():
        return module(*(torch.from_numpy(x) for x in inputs)).numpy()


def make_golden(model: Model, family: Family, tokenizer: Tokenizer | None) -> Golden:
    """Run the PyTorch reference on the captions and clips, on query pairs or the model's own conditions, and on hard signals."""
    queries, embeddings = _encode(model, tokenizer), []
    if model.towers is None:
        conditions = model.conditions()
        pairs = np.full((len(conditions), 2), -1)
    else:
        embeddings = [*queries["text_embedding"], *queries["audio_embedding"]]
        clip = len(CAPTIONS)  # row of the first one
        pairs = np.array([[0, -1], [-1, 1], [2, 3], [clip, 4]] if family.signed else [[0, -1], [1, -1], [2, -1], [clip, -1]])
        conditions = np.stack([condition_of(family, pair, embeddings) for pair in pairs])
    size, rate = family.window_samples, family.sample_rate
    mixture, hard = signals.mixture(size, rate), np.stack([signals.named(name, size, rate) for name in signals.HARD])
    return Golden(
        **queries,
        pairs=pairs,
        condition=conditions,
        mixture=mixture,
        target=np.concatenate([model.separate(as_float(mixture)[None], c) for c in conditions]),
        hard_names=np.array(signals.HARD),
        hard=hard,
        hard_target=np.concatenate([model.separate(as_float(row)[None], conditions[0]) for row in hard]),
    )


def condition_of(family: Family, pair: NDArray[np.int64], embeddings: Sequence[Float32]) -> Float32:
    """The condition of a query pair, -1 for no query."""
    return family.condition(*(None if i < 0 else embeddings[i] for i in pair), normalize=None)


def _encode(model: Model, tokenizer: Tokenizer | None) -> dict[str, NDArray[Any]]:
    """The towers' inputs and outputs; without rows if there are none."""
    towers = model.towers
    if towers is None or tokenizer is None:
        integers, floats = np.zeros((0, 1), np.int64), np.zeros((0, 1), np.float32)
        text = {"captions": np.array([], "U1"), "input_ids": integers, "attention_mask": integers, "text_embedding": floats}
        clips = {"clip": integers.astype(np.int16), "clip_length": integers[:, 0], "log_mel": floats, "audio_embedding": floats}
        return {**text, **clips}
    ids, mask = tokenizer.encode(CAPTIONS)
    clip, lengths = _clips(towers.front_end.clip_samples, towers.front_end.sample_rate)
    log_mel = np.stack([towers.features(as_float(row[:n])) for row, n in zip(clip, lengths, strict=True)])
    return {
        "captions": np.array(CAPTIONS),
        "input_ids": ids,
        "attention_mask": mask,
        "text_embedding": _run(towers.text, ids, mask),
        "clip": clip,
        "clip_length": lengths,
        "log_mel": log_mel,
        "audio_embedding": _run(towers.audio, log_mel),
    }
