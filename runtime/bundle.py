"""A bundle on disk: opened by its manifest, every file checked before it is used."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath

from .errors import BundleError, HashMismatch, MissingFile, SizeMismatch, UnsafePath
from .graph import check_graph
from .manifest import FileEntry, Manifest, parse_manifest

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 16 << 20  # bytes; a real one has some hundred kilobytes at most


def sha256_of(path: Path) -> str:
    """Lower-case hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(root: Path, relative: str) -> FileEntry:
    """The manifest's entry for the file `relative` below `root`."""
    path = root / relative
    return FileEntry(relative, path.stat().st_size, sha256_of(path))


class Bundle:
    """A directory `NAME.clapsep/` with its manifest read and its files known to be there, in full."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest and check that every listed file exists with its size; no engine is needed.

        Raises:
            BundleError: a sub-class for each thing that can be wrong with a bundle.
        """
        root = Path(path)
        if not os.path.isdir(root):
            raise BundleError(f"{root} is not a bundle directory; give the path that clapsep-export build wrote")
        manifest_path = root / MANIFEST
        if not os.path.isfile(manifest_path):
            raise MissingFile(f"{root} has no {MANIFEST}, so it is not a bundle; give the path that clapsep-export build wrote")
        if manifest_path.stat().st_size > MANIFEST_LIMIT:
            raise BundleError(f"{manifest_path} is larger than {MANIFEST_LIMIT >> 20} MiB, so it is not a manifest; build the bundle again")
        bundle = cls(root, parse_manifest(manifest_path.read_bytes(), str(manifest_path)))
        for entry in bundle.manifest.files():
            bundle._inside(entry)
        for entry in bundle.manifest.files(plans=False):  # a plan that is damaged stops only the engine that needs it
            bundle.locate(entry)
        bundle._refuse_unlisted()
        return bundle

    def file(self, entry: FileEntry) -> Path:
        """Path of a listed file after its content has been checked against the manifest (once per Bundle)."""
        path = self.locate(entry)
        if entry.file not in self._verified:
            try:
                found = sha256_of(path)
            except OSError as error:
                raise BundleError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
            if found != entry.sha256:
                raise HashMismatch(f"{path} is not the file that the manifest describes (SHA-256 differs); build or copy the bundle again")
            self._verified.add(entry.file)
        return path

    def graph(self, name: str) -> Path:
        """Path of a graph, after it and its weights have been checked."""
        entry = self.manifest.graphs.get(name)
        if entry is None:
            raise BundleError(f"{self.path} has no graph '{name}', only {sorted(self.manifest.graphs)}; build the bundle again")
        if entry.data is not None:
            self.file(entry.data)
        path = self.file(entry.graph)
        check_graph(path, entry)
        return path

    def check_files(self) -> None:
        """Check the content of every file."""
        for entry in self.manifest.files():
            self.file(entry)

    def _refuse_unlisted(self) -> None:
        """A graph can name any file near it as its weights; those that nobody vouches for must not be there."""
        listed = {self.path / entry.file for entry in self.manifest.files()}
        unlisted = [path for path in (self.path / "graphs").rglob("*") if path not in listed and not path.is_dir()]
        if unlisted:
            raise BundleError(f"{unlisted[0]} is not listed in {MANIFEST}; remove it or build the bundle again")

    def locate(self, entry: FileEntry) -> Path:
        """Path of a listed file after its place and size have been checked, but not its content."""
        path = self._inside(entry)
        try:
            return self._checked(path, entry)
        except (OSError, ValueError, RuntimeError) as error:  # names too long, not encodable, or links in a circle
            raise BundleError(f"{self.path / MANIFEST} names a file that cannot be opened ({error}); build the bundle again") from error

    def _inside(self, entry: FileEntry) -> Path:
        relative = PurePosixPath(entry.file)
        if relative.is_absolute() or ".." in relative.parts or "\\" in entry.file or "\0" in entry.file:
            raise UnsafePath(f"{self.path / MANIFEST} names {entry.file!r}, which lies outside the bundle; do not use this bundle")
        return self.path / relative

    def _checked(self, path: Path, entry: FileEntry) -> Path:
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise UnsafePath(f"{path} is a link that leads outside the bundle; do not use this bundle")
        if not path.is_file():
            raise MissingFile(f"{path} is missing; build or copy the bundle again")
        if path.stat().st_size != entry.size:
            raise SizeMismatch(f"{path} has {path.stat().st_size} bytes instead of {entry.size}; build or copy the bundle again")
        return path
