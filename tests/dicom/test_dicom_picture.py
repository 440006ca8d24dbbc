"""Colour, palettes and windows: by pydicom's pixels, by the formulas of the standard, and by arithmetic."""

import struct
import subprocess
from pathlib import Path
from shutil import which

import numpy as np
import pydicom
import pytest
from conftest import save
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_voi_lut, apply_windowing, pixel_array
from pydicom.uid import DigitalXRayImageStorageForPresentation, ImplicitVRLittleEndian

from mm.dicom.colour import read_colour
from mm.dicom.display import Window
from mm.dicom.errors import PixelError
from mm.dicom.header import read_header
from mm.dicom.image import read_image, read_picture, windowed
from mm.dicom.lut import palette_of
from mm.dicom.scan import scan

COLOURED = [
    "ExplVR_BigEnd.dcm",
    "SC_rgb_rle.dcm",
    "SC_rgb_rle_16bit_2frame.dcm",
    "SC_rgb_small_odd.dcm",
    "SC_rgb_small_odd_big_endian.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "examples_jpeg2k.dcm",
    "examples_palette.dcm",
    "examples_rgb_color.dcm",
    "examples_ybr_color.dcm",
    "GDCMJ2K_TextGBR.dcm",
    "SC_rgb_dcmtk_+eb+cr.dcm",
    "SC_rgb_dcmtk_+eb+cy+s2.dcm",
    "SC_rgb_gdcm_KY.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "SC_rgb_jls_lossy_line.dcm",
    "SC_rgb_jls_lossy_sample.dcm",
]


def colour_of(path, index=0):
    try:
        return read_colour(read_header(path), index)
    except PixelError as error:
        if error.reason == "missing_decoder":
            pytest.skip("no decoder installed: pip install 'mm-report[dicom]'")
        raise


@pytest.mark.parametrize("name", COLOURED)
@pytest.mark.filterwarnings("ignore")
def test_colours_are_those_of_pydicom(tmp_path, name):
    data = pydicom.dcmread(get_testdata_file(name, download=False))
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(data, keyword, data.get(keyword) or "1.2.3")
    data.save_as(tmp_path / "a")
    index = int(data.get("NumberOfFrames") or 1) - 1
    expected = pixel_array(data, index=index)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        expected = apply_color_lut(expected, data)
    expected = (expected >> 8 * (expected.dtype.itemsize - 1)).astype(np.uint8)
    np.testing.assert_array_equal(colour_of(tmp_path / "a", index), expected)


@pytest.mark.skipif(which("dcmdjpeg") is None, reason="dcmtk isn't installed")
@pytest.mark.parametrize(
    "name", ["SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_jpeg_lossy_gdcm.dcm"]
)
def test_jpeg_colours_are_those_of_dcmtk(tmp_path, name):
    path = get_testdata_file(name, download=False)
    subprocess.run(["dcmdjpeg", path, tmp_path / "plain"], check=True, capture_output=True)
    expected = pydicom.dcmread(tmp_path / "plain").pixel_array
    assert np.abs(colour_of(Path(path)).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("planar", [0, 1])
def test_planar_configuration(tmp_path, planar):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    stored = np.ascontiguousarray(np.moveaxis(rgb, 2, 0)) if planar else rgb
    path = save(
        tmp_path / "a",
        stored,
        Rows=4,
        Columns=6,
        SamplesPerPixel=3,
        PlanarConfiguration=planar,
        PhotometricInterpretation="RGB",
    )
    assert (read_picture(read_header(path)) == rgb).all()


def test_ybr_of_pure_colours(tmp_path):
    ybr = np.array([[[76, 85, 255], [150, 44, 21], [29, 255, 107], [255, 128, 128], [0, 128, 128], [128, 128, 128]]])
    path = save(
        tmp_path / "a",
        ybr.astype(np.uint8),
        Rows=1,
        Columns=6,
        SamplesPerPixel=3,
        PlanarConfiguration=0,
        PhotometricInterpretation="YBR_FULL",
    )
    rgb = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128]]
    assert np.abs(read_colour(read_header(path))[0].astype(int) - rgb).max() <= 1


