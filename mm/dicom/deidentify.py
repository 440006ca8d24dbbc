"""A folder of DICOM images copied without who they are of: `OUT/<patient>/<study>/<series>/<instance>.dcm`.

PS3.15 Annex E, Basic Application Level Confidentiality Profile. Whatever isn't known to be harmless is left out
(`mm.dicom.retained`), and an object that can't be cleaned that way is refused. `OUT/audit.jsonl` gets a line for each
object as soon as it is dealt with, without original values. The secret that pseudonyms follow from never lies in OUT.
"""

import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from mm.dicom.audit import Audit
from mm.dicom.cleaning import Cleaner, Keep, is_registered
from mm.dicom.comments import without_comments
from mm.dicom.errors import DicomError, FileError, KindError, PixelError, Reason
from mm.dicom.guard import guarded, inflate, open_file
from mm.dicom.header import MAX_HEADER_BYTES, behind_meta
from mm.dicom.instance import Instance
from mm.dicom.kinds import CAPTURES, IMAGES
from mm.dicom.originals import Originals
from mm.dicom.pseudonyms import Pseudonyms, open_secret
from mm.dicom.scan import Rejected, scan
from mm.files import write_atomically

IMPLEMENTATION_UID: Final = "2.25.101737938214937106203428183546277386437"
CODES: Final[dict[Keep | None, tuple[str, str]]] = {
    None: ("113100", "Basic Application Confidentiality Profile"),
    "shifted-dates": ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    "characteristics": ("113108", "Retain Patient Characteristics Option"),
}
"""PS3.16 CID 7050."""
PIXELS: Final = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
NOT_OBJECTS: Final[tuple[Reason, ...]] = ("not_dicom", "dicomdir")


@dataclass
class Outcome:
    """What became of the files of a folder."""

    num_written: int = 0
    num_skipped: int = 0
    num_duplicates: int = 0
    """Files that hold the very bytes of another one."""
    refused: Counter[Reason] = field(default_factory=Counter)


def deidentify(
    folder: Path,
    out: Path,
    *,
    secret: Path | None = None,
    keep: frozenset[Keep] = frozenset(),
    pixels_ok: bool = False,
) -> Outcome:
    """De-identifies every image below a folder; one that can't be doesn't keep the others from it.

    Args:
        folder: Of DICOM files; those that are none are passed over.
        out: Folder for the copies; those of an earlier call are overwritten.
        secret: The file that pseudonyms and shifts follow from, made where it doesn't exist; `out` with the suffix
            ".secret" by default.
        keep: Options of the profile.
        pixels_ok: Objects that may show text are taken, for somebody looked at them.

    Raises:
        ValueError: `folder` doesn't exist, or folder, `out` and `secret` lie within each other.
        OSError: `out` or `secret` can't be written.
    """
    source, target = folder.resolve(), out.resolve()
    key = (secret if secret is not None else target.with_name(target.name + ".secret")).resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise ValueError("OUT must lie outside of IN, and IN outside of OUT; name another folder")
    if key.is_relative_to(target):
        raise ValueError("--secret must name a file outside of OUT, for whoever has it can tell who the patients are")
    found = scan(folder)
    outcome = Outcome()
    objects: list[tuple[Path, str, Instance | Rejected]] = [(item.path, "", item) for item in found.rejected]
    for study in found.studies:
        identity = study.patient_id or f"study/{study.study_instance_uid}"  # who isn't named is nobody else
        # An object of many frames may be several series.
        once = {item.path: item for series in study.series for item in series.instances}
        objects += [(path, identity, item) for path, item in once.items()]
    pseudonyms = None
    if any(isinstance(item, Instance) for *_, item in objects):
        pseudonyms = Pseudonyms(open_secret(key, otherwise="name another file with --secret"))
    audit = Audit(target)
    copied = any(isinstance(item, Rejected) and item.reason == "duplicate_instance" for *_, item in objects)
    kept = Originals(path for path, _, item in objects if copied and isinstance(item, Instance))
    for number, (_, identity, item) in enumerate(sorted(objects, key=lambda row: row[0]), start=1):
        line: dict[str, Any] = {"input": number}
        try:
            if isinstance(item, Rejected):
                if item.reason == "duplicate_instance" and kept.hold(item.path):
                    outcome.num_duplicates += 1
                    audit.add(line | {"status": "skipped", "reason": item.reason})
                    continue
                raise FileError(item.reason)
            assert pseudonyms is not None
            cleaner = Cleaner(pseudonyms, identity, keep)
            line |= _mapped(item, cleaner)
            with guarded():
                content = _cleaned(item, cleaner, pixels_ok=pixels_ok)
        except DicomError as error:
            if error.reason in NOT_OBJECTS:
                outcome.num_skipped += 1
                continue
            outcome.refused[error.reason] += 1
            line |= {"status": "refused", "reason": error.reason}
        else:
            place = target / line["patient"] / line["study"] / line["series"]
            place.mkdir(parents=True, exist_ok=True)
            write_atomically(place / f"{line['instance']}.dcm", content)
            outcome.num_written += 1
            line |= {"status": "written", "elements": dict(sorted(cleaner.acts.items()))}
        audit.add(line)
    return outcome


