"""What a de-identification tells of itself, object by object."""

import json
import os
from pathlib import Path
from typing import Any


class Audit:
    """OUT/audit.jsonl: a line at a time, on the disk before the next object; a new run begins a new one."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "audit.jsonl"
        self._begun = False

    def add(self, line: dict[str, Any]) -> None:
        """One object."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a" if self._begun else "w", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._begun = True
