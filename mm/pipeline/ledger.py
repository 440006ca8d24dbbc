"""What is finished: OUT/<study key>/ put in place whole, and OUT/manifest.jsonl with one line a study.

The report folder itself says what it was made from (its `fingerprint`); the manifest is an account for
people and programs. So a kill at any moment costs at most the studies in work.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from mm.files import discard_folder, replace_folder, write_atomically
from mm.pipeline.stage import Writer
from mm.report.schema import Report

Status = Literal["done", "failed", "skipped"]
STATUSES: Final[tuple[Status, ...]] = ("done", "failed", "skipped")
FINGERPRINT: Final = "fingerprint"


@dataclass(frozen=True)
class Line:
    """What became of a study.

    Attributes:
        study: Study key.
        status: Reported, failed, or not eligible.
        reason: A stable word, or the name of an error's type; None when done.
        place: Where it went wrong, or None.
        seconds: Its share of the time, or None where a kill lost it.
        fingerprint: Of a failure, what it failed on: the same need not be tried again. None where another try may
            do better.
    """

    study: str
    status: Status
    reason: str | None = None
    place: str | None = None
    seconds: float | None = None
    fingerprint: str | None = None


class Ledger:
    """The account of one output folder. Make it with `open_ledger`."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._work = out / ".work"
        self._manifest = out / "manifest.jsonl"
        self._lines = _read(self._manifest)
        shutil.rmtree(self._work, ignore_errors=True)  # a killed run's
        self._work.mkdir()
        self.compact()

    def finished(self, study: str, fingerprint: str) -> bool:
        """True where a report made from the very same lies in its place."""
        try:
            return (self._out / study / FINGERPRINT).read_text(encoding="ascii").strip() == fingerprint
        except (OSError, UnicodeDecodeError):
            return False

    def failed(self, study: str, fingerprint: str) -> Line | None:
        """The recorded failure of the very same study, or None."""
        line = self._lines.get(study)
        return line if line is not None and line.status == "failed" and line.fingerprint == fingerprint else None

    def place(self, report: Report, fingerprint: str, writers: Sequence[Writer]) -> None:
        """Writes a report's folder aside and moves it to its place."""
        fresh = self._work / report.study
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        for writer in writers:
            writer.write(report, fresh)
        write_atomically(fresh / FINGERPRINT, f"{fingerprint}\n".encode())
        replace_folder(fresh, self._out / report.study, work=self._work)

    def withdraw(self, study: str) -> None:
        """Takes away a report that no longer tells of what the input holds."""
        discard_folder(self._out / study, work=self._work)

    def line(self, study: str) -> Line | None:
        """What the manifest says of a study."""
        return self._lines.get(study)

    def record(self, line: Line) -> None:
        """Appends a line, unless the study's last one says the same."""
        if self._lines.get(line.study) == line:
            return
        self._lines[line.study] = line
        with self._manifest.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")

    def compact(self) -> None:
        """Rewrites the manifest: one line a study, in the order of keys."""
        text = "".join(json.dumps(asdict(self._lines[study])) + "\n" for study in sorted(self._lines))
        write_atomically(self._manifest, text.encode())

    def close(self) -> None:
        """Leaves nothing but reports, manifest and private/."""
        self.compact()
        shutil.rmtree(self._work, ignore_errors=True)


@contextmanager
def open_ledger(out: Path) -> Iterator[Ledger]:
    """The ledger of a folder, for one process at a time; take it before anything else in the folder is touched.

    Raises:
        ValueError: Another run is writing there.
        OSError: No right to write.
    """
    private = out / "private"
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    private.chmod(0o700)
    lock = private / "lock"
    lock.touch(mode=0o600)
    with lock.open("w") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when a process is killed
            except BlockingIOError:
                raise ValueError(
                    f"another mm report is writing into {out}; wait for it or choose another folder"
                ) from None
        ledger = Ledger(out)
        try:
            yield ledger
        finally:
            ledger.close()


def _read(path: Path) -> dict[str, Line]:
    """Lines by study, the last one counts; a line torn by a kill is passed over."""
    lines: dict[str, Line] = {}
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = Line(**json.loads(text))
            except (json.JSONDecodeError, TypeError):
                continue
            if line.status in STATUSES:
                lines[line.study] = line
    return lines
