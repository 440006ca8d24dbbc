"""How far a run is: a bar on a terminal, one JSON object a line otherwise."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TextIO, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mm.pipeline.ledger import Line

Tell: TypeAlias = Callable[[Line, bool], None]
"""Called once a study with what became of it, and whether this run did it (not an earlier one)."""


@contextmanager
def progress(stream: TextIO, total: int) -> Iterator[Tell]:
    """Shows how many of `total` eligible studies are through, and the count of each outcome."""
    with _bar(stream, total) if stream.isatty() else _lines(stream, total) as tell:
        yield tell


@contextmanager
def _bar(stream: TextIO, total: int) -> Iterator[Tell]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task("reports", total=total)
        failed = 0

        def tell(line: Line, fresh: bool) -> None:  # noqa: ARG001
            nonlocal failed
            if line.status == "skipped":
                return
            failed += line.status == "failed"
            bar.update(task, advance=1, description=f"reports ({failed} failed)" if failed else "reports")

        yield tell


@contextmanager
def _lines(stream: TextIO, total: int) -> Iterator[Tell]:
    counts = {"done": 0, "failed": 0, "skipped": 0}

    def tell(line: Line, fresh: bool) -> None:
        counts[line.status] += 1
        through = counts["done"] + counts["failed"]
        _write(stream, {"event": "study", **asdict(line), "fresh": fresh, "through": through, "total": total})

    yield tell
    _write(stream, {"event": "end", **counts})


def _write(stream: TextIO, content: dict[str, object]) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()
