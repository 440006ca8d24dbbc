import json
import logging
import os
import random
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import pydicom
import pytest
from conftest import SECRET, dataset, save
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from mm.dicom.errors import REASONS, DicomError, FileError, GeometryError, KindError, Reason
from mm.dicom.listing import scan_json, scan_table
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume

PIXELS = np.zeros((4, 6), np.int16)
CR = UID("1.2.840.10008.5.1.4.1.1.1")


def only(folder):
    found = scan(folder)
    assert len(found.studies) == 1, found
    assert len(found.studies[0].series) == 1, found
    return found.studies[0].series[0]


def reasons(folder):
    return sorted(item.reason for item in scan(folder).rejected)


def test_slices_are_sorted_on_the_normal_whatever_the_file_names(slices, tmp_path):
    folder = slices(6)
    series = only(folder)
    volume = read_volume(series)
    assert volume.voxels[:, 0, 0].tolist() == [0, 100, 200, 300, 400, 500]
    assert volume.sop_instance_uids == tuple(f"1.2.3.1.{6 - i}" for i in range(6))
    assert volume.affine[:3, 0] == pytest.approx([0, 0, 2.5])
    assert volume.units == "HU"
    names = sorted(folder.iterdir())
    new = list(range(6))
    random.Random(3).shuffle(new)
    for name, number in zip(names, new, strict=True):
        target = tmp_path / "again" / f"sub{number % 2}" / f"{number}.dcm"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, target)
    again = read_volume(only(tmp_path / "again"))
    assert again.sop_instance_uids == volume.sop_instance_uids
    assert (again.voxels == volume.voxels).all()


def test_the_affine_follows_orientation_and_spacing(slices):
    def change(index):
        orientation = [0, 1, 0, 0, 0, -1]  # rows to the back, columns to the feet; the normal points right
        return {
            "ImageOrientationPatient": orientation,
            "ImagePositionPatient": [50 - 3 * index, 7, 9],
            "PixelSpacing": [0.5, 0.25],
        }

    volume = read_volume(only(slices(4, change=change)))
    np.testing.assert_allclose(volume.affine[:3, :3], np.array([[-3, 0, 0], [0, 0, 0.25], [0, -0.5, 0]]))
    np.testing.assert_allclose(volume.to_mm((0.0, 0.0, 0.0)), (50, 7, 9))
    assert volume.spacing_mm == pytest.approx((3, 0.5, 0.25))


def at(index, z, y=0.0):
    return lambda i: {"ImagePositionPatient": [0, y, z]} if i == index else {}


TILT = np.deg2rad(20)


