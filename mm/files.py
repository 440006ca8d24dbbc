"""Writes that a kill at any moment can't tear: a temporary name in the same folder, then `os.replace`."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Puts a file in place whole or not at all.

    Args:
        path: In an existing folder.
        content: Its bytes.
        mode: Permissions, in force before the first byte is written.

    Raises:
        OSError: No right to write, or the disk is full; the former file is as it was.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # after a failure; else it has its name by now


def replace_folder(fresh: Path, place: Path, *, work: Path) -> None:
    """Moves a finished folder to its place; a former one of that name is gone afterwards.

    Between the two renames the place is empty for an instant: a kill there leaves nothing, never half of one.

    Args:
        fresh: The finished folder, on the same file system.
        place: Where it belongs.
        work: Where the former one is moved before it is deleted.
    """
    old = _aside(place, work)
    fresh.replace(place)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def folder_in_place(place: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes its place where the block ends well; else nothing is left of it.

    Args:
        place: Where it belongs; a former one of that name is replaced.

    Raises:
        OSError: No right to write, or the disk is full; the former folder is as it was.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        replace_folder(fresh, place, work=place.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after a failure; else it has its name by now


def discard_folder(place: Path, *, work: Path) -> None:
    """Takes a folder away at one stroke: renamed first, then deleted."""
    old = _aside(place, work)
    if old.exists():
        shutil.rmtree(old)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        OSError: It can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _aside(place: Path, work: Path) -> Path:
    old = work / f".{place.name}.{os.getpid()}.old"
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.replace(old)
    return old
