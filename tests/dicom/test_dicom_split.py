"""Which images of a series become which volume."""

import json
import random
import shutil

import numpy as np
import pytest
from conftest import save

from mm.dicom.errors import DicomError
from mm.dicom.listing import scan_json
from mm.dicom.resample import Grid, resample
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume

MR = "1.2.840.10008.5.1.4.1.1.4"
PLACES = 4


def write(folder, images):
    """Images of (place, elements); a pixel holds 100 * place + how many came before in that place."""
    seen = {}
    for number, (place, elements) in enumerate(images):
        copy = seen[place] = seen.get(place, -1) + 1
        values = {
            "SOPClassUID": MR,
            "Modality": "MR",
            "ImageType": ["ORIGINAL", "PRIMARY", "M"],
            "SOPInstanceUID": f"1.2.3.9.{(number * 37) % 997 + 1}",
            "ImagePositionPatient": [0, 0, 2.5 * place],
            **elements,
        }
        save(folder / f"f{number}", np.full((4, 6), 100 * place + copy, np.int16), **values)
    return folder


def parts(folder):
    (study,) = scan(folder).studies
    return study.series


def values(series):
    return read_volume(series).voxels[:, 0, 0].tolist()


def four_d(key, given):
    """Every place once for each value, place after place."""
    return [(place, {key: value} if value is not None else {}) for place in range(PLACES) for value in given]


@pytest.mark.parametrize(
    ("key", "given", "told"),
    [
        ("EchoNumbers", [1, 2, 3], ["echo 1", "echo 2", "echo 3"]),
        ("EchoTime", [4.6, 9.2], ["TE 4.6 ms", "TE 9.2 ms"]),
        ("DiffusionBValue", [0.0, 1000.0], ["b 0", "b 1000"]),
        ("DiffusionGradientOrientation", [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], ["direction 1", "direction 2"]),
        ("InversionTime", [100, 900], ["TI 100 ms", "TI 900 ms"]),
        ("FlipAngle", [3, 15], ["flip angle 3", "flip angle 15"]),
        ("TemporalPositionIdentifier", [1, 2, 3], ["time 1", "time 2", "time 3"]),
        ("FrameReferenceTime", [500, 1500], ["time 1", "time 2"]),
        ("NominalPercentageOfCardiacPhase", [10.0, 60.0], ["cardiac phase 1", "cardiac phase 2"]),
        ("TriggerTime", [0, 40, 80], ["trigger 0 ms", "trigger 40 ms", "trigger 80 ms"]),
        ("KVP", [80, 140], ["80 kV", "140 kV"]),
        ("ConvolutionKernel", ["B30", "B70"], ["kernel 1", "kernel 2"]),
        ("AcquisitionNumber", [1, 2], ["acquisition 1", "acquisition 2"]),
        ("AcquisitionTime", ["101010.5", "101012.5"], ["time 1", "time 2"]),
        ("ComplexImageComponent", ["MAGNITUDE", "PHASE"], ["magnitude", "phase"]),
    ],
)
def test_a_4d_series_becomes_volumes(tmp_path, key, given, told):
    found = parts(write(tmp_path / "in", four_d(key, given)))
    assert [series.told for series in found] == [(name,) for name in told]
    assert [series.part for series in found] == list(range(len(given)))
    for copy, series in enumerate(found):
        assert series.refused is None
        assert values(series) == [100 * place + copy for place in range(PLACES)]
        assert series.spacing_mm == pytest.approx((2.5, 1, 1))


def test_image_types_and_echoes_together(tmp_path):
    images = [
        (place, {"EchoNumbers": echo, "ImageType": ["ORIGINAL", "PRIMARY", kind]})
        for kind in "MP"
        for echo in (1, 2)
        for place in range(PLACES)
    ]
    found = parts(write(tmp_path / "in", images))
    assert [series.told for series in found] == [
        ("magnitude", "echo 1"),
        ("magnitude", "echo 2"),
        ("phase", "echo 1"),
        ("phase", "echo 2"),
    ]
    assert [values(series)[0] for series in found] == [0, 1, 2, 3]


def test_diffusion_with_one_b0_and_many_directions(tmp_path):
    volumes = [{"DiffusionBValue": 0.0}] + [
        {"DiffusionBValue": 700.0, "DiffusionGradientOrientation": [float(np.cos(a)), float(np.sin(a)), 0.0]}
        for a in (0.1, 0.7, 1.3)
    ]
    found = parts(write(tmp_path / "in", [(place, each) for each in volumes for place in range(PLACES)]))
    assert [series.told[0] for series in found] == ["b 0", "b 700", "b 700", "b 700"]
    assert sorted(values(series)[0] for series in found) == [0, 1, 2, 3]
    assert all(len({value % 100 for value in values(series)}) == 1 for series in found)


