import json
import logging
import stat
import struct
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import dataset, save
from pydicom.datadict import DicomDictionary, dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)
from raw import BASELINE, FRAMES, J2K, JPEG_LS, LOSSLESS, RLE, element, items, jpeg, of_syntax

import mm.dicom.deidentify
from mm.cli import main
from mm.dicom.comments import without_comments
from mm.dicom.confidentiality import TABLE
from mm.dicom.deidentify import CODES, deidentify
from mm.dicom.errors import FileError, PixelError
from mm.dicom.pixels import read_pixels
from mm.dicom.retained import CHARACTERISTICS, DATES
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume

CANARY = "KANARIENVOGEL"
PIXELS = np.arange(24, dtype=np.int16).reshape(4, 6)
TEXT_VRS = ("AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
# What a reader of the standard would name first; written down by hand, not taken from our table.
PROMINENT = {
    "AccessionNumber": "",
    "AdditionalPatientHistory": None,
    "DeviceSerialNumber": "REMOVED",
    "ImageComments": None,
    "InstitutionAddress": None,
    "InstitutionName": "REMOVED",
    "InstitutionalDepartmentName": None,
    "IssuerOfPatientID": None,
    "NameOfPhysiciansReadingStudy": None,
    "OperatorsName": "REMOVED",
    "OtherPatientIDs": None,
    "OtherPatientNames": None,
    "PatientAddress": None,
    "PatientComments": None,
    "PatientTelephoneNumbers": None,
    "PerformedProcedureStepDescription": None,
    "PerformingPhysicianName": None,
    "ProtocolName": "REMOVED",
    "ReferringPhysicianName": "",
    "RequestingPhysician": None,
    "SeriesDescription": None,
    "StationName": "REMOVED",
    "StudyDescription": None,
    "StudyID": "",
}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["deidentify", *map(str, arguments)])
    output = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, output.out + output.err


def copies(out: Path) -> list[pydicom.FileDataset]:
    return [pydicom.dcmread(path) for path in sorted(out.rglob("*.dcm"))]


def copy(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str, **elements: Any) -> pydicom.FileDataset:
    save(tmp_path / "in" / "a", PIXELS, **elements)
    code, told = run(capsys, tmp_path / "in", tmp_path / "out", *options)
    assert code == 0, told
    (only,) = copies(tmp_path / "out")
    return only


def everything(out: Path) -> bytes:
    return b"".join(str(path).encode() + path.read_bytes() for path in out.rglob("*") if path.is_file())