@pytest.mark.parametrize(
    ("reason", "place", "change"),
    [
        ("missing_slice", "between slice 5 and 6 of 6", at(5, 15.0)),
        ("duplicate_position", "between slice 3 and 4 of 6", at(3, 5.0)),
        ("uneven_spacing", "between slice 5 and 6 of 6", at(5, 13.4)),
        ("shifted_slice", "slice 3 of 6", at(2, 5.0, 4.0)),
        ("gantry_tilt", "", lambda i: {"ImageOrientationPatient": [1, 0, 0, 0, np.cos(TILT), -np.sin(TILT)]}),
        ("invalid_orientation", "", lambda i: {"ImageOrientationPatient": [0] * 6}),
        ("invalid_orientation", "", lambda i: {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}),
        ("missing_geometry", "", lambda i: {"ImageOrientationPatient": None}),
        ("missing_geometry", "", lambda i: {"PixelSpacing": None}),
        ("missing_geometry", "", lambda i: {"ImagePositionPatient": None} if i == 2 else {}),
        ("invalid_spacing", "", lambda i: {"PixelSpacing": [0, 0]}),
        ("mosaic", "", lambda i: {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}),
        ("localizer", "", lambda i: {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
        ("unsupported_pixels", "", lambda i: {"BitsStored": 17}),
    ],
)
def test_irregular_stacks_are_refused_with_reason_and_place(slices, reason, place, change):
    series = only(slices(6, change=change))
    assert (series.refused, series.place) == (reason, place)
    with pytest.raises(DicomError) as caught:
        read_volume(series)
    assert caught.value.reason == reason
    assert REASONS[reason] in str(caught.value)


def test_regular_enough_stacks_are_read(slices):
    rounded = only(slices(9, change=lambda i: {"ImagePositionPatient": [0, 0, round(0.625 * i, 1)]}))
    assert rounded.refused is None
    assert rounded.spacing_mm[0] == pytest.approx(0.625, abs=0.01)
    backwards = only(slices(5, change=lambda i: {"ImagePositionPatient": [0, 0, -2.5 * i]}, folder="back"))
    assert read_volume(backwards).voxels[:, 0, 0].tolist() == [400, 300, 200, 100, 0]


def test_one_slice_is_no_volume(tmp_path):
    save(tmp_path / "in" / "a", PIXELS)
    series = only(tmp_path / "in")
    assert series.refused == "single_slice"
    with pytest.raises(GeometryError, match="single_slice"):
        read_volume(series)


def test_a_series_is_split_by_orientation_and_size(slices):
    folder = slices(5)
    for index in range(3):
        coronal = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "ImagePositionPatient": [0, index, 0]}
        save(folder / f"c{index}", PIXELS, SOPInstanceUID=f"1.9.{index}", **coronal)
    save(folder / "large", np.zeros((8, 8), np.int16), SOPInstanceUID="1.9.9")
    parts = scan(folder).studies[0].series
    assert [(part.part, part.num_slices, part.refused) for part in parts] == [
        (0, 5, None),
        (1, 3, None),
        (2, 1, "single_slice"),
    ]


def test_studies_series_and_patients_are_kept_apart(slices, tmp_path):
    folder = slices(3)
    other = {"StudyInstanceUID": "1.3", "SeriesInstanceUID": "1.3.1", "PatientID": "B"}
    save(folder / "x", PIXELS, SOPInstanceUID="1.3.1.1", **other)
    assert [study.patient_id for study in scan(folder).studies] == [SECRET, "B"]
    save(folder / "y", PIXELS, SOPInstanceUID="1.2.3.9", PatientID="B")
    found = scan(folder)
    assert [study.study_instance_uid for study in found.studies] == ["1.3"]
    assert [item.reason for item in found.rejected] == ["two_patients"] * 4
    save(folder / "y", PIXELS, SOPInstanceUID="1.2.3.1.1", PatientID="B")  # hidden behind a known SOPInstanceUID
    assert reasons(folder) == ["conflicting_instance"] * 2 + ["two_patients"] * 2


@pytest.mark.parametrize(
    ("uid", "modality", "kind"),
    [
        ("1.2.840.10008.5.1.4.1.1.88.33", "SR", "document"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "DOC", "document"),
        ("1.2.840.10008.5.1.4.1.1.66.4", "SEG", "segmentation"),
        ("1.2.840.10008.5.1.4.1.1.7", "OT", "secondary_capture"),
        ("1.2.840.10008.5.1.4.1.1.7", "CR", "image"),
        ("1.2.840.10008.5.1.4.1.1.1.1", "DX", "image"),
        ("1.2.840.10008.5.1.4.1.1.11.1", "PR", "presentation"),
        ("1.2.840.10008.5.1.4.1.1.7.2", "OT", "multiframe"),
        ("1.2.840.10008.5.1.4.1.1.3.1", "US", "multiframe"),
        ("1.2.840.10008.5.1.4.1.1.12.1", "XA", "multiframe"),
        ("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT", "other"),
    ],
)
def test_kinds(tmp_path, uid, modality, kind):
    save(tmp_path / "in" / "a", PIXELS, SOPClassUID=UID(uid), Modality=modality)
    series = only(tmp_path / "in")
    assert series.kind == kind
    if kind != "image":
        assert series.refused is not None
    with pytest.raises(KindError):
        read_volume(series)


def test_an_empty_patient_id_is_no_second_patient(slices):
    folder = slices(change=lambda z: {"PatientID": ""} if z == 0 else {})
    found = scan(folder)
    assert found.rejected == ()
    assert len(found.studies) == 1
    assert found.studies[0].patient_id != ""


@pytest.mark.parametrize("cut", [-10, 700])
def test_a_broken_file_breaks_its_series(slices, cut):
    folder = slices()
    first = next(iter(sorted(folder.iterdir())))
    first.write_bytes(first.read_bytes()[:cut])
    found = scan(folder)
    (rejected,) = found.rejected
    (series,) = found.studies[0].series
    assert rejected.series_instance_uid == series.series_instance_uid
    assert series.refused == "broken_slice"
    assert series.series_instance_uid not in repr(found)
    with pytest.raises(DicomError, match="broken_slice"):
        read_volume(series)


def test_files_that_are_not_read(tmp_path):
    folder = tmp_path / "in"
    good = save(folder / "noSuffix", PIXELS)
    shutil.copy(good, folder / "second.dcm")
    (folder / "note.txt").write_text("nothing")
    (folder / "empty").touch()
    shutil.copy(good, folder / "DICOMDIR")
    (folder / "program").write_bytes(b"MZ" + good.read_bytes()[2:])
    (folder / "cut").write_bytes(good.read_bytes()[:-20])
    os.mkfifo(folder / "pipe")
    save(folder / "id", PIXELS, SOPInstanceUID="1.2.5", SeriesInstanceUID=None)
    found = {item.path.name: item.reason for item in scan(folder).rejected}
    assert found == {
        "second.dcm": "duplicate_instance",
        "note.txt": "not_dicom",
        "empty": "not_dicom",
        "DICOMDIR": "dicomdir",
        "program": "executable",
        "cut": "truncated",
        "pipe": "not_dicom",
        "id": "missing_element",
    }
    assert only(folder).files == (good,)


def test_a_bare_data_set_is_read(tmp_path):
    whole = save(tmp_path / "whole", PIXELS, TransferSyntaxUID=ImplicitVRLittleEndian).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bare").write_bytes(whole[whole.index(b"\x08\x00\x08\x00") :])
    assert only(tmp_path / "in").instances[0].transfer_syntax_uid == ImplicitVRLittleEndian


def element(group, number, vr, value, length=None):
    length = len(value) if length is None else length
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
        return struct.pack("<HH2sHL", group, number, vr, 0, length) + value
    return struct.pack("<HH2sH", group, number, vr, length) + value


def meta(uid):
    body = element(2, 0x10, b"UI", uid.encode() + b"\0" * (len(uid) % 2))
    return b"\0" * 128 + b"DICM" + element(2, 0, b"UL", struct.pack("<L", len(body))) + body


EXPLICIT = "1.2.840.10008.1.2.1"


def test_hostile_files_are_refused_in_bounded_memory(tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    nested = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    (folder / "deep").write_bytes(meta(EXPLICIT) + nested * 50_000)
    lie = element(0x0008, 0x0016, b"UI", b"1.2.840.10008.5.1.4.1.1.2\0") + element(
        0x0010, 0x0020, b"UN", b"x", 0xFFFFFFF0
    )
    (folder / "lie").write_bytes(meta(EXPLICIT) + lie)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    inner = save(tmp_path / "plain", PIXELS).read_bytes()
    inner = inner[inner.index(b"\x08\x00\x08\x00") :]
    bomb = packer.compress(inner) + b"".join(packer.compress(b"\0" * (1 << 20)) for _ in range(64)) + packer.flush()
    (folder / "bomb").write_bytes(meta(str(DeflatedExplicitVRLittleEndian)) + bomb)
    save(folder / "huge", PIXELS, Rows=60_000, Columns=60_000, SOPInstanceUID="1.7")
    save(folder / "path", PIXELS, SOPInstanceUID="1.8")
    raw = (folder / "path").read_bytes().replace(b"1.2.3.1\0", b"../../x\0")
    (folder / "path").write_bytes(raw)
    (folder / "text_number").write_bytes(
        save(tmp_path / "n", PIXELS, SOPInstanceUID="1.9", RescaleSlope="77").read_bytes().replace(b"77", b"JD")
    )
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        found = scan(folder)
    assert {item.path.name: item.reason for item in found.rejected} == {
        "bomb": "expansion",
        "deep": "damaged",
        "huge": "too_many_pixels",
        "lie": "missing_element",
        "path": "invalid_uid",
        "text_number": "damaged",
    }
    assert caught == []
    assert caplog.records == []


def test_random_damage_never_escapes(tmp_path):
    data = dataset(PIXELS, ReferencedImageSequence=Sequence([Dataset()]))
    data.save_as(tmp_path / "good", enforce_file_format=True)
    good = (tmp_path / "good").read_bytes()
    rng = random.Random(0)
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(150):
        raw = bytearray(good)
        for _ in range(rng.choice([1, 4, 16])):
            raw[rng.randrange(132, len(raw))] = rng.randrange(256)
        (folder / str(index)).write_bytes(raw[: rng.randrange(100, len(raw))] if index % 3 == 0 else raw)
    for study in scan(folder).studies:
        for series in study.series:
            try:
                read_volume(series)
            except DicomError as error:
                assert error.reason in REASONS  # noqa: PT017


def test_nothing_names_the_patient(slices):
    folder = slices(4, change=at(3, 11.0))
    found = scan(folder)
    shown = [scan_table(found), json.dumps(scan_json(found)), repr(found)]
    with pytest.raises(DicomError) as caught:
        read_volume(found.studies[0].series[0])
    shown.append(str(caught.value))
    for text in shown:
        for secret in (SECRET, "DOE", "1.2.3", "20240102"):
            assert secret not in text
    assert scan_json(found)["studies"][0]["series"][0]["refused"] == "uneven_spacing"
    assert "uneven_spacing" in shown[0]


def test_the_table_names_refused_files(tmp_path):
    folder = tmp_path / "in"
    whole = save(folder / "a", PIXELS).read_bytes()
    (folder / "cut").write_bytes(whole[:-4])
    table = scan_table(scan(folder))
    assert "single_slice" in table
    assert "cut (pixels)" in table
    (tmp_path / "nothing").mkdir()
    assert scan_table(scan(tmp_path / "nothing")) == "no DICOM series"


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(ValueError, match="folder must be"):
        scan(tmp_path / "no")


def test_every_reason_is_explained_and_documented():
    assert set(REASONS) == set(get_args(Reason))
    page = (Path(__file__).parents[2] / "docs" / "dicom.md").read_text()
    assert all(f"`{reason}`" in page for reason in REASONS)


def test_the_table_escapes_what_a_terminal_would_obey(slices):
    folder = slices(2)
    whole = next(folder.iterdir()).read_bytes()
    (folder / os.fsdecode(b"a\xff\x1b[31m\n.dcm")).write_bytes(whole[:-8])
    table = scan_table(scan(folder))
    assert table.encode().count(rb"a\udcff\x1b[31m\n.dcm") == 1


def test_an_error_carries_its_code():
    error = FileError("truncated", "pixels")
    assert error.reason == "truncated"
    assert str(error) == "truncated: it ends before its elements or pixels do (pixels)"


def test_copies_are_kept_once_and_other_content_under_one_uid_not_at_all(slices, tmp_path):
    folder = slices(6)
    paths = sorted(folder.iterdir())
    shutil.copy(paths[0], folder / "zz")
    (folder / "0first").write_bytes(b"other" + paths[1].read_bytes()[5:])  # another preamble is no other content
    found = scan(folder)
    assert [(item.path.name, item.reason) for item in found.rejected] == [
        (paths[1].name, "duplicate_instance"),
        ("zz", "duplicate_instance"),
    ]
    assert found.studies[0].series[0].refused is None
    raw = bytearray(paths[2].read_bytes())
    raw[-1] ^= 1
    for name in ("after", "before"):
        target = tmp_path / name
        shutil.copytree(folder, target)
        (target / ("~" if name == "after" else "!")).write_bytes(raw)
        found = scan(target)
        reasons = sorted(item.reason for item in found.rejected)
        assert reasons == ["conflicting_instance"] * 2 + ["duplicate_instance"] * 2
        (series,) = found.studies[0].series
        assert (series.refused, series.num_slices) == ("broken_slice", 5)


def test_another_place_under_one_uid_is_a_conflict(slices):
    folder = slices(4)
    save(folder / "x", np.zeros((4, 6), np.int16), SOPInstanceUID="1.2.3.1.4", ImagePositionPatient=[0, 0, 77])
    assert reasons(folder) == ["conflicting_instance"] * 2


def test_files_and_folders_may_be_listed(slices, tmp_path):
    folder = slices(5)
    paths = sorted(folder.iterdir())
    other = save(tmp_path / "other" / "a", PIXELS, SOPInstanceUID="1.9", SeriesInstanceUID="1.9.1")
    told = []
    found = scan([*paths[3:], folder, other, paths[0]], lambda *numbers: told.append(numbers))
    assert found.folder == tmp_path
    assert [series.num_slices for series in found.studies[0].series] == [5, 1]
    assert found.rejected == ()
    assert told == [(number, 6) for number in range(1, 7)]
    for nothing in ([], [tmp_path / "no"]):
        with pytest.raises(ValueError, match="must exist"):
            scan(nothing)


@pytest.mark.parametrize(("noise", "reason"), [(0, "duplicate_instance"), (1, "conflicting_instance")])
def test_a_lossless_copy_in_another_transfer_syntax_is_a_duplicate(slices, noise, reason):
    folder = slices(3)
    for path in sorted(folder.iterdir()):
        data = pydicom.dcmread(path)
        data.PixelData = (data.pixel_array + noise).astype(data.pixel_array.dtype).tobytes()
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(folder / f"copy_{path.name}")
    assert reasons(folder) == [reason] * (6 if noise else 3)


def test_a_folder_that_cannot_be_listed_is_told(slices, monkeypatch):
    folder = slices(3)
    (folder / "closed").mkdir()
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = scan(folder)
    assert [(item.path.name, item.reason) for item in found.rejected] == [("closed", "unreadable")]
    assert found.studies[0].series[0].refused is None
