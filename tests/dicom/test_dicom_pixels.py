import io

import numpy as np
import pytest
from conftest import save
from PIL import Image as Picture
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from mm.dicom.codestream import Codestream, codestream
from mm.dicom.errors import DicomError, KindError, PixelError
from mm.dicom.image import read_image
from mm.dicom.pixels import read_pixels
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume

STORED = np.arange(-12, 12, dtype=np.int16).reshape(4, 6)


def series(folder):
    return scan(folder).studies[0].series[0]


def stored(path):
    return read_pixels(series(path.parent).instances[0])


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_uncompressed_transfer_syntaxes(tmp_path, syntax):
    path = save(tmp_path / "in" / "a", STORED, TransferSyntaxUID=syntax)
    assert (stored(path) == STORED).all()


def test_big_endian(tmp_path):
    path = save(tmp_path / "in" / "a", STORED.byteswap(), TransferSyntaxUID=ExplicitVRBigEndian)
    assert (stored(path) == STORED).all()


@pytest.mark.parametrize("signed", [0, 1])
def test_bits_outside_bits_stored_are_ignored(tmp_path, signed):
    values = np.array([[0, 1, 2047, 2048, 4095, 100]] * 2, np.uint16)
    overlay = values | np.uint16(0xA000)
    path = save(tmp_path / "in" / "a", overlay, BitsStored=12, HighBit=11, PixelRepresentation=signed)
    expected = np.where(values >= 2048, values.astype(int) - 4096, values) if signed else values
    assert (stored(path) == expected).all()
    shifted = save(tmp_path / "high" / "a", values << 4, BitsStored=12, HighBit=15, PixelRepresentation=signed)
    assert (stored(shifted) == expected).all()


def test_rescale_is_applied_once_a_slice(tmp_path):
    for index, slope in enumerate((0.1, 1.0, 3.7)):
        elements = {"RescaleSlope": slope, "RescaleIntercept": -1024.5 + index, "SOPInstanceUID": f"1.{index}"}
        save(tmp_path / "in" / str(index), STORED, ImagePositionPatient=[0, 0, index], **elements)
    voxels = read_volume(series(tmp_path / "in")).voxels
    for index, slope in enumerate((0.1, 1.0, 3.7)):
        expected = (STORED.astype(np.float64) * slope - 1024.5 + index).astype(np.float32)
        assert (voxels[index] == expected).all()


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"RescaleIntercept": None}, "missing_rescale"),
        ({"RescaleSlope": 0}, "invalid_rescale"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "unsupported_pixels"),
        ({"TransferSyntaxUID": ImplicitVRLittleEndian, "BitsAllocated": 1}, "unsupported_pixels"),
    ],
)
def test_values_that_would_be_wrong_are_refused(tmp_path, elements, reason):
    for index in range(3):
        save(
            tmp_path / "in" / str(index),
            STORED,
            ImagePositionPatient=[0, 0, index],
            SOPInstanceUID=f"1.{index}",
            **elements,
        )
    with pytest.raises(DicomError) as caught:
        read_volume(series(tmp_path / "in"))
    assert caught.value.reason == reason


def test_units_are_hu_only_where_the_header_says_so(tmp_path):
    for index in range(2):
        extra = {"RescaleType": "US", "SOPInstanceUID": f"1.{index}", "ImagePositionPatient": [0, 0, index]}
        save(tmp_path / "in" / str(index), STORED, **extra)
    assert read_volume(series(tmp_path / "in")).units == "arbitrary"


DX = {"SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX", "ImageOrientationPatient": None}


def radiograph(folder, pixels, **elements):
    save(folder / "a", pixels, **{**DX, **elements})
    return read_image(series(folder))


def test_monochrome1_is_turned_so_that_bright_is_dense(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    plain = radiograph(tmp_path / "2", pixels, ViewPosition="PA")
    turned = radiograph(tmp_path / "1", 255 - pixels, PhotometricInterpretation="MONOCHROME1")
    assert (plain.pixels == pixels).all()
    assert (turned.pixels == plain.pixels).all()
    assert plain.view == "PA"
    assert plain.spacing_mm == (1.0, 1.0)


@pytest.mark.parametrize(
    ("orientation", "store"),
    [
        (["L", "F"], lambda p: p),
        (["R", "F"], lambda p: p[:, ::-1]),
        (["L", "H"], lambda p: p[::-1]),
        (["F", "L"], lambda p: p.T),
        (["H", "R"], lambda p: p[::-1, ::-1].T),
        (["A", "F"], lambda p: p),
    ],
)
def test_the_patients_left_is_on_the_right(tmp_path, orientation, store):
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6)
    stored_as = np.ascontiguousarray(store(upright))
    spacing = [0.5, 0.25] if stored_as.shape == upright.shape else [0.25, 0.5]
    image = radiograph(tmp_path / "in", stored_as, PatientOrientation=orientation, PixelSpacing=spacing)
    assert (image.pixels == upright).all()
    assert image.spacing_mm == (0.5, 0.25)


def test_a_volume_is_no_image(tmp_path):
    save(tmp_path / "in" / "a", STORED)
    with pytest.raises(KindError, match="not_an_image"):
        read_image(series(tmp_path / "in"))


def jpeg(pixels):
    stream = io.BytesIO()
    Picture.fromarray(pixels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def compressed(folder, pixels, frame, syntax):
    save(folder / "a", pixels, **DX)
    import pydicom

    data = pydicom.dcmread(folder / "a")
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([frame])
    data["PixelData"].is_undefined_length = True
    data["PixelData"].VR = "OB"
    pydicom.dcmwrite(folder / "a", data, enforce_file_format=True)
    return series(folder)


def test_jpeg_is_read_and_a_codestream_of_another_size_refused(tmp_path):
    pixels = np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8) * 2
    found = compressed(tmp_path / "good", pixels, jpeg(pixels), JPEGBaseline8Bit)
    assert np.abs(read_image(found).pixels - pixels).max() <= 8
    larger = jpeg(np.zeros((64, 96), np.uint8))
    with pytest.raises(PixelError, match="codestream_mismatch"):
        read_image(compressed(tmp_path / "bad", pixels, larger, JPEGBaseline8Bit))
    with pytest.raises(DicomError):
        read_image(compressed(tmp_path / "broken", pixels, jpeg(pixels)[:120], JPEGBaseline8Bit))
    with pytest.raises(DicomError):
        read_image(compressed(tmp_path / "rle", pixels, b"\0" * 100, RLELossless))


def test_codestream_shapes():
    assert codestream(jpeg(np.zeros((10, 20), np.uint8))) == Codestream(10, 20, 1, 8)
    for bare in (True, False):
        stream = io.BytesIO()
        Picture.fromarray(np.zeros((12, 34), np.uint8)).save(stream, "JPEG2000", no_jp2=bare)
        found = codestream(stream.getvalue())
        assert found is not None
        assert (found.rows, found.columns) == (12, 34)
    assert codestream(b"") is None
    assert codestream(b"\xff\xd8\xff\xe0") is None


JLS_HEAD = b"\xff\xd8\xff\xf7\x00\x0b\x08\x00\x04\x00\x06\x01\x01\x11\x00"


def test_a_missing_decoder_names_the_extra(tmp_path, monkeypatch):
    pixels = np.zeros((4, 6), np.uint8)
    found = compressed(tmp_path / "in", pixels, JLS_HEAD, JPEGLSLossless)

    monkeypatch.setattr("mm.dicom.codecs.is_installed", lambda _: False)
    with pytest.raises(PixelError, match=r"pip install 'mm-report\[dicom\]'"):
        read_image(found)
