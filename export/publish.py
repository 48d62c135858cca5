"""Files that exist whole or not at all: staging directories, atomic renames, locks that die with their process."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..runtime.bundle import MANIFEST
from ..runtime.errors import OutputError, OutputExists
from ..runtime.manifest import Manifest

STAGING, ASIDE = ".building", ".replaced"  # suffixes of the directories beside a bundle while it is made


def _beside(out: Path, suffix: str) -> Path:
    """A new directory beside `out`, hidden, on the same file system."""
    return Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=suffix, dir=out.parent))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Lock a directory while its build lives; yields False if another process holds it. The lock dies with its process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A directory beside `out`, removed unless it was published."""
    root: Path | None = None
    try:
        root = _beside(out, STAGING)
        root.chmod(0o755)
        with held(root):
            yield root
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror or error}); choose another place or free some space") from error
    finally:
        if root is not None:
            shutil.rmtree(root, ignore_errors=True)


def publish(root: Path, out: Path, *, force: bool) -> None:
    """Give the finished directory its name; an old bundle steps aside first and comes back if that fails."""
    if not out.exists():
        os.rename(root, out)
        return
    if not force:
        raise OutputExists(f"{out} was made by somebody else meanwhile; choose another name or pass --force")
    with held(out) as free:
        if not free:
            raise OutputError(f"another process is changing {out}; wait until it is done, or choose another name")
        aside = _beside(out, ASIDE)
        os.rename(out, aside)
        try:
            os.rename(root, out)
        except OSError:
            os.rename(aside, out)
            raise
    shutil.rmtree(aside, ignore_errors=True)


def recover(out: Path) -> None:
    """Clear away what builds that were killed left beside `out`; an old bundle without its successor gets its name back."""
    for suffix in (ASIDE, STAGING):
        for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.*{suffix}")):
            with held(left) as abandoned:
                if abandoned and suffix == ASIDE and not out.exists():
                    os.rename(left, out)
                elif abandoned:
                    shutil.rmtree(left, ignore_errors=True)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Put a manifest into a bundle, in place of the one that may be there."""
    temporary = root / f".{MANIFEST}"
    temporary.write_text(manifest.to_json(), encoding="utf-8")
    os.replace(temporary, root / MANIFEST)
