"""The fast way into memory against the slow one: equal to the bit, and equal in what is refused."""

import numpy as np
import pytest
from conftest import save
from pydicom.uid import ImplicitVRLittleEndian

from mm.dicom import planes
from mm.dicom.errors import DicomError
from mm.dicom.header import read_header
from mm.dicom.instance import Frame
from mm.dicom.pixels import read_pixels, rescaled
from mm.dicom.planes import fill
from mm.dicom.scan import scan

RNG = np.random.default_rng(0)


def slowly(frames) -> np.ndarray:
    first = frames[0].instance
    out = np.empty((len(frames), first.rows, first.columns), np.float32)
    for frame, plane in zip(frames, out, strict=True):
        rescaled(frame, read_pixels(frame.instance, frame.index), plane)
    return out


def fast(frames, monkeypatch) -> np.ndarray:
    """Through `fill`, with the slow way out of reach."""
    first = frames[0].instance
    out = np.empty((len(frames), first.rows, first.columns), np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(planes, "read_planes", lambda *_: pytest.fail("took the slow way"))
        fill(out, frames)
    return out


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize(
    ("kind", "elements"),
    [
        ("int16", {}),
        ("int16", {"RescaleSlope": 1, "RescaleIntercept": -1024}),
        ("uint16", {"RescaleSlope": 0.1, "RescaleIntercept": -0.3}),
        ("int16", {"BitsStored": 12, "HighBit": 11}),
        ("uint16", {"BitsStored": 12, "HighBit": 13, "RescaleSlope": 2.5}),
        ("uint8", {"RescaleIntercept": 0.5}),
        ("int32", {"RescaleSlope": 1e-3}),
        ("uint32", {"BitsStored": 20, "HighBit": 19}),
    ],
)
def test_every_kind_of_pixel(tmp_path, monkeypatch, kind, elements, implicit):
    frames = []
    for index in range(5):
        whole = np.iinfo(kind)
        pixels = RNG.integers(whole.min, whole.max, (7, 5), dtype=kind, endpoint=True)
        syntax = {"TransferSyntaxUID": ImplicitVRLittleEndian} if implicit else {}
        frames.append(read_header(save(tmp_path / str(index), pixels, **elements, **syntax)).frame)
    np.testing.assert_array_equal(fast(frames, monkeypatch).view(np.int32), slowly(frames).view(np.int32))


def test_frames_of_one_file_and_planes_larger_than_the_buffer(tmp_path, monkeypatch):
    pixels = RNG.integers(-1000, 1000, (30, 20), dtype=np.int16)
    instance = read_header(save(tmp_path / "a", pixels, Rows=10, NumberOfFrames=3))
    frames = [Frame(instance, index, None, None, None, 1.0, float(index)) for index in (2, 0, 1)]
    expected = np.stack([pixels.reshape(3, 10, 20)[frame.index] + frame.index for frame in frames])
    for size in (512 << 10, 100, 1):  # all rows at once, two at a time, one
        monkeypatch.setattr(planes, "BUFFER_BYTES", size)
        np.testing.assert_array_equal(fast(frames, monkeypatch), expected)


def test_a_file_that_changed_since_the_scan_is_refused_by_its_number(tmp_path):
    paths = [save(tmp_path / str(index), np.zeros((4, 6), np.int16)) for index in range(6)]
    frames = [read_header(path).frame for path in paths]
    whole = paths[4].read_bytes()
    out = np.empty((6, 4, 6), np.float32)
    for content, reason in (
        (whole[:-10], "truncated"),
        (whole[:-60], "changed"),
        (b"", "changed"),
        (whole.replace(b"\xe0\x7f\x10\x00", b"\xe0\x7f\x11\x00"), "changed"),
    ):
        paths[4].write_bytes(content)
        with pytest.raises(DicomError, match="slice 5 of 6") as caught:
            fill(out, frames)
        assert caught.value.reason == reason
    paths[2].unlink()
    with pytest.raises(DicomError, match="slice 3 of 6") as caught:
        fill(out, frames)
    assert caught.value.reason == "unreadable"


def test_what_is_no_plain_greyscale_is_refused(tmp_path):
    frame = read_header(save(tmp_path / "a", np.zeros((4, 6), np.int16), PhotometricInterpretation="RGB")).frame
    with pytest.raises(DicomError, match="unsupported_pixels"):
        fill(np.empty((1, 4, 6), np.float32), [frame])
    frame = read_header(save(tmp_path / "b", np.zeros((4, 6), np.int16), RescaleSlope=0)).frame
    with pytest.raises(DicomError, match="invalid_rescale"):
        fill(np.empty((1, 4, 6), np.float32), [frame])


def test_every_real_volume_is_equal_both_ways(real):
    compared = 0
    for folder in ("LIDC-IDRI-0001", "dicom2nifti/generic/anatomical", "dicom2nifti/failing", "dcm_qa_ts"):
        for study in scan(real / folder).studies:
            for series in study.series:
                frames = [item.frame for item in series.instances]
                try:
                    expected = slowly(frames)
                except DicomError:
                    continue
                out = np.empty_like(expected)
                fill(out, frames)
                np.testing.assert_array_equal(out.view(np.int32), expected.view(np.int32))
                compared += 1
    assert compared >= 6


def test_planes_of_single_bits(tmp_path):
    bits = RNG.integers(0, 2, (3, 8, 16), dtype=np.uint8)
    packed = {"Rows": 8, "Columns": 16, "BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
    for z, plane in enumerate(bits):
        own = {"SOPInstanceUID": f"1.2.3.1.{z}", "ImagePositionPatient": [0, 0, 2 * z]}
        save(tmp_path / str(z), np.packbits(plane, bitorder="little").reshape(1, -1), **packed, **own)
    out = np.empty(bits.shape, np.float32)
    fill(out, scan(tmp_path).studies[0].series[0].frames)
    np.testing.assert_array_equal(out, bits)
