"""Query embeddings, computed once: CLAP is frozen in stage 2, so its towers never run there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from clapsep.export.clap import AudioEncoder, TextEncoder
from clapsep.runtime.tokenizer import Tokenizer

from .captions import caption
from .clips import Clips
from .mixtures import Float32, Question
from .pretrain import log_mels, tokens
from .sounds import CLASSES

WORDINGS = {1: 100, 2: 16, 3: 5}  # captions per set of one, two and three classes
SHOTS = ((1, 2, 3, 5), (0.6, 0.15, 0.1, 0.15))


@dataclass(frozen=True)
class Bank:
    """Unit embeddings of captions per set of classes, and of one query clip per pool clip [classes, clips, embedding]."""

    texts: dict[frozenset[str], Float32]
    audio: Float32

    def text(self, random: np.random.Generator, names: tuple[str, ...]) -> Float32:
        rows = self.texts[frozenset(names)]
        return rows[int(random.integers(len(rows)))]

    def shots(self, random: np.random.Generator, names: tuple[str, ...], used: dict[str, int]) -> Float32:
        """Mean over one to five clips of every class; never the clip that is in the mixture."""
        count = int(random.choice(SHOTS[0], p=SHOTS[1]))
        picked = [self.audio[CLASSES.index(n), self._others(random, count, used.get(n, -1))] for n in names]
        return np.concatenate(picked).mean(0)

    def _others(self, random: np.random.Generator, count: int, used: int) -> list[int]:
        drawn = random.integers(self.audio.shape[1] - 1, size=count)
        return [int(i) + (used >= 0 and int(i) >= used) for i in drawn]

    def condition(self, random: np.random.Generator, question: Question, used: dict[str, int], alpha: float) -> Float32:
        """Embedding of P beside that of N, zeros for a missing one, as one unit vector; the same alpha for both."""
        halves = []
        for names in (question.positive, question.negative):
            half = np.zeros(self.audio.shape[2], np.float32)
            if names and alpha > 0:
                half = half + np.float32(alpha) * self.shots(random, names, used)
            if names and alpha < 1:
                half = half + np.float32(1 - alpha) * self.text(random, names)
            halves.append(half)
        joined = np.concatenate(halves)
        return (joined / np.linalg.norm(joined)).astype(np.float32)


@torch.no_grad()
def make_bank(text: TextEncoder, audio: AudioEncoder, tokenizer: Tokenizer, clips: Clips, seed: int, *, test: bool) -> Bank:
    """Embed captions of every set of one to three classes, and a query cut from every clip of the pool."""
    random = np.random.Generator(np.random.PCG64(seed))
    texts = {}
    for size, wordings in WORDINGS.items():
        for names in combinations(CLASSES, size):
            captions = [caption(names, random, test=test) for _ in range(wordings)]
            texts[frozenset(names)] = text(*tokens(tokenizer, captions)).numpy()
    rows = []
    for name in CLASSES:
        for begin in range(0, clips.data.shape[1], 48):
            waves = [clips.query(random, name, i) for i in range(begin, min(begin + 48, clips.data.shape[1]))]
            rows.append(audio(log_mels(np.stack(waves))).numpy())
    return Bank(texts, np.concatenate(rows).reshape(len(CLASSES), -1, rows[0].shape[1]))
