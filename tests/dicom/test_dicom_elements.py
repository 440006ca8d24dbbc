"""Our own header walk against pydicom's: on real files, on damaged ones and on odd encodings."""

import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import dataset, save
from pydicom.data.data_manager import DATA_ROOT
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from mm.dicom.elements import WINDOW
from mm.dicom.errors import FileError
from mm.dicom.header import parse_header, read_header, walk_header
from mm.dicom.instance import Instance
from mm.dicom.siblings import Siblings

PIXELS = np.zeros((4, 6), np.int16)


def outcome(read, *args) -> Instance | str:
    """The instance, or the reason that there is none."""
    try:
        return read(*args)
    except FileError as error:
        return error.reason


def check(path: Path, siblings: Siblings | None = None) -> bool:
    """Both ways tell the same; returns whether the walk alone was enough."""
    expected = outcome(parse_header, path)
    walked = outcome(walk_header, path, siblings)
    assert walked is None or walked == expected
    assert outcome(read_header, path, siblings) == expected
    return walked is not None


def test_every_test_file_of_pydicom():
    files = [path for path in sorted(Path(DATA_ROOT).rglob("*")) if path.is_file()]
    assert len(files) > 50
    siblings = Siblings()
    for path in files:
        check(path, siblings)


def test_every_real_file(real):
    siblings = Siblings()
    walked = [check(path, siblings) for path in sorted(real.rglob("*")) if path.is_file()]
    assert sum(walked) > 0.9 * len(walked)


def sequences(explicit_length: bool) -> dict:
    """A nested sequence, with lengths or with delimiters."""
    inner, outer = Dataset(), Dataset()
    inner.SeriesInstanceUID = "9.9"  # of another series: must not be taken for this one's
    inner.is_undefined_length_sequence_item = not explicit_length
    outer.ReferencedInstanceSequence = Sequence([inner, Dataset()])
    outer["ReferencedInstanceSequence"].is_undefined_length = not explicit_length
    outer.is_undefined_length_sequence_item = not explicit_length
    return {"ReferencedSeriesSequence": Sequence([outer, inner])}


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian])
@pytest.mark.parametrize("explicit_length", [True, False])
def test_nested_sequences_are_skipped(tmp_path, syntax, explicit_length):
    elements = sequences(explicit_length) | ({"TransferSyntaxUID": syntax} if syntax else {})
    data = dataset(PIXELS, **elements)
    data["ReferencedSeriesSequence"].is_undefined_length = not explicit_length
    data.save_as(tmp_path / "a", enforce_file_format=True)
    assert check(tmp_path / "a")
    assert walk_header(tmp_path / "a").series_instance_uid == "1.2.3.1"


@pytest.mark.parametrize(
    ("elements", "walked"),
    [
        ({"PatientID": "", "RescaleSlope": None, "Manufacturer": None}, True),
        ({"ImagePositionPatient": None, "SliceThickness": ""}, True),
        ({"SpecificCharacterSet": "ISO_IR 192", "PatientID": "A1"}, True),
        ({"SpecificCharacterSet": "ISO_IR 192", "PatientID": "\u738b\u5c0f"}, False),
        ({"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientID": "A1"}, True),
        ({"ImageComments": "x" * 9000}, True),
        ({"TextValue": "x" * 3 * WINDOW}, True),
        ({"ConvolutionKernel": ["H30s", "3"], "PatientOrientation": ["L", "P"]}, True),
        ({"TransferSyntaxUID": ImplicitVRLittleEndian}, True),
    ],
)
def test_odd_values(tmp_path, elements, walked):
    assert check(save(tmp_path / "a", PIXELS, **elements)) is walked


