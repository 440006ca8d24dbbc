"""Study keys and pseudonymous UIDs: they follow from a secret that lies in OUT/private/ and nowhere else."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from mm.dicom.pseudonyms import Secret, made_uid, open_secret
from mm.files import write_atomically

KEY_DIGITS: Final = 16
COLUMNS: Final = ("key", "kind", "uid")


class Keys(Secret):
    """What a report shows in place of true UIDs."""

    def study(self, uid: str) -> str:
        """The study key: the first 16 hex digits of the HMAC of a StudyInstanceUID."""
        return self.digest(uid).hex()[:KEY_DIGITS]

    def instance(self, uid: str) -> str:
        """A UID that stands for a SOPInstanceUID."""
        return made_uid(self.digest(uid)[:16])

    def key(self, kind: str, uid: str) -> str:
        """The key of a row of map.csv."""
        return self.study(uid) if kind == "study" else self.instance(uid)


class KeyMap:
    """OUT/private/map.csv: from study keys and pseudonymous SOPInstanceUIDs back to the true ones.

    Rows are appended before the report that shows the key is put in its place, so a run that is killed never
    leaves a key without a row. A torn row doesn't match its own HMAC and is dropped when the map is opened.
    """

    def __init__(self, path: Path, keys: Keys) -> None:
        self._path = path
        self._keys = keys
        self._rows: dict[str, tuple[str, str]] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                for row in csv.reader(file):
                    if len(row) == 3 and row[1] in {"study", "instance"} and keys.key(row[1], row[2]) == row[0]:
                        self._rows[row[0]] = (row[1], row[2])
        self.compact()

    def add(self, kind: str, uids: Iterable[str]) -> None:
        """Appends what isn't there yet."""
        fresh = {self._keys.key(kind, uid): (kind, uid) for uid in uids}
        fresh = {key: row for key, row in fresh.items() if key not in self._rows}
        if fresh:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_lines(fresh))
            self._rows.update(fresh)

    def compact(self) -> None:
        """Rewrites the file: one row a key, in the order of keys."""
        text = ",".join(COLUMNS) + "\n" + _lines(dict(sorted(self._rows.items())))
        write_atomically(self._path, text.encode(), mode=0o600)


def open_private(out: Path) -> tuple[Keys, KeyMap]:
    """Reads or makes the secret and the map under OUT/private/ (folder 0700, files 0600).

    Raises:
        ValueError: The secret that lies there has another length: keys made with it would be wrong.
        OSError: No right to write.
    """
    folder = out / "private"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    secret = open_secret(folder / "secret", otherwise="restore it, or write into a new folder")
    keys = Keys(secret)
    return keys, KeyMap(folder / "map.csv", keys)


def _lines(rows: dict[str, tuple[str, str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows((key, kind, uid) for key, (kind, uid) in rows.items())
    return buffer.getvalue()