def _mapped(item: Instance, cleaner: Cleaner) -> dict[str, str]:
    """An object under its new names."""
    return {
        "patient": cleaner.pseudonyms.patient(cleaner.identity),
        "study": cleaner.pseudonyms.uid(item.study_instance_uid),
        "series": cleaner.pseudonyms.uid(item.series_instance_uid),
        "instance": cleaner.pseudonyms.uid(item.sop_instance_uid),
        "sop_class": item.sop_class_uid if is_registered(item.sop_class_uid) else "",
    }


def _cleaned(item: Instance, cleaner: Cleaner, *, pixels_ok: bool) -> bytes:
    """The de-identified file.

    Raises:
        DicomError: The object is refused.
    """
    if item.sop_class_uid not in IMAGES | CAPTURES:
        raise KindError("document" if item.kind == "document" else "unknown_object")
    if not is_registered(item.transfer_syntax_uid) or not UID(item.transfer_syntax_uid).is_transfer_syntax:
        raise PixelError("unsupported_transfer_syntax")
    data = _read(item)
    if not pixels_ok and _may_show_text(item, data):
        raise PixelError("burnt_in")
    _check_pixels(item, data)
    cleaned = cleaner.clean(data)
    cleaned.PatientID = cleaned.PatientName = cleaner.pseudonyms.patient(cleaner.identity)
    cleaned.PatientIdentityRemoved = "YES"
    cleaned.DeidentificationMethod = ["DICOM PS3.15 Annex E", "attributes not known to be harmless removed"]
    options = [None, *sorted(cleaner.keep)]
    cleaned.DeidentificationMethodCodeSequence = Sequence([_code(*CODES[option]) for option in options])
    shifted = "shifted-dates" in cleaner.keep
    cleaned.LongitudinalTemporalInformationModified = "MODIFIED" if shifted else "REMOVED"
    implicit = item.transfer_syntax_uid == ImplicitVRLittleEndian
    little = item.transfer_syntax_uid != ExplicitVRBigEndian
    correct_ambiguous_vr(cleaned, little)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(item.sop_class_uid)
    meta.MediaStorageSOPInstanceUID = UID(str(cleaned.SOPInstanceUID))
    meta.TransferSyntaxUID = UID(item.transfer_syntax_uid)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    meta.ImplementationVersionName = "MM_DEIDENTIFY_1"
    buffer = io.BytesIO()
    zeros = b"\0" * 128
    file = FileDataset("", cleaned, zeros, meta, is_implicit_VR=implicit, is_little_endian=little)
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _read(item: Instance) -> Dataset:
    """All elements of a file whose header was read before, which bounds what it inflates to."""
    implicit = item.transfer_syntax_uid == ImplicitVRLittleEndian
    with open_file(item.path) as file:
        if item.transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
            limit = item.pixel_offset + item.num_bytes + MAX_HEADER_BYTES
            return read_dataset(io.BytesIO(inflate(behind_meta(file), limit)), False, True)
        if file.read(132)[128:] == b"DICM":
            read_dataset(file, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2)
        else:
            file.seek(0)
        return read_dataset(file, implicit, item.transfer_syntax_uid != ExplicitVRBigEndian)


def _may_show_text(item: Instance, data: Dataset) -> bool:
    """Whether pixels show text, by the kind of object or by what it says of itself."""
    said = str(data.get("BurnedInAnnotation") or "").strip().upper()
    captured = "ConversionType" in data or any("SCREEN" in word.upper() for word in item.image_type)
    # Overlays of old (PS3.5 section 8.1.2, retired) lie in the pixels' unused bits and have no OverlayData.
    overlays = {tag.group for tag in data.keys() if tag.group >> 8 == 0x60}  # noqa: SIM118 (iterating parses values)
    hidden = any((group, 0x3000) not in data for group in overlays)
    return item.sop_class_uid in CAPTURES or said not in ("", "NO") or captured or hidden


def _check_pixels(item: Instance, data: Dataset) -> None:
    """Cuts what lies behind the last pixel; compressed frames must be items and nothing else (PS3.5 section A.4).

    Raises:
        FileError: `truncated` or `damaged`.
    """
    held = [name for name in PIXELS if name in data]
    if len(held) != 1 or not isinstance(data[held[0]].value, bytes):
        raise FileError("truncated", "no pixels")
    element: DataElement = data[held[0]]
    if UID(item.transfer_syntax_uid).is_compressed:
        if not element.is_undefined_length:
            raise FileError("damaged", "compressed frames")
        element.value = without_comments(element.value, item.transfer_syntax_uid)
        return
    samples = 2 if item.photometric == "YBR_FULL_422" else item.samples
    bits = item.rows * item.columns * samples * item.num_frames * item.bits_allocated
    expected = (bits + 7) // 8
    if element.is_undefined_length or expected < 1 or len(element.value) < expected:
        raise FileError("truncated", "pixels")
    element.value = element.value[:expected] + b"\0" * (expected % 2)


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue = value
    item.CodingSchemeDesignator = "DCM"
    item.CodeMeaning = meaning
    return item
