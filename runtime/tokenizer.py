"""Text to token ids, from one tokenizer.json, without transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, ClapsepError

PAD = "<pad>"
Ids = NDArray[np.int64]


class Tokenizer:
    """A byte-level BPE tokenizer in the `tokenizers` library's JSON format; every text becomes `context` ids."""

    def __init__(self, path: str | Path, context: int) -> None:
        from tokenizers import Tokenizer as Backend

        with library_errors(lambda reason: BundleError(f"{path} is not a tokenizer.json ({reason}); build the bundle again")):
            self._backend = Backend.from_file(str(path))
        self._path = path
        pad = self._backend.token_to_id(PAD)
        if pad is None:
            raise BundleError(f"{path} has no {PAD} token; give a RoBERTa tokenizer")
        self.context = context
        self._backend.enable_truncation(context)
        self._backend.enable_padding(length=context, pad_id=pad, pad_token=PAD)

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        """Token ids and attention mask, int64 [n, context] each; longer texts are truncated."""
        with library_errors(self._unusable):
            encodings = self._backend.encode_batch([_encodable(text) for text in texts])
        ids = np.array([e.ids for e in encodings], np.int64)
        mask = np.array([e.attention_mask for e in encodings], np.int64)
        return ids, mask

    def truncates(self, text: str) -> bool:
        """Whether part of `text` is lost."""
        with library_errors(self._unusable):
            return bool(self._backend.encode(_encodable(text)).overflowing)

    def _unusable(self, reason: str) -> BundleError:
        return BundleError(f"{self._path} cannot encode texts ({reason}); build the bundle again")


@contextlib.contextmanager
def library_errors(refusal: Callable[[str], ClapsepError]) -> Iterator[None]:
    """Turn what the tokenizers library raises into `refusal`: plain Exception or, where Rust panics, a BaseException that has no module."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise refusal(str(error)) from error
        raise


def _encodable(text: str) -> str:
    """Lone surrogates (from undecodable command-line bytes) cannot be tokenised; they become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
