"""What `mm data check` found, as a table for a terminal."""

from typing import Final

from mm.data.check_result import Check, Leak, Problem

MOST_ROWS: Final = 5
"""Named in a line."""
REMEDY: Final = (
    "  unless that is meant, move the rows of each to one split, or carve: test: {share: 0.2, group: {column: ...}}"
)


def check_table(found: Check) -> str:
    """Lines of text: counts first, then what stops training, then what is worth knowing."""
    counts = ", ".join(f"{split} {count:,}" for split, count in found.rows.items())
    lines = [f"{found.name}: {sum(found.rows.values()):,} rows ({counts}), {found.files:,} files"]
    if found.left_out:
        lines.append(f"left out by exclude or drop_empty: {found.left_out:,} rows")
    lines += _problem("missing files", found.missing)
    lines += _problem("broken files", found.broken)
    lines += _problem("rows with a faulty text or column", found.texts)
    lines += [leak_line("groups", leak) for leak in found.group_leaks]
    lines += [leak_line("files (by content)", leak) for leak in found.file_leaks]
    if found.group_leaks or found.file_leaks:
        lines.append(REMEDY)
    lines += _problem("files whose content another has too", found.duplicate_files)
    if found.num_texts:
        distinct = f"{found.num_texts:,}, {found.distinct_texts:,} distinct"
        lines.append(f"texts: {distinct}; the most frequent {found.most_common:,} times")
    lines += _problem("left/right conflicts", found.conflicts)
    lines += _problem("images with texts of the left only and of the right only (worth a look)", found.opposite)
    for split, lengths in found.lengths.items():
        lines.append(f"text lengths, {split}: {lengths.least} to {lengths.most}, median {lengths.median:g}")
    if not (found.faulty or found.group_leaks or found.file_leaks):
        lines.append("nothing is missing or broken, and no split shares anything with another")
    return "\n".join(lines)


def leak_line(what: str, leak: Leak) -> str:
    """One leak, with the rows where it is seen."""
    some = leak.examples[:MOST_ROWS]
    where = f": {', '.join(map(str, some))}{', ...' if leak.rows > len(some) else ''}" if some else ""
    return (
        f"leak: {leak.shared:,} of the {leak.of:,} {what} of {leak.second} are in {leak.first} too "
        f"({leak.rows:,} rows of {leak.second}{where})"
    )


def _problem(what: str, problem: Problem) -> list[str]:
    if not problem.count:
        return []
    rest = problem.count - len(problem.examples)
    return [
        f"{what}: {problem.count:,}",
        *(f"  {example}" for example in problem.examples),
        *([f"  and {rest:,} more"] if rest else []),
    ]
