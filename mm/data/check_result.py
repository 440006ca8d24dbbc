"""What `mm data check` finds, as plain data."""

from dataclasses import dataclass, field
from typing import Final

from mm.data.spec import Split

SHOWN: Final = 10
"""Examples kept of each kind of problem."""


@dataclass
class Problem:
    """One kind of problem: how often, and where it was met first (rows and file names; never a text)."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.examples) < SHOWN:
            self.examples.append(where)


@dataclass(frozen=True)
class Leak:
    """What two splits share.

    Attributes:
        first: A split.
        second: Another.
        shared: Groups, or contents of files, that are in both.
        of: Groups, or contents, that `second` has.
        rows: Rows of `second` that they make up.
        examples: The first of these rows, by their number in the index (from 1); none of procedural patients.
    """

    first: Split
    second: Split
    shared: int
    of: int
    rows: int
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """Lengths of a split's texts in words (in Chinese: characters)."""

    least: int
    median: float
    most: int


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        name: Of the data set.
        rows: Rows a split.
        left_out: Rows that `exclude` and `drop_empty` take away.
        files: Distinct files named.
        missing: Files that aren't there, or lie outside the root.
        broken: Files that can't be read.
        texts: Rows whose text or column is missing or has no words.
        group_leaks: By the spec's group column (the patient).
        file_leaks: By the content of files.
        duplicate_files: Files whose content another one has too.
        distinct_texts: Different texts.
        most_common: How often the most frequent text occurs.
        num_texts: All texts.
        conflicts: Rows whose text names the side that the side column, or a text equal but for the side, denies.
        opposite: Images one text of which names the left only and another the right only: worth a look, no error.
        lengths: Of the texts, a split.
    """

    name: str
    rows: dict[Split, int]
    left_out: int
    files: int
    missing: Problem
    broken: Problem
    texts: Problem
    group_leaks: tuple[Leak, ...]
    file_leaks: tuple[Leak, ...]
    duplicate_files: Problem
    distinct_texts: int
    most_common: int
    num_texts: int
    conflicts: Problem
    opposite: Problem
    lengths: dict[Split, Lengths]

    @property
    def faulty(self) -> bool:
        """True where training would stop: a file is missing or broken, or a row has no text."""
        return bool(self.missing.count or self.broken.count or self.texts.count)
