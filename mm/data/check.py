"""`mm data check`: what is wrong with a data set, or worth knowing, before anything is trained on it."""

import hashlib
import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from mm.data.check_result import SHOWN, Check, Leak, Lengths, Problem
from mm.data.index import Row, inside, num_rows, rows_by_split, targets, value
from mm.data.readers import decode_picture, image_name, read_sound
from mm.data.sides import sideless, sides_of
from mm.data.spec import SPLITS, PhantomSpec, Spec, Split, TableSpec

Track: TypeAlias = Callable[[Iterable[str]], Iterable[str]]
"""Passes names on, and may show how far they are."""


def check(spec: Spec, *, track: Track = iter) -> Check:
    """Reads every row and every file of a data set once.

    Args:
        spec: From `mm.data.spec.load_spec`; of procedural patients there are only numbers and seeds.
        track: Shows how far it is.

    Raises:
        ValueError: The index is missing or broken, or a row names no split.
    """
    if isinstance(spec, PhantomSpec):
        return _procedural(spec)
    rows = rows_by_split(spec)
    missing, broken, texts = Problem(), Problem(), Problem()
    of_row: dict[tuple[Split, int], list[str]] = {}
    said: dict[tuple[Split, int], tuple[str, ...]] = {}
    named: dict[str, Callable[[Path], object]] = {}
    for split, number, row in _each(rows):
        try:
            said[split, number] = targets(row, spec)
            of_row[split, number] = [name for name, _ in _files(row, spec)]
            named.update(_files(row, spec))
        except ValueError as error:
            texts.add(f"{split}: {error}")
    digests = _read(named, spec, missing=missing, broken=broken, track=track)
    contents = {key: [digests[name] for name in names if name in digests] for key, names in of_row.items()}
    copies: dict[str, list[str]] = defaultdict(list)
    for name, digest in digests.items():
        copies[digest].append(name)
    duplicates = Problem()
    for names in copies.values():
        for name in names[1:]:
            duplicates.add(f"{name} is {names[0]}")
    conflicts, opposite = _sides(rows, spec, said, contents)
    counted = Counter(text for offered in said.values() for text in offered)
    return Check(
        name=spec.name,
        rows={split: len(rows[split]) for split in SPLITS},
        left_out=num_rows(spec) - sum(map(len, rows.values())),
        files=len(named),
        missing=missing,
        broken=broken,
        texts=texts,
        group_leaks=group_leaks(spec, rows),
        file_leaks=_leaks(contents, rows),
        duplicate_files=duplicates,
        distinct_texts=len(counted),
        most_common=max(counted.values(), default=0),
        num_texts=counted.total(),
        conflicts=conflicts,
        opposite=opposite,
        lengths=_lengths(said, spec.language),
    )


def _each(rows: dict[Split, list[Row]]) -> Iterable[tuple[Split, int, Row]]:
    return ((split, number, row) for split in SPLITS for number, row in enumerate(rows[split]))


def _files(row: Row, spec: TableSpec) -> list[tuple[str, Callable[[Path], object]]]:
    found: list[tuple[str, Callable[[Path], object]]] = []
    name = image_name(row, spec)
    if name is not None:
        found.append((name, decode_picture))
    if spec.audio is not None:
        rate = spec.audio.rate
        found.append((value(row, spec.audio.column), lambda path: read_sound(path, rate=rate)))
    return found


def _read(
    named: dict[str, Callable[[Path], object]], spec: TableSpec, *, missing: Problem, broken: Problem, track: Track
) -> dict[str, str]:
    """Hash of each file's bytes; what can't be read is told and has none."""
    digests = {}
    for name in track(list(named)):
        try:
            path = inside(spec.root, name)
            if not path.is_file():
                missing.add(name)
                continue
            named[name](path)
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except (ValueError, OSError) as error:
            broken.add(str(error))
    return digests


