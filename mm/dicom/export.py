"""Every volume of a folder as a NIfTI file (`mm volume DIR OUT`); one bad series never stops the rest.

Names and lines hold nothing a patient could be known by: series and studies are counted in the order of their
UIDs, as in `mm scan`, and a modality is one of three words, whatever the file says.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from mm.dicom.errors import REASONS, Reason, RefusedError
from mm.dicom.listing import SILENT
from mm.dicom.nifti import load_nibabel, write_nifti
from mm.dicom.scan import Scan, Series, scan
from mm.dicom.volume import read_volume

VOLUMES: Final = ("volume",)  # kinds that hold a volume, whether or not it can be read
MODALITIES: Final = ("CT", "MR", "PT")
OTHER: Final = "OT"  # PS3.3 C.7.3.1.1.1


@dataclass(frozen=True)
class Written:
    """A volume that was written.

    Attributes:
        row: Of the series in the table of `mm scan`, from 1; the file is named by it.
        study: Of the study there, from 1.
        modality: "CT", "MR", "PT" or "OT".
        file: Its name in the folder.
        shape: Number of voxels (z, y, x).
        spacing_mm: (z, y, x).
        units: "HU" or "arbitrary".
        dtype: Of the voxels in the file.
    """

    row: int
    study: int
    modality: str
    file: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    units: str
    dtype: str

    def line(self) -> str:
        """For people."""
        size, spacing = (" x ".join(f"{value:.4g}" for value in values) for values in (self.shape, self.spacing_mm))
        return f"{self.file}  study {self.study}  {size} voxels of {spacing} mm  {self.units}, {self.dtype}"


@dataclass(frozen=True)
class Refused:
    """A series that wasn't written.

    Attributes:
        row: As in `Written`.
        study: As in `Written`.
        modality: As in `Written`.
        refused: Reason code.
        message: The reason in words, with its place.
        is_volume: False for radiographs, localizers, documents and the like, which nobody expects to be written.
    """

    row: int
    study: int
    modality: str
    refused: str
    message: str
    is_volume: bool

    def line(self) -> str:
        """For people."""
        word = "refused" if self.is_volume else "passed over"
        return f"{self.row:04d}_{self.modality}  study {self.study}  {word}: {self.message}"


@dataclass(frozen=True)
class Unread:
    """Files that were refused for one reason."""

    unread: Reason
    message: str
    num_files: int

    def line(self) -> str:
        """For people."""
        return f"{self.num_files} file{'s' * (self.num_files > 1)} not read, {self.unread}: {self.message}"


Outcome = Written | Refused | Unread


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """The same as plain data; the keys `file`, `refused` and `unread` tell the three apart."""
    return asdict(outcome)


def _export(series: Series, out: Path, *, row: int, study: int) -> Written | Refused:
    modality = series.modality if series.modality in MODALITIES else OTHER
    name = f"{row:04d}_{modality}.nii.gz"
    try:
        volume = read_volume(series)
        dtype = write_nifti(volume, out / name)
    except RefusedError as error:
        return Refused(row, study, modality, error.reason, str(error), series.kind in VOLUMES)
    except (ValueError, MemoryError) as error:  # an affine of no extent, or too large for this machine
        kind = type(error).__name__
        return Refused(row, study, modality, kind, f"{kind} while it was read or written", series.kind in VOLUMES)
    return Written(row, study, modality, name, volume.shape, volume.spacing_mm, volume.units, dtype)


def _nothing(found: Scan) -> str:
    kinds = Counter(series.kind for study in found.studies for series in study.series)
    reasons = Counter(item.reason for item in found.rejected)
    counts = ", ".join(f"{name} {count}" for name, count in sorted((kinds + reasons).items())) or "no file"
    return (
        f"no volume in {found.folder} ({counts}); a volume is a series of CT, MR or PET slices;"
        " `mm scan` lists every file"
    )


def export_volumes(folder: Path, out: Path, tell: Callable[[Outcome], None]) -> int:
    """Writes one .nii.gz for every volume below a folder that can be read.

    Args:
        folder: Of DICOM files.
        out: New or empty, so that no volume of an earlier run passes for one of this.
        tell: Gets every outcome as soon as it is known.

    Returns:
        0 if all volumes were written; 1 if one was refused or a file that belongs to a series couldn't be read.

    Raises:
        ValueError: There is no volume, `folder` is none, or `out` isn't empty.
        ImportError: nibabel isn't installed.
        OSError: `out` can't be written; what was written before is whole.
    """
    load_nibabel()  # before the scan, which may take minutes
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT must be a new or an empty folder, got {str(out)!r}")
    found = scan(folder)
    if not any(series.kind in VOLUMES for study in found.studies for series in study.series):
        raise ValueError(_nothing(found))
    out.mkdir(parents=True, exist_ok=True)
    code = 0
    row = 0
    for number, study in enumerate(found.studies, 1):
        for series in study.series:
            row += 1
            outcome = _export(series, out, row=row, study=number)
            tell(outcome)
            if isinstance(outcome, Refused) and outcome.is_volume:
                code = 1
    for reason, count in sorted(Counter(item.reason for item in found.rejected).items()):
        if reason not in SILENT:
            tell(Unread(reason, REASONS[reason], count))
    return max(code, int(any(item.study_instance_uid for item in found.rejected)))