def test_what_is_left_to_pydicom(tmp_path):
    raw = save(tmp_path / "a", PIXELS, ImageComments="x").read_bytes()
    start = raw.index(b"\x08\x00\x08\x00")
    (tmp_path / "bare").write_bytes(raw[start:])
    (tmp_path / "odd").write_bytes(raw.replace(b"LT\x02\x00", b"XX\x02\x00"))
    (tmp_path / "number").write_bytes(raw.replace(b"1.0\\1.0", b"1.0\\x.0"))
    (tmp_path / "big").write_bytes(raw.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0", 1))
    assert ExplicitVRBigEndian == "1.2.840.10008.1.2.2"
    for name in ("bare", "odd", "number", "big"):
        assert (tmp_path / name).read_bytes() != raw
        assert not check(tmp_path / name), name


@pytest.mark.parametrize("depth", [10, 60, 70, 50_000])
def test_sequences_nest_to_a_cap(tmp_path, depth):
    raw = save(tmp_path / "a", PIXELS).read_bytes()
    start = raw.index(b"\x08\x00\x08\x00")
    opened = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    closed = struct.pack("<HHLHHL", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    (tmp_path / "deep").write_bytes(raw[:start] + opened * depth + closed * depth + raw[start:])
    if depth < 64:
        assert check(tmp_path / "deep")
        return
    with pytest.raises(FileError, match=r"damaged.*depth"):
        read_header(tmp_path / "deep")


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian])
def test_mutated_bytes_tell_the_same_both_ways(tmp_path, syntax):
    elements = sequences(explicit_length=False) | ({"TransferSyntaxUID": syntax} if syntax else {})
    data = dataset(PIXELS, SpecificCharacterSet="ISO_IR 100", PixelPaddingValue=0, **elements)
    data["ReferencedSeriesSequence"].is_undefined_length = True
    data.save_as(tmp_path / "good", enforce_file_format=True)
    good = (tmp_path / "good").read_bytes()
    rng = random.Random(0)
    siblings = Siblings()
    for index in range(400):
        raw = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 8])):
            raw[rng.randrange(132, len(raw))] = rng.choice([rng.randrange(256), 0, 0xFF, 0x20, ord("\\")])
        (tmp_path / "x").write_bytes(raw[: rng.randrange(132, len(raw))] if index % 8 == 0 else raw)
        check(tmp_path / "x", siblings)
        check(tmp_path / "good", siblings)


def test_slices_of_one_series_are_read_from_what_they_share(tmp_path, monkeypatch):
    paths = []
    for series in range(3):
        for index in range(12):
            elements = {
                "SOPInstanceUID": f"1.2.{series}.{10**index}",
                "SeriesInstanceUID": f"1.3.{series}",
                "ImagePositionPatient": [0, -1.25, 3.5 * index],
                "InstanceNumber": index,
                "SliceLocation": 10**index / 7,
                "RescaleSlope": 1 + index / 8,
                "ConvolutionKernel": "SOFT" if series else "BONE",
                **(sequences(explicit_length=False) if series == 2 else {}),
            }
            paths.append(save(tmp_path / f"{series}_{index}", PIXELS, **elements))
    for seed in (0, 1):  # series by series, then mixed
        random.Random(seed).shuffle(paths) if seed else paths.sort()
        siblings = Siblings()
        assert [read_header(path, siblings) for path in paths] == [parse_header(path) for path in paths]
        with monkeypatch.context() as patch:
            patch.setattr("mm.dicom.header.walk", lambda *_: None)  # whoever needs it is left to pydicom
            known = sum(walk_header(path, siblings) is not None for path in paths)
        assert known > len(paths) / 2


def test_one_other_byte_between_siblings_is_seen(tmp_path):
    siblings = Siblings()
    for index in range(4):
        check(save(tmp_path / str(index), PIXELS, SOPInstanceUID=f"1.4.{index}"), siblings)
    raw = (tmp_path / "3").read_bytes()
    header = raw.index(b"\xe0\x7f\x10\x00") + 12
    for position in range(132, header):
        changed = bytearray(raw)
        changed[position] ^= 0x11
        (tmp_path / "x").write_bytes(changed)
        check(tmp_path / "x", siblings)


@pytest.mark.parametrize("longer", [100, 3000, 3 * WINDOW])
def test_a_longer_header_beside_short_ones_needs_no_other_reader(tmp_path, longer):
    siblings = Siblings()
    for index in range(12):
        described = {"TextValue": "x" * longer} if index % 4 == 3 else {}
        path = save(tmp_path / str(index), PIXELS, SOPInstanceUID=f"1.4.{index}", **described)
        assert check(path, siblings)


def test_nothing_is_kept_open(tmp_path):
    path = save(tmp_path / "a", PIXELS)
    shutil.copy(path, tmp_path / "b")
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    for _ in range(20):
        read_header(path)
    after = len(list(Path("/proc/self/fd").iterdir())) if before else 0
    assert after <= before