def plant(data: Dataset, step: int = 1) -> int:
    """The canary in every (`step`th) public attribute of a text VR that doesn't stand there yet."""
    planted = 0
    for tag, (vr, *_) in list(DicomDictionary.items())[::step]:
        if tag >> 16 < 8 or tag & 0xFFFF == 0 or tag in data or vr not in TEXT_VRS or tag == 0x00080005:
            continue
        if tag == tag_for_keyword("BurnedInAnnotation") or tag == tag_for_keyword("ConversionType"):
            continue
        data.add(DataElement(tag, vr, CANARY))
        planted += 1
    return planted


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_planted_name_is_in_no_byte_that_comes_out(tmp_path, capsys, caplog):
    data = dataset(PIXELS, PatientID=CANARY, PatientName=CANARY, Modality="CT")
    assert plant(data) > 1500
    inner, deep = Dataset(), Dataset()
    plant(deep, 17)
    deep.ReferencedSOPInstanceUID = "1.2.3.9"
    deep.PurposeOfReferenceCodeSequence = Sequence([Dataset()])
    deep.PurposeOfReferenceCodeSequence[0].CodeValue = CANARY
    deep.PurposeOfReferenceCodeSequence[0].CodingSchemeDesignator = "DCM"
    deep.PurposeOfReferenceCodeSequence[0].CodeMeaning = CANARY
    inner.SourceImageSequence = Sequence([deep])
    plant(inner, 23)
    data.ReferencedImageSequence = Sequence([inner])  # one that stays
    data.RequestAttributesSequence = Sequence([inner])  # one that goes
    data.ImageType = ["ORIGINAL", CANARY]
    block = data.private_block(0x0029, CANARY, create=True)
    block.add_new(1, "LO", CANARY)
    block.add_new(2, "SQ", Sequence([inner]))
    deep.private_block(0x0031, CANARY, create=True).add_new(1, "OB", CANARY.encode() + b"\0")
    data.add_new(0x60000010, "US", 4)
    data.add_new(0x60000022, "LO", CANARY)
    data.add_new(0x60003000, "OW", CANARY.encode() + b"\0")
    data.add_new(0x50000030, "SH", CANARY)
    data.add_new(0x00091001, "UN", CANARY.encode() + b"\0")
    data.add_new(0x00083332, "UN", CANARY.encode() + b"\0")
    data.add_new(0xFFFCFFFC, "OB", CANARY.encode() + b"\0")
    data.PixelData += CANARY.encode() + b"\0"
    data["PixelData"].VR = "OW"
    data.preamble = CANARY.encode().ljust(128, b"\0")
    data.file_meta.SourceApplicationEntityTitle = CANARY
    data.file_meta.PrivateInformationCreatorUID = "1.2.3"
    data.file_meta.PrivateInformation = CANARY.encode() + b"\0"
    folder = tmp_path / "in" / CANARY
    folder.mkdir(parents=True)
    pydicom.dcmwrite(folder / f"{CANARY}.dcm", data, enforce_file_format=True)
    (folder / f"{CANARY}.txt").write_text(CANARY)
    (folder / f"{CANARY}_broken").write_bytes(b"\0" * 128 + b"DICM" + CANARY.encode())
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    for options in ((), ("--keep", "shifted-dates", "--keep", "characteristics")):
        code, told = run(capsys, tmp_path / "in", tmp_path / "out", *options)
        assert code == 1
        assert "1 written, 1 passed over" in told
        assert "1 refused" in told
        for said in (told, caplog.text, everything(tmp_path / "out").decode("latin-1")):
            assert CANARY.lower() not in said.lower()
    (made,) = copies(tmp_path / "out")
    assert made.PixelData == PIXELS.tobytes()
    assert made.preamble == b"\0" * 128
    assert not [element for element in made.iterall() if element.tag.is_private]
    assert made.ReferencedImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID.startswith("2.25.")


def test_codes_are_those_of_the_standard():
    """PS3.16 CID 7050, as pydicom lists it."""
    listed = {(code.value, code.meaning) for code in codes.cid7050.concepts.values()}
    assert set(CODES.values()) <= listed


def test_the_prominent_rows_of_the_standard(tmp_path, capsys):
    given = dict.fromkeys(PROMINENT, "Somebody") | {"PatientBirthDate": "19500102", "PatientSex": "F"}
    given |= {"PatientAge": "074Y", "PatientWeight": "70", "PatientSize": "1.7", "StudyTime": "101112"}
    given["OtherPatientIDsSequence"] = Sequence([Dataset()])
    made = copy(tmp_path, capsys, **given)
    for keyword, expected in PROMINENT.items():
        assert (str(made[keyword].value or "") if keyword in made else None) == expected, keyword
    assert not made.PatientBirthDate
    assert not made.PatientSex
    assert not made.StudyDate
    assert "StudyTime" in made
    for keyword in ("OtherPatientIDsSequence", "PatientAge", "PatientSize", "PatientWeight"):
        assert keyword not in made
    assert made.PatientID == made.PatientName
    assert made.PatientIdentityRemoved == "YES"
    assert made.LongitudinalTemporalInformationModified == "REMOVED"
    assert [item.CodeValue for item in made.DeidentificationMethodCodeSequence] == ["113100"]
    assert made.DeidentificationMethod
    assert made.file_meta.MediaStorageSOPInstanceUID == made.SOPInstanceUID
    assert CANARY not in str(made)


def test_the_options_may_only_keep_what_the_table_names():
    assert TABLE.keys() >= DATES
    assert TABLE.keys() >= CHARACTERISTICS
    assert all(dictionary_VR(tag) in ("DA", "DT", "TM") for tag in DATES)


def test_characteristics_are_kept_on_request(tmp_path, capsys):
    given = {"PatientAge": "097Y", "PatientSex": "F", "PatientWeight": "70", "PatientSize": "1.7"}
    made = copy(tmp_path, capsys, "--keep", "characteristics", **given)
    assert (made.PatientAge, made.PatientSex, made.PatientWeight, made.PatientSize) == ("090Y", "F", 70, 1.7)
    assert [item.CodeValue for item in made.DeidentificationMethodCodeSequence] == ["113100", "113108"]