@pytest.mark.parametrize("by", ["volume", "place"])
def test_instance_numbers_count_volumes_as_the_last_resort(tmp_path, by):
    pairs = [(place, time) for time in range(3) for place in range(PLACES)]
    pairs.sort(key=(lambda pair: pair[1]) if by == "volume" else (lambda pair: pair[0]))
    images = [(place, {"InstanceNumber": number}) for number, (place, _) in enumerate(pairs, 1)]
    found = parts(write(tmp_path / "in", images))
    assert [series.told for series in found] == [("repetition 1",), ("repetition 2",), ("repetition 3",)]
    assert [values(series)[1] for series in found] == [100, 101, 102]


def test_times_that_differ_from_slice_to_slice_are_counted(tmp_path):
    images = [(place, {"TriggerTime": 50 * time + 3 * place}) for time in range(3) for place in range(PLACES)]
    found = parts(write(tmp_path / "in", images))
    assert [values(series)[2] for series in found] == [200, 201, 202]


def test_numbers_without_a_system_tell_nothing(tmp_path):
    numbers = random.Random(1).sample(range(100), 2 * PLACES)
    images = [(place, {"InstanceNumber": numbers.pop()}) for _ in range(2) for place in range(PLACES)]
    (series,) = parts(write(tmp_path / "in", images))
    assert series.refused == "duplicate_position"
    assert series.told == ()


def test_one_regular_stack_is_one_volume_whatever_differs(tmp_path):
    rng = random.Random(0)
    images = [
        (place, {"AcquisitionNumber": 1 + (place > 1), "EchoTime": rng.random(), "InstanceNumber": rng.randrange(99)})
        for place in range(6)
    ]
    (series,) = parts(write(tmp_path / "in", images))
    assert values(series) == [0, 100, 200, 300, 400, 500]
    assert series.told == ()


def test_acquisitions_never_hide_a_missing_slice(tmp_path):
    images = [(place, {"AcquisitionNumber": 1 + (place > 2)}) for place in (0, 1, 2, 4, 5, 6)]
    (series,) = parts(write(tmp_path / "in", images))
    assert (series.refused, series.place) == ("missing_slice", "between slice 3 and 4 of 6")


def test_a_series_that_was_broken_off(tmp_path):
    images = [(place, {"TemporalPositionIdentifier": time}) for time in (1, 2, 3) for place in range(PLACES)]
    found = parts(write(tmp_path / "in", images[:-1]))
    assert [series.refused for series in found] == [None, None, "missing_slice"]
    assert found[2].told == ("time 3",)


def test_two_scans_that_overlap(tmp_path):
    images = [(place, {"AcquisitionNumber": 1}) for place in range(5)]
    images += [(place, {"AcquisitionNumber": 2}) for place in range(4, 9)]
    found = parts(write(tmp_path / "in", images))
    assert [(series.refused, series.num_slices) for series in found] == [(None, 5), (None, 5)]