def test_grey_is_no_colour_and_broken_palettes_are_refused(tmp_path):
    grey = save(tmp_path / "a", np.zeros((4, 6), np.uint8))
    with pytest.raises(PixelError, match="unsupported_pixels"):
        read_colour(read_header(grey))
    bare = save(tmp_path / "b", np.zeros((4, 6), np.uint8), PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(PixelError, match="invalid_lut"):
        read_colour(read_header(bare))


def palette(segments, number, bits=16):
    data = Dataset()
    data.PixelRepresentation = 0
    for name in ("Red", "Green", "Blue"):
        setattr(data, f"{name}PaletteColorLookupTableDescriptor", [number % 65536, 10, bits])
        setattr(data, f"Segmented{name}PaletteColorLookupTableData", segments)
    return data


def test_segmented_palettes():
    discrete = struct.pack("<4H", 0, 2, 256, 512)
    linear = struct.pack("<3H", 1, 4, 2560)
    again = struct.pack("<4H", 2, 1, len(discrete), 0)
    red, _, _ = palette_of(palette(discrete + linear + again, 10))
    assert red.lut.entries.tolist() == [256, 512, 1024, 1536, 2048, 2560, 2560, 2560, 2560, 2560]
    assert red(np.array([[0, 10, 11, 15, 99]])).tolist() == [[1, 1, 2, 10, 10]]
    eight = struct.pack("<5B", 0, 3, 7, 8, 9) + struct.pack("<3B", 1, 2, 13)
    assert palette_of(palette(eight, 5, 8))[0].lut.entries.tolist() == [7, 8, 9, 11, 13]


@pytest.mark.parametrize(
    "segments",
    [
        struct.pack("<3H", 1, 4, 2560),  # nothing to start from
        struct.pack("<4H", 2, 9, 0, 0),  # repeats itself
        struct.pack("<3H", 0, 60000, 1),  # ends early
        struct.pack("<3H", 7, 1, 1),
        struct.pack("<3H", 0, 1, 5),  # too few
    ],
)
def test_segments_that_lie_are_refused(segments):
    with pytest.raises(PixelError, match="invalid_lut"):
        palette_of(palette(segments, 100))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_are_those_of_pydicom(function):
    values = np.arange(-100, 400, dtype=np.float64).reshape(20, 25)
    data = Dataset()
    data.WindowCenter, data.WindowWidth, data.VOILUTFunction = 113, 77, function
    data.PhotometricInterpretation, data.BitsStored, data.PixelRepresentation = "MONOCHROME2", 8, 0
    expected = apply_windowing(values, data) / 255
    found = Window(113.0, 77.0, function)(values.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_window_of_one_is_a_step():
    assert Window(10.0, 1.0)(np.array([[9.4, 9.5, 9.6]], np.float32)).tolist() == [[0, 0, 1]]


DX = {"SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX", "ImageOrientationPatient": None}


def radiograph(folder, pixels, **elements):
    save(folder / "a", pixels, **{**DX, **elements})
    return read_image(scan(folder).studies[0].series[0])


def test_both_polarities_are_shown_alike(tmp_path):
    pixels = np.arange(240, dtype=np.uint8).reshape(12, 20)
    window = {"WindowCenter": [100, 50], "WindowWidth": [120, 20]}
    plain = radiograph(tmp_path / "2", pixels, **window)
    turned = radiograph(
        tmp_path / "1",
        255 - pixels,
        PhotometricInterpretation="MONOCHROME1",
        PresentationLUTShape="INVERSE",
        WindowCenter=[156, 206],  # of 255 - x, with the half that LINEAR is off
        WindowWidth=[120, 20],
    )
    assert (plain.pixels == turned.pixels).all()
    for view in range(2):
        np.testing.assert_allclose(windowed(plain, view), windowed(turned, view), atol=1e-5)
    expected = np.clip((pixels - 99.5) / 119 + 0.5, 0, 1)
    np.testing.assert_allclose(windowed(plain), expected, atol=1e-6)
    with pytest.raises(ValueError, match="view"):
        windowed(plain, 2)
    bare = radiograph(tmp_path / "3", pixels)
    assert (windowed(bare).min(), windowed(bare).max()) == (0, 1)


def words(*values):
    return np.array(values, "<u2").tobytes()


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian])
def test_voi_and_modality_tables(tmp_path, syntax):
    pixels = np.arange(24, dtype=np.uint16).reshape(4, 6)
    voi = Dataset()
    voi.LUTDescriptor, voi.LUTData = [8, 104, 12], words(0, 5, 10, 100, 1000, 2000, 3000, 4095)
    modality = Dataset()
    modality.LUTDescriptor, modality.ModalityLUTType = [16, 4, 16], "US"
    modality.LUTData = words(*range(100, 116))
    elements = {"RescaleSlope": None, "RescaleIntercept": None, "VOILUTSequence": [voi]}
    if syntax is not None:
        elements["TransferSyntaxUID"] = syntax
    image = radiograph(tmp_path / "in", pixels, ModalityLUTSequence=[modality], **elements)
    assert (image.pixels == pixels).all()  # as stored: the table is for showing
    data = pydicom.dcmread(tmp_path / "in" / "a")
    expected = apply_voi_lut(np.clip(pixels, 4, 19) + 96, data) / 4095
    np.testing.assert_allclose(windowed(image), expected, atol=1e-6)


def test_a_view_by_its_code(tmp_path):
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "399368009", "SCT", "medio-lateral oblique"
    image = radiograph(tmp_path / "in", np.zeros((4, 6), np.uint8), ViewCodeSequence=[code], ImageLaterality="L")
    assert (image.view, image.laterality) == ("MLO", "L")


def test_real_radiographs_have_something_to_show(real):
    for series in (series for study in scan(real / "chest_xray").studies for series in study.series):
        shown = windowed(read_image(series))
        assert 0 <= shown.min() < 0.3 < 0.7 < shown.max() <= 1