def group_leaks(spec: TableSpec, rows: dict[Split, list[Row]]) -> tuple[Leak, ...]:
    """What the spec says should not be in two splits, such as a patient, and is.

    Args:
        spec: With `group`, or there is nothing to tell.
        rows: Of its index, from `rows_by_split`.

    Raises:
        ValueError: A row doesn't have the column.
    """
    if spec.group is None:
        return ()
    return _leaks({(split, n): [value(row, spec.group.column)] for split, n, row in _each(rows)}, rows)


def _leaks(keys: dict[tuple[Split, int], list[str]], rows: dict[Split, list[Row]]) -> tuple[Leak, ...]:
    held: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for (split, _), found in keys.items():
        held[split].update(found)
    leaks = []
    for first, second in itertools.combinations(SPLITS, 2):
        shared = held[first] & held[second]
        if shared:
            those = [
                number for (split, number), found in keys.items() if split == second and not shared.isdisjoint(found)
            ]
            examples = tuple(rows[second][number]["__row__"] + 1 for number in those[:SHOWN])
            leaks.append(Leak(first, second, len(shared), len(held[second]), len(those), examples))
    return tuple(leaks)


def _sides(
    rows: dict[Split, list[Row]],
    spec: TableSpec,
    said: dict[tuple[Split, int], tuple[str, ...]],
    contents: dict[tuple[Split, int], list[str]],
) -> tuple[Problem, Problem]:
    conflicts, opposite = Problem(), Problem()
    of_file: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for split, number, row in _each(rows):
        for text in said.get((split, number), ()):
            asked = "" if spec.prompt is None else value(row, spec.prompt.column) + " "
            truth = "" if spec.side is None else value(row, spec.side.column).strip().lower()
            sides = sides_of(text)
            if truth in ("left", "right") and sides == {"left": {"right"}, "right": {"left"}}[truth]:
                conflicts.add(
                    f"row {row['__row__'] + 1}: the text names the other side than {spec.side and spec.side.column}"
                )
            for digest in contents.get((split, number), []):
                of_file[digest].append((row["__row__"] + 1, asked + text))
    for texts in of_file.values():
        one = [(number, text, sides_of(text)) for number, text in texts]
        left = [(number, text) for number, text, sides in one if sides == {"left"}]
        right = {sideless(text): number for number, text, sides in one if sides == {"right"}}
        if left and right:
            opposite.add(f"rows {left[0][0]} and {next(iter(right.values()))}")
        for number, text in left:
            if sideless(text) in right:
                conflicts.add(f"rows {number} and {right[sideless(text)]}: one image, texts equal but for the side")
    return conflicts, opposite


def _lengths(said: dict[tuple[Split, int], tuple[str, ...]], language: str) -> dict[Split, Lengths]:
    lengths: dict[Split, list[int]] = defaultdict(list)
    for (split, _), offered in said.items():
        lengths[split] += [len(text) if language == "zh" else len(text.split()) for text in offered]
    return {split: Lengths(min(all_), float(statistics.median(all_)), max(all_)) for split, all_ in lengths.items()}


def _procedural(spec: PhantomSpec) -> Check:
    parts = {split: getattr(spec, split) for split in SPLITS}
    leaks = []
    for first, second in itertools.combinations(SPLITS, 2):
        if parts[first].seed == parts[second].seed:
            shared = min(parts[first].studies, parts[second].studies)
            leaks.append(Leak(first, second, shared, parts[second].studies, shared))
    rows: dict[Split, int] = {split: part.studies for split, part in parts.items()}
    nothing: dict[str, Any] = {
        name: Problem() for name in ("missing", "broken", "texts", "duplicate_files", "conflicts", "opposite")
    }
    return Check(spec.name, rows, 0, 0, group_leaks=tuple(leaks), file_leaks=(), distinct_texts=0, most_common=0,
                 num_texts=0, lengths={}, **nothing)  # fmt: skip