def test_an_appended_projection_is_set_apart(tmp_path):
    images = [(place, {}) for place in range(5)]
    images.append((1.5, {"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]}))
    found = parts(write(tmp_path / "in", images))
    assert sorted((series.num_slices, series.refused) for series in found) == [(1, "single_slice"), (5, None)]


def test_a_place_alone_is_no_volume(tmp_path):
    images = [(0, {"AcquisitionNumber": number}) for number in range(4)]
    (series,) = parts(write(tmp_path / "in", images))
    assert series.refused == "duplicate_position"


def test_orientations_that_differ_by_rounding_are_one(tmp_path):
    images = [
        (place, {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0.0005 + (place % 2) * 2e-6]}) for place in range(PLACES)
    ]
    (series,) = parts(write(tmp_path / "in", images))
    assert series.num_slices == PLACES


def test_parts_don_t_depend_on_file_names(tmp_path):
    folder = write(tmp_path / "in", four_d("EchoNumbers", [1, 2]))
    before = [read_volume(series).sop_instance_uids for series in parts(folder)]
    names = sorted(folder.iterdir())
    random.Random(2).shuffle(names)
    (tmp_path / "again").mkdir()
    for number, name in enumerate(names):
        shutil.copy(name, tmp_path / "again" / str(number))
    assert [read_volume(series).sop_instance_uids for series in parts(tmp_path / "again")] == before


def test_the_listing_tells_the_parts_apart_without_text_of_the_header(tmp_path):
    folder = write(tmp_path / "in", four_d("ConvolutionKernel", ["DOE^JANE", "JANE"]))
    text = json.dumps([item["told_apart_by"] for item in scan_json(scan(folder))["studies"][0]["series"]])
    assert text == '[["kernel 1"], ["kernel 2"]]'


@pytest.mark.parametrize(
    "elements",
    [
        {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "Columns": 2},
        {"ImageType": ["DERIVED", "SECONDARY"], "ImagePositionPatient": None, "ImageOrientationPatient": None},
    ],
)
def test_screen_shots_among_slices(tmp_path, elements):
    found = parts(write(tmp_path / "in", [*((place, {}) for place in range(5)), (9, elements)]))
    assert [(series.kind, series.refused) for series in found] == [
        ("volume", None),
        ("secondary_capture", "not_a_volume"),
    ]


def test_units_of_a_pet_and_padding(tmp_path):
    pet = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.128", "Modality": "PT", "Units": "BQML"}
    padding = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990, "RescaleSlope": 2, "RescaleIntercept": 10}
    (series,) = parts(write(tmp_path / "in", [(place, pet | padding) for place in range(3)]))
    volume = read_volume(series)
    assert (series.units, volume.units, volume.padding) == ("BQML", "arbitrary", (-3990.0, -3970.0))
    assert volume.voxels[:, 0, 0].tolist() == [10, 210, 410]
    padding["PixelPaddingValue"] = -2000
    mixed = [(place, padding | {"RescaleSlope": 1 + place}) for place in range(3)]
    volume = read_volume(parts(write(tmp_path / "mixed", mixed))[0])
    assert volume.padding is None
    assert volume.voxels[:, 0, 0].tolist() == [10, 210, 610]


# ------------------------------------------------------------------------------------------- tilt and turns


def tilted(folder, degrees=20.0, count=7):
    angle = np.deg2rad(degrees)
    down = np.array([0, np.cos(angle), -np.sin(angle)])
    rows, columns = np.indices((24, 16))
    for index in range(count):
        origin = np.array([-8.0, -12.0, 3.0 * index])
        points = origin[:, None, None] + rows * down[:, None, None] + columns * np.array([1.0, 0, 0])[:, None, None]
        pixels = np.rint(3 * points[0] + 10 * points[1] + 7 * points[2]).astype(np.int16)
        save(
            folder / str(index),
            pixels,
            SOPInstanceUID=f"1.2.3.7.{index + 1}",
            ImagePositionPatient=origin.round(6).tolist(),
            ImageOrientationPatient=[1, 0, 0, *down.round(9).tolist()],
        )
    return folder


@pytest.mark.parametrize("degrees", [20.0, -12.5])
def test_tilt_is_refused_or_resampled(tmp_path, degrees):
    (series,) = parts(tilted(tmp_path / "in", degrees))
    assert series.refused == "gantry_tilt"
    with pytest.raises(DicomError, match="gantry_tilt"):
        read_volume(series)
    volume = read_volume(series, tilt="resample")
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    index = np.indices(volume.shape).reshape(3, -1)
    x, y, z = volume.affine[:3, :3] @ index + volume.affine[:3, 3:]
    inside = volume.voxels.reshape(-1) != -1024
    assert inside.sum() >= 0.9 * 7 * 24 * 16
    off = np.abs(volume.voxels.reshape(-1) - (3 * x + 10 * y + 7 * z))[inside]
    assert off.max() < 0.6  # the field is linear; pixels were rounded to integers
    assert volume.sop_instance_uids == tuple(f"1.2.3.7.{number + 1}" for number in range(7))


def test_a_shear_below_half_a_pixel_is_in_the_affine(tmp_path):
    images = [(place, {"ImagePositionPatient": [0, 0.08 * place, 2.5 * place]}) for place in range(6)]
    (series,) = parts(write(tmp_path / "in", images))
    np.testing.assert_allclose(read_volume(series).affine[:3, 0], [0, 0.08, 2.5], atol=1e-9)


DIRECTIONS = {
    "axial": ([1, 0, 0], [0, 1, 0]),
    "coronal": ([1, 0, 0], [0, 0, -1]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
    "feet first": ([-1, 0, 0], [0, 1, 0]),
    "decubitus": ([0, -1, 0], [1, 0, 0]),
    "prone": ([-1, 0, 0], [0, -1, 0]),
}


def test_six_orientations_of_one_anatomy_give_one_tensor(tmp_path):
    anatomy = np.random.default_rng(0).integers(-900, 900, (12, 12, 12)).astype(np.int16)  # by x, y, z mm from -6
    tensors = []
    for name, (row, column) in DIRECTIONS.items():
        normal = np.cross(row, column)
        step = np.stack([normal, column, row], axis=1)
        for slice_number in range(12):
            z, y, x = np.meshgrid([slice_number], range(12), range(12), indexing="ij")
            start = -5.5 * step.sum(axis=1)
            points = start[:, None] + step @ np.stack([z.ravel(), y.ravel(), x.ravel()])
            pixels = anatomy[tuple((points + 5.5).round().astype(int))].reshape(12, 12)
            save(
                tmp_path / name / str(slice_number),
                pixels,
                SOPInstanceUID=f"1.2.3.8.{slice_number + 1}",
                ImageOrientationPatient=[*row, *column],
                ImagePositionPatient=points[:, 0].tolist(),
            )
        (series,) = parts(tmp_path / name)
        tensors.append(resample(read_volume(series), Grid((12, 12, 12), (1.0, 1.0, 1.0))).voxels)
    for tensor in tensors[1:]:
        np.testing.assert_allclose(tensor, tensors[0], atol=1e-3)
    assert tensors[0].std() > 100
