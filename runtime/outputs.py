"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError, OutputExists

log = logging.getLogger(__name__)
LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.clapsep-part")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@contextlib.contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes its name only when it is complete; without `force` it never replaces another.

    Until then it has a hidden name and is locked, so that `remove_leftovers` knows the ones whose writers are gone.

    Raises:
        OutputExists: `path` exists, or came into being meanwhile, and `force` is not set.
        OutputError: the place is not writable, or full.
    """
    if os.path.lexists(path) and not force:
        raise OutputExists(f"{path} exists; choose another name or pass --force")
    with _temporary(path) as (file, temporary):
        try:
            yield file
        except OSError as error:
            raise unwritable(path, error) if error.errno in NO_ROOM else error from error
        try:
            file.flush()
            os.fsync(file.fileno())
            _give_name(temporary, path, force)
        except FileExistsError as error:
            raise OutputExists(f"{path} exists; choose another name or pass --force") from error
        except OSError as error:
            raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> OutputError:
    """What is said when the operating system does not write a file."""
    hint = {errno.ENAMETOOLONG: "choose a shorter name", errno.ENOSPC: "free some space or choose another place"}
    return OutputError(f"{path} cannot be written ({error.strerror or error}); {hint.get(error.errno or 0, 'choose another place')}")


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A locked file beside `path`, which is gone afterwards under its own name."""
    temporary = path
    try:
        while True:
            temporary = path.with_name(f".{secrets.token_hex(8)}.clapsep-part")
            file = temporary.open("x+b")
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # nobody took it for a leftover before it was locked
                break
            file.close()
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        with file:
            yield file, temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _give_name(temporary: Path, path: Path, force: bool) -> None:
    """A link, unlike a rename, fails if somebody made the file meanwhile; some file systems have none."""
    try:
        if not force:
            os.link(temporary, path)
            return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "it exists") from error
    os.replace(temporary, path)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove unfinished files in `folder` whose writers were killed; those still being written are locked, and stay."""
    removed = []
    for path in sorted(folder.glob(".*.clapsep-part")):
        if LEFTOVER.fullmatch(path.name) and not path.is_symlink() and _remove_unlocked(path):
            log.info("removed %s, left by a run that was killed", path)
            removed.append(path)
    return removed


def _remove_unlocked(path: Path) -> bool:
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:  # locked, or gone, or not ours to remove
        return False
    return True