def test_dates_of_a_patient_shift_alike(tmp_path, capsys):
    for number, (patient, day) in enumerate((("A", "20240102"), ("A", "20240310"), ("B", "20240102"))):
        given = {"SOPInstanceUID": f"1.2.3.{number}.1", "StudyInstanceUID": f"1.2.3.{number}", "PatientID": patient}
        given |= {"StudyDate": day, "AcquisitionDateTime": f"{day}101112.5+0900", "PatientBirthDate": "19500101"}
        save(tmp_path / "in" / str(number), PIXELS, SeriesInstanceUID=f"1.2.3.{number}.0", **given)
    code, _ = run(capsys, tmp_path / "in", tmp_path / "out", "--keep", "shifted-dates")
    assert code == 0
    days: dict[str, list[date]] = {}
    for made in copies(tmp_path / "out"):
        days.setdefault(made.PatientID, []).append(date.fromisoformat(made.StudyDate))
        assert made.AcquisitionDateTime == made.StudyDate + "101112.5"
        assert not made.PatientBirthDate
        assert made.LongitudinalTemporalInformationModified == "MODIFIED"
        assert [item.CodeValue for item in made.DeidentificationMethodCodeSequence] == ["113100", "113107"]
    (other,), (first, second) = sorted((sorted(found) for found in days.values()), key=len)
    assert (second - first).days == (date(2024, 3, 10) - date(2024, 1, 2)).days
    assert 1 <= (date(2024, 1, 2) - first).days <= 3650
    assert first != other


def reference(uid: str) -> Sequence:
    item = Dataset()
    item.ReferencedSOPClassUID = CTImageStorage
    item.ReferencedSOPInstanceUID = uid
    return Sequence([item])


def test_uids_are_mapped_alike_everywhere_and_by_the_secret(tmp_path, slices):
    folder = slices(3, change=lambda index: {"ReferencedImageSequence": reference("1.2.3.1.3")})
    for name, secret in (("one", "a"), ("again", "a"), ("other", "b")):
        assert deidentify(folder, tmp_path / name, secret=tmp_path / secret).num_written == 3
    made = copies(tmp_path / "one")
    assert len({item.SOPInstanceUID for item in made}) == 3
    assert len({item.StudyInstanceUID for item in made}) == 1
    (named,) = {item.ReferencedImageSequence[0].ReferencedSOPInstanceUID for item in made}
    assert named in {item.SOPInstanceUID for item in made}
    assert all(item.ReferencedImageSequence[0].ReferencedSOPClassUID == CTImageStorage for item in made)
    for item in made:
        path = Path(item.PatientID, item.StudyInstanceUID, item.SeriesInstanceUID, f"{item.SOPInstanceUID}.dcm")
        assert (tmp_path / "one" / path).is_file()
        assert UID(item.SOPInstanceUID).is_valid
    one, again, other = (everything(tmp_path / name) for name in ("one", "again", "other"))
    assert one.replace(b"/one/", b"/again/") == again
    assert not {item.SOPInstanceUID for item in made} & {item.SOPInstanceUID for item in copies(tmp_path / "other")}
    assert named.encode() not in other


def test_the_volume_is_the_same(tmp_path, slices: Callable[..., Path]):
    change = {"RescaleSlope": "2", "RescaleIntercept": "-1024", "RescaleType": "HU"}
    folder = slices(4, change=lambda index: {"SliceThickness": "2.5", **change})
    deidentify(folder, tmp_path / "out")
    before, after = (read_volume(scan(place).studies[0].series[0]) for place in (folder, tmp_path / "out"))
    np.testing.assert_array_equal(before.voxels, after.voxels)
    np.testing.assert_array_equal(before.affine, after.affine)
    assert before.units == after.units == "HU"


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_pixels_pass_through_every_encoding(tmp_path, syntax):
    values = {"PixelPaddingValue": -5, "SmallestImagePixelValue": -1, "TransferSyntaxUID": syntax}
    data = dataset(PIXELS, **values)
    (tmp_path / "in").mkdir()
    pydicom.dcmwrite(tmp_path / "in" / "a", data, enforce_file_format=True)
    assert deidentify(tmp_path / "in", tmp_path / "out").num_written == 1
    (made,) = copies(tmp_path / "out")
    assert made.file_meta.TransferSyntaxUID == syntax
    assert made.PixelData == PIXELS.tobytes()
    assert made.PixelPaddingValue == -5


