"""Writes that a kill at any moment can't tear: a temporary name in the same folder, then `os.replace`."""

import os
import shutil
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
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def replace_folder(fresh: Path, place: Path, *, work: Path) -> None:
    """Moves a finished folder to its place; a former one of that name is gone afterwards.

    Between the two renames the place is empty for an instant: a kill there leaves no report, never half of
    one, and the next run writes it again.

    Args:
        fresh: The finished folder, on the same file system.
        place: Where it belongs.
        work: Where the former one is moved before it is deleted.
    """
    discard_folder(place, work=work)
    fresh.replace(place)


def discard_folder(place: Path, *, work: Path) -> None:
    """Takes a folder away at one stroke: renamed first, then deleted."""
    if place.exists():
        old = work / f"{place.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        place.replace(old)
        shutil.rmtree(old)
