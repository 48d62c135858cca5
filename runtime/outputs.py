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
LEFTOVER = re.compile(r"\..*\.[0-9a-f]{8}\.clapsep-part")


@contextlib.contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes its name only when it is complete; without `force` it never replaces another.

    Until then it has a hidden name and is locked, so that `remove_leftovers` knows the ones whose writers are gone.

    Raises:
        OutputExists: `path` exists, or came into being meanwhile, and `force` is not set.
        OutputError: the place is not writable, or full.
    """
    if os.path.exists(path) and not force:
        raise OutputExists(f"{path} exists; choose another name or pass --force")
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.clapsep-part")
    try:
        with temporary.open("x+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            _give_name(temporary, path, force)
    except FileExistsError as error:
        raise OutputExists(f"{path} exists; choose another name or pass --force") from error
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); choose another place or free some space") from error
    finally:
        with contextlib.suppress(OSError):  # what could not be made cannot be removed
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