def test_compressed_frames_pass_through_and_must_be_frames(tmp_path):
    for name, value in (("a", encapsulate([FRAMES[JPEG_LS]])), ("b", b"\xfe\xff\x00\xe0\x04\0\0\0nope-text!")):
        data = dataset(PIXELS, TransferSyntaxUID=JPEG_LS, SOPInstanceUID=f"1.2.3.{ord(name)}")
        data.PixelData = value
        data["PixelData"].is_undefined_length = True
        (tmp_path / "in").mkdir(exist_ok=True)
        data.save_as(tmp_path / "in" / name, enforce_file_format=True)
    done = deidentify(tmp_path / "in", tmp_path / "out")
    assert done.num_written == 1
    assert dict(done.refused) == {"damaged": 1}
    (made,) = copies(tmp_path / "out")
    assert made.PixelData == pydicom.dcmread(tmp_path / "in" / "a").PixelData


@pytest.mark.parametrize(
    "elements",
    [
        {"BurnedInAnnotation": "YES"},
        {"ConversionType": "WSD"},
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1", "Modality": "US"},
        {"OverlayRows": 4},
    ],
)
def test_burnt_in_text_is_refused_until_somebody_looked(tmp_path, capsys, elements):
    overlay = elements.pop("OverlayRows", None) if "OverlayRows" in elements else None
    data = dataset(PIXELS, **elements)
    if overlay:
        data.add_new(0x60000010, "US", overlay)
        elements["OverlayRows"] = overlay
    (tmp_path / "in").mkdir()
    data.save_as(tmp_path / "in" / "a", enforce_file_format=True)
    code, told = run(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 1
    assert "1 refused, burnt_in" in told
    assert not copies(tmp_path / "out")
    code, _ = run(capsys, tmp_path / "in", tmp_path / "out", "--pixels", "ok")
    assert code == 0
    assert len(copies(tmp_path / "out")) == 1


def test_what_cannot_be_cleaned_is_refused_and_does_not_stop_the_rest(tmp_path, capsys):
    save(tmp_path / "in" / "good", PIXELS)
    kinds = {"88.11": "document", "104.1": "document", "66.4": "unknown_object", "481.3": "unknown_object"}
    for number, tail in enumerate(kinds):
        uids = {"SOPClassUID": f"1.2.840.10008.5.1.4.1.1.{tail}", "SOPInstanceUID": f"1.2.3.8.{number}"}
        save(tmp_path / "in" / tail, PIXELS, Modality="OT", **uids)
    short = (tmp_path / "in" / "good").read_bytes()[:-20]
    (tmp_path / "in" / "short").write_bytes(short.replace(b"1.2.3.4\0", b"1.2.3.5\0"))
    code, told = run(capsys, tmp_path / "in", tmp_path / "out", "--pixels", "ok")
    assert code == 1
    assert "1 written" in told
    lines = [json.loads(line) for line in (tmp_path / "out" / "audit.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    reasons = sorted(line.get("reason", "written") for line in lines)
    assert reasons == ["document", "document", "truncated", "unknown_object", "unknown_object", "written"]


@pytest.mark.parametrize("tail", ["2.2", "4.4", "128.1", "1.2.1", "13.1.3", "20"])
def test_every_kind_of_image_is_taken(tmp_path, tail):
    save(tmp_path / "in" / "a", PIXELS, SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{tail}")
    assert deidentify(tmp_path / "in", tmp_path / "out").num_written == 1


def test_the_audit_counts_and_names_nothing(tmp_path, capsys):
    made = copy(tmp_path, capsys, InstitutionName="Charity", KVP="120", StudyDescription="Charity")
    (line,) = (tmp_path / "out" / "audit.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (told["status"], told["input"], told["instance"]) == ("written", 1, made.SOPInstanceUID)
    assert told["elements"]["uid_mapped"] == 3
    assert told["elements"]["dummy"] >= 1
    assert made.KVP == 120
    for value in ("Charity", "1.2.3", "20240102", "DOE", str(tmp_path)):
        assert value not in line


def test_the_secret_lies_beside_and_for_its_owner_alone(tmp_path, capsys):
    copy(tmp_path, capsys)
    secret = tmp_path / "out.secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert secret.read_text().strip() not in everything(tmp_path / "out").decode("latin-1")
    code, told = run(capsys, tmp_path / "in", tmp_path / "out", "--secret", tmp_path / "out" / "key")
    assert code == 2
    assert "--secret" in told
    secret.write_text("short")
    assert run(capsys, tmp_path / "in", tmp_path / "out")[0] == 2


def test_nothing_to_do_and_folders_within_each_other_are_usage(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert run(capsys, tmp_path / "in", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()
    assert run(capsys, tmp_path / "none", tmp_path / "out")[0] == 2
    assert run(capsys, tmp_path / "in", tmp_path / "in" / "out")[0] == 2
    assert run(capsys, tmp_path / "in", tmp_path / "out", "--keep", "uids")[0] == 2


def test_two_patients_in_one_study_are_refused(tmp_path):
    for number in range(2):
        save(tmp_path / "in" / str(number), PIXELS, PatientID=str(number), SOPInstanceUID=f"1.2.3.{number}")
    assert dict(deidentify(tmp_path / "in", tmp_path / "out").refused) == {"two_patients": 2}


def test_identical_files_are_passed_once_and_different_ones_refused(tmp_path, capsys):
    first = save(tmp_path / "in" / "a", PIXELS)
    (tmp_path / "in" / "b").write_bytes(first.read_bytes())
    for name, pixels in (("c", PIXELS), ("d", PIXELS + 1)):
        save(tmp_path / "in" / name, pixels, SOPInstanceUID="1.2.3.99")
    code, told = run(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 1
    assert "1 written" in told
    assert "1 passed over, the same as another file" in told
    assert "2 refused, conflicting_instance" in told
    lines = [json.loads(line) for line in (tmp_path / "out" / "audit.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["written", "skipped", "refused", "refused"]
    for name in ("c", "d"):
        (tmp_path / "in" / name).unlink()
    assert run(capsys, tmp_path / "in", tmp_path / "out")[0] == 0


def test_the_audit_is_on_the_disk_before_the_next_object(tmp_path, slices, monkeypatch):
    folder, real = slices(4), mm.dicom.deidentify.write_atomically
    seen: list[int] = []

    def write(path: Path, content: bytes) -> None:
        audit = tmp_path / "out" / "audit.jsonl"
        seen.append(len(audit.read_text().splitlines()) if audit.exists() else 0)
        if len(seen) == 4:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(mm.dicom.deidentify, "write_atomically", write)
    with pytest.raises(KeyboardInterrupt):
        deidentify(folder, tmp_path / "out", secret=tmp_path / "secret")
    assert seen[1:] == [1, 2, 3]
    lines = (tmp_path / "out" / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["written"] * 3
    assert len(copies(tmp_path / "out")) == 3


def commented(syntax: str) -> bytes:
    """A frame with the canary wherever a codestream has room for words, and behind its end."""
    frame, said = FRAMES[syntax], CANARY.encode()
    segment = struct.pack(">H", len(said) + 2) + said
    if syntax == J2K:
        comment = b"\xff\x64" + struct.pack(">HH", len(said) + 4, 1) + said
        place = frame.index(b"\xff\x52")
        return frame[:place] + comment + frame[place:] + said
    jfif = b"\xff\xe0" + struct.pack(">H", 16 + 3) + b"JFIF\0\1\1\0\0\1\0\1\1\1" + b"DOE"
    body = frame[2:] if syntax == JPEG_LS else frame[2 + 2 + struct.unpack(">H", frame[4:6])[0] :]
    extra = b"" if syntax == JPEG_LS else jfif
    return frame[:2] + extra + b"\xff\xfe" + segment + b"\xff\xe1" + segment + b"\xff\xef" + segment + body + said


@pytest.mark.parametrize("syntax", [BASELINE, LOSSLESS, JPEG_LS, J2K])
@pytest.mark.parametrize("pieces", [1, 3])
def test_comments_in_codestreams_are_blanked_and_pixels_kept(tmp_path, syntax, pieces):
    frame = commented(syntax)
    frame += b"\0" * (len(frame) % 2)
    step = -(-len(frame) // pieces) // 2 * 2 + 2
    made = of_syntax(syntax)
    made.pixels = element(
        0x7FE00010, "OB", items(*(frame[at : at + step] for at in range(0, len(frame), step))), length=0xFFFFFFFF
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(made.bytes())
    assert CANARY.encode() in made.bytes()
    assert deidentify(tmp_path / "in", tmp_path / "out").num_written == 1
    (copy_,) = (tmp_path / "out").rglob("*.dcm")
    assert CANARY.encode() not in copy_.read_bytes()
    assert b"DOE" not in copy_.read_bytes()
    before, after = (scan(place).studies[0].series[0].instances[0] for place in (tmp_path / "in", tmp_path / "out"))
    if get_decoder(syntax).is_available:
        np.testing.assert_array_equal(read_pixels(before), read_pixels(after))


def test_several_frames_each_lose_their_comments():
    frame = commented(J2K)
    value = items(frame, frame, table=struct.pack("<2L", 0, len(frame) + len(frame) % 2 + 8), end=False)
    cleaned = without_comments(value, J2K)
    assert len(cleaned) == len(value)
    assert CANARY.encode() not in cleaned
    assert cleaned.count(b"\xff\x4f\xff\x51") == 2
    assert without_comments(items(FRAMES[RLE], end=False), RLE) == items(FRAMES[RLE], end=False)
    plain = items(jpeg(np.zeros((16, 16))), end=False)
    assert without_comments(plain, BASELINE) == plain


def test_codestreams_that_cannot_be_followed_are_refused():
    for frame in (b"\xff\xd8\xff\xfe\xff\xff", b"no codestream", b"\xff\xd8text", b"\xff\xd8\xff\xfe\0\1ab"):
        with pytest.raises(FileError, match="damaged"):
            without_comments(items(frame, end=False), BASELINE)
    with pytest.raises(PixelError, match="unsupported_transfer_syntax"):
        without_comments(items(b"\0\0\1\xb3", end=False), "1.2.840.10008.1.2.4.102")


def studies_with_canaries(folder: Path, number: int) -> None:
    """One study of many: the canary in other attributes each, three levels deep, in private ones, and in its name."""
    data = dataset(PIXELS, PatientID=f"{CANARY}{number}", PatientName=CANARY, Modality="CT")
    data.StudyInstanceUID, data.SeriesInstanceUID = f"1.2.3.{number}", f"1.2.3.{number}.1"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}.1.1"
    plant(data, 7 + number % 11)
    inner = data
    for keyword in ("ReferencedImageSequence", "SourceImageSequence", "PurposeOfReferenceCodeSequence"):
        item = Dataset()
        plant(item, 41 + number % 13)
        item.private_block(0x0031, CANARY, create=True).add_new(1, "LO", CANARY)
        setattr(inner, keyword, Sequence([item]))
        inner = item
    block = data.private_block(0x0029, CANARY, create=True)
    for place, vr in enumerate(("LO", "UT", "PN", "UN", "OB"), 1):
        block.add_new(place, vr, CANARY.encode() + b"\0" if vr in ("UN", "OB") else CANARY)
    block.add_new(9, "SQ", Sequence([inner]))
    place = folder / f"{CANARY}{number}"
    place.mkdir(parents=True)
    pydicom.dcmwrite(place / f"{CANARY}.dcm", data, enforce_file_format=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_no_canary_comes_out_of_many_studies(tmp_path, capsys, caplog, count):
    for number in range(count):
        studies_with_canaries(tmp_path / "in", number)
    broken = tmp_path / "in" / f"{CANARY}_cut"
    broken.write_bytes(next((tmp_path / "in").rglob("*.dcm")).read_bytes()[:-30])
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    code, told = run(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 1
    assert f"{count - 1} written" in told or f"{count} written" in told
    made = copies(tmp_path / "out")
    assert len({item.PatientID for item in made}) == len(made) >= count - 1
    for said in (told, caplog.text, everything(tmp_path / "out").decode("latin-1")):
        assert CANARY.lower() not in said.lower()
