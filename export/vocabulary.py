"""Tokenizers for the bundle: read RoBERTa's files, or train a small one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..runtime.errors import CheckpointError
from ..runtime.tokenizer import library_errors

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3 in every RoBERTa vocabulary


def _roberta(backend: Tokenizer) -> Tokenizer:
    """Byte-level splitting, and <s> … </s> around the text."""
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    return backend


def read_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """A RoBERTa tokenizer from tokenizer.json, or from a directory with it or with vocab.json and merges.txt.

    Raises:
        CheckpointError: nothing readable there, other special tokens than RoBERTa's, or ids beyond the model's vocabulary.
    """
    file = path / "tokenizer.json" if os.path.isdir(path) else path
    if not os.path.isfile(file) and not (os.path.isfile(path / "vocab.json") and os.path.isfile(path / "merges.txt")):
        raise CheckpointError(f"--tokenizer {path} is neither a tokenizer.json nor a directory with one (or vocab.json and merges.txt)")
    with library_errors(
        lambda reason: CheckpointError(f"--tokenizer {path} cannot be read ({reason}); give roberta-base's tokenizer.json")
    ):
        if os.path.isfile(file):
            backend = Tokenizer.from_file(str(file))
        else:
            backend = Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"), unk_token="<unk>"))
            backend.add_special_tokens([*SPECIAL, "<mask>"])
            _roberta(backend)
    ids = [backend.token_to_id(token) for token in SPECIAL[:3]]
    if ids != [0, 1, 2]:
        raise CheckpointError(f"--tokenizer {path} has ids {ids} for {SPECIAL[:3]} instead of 0, 1, 2; give roberta-base's tokenizer.json")
    size = 1 + max(backend.get_vocab().values())  # ids may have gaps, and a gap of billions fills the memory when it is written
    if size > vocabulary:
        raise CheckpointError(
            f"--tokenizer {path} has ids up to {size - 1} and the model knows {vocabulary} tokens; give the one the model was trained with"
        )
    return backend


def train_tokenizer(captions: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with at most `size` tokens, RoBERTa's special ones included."""
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend = _roberta(Tokenizer(models.BPE(unk_token="<unk>")))
    backend.train_from_iterator(captions, trainer)
    return backend
