"""Working memory that is reused from one call to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Pool(Generic[T]):
    """Pieces of working memory made by `make`, each lent to one user at a time; at most `keep` idle ones are kept.

    Threads may share a pool: those that find it empty get a new piece.
    """

    def __init__(self, make: Callable[[], T], keep: int = 4) -> None:
        self._make = make
        self._idle: deque[T] = deque(maxlen=keep)  # its append and pop are atomic

    @contextmanager
    def borrow(self) -> Iterator[T]:
        try:
            piece = self._idle.pop()
        except IndexError:
            piece = self._make()
        try:
            yield piece
        finally:
            self._idle.append(piece)
