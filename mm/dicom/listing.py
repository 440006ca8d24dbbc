"""What a scan found, for people (`mm scan DIR`) and for programs (`mm scan DIR --json`).

Neither names a patient: studies are numbered in the order of their StudyInstanceUID, dates and identifiers
are left out. The table alone shows paths (relative ones, of refused files), for whoever has to mend them.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from mm.dicom.errors import REASONS, Reason
from mm.dicom.scan import Rejected, Scan, Series

PATHS_SHOWN: Final = 5
SILENT: Final[tuple[Reason, ...]] = ("not_dicom", "dicomdir")
HEADINGS: Final = ("study", "modality", "kind", "slices", "size", "spacing mm", "body part", "manufacturer", "read as")


def _by_reason(scan: Scan) -> dict[Reason, list[Rejected]]:
    groups: dict[Reason, list[Rejected]] = defaultdict(list)
    for item in scan.rejected:
        groups[item.reason].append(item)
    return dict(sorted(groups.items()))


def _verdict(series: Series) -> str:
    told = f" ({', '.join(series.told)})" if series.told else ""
    if series.refused is None:
        return f"a volume{told}" if series.kind == "volume" else "images" if series.num_slices > 1 else "an image"
    return f"refused: {series.refused}" + (f", {series.place}" if series.place else "") + told


def _printable(path: Path) -> str:
    """A path on one line: what a terminal would obey, or no encoding holds, is escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(path))


def scan_table(scan: Scan) -> str:
    """A row a series, then the refused files by reason. Ends without a newline."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for number, study in enumerate(scan.studies, 1):
        for series in study.series:
            spacing = " x ".join(f"{value:.4g}" for value in series.spacing_mm or ())
            size = f"{series.rows} x {series.columns}" if series.rows else "-"
            about = (series.modality or "-", series.kind, str(series.num_slices), size, spacing or "-")
            rows.append((str(number), *about, series.body_part or "-", series.manufacturer or "-", _verdict(series)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(rows) == 1:
        lines = ["no DICOM series"]
    for reason, items in _by_reason(scan).items():
        lines.append(f"{len(items)} file{'s' * (len(items) > 1)} not read, {reason}: {REASONS[reason]}")
        shown = [] if reason in SILENT else items[:PATHS_SHOWN]
        for item in shown:
            place = f" ({item.place})" if item.place else ""
            lines.append(f"    {_printable(item.path.relative_to(scan.folder))}{place}")
        if shown and len(items) > len(shown):
            lines.append(f"    and {len(items) - len(shown)} more")
    return "\n".join(lines)


def _series_json(series: Series) -> dict[str, Any]:
    return {
        "part": series.part,
        "told_apart_by": list(series.told),
        "modality": series.modality,
        "kind": series.kind,
        "num_slices": series.num_slices,
        "rows": series.rows,
        "columns": series.columns,
        "spacing_mm": None if series.spacing_mm is None else list(series.spacing_mm),
        "slice_thickness_mm": series.slice_thickness_mm,
        "manufacturer": series.manufacturer,
        "model": series.model,
        "body_part": series.body_part,
        "kernel": series.kernel,
        "view": series.view,
        "units": series.units,
        "refused": series.refused,
        "place": series.place,
    }


def scan_json(scan: Scan) -> dict[str, Any]:
    """The same as plain data: `studies` (numbered from 1, each with its `series`) and `rejected` by reason."""
    studies = [
        {"study": number, "series": [_series_json(series) for series in study.series]}
        for number, study in enumerate(scan.studies, 1)
    ]
    rejected = [
        {"reason": reason, "meaning": REASONS[reason], "num_files": len(items)}
        for reason, items in _by_reason(scan).items()
    ]
    return {"studies": studies, "rejected": rejected}
