"""Enhanced CT, MR and PET: functional groups, shared and per frame."""

import contextlib
import struct
import time

import numpy as np
import pydicom
import pytest
from conftest import dataset
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from mm.dicom.errors import DicomError
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume

MR, CT, PET = (UID(f"1.2.840.10008.5.1.4.1.1.{tail}") for tail in ("4.1", "2.1", "130"))


def item(**elements):
    data = Dataset()
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    return data


def group(**macros):
    data = Dataset()
    for keyword, elements in macros.items():
        setattr(data, keyword, Sequence([item(**elements)]))
    return data


def frame(place, *, slope=1.0, intercept=0.0, **macros):
    return group(
        PlanePositionSequence={"ImagePositionPatient": [0, 0, 3.0 * place]},
        PixelValueTransformationSequence={"RescaleSlope": slope, "RescaleIntercept": intercept, "RescaleType": "HU"},
        **macros,
    )


SHARED = group(
    PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
    PixelMeasuresSequence={"PixelSpacing": [0.5, 0.25], "SliceThickness": 3},
)


def enhanced(path, frames, *, sop_class=MR, modality="MR", shared=SHARED, undefined=False, **elements):
    """One object; frame `n` of the file holds n everywhere, or what `pixels` gives."""
    count = len(frames)
    syntax = elements.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    stored = elements.pop("pixels", np.arange(count, dtype=np.int16)[:, None, None] * np.ones((4, 6), np.int16))
    placed = ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept")
    values = {
        **dict.fromkeys(placed),
        "SOPClassUID": sop_class,
        "Modality": modality,
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "Rows": 4,
        "Columns": 6,
        "NumberOfFrames": count,
        **elements,
    }
    data = dataset(stored[0], TransferSyntaxUID=syntax, **values)
    if shared is not None:
        data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    if undefined:
        data["PerFrameFunctionalGroupsSequence"].is_undefined_length = True
        for each in frames:
            each.is_undefined_length_sequence_item = True
            for element in each:
                element.is_undefined_length = True
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    data.PixelData = stored.astype(f"{order}i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def parts(folder):
    (study,) = scan(folder).studies
    return study.series


def values(series):
    return read_volume(series).voxels[:, 0, 0].tolist()


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
)
@pytest.mark.parametrize(("sop_class", "modality", "units"), [(MR, "MR", "arbitrary"), (CT, "CT", "HU")])
def test_frames_are_slices_with_their_own_rescale(tmp_path, sop_class, modality, units, syntax, undefined):
    order = [3, 1, 0, 2]
    frames = [frame(place, slope=1.5 + place, intercept=-100 + place) for place in order]
    path = enhanced(
        tmp_path / "in" / "a",
        frames,
        sop_class=sop_class,
        modality=modality,
        TransferSyntaxUID=syntax,
        undefined=undefined,
    )
    (series,) = parts(tmp_path / "in")
    assert (series.num_slices, series.files, series.refused) == (4, (path,), None)
    assert [item.index for item in series.frames] == [2, 1, 3, 0]
    volume = read_volume(series)
    assert volume.units == units
    assert volume.voxels[:, 0, 0].tolist() == [(1.5 + z) * order.index(z) - 100 + z for z in range(4)]
    assert volume.sop_instance_uids == ("1.2.3.4",) * 4
    assert volume.frame_numbers == (3, 2, 4, 1)
    np.testing.assert_allclose(volume.affine[:3, :3], [[0, 0, 0.25], [0, 0.5, 0], [3, 0, 0]], atol=1e-9)


@pytest.mark.parametrize(
    ("macro", "told"),
    [
        (lambda copy: {"MREchoSequence": {"EffectiveEchoTime": 5.0 * copy}}, ["TE 5 ms", "TE 10 ms"]),
        (lambda copy: {"MRDiffusionSequence": {"DiffusionBValue": 500.0 * copy}}, ["b 500", "b 1000"]),
        (lambda copy: {"FrameContentSequence": {"TemporalPositionIndex": copy}}, ["time 1", "time 2"]),
        (lambda copy: {"TemporalPositionSequence": {"TemporalPositionTimeOffset": 2.5 * copy}}, ["time 1", "time 2"]),
        (
            lambda copy: {"FrameContentSequence": {"FrameAcquisitionNumber": copy}},
            ["acquisition 1", "acquisition 2"],
        ),
        (lambda copy: {"FrameContentSequence": {"DimensionIndexValues": [1, copy]}}, ["index 1", "index 2"]),
        (
            lambda copy: {"MRImageFrameTypeSequence": {"ComplexImageComponent": ["MAGNITUDE", "PHASE"][copy - 1]}},
            ["magnitude", "phase"],
        ),
        (
            lambda copy: {"CardiacSynchronizationSequence": {"NominalPercentageOfCardiacPhase": 10.0 * copy}},
            ["cardiac phase 1", "cardiac phase 2"],
        ),
        (
            lambda copy: {"UnassignedPerFrameConvertedAttributesSequence": {"EchoNumbers": copy}},
            ["echo 1", "echo 2"],
        ),
    ],
)
def test_frames_of_one_place_are_split(tmp_path, macro, told):
    frames = [frame(place, **macro(copy)) for place in range(3) for copy in (1, 2)]
    enhanced(tmp_path / "in" / "a", frames)
    found = parts(tmp_path / "in")
    assert [series.told for series in found] == [(name,) for name in told]
    assert [values(series) for series in found] == [[0, 2, 4], [1, 3, 5]]


def test_gradient_directions(tmp_path):
    def diffusion(copy):
        data = frame(0)
        data.MRDiffusionSequence = Sequence([item(DiffusionBValue=800.0)])
        direction = item(DiffusionGradientOrientation=[float(copy), 1.0 - copy, 0.0])
        data.MRDiffusionSequence[0].DiffusionGradientDirectionSequence = Sequence([direction])
        return data

    frames = []
    for place in range(3):
        for copy in (0, 1):
            each = diffusion(copy)
            each.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 3.0 * place]
            frames.append(each)
    enhanced(tmp_path / "in" / "a", frames)
    assert [series.told for series in parts(tmp_path / "in")] == [("direction 1",), ("direction 2",)]


def test_stacks_in_one_orientation_are_apart(tmp_path):
    frames = [
        frame(place, FrameContentSequence={"StackID": str(1 + (place > 10))}) for place in (0, 1, 2, 20, 21, 22, 23)
    ]
    enhanced(tmp_path / "in" / "a", frames)
    assert [(series.num_slices, series.refused) for series in parts(tmp_path / "in")] == [(3, None), (4, None)]


def test_objects_of_one_series_are_volumes_each(tmp_path):
    for number in (2, 1):
        frames = [frame(place) for place in range(3)]
        extra = {"SOPInstanceUID": f"1.2.3.{number}", "InstanceNumber": number}
        enhanced(tmp_path / "in" / str(number), frames, **extra)
    found = parts(tmp_path / "in")
    assert [series.instances[0].sop_instance_uid for series in found] == ["1.2.3.1", "1.2.3.2"]


def concatenated(folder, members, *, total=3, offset=True):
    for number in members:
        frames = [frame(2 * (number - 1) + k) for k in range(2)]
        extra = {"SOPInstanceUID": f"1.2.3.{number}", "ConcatenationUID": "1.2.3.77", "InConcatenationNumber": number}
        if total:
            extra["InConcatenationTotalNumber"] = total
        if offset:
            extra["ConcatenationFrameOffsetNumber"] = 2 * (number - 1)
        enhanced(folder / str(number), frames, **extra)


def test_a_concatenation_is_one_object(tmp_path):
    concatenated(tmp_path / "in", (1, 2, 3))
    (series,) = parts(tmp_path / "in")
    assert (series.num_slices, series.refused, len(series.instances)) == (6, None, 3)
    assert values(series) == [0, 1, 0, 1, 0, 1]
    assert read_volume(series).frame_numbers == (1, 2, 1, 2, 1, 2)


@pytest.mark.parametrize(("members", "total"), [((1, 2), 3), ((2, 3), 0), ((1, 3), 0)])
def test_a_concatenation_that_lacks_a_part_is_refused(tmp_path, members, total):
    concatenated(tmp_path / "in", members, total=total)
    (series,) = parts(tmp_path / "in")
    assert series.refused in ("missing_part", "missing_slice")
    assert series.affine is None


@pytest.mark.parametrize(
    ("frames", "elements", "reason"),
    [
        ([frame(place) for place in range(3)], {"NumberOfFrames": 2}, "functional_groups"),
        ([frame(place) for place in range(3)], {"shared": None}, "missing_geometry"),
        ([group(PixelMeasuresSequence={"PixelSpacing": [1, 1]}) for _ in range(3)], {}, "missing_geometry"),
        ([frame(0) for _ in range(3)], {}, "duplicate_position"),
        ([frame(place) for place in (0, 1, 3, 4)], {}, "missing_slice"),
        ([frame(0)], {}, "single_slice"),
    ],
)
def test_what_is_refused(tmp_path, frames, elements, reason):
    enhanced(tmp_path / "in" / "a", frames, **elements)
    (series,) = parts(tmp_path / "in")
    assert series.refused == reason
    with pytest.raises(DicomError, match=reason):
        read_volume(series)


def test_no_functional_groups_at_all(tmp_path):
    path = enhanced(tmp_path / "in" / "a", [frame(place) for place in range(3)])
    data = pydicom.dcmread(path)
    del data.PerFrameFunctionalGroupsSequence
    data.save_as(path)
    (series,) = parts(tmp_path / "in")
    assert series.refused == "functional_groups"


def test_a_ct_without_rescale_has_no_hu(tmp_path):
    frames = [group(PlanePositionSequence={"ImagePositionPatient": [0, 0, place]}) for place in range(3)]
    enhanced(tmp_path / "in" / "a", frames, sop_class=CT, modality="CT")
    (series,) = parts(tmp_path / "in")
    with pytest.raises(DicomError, match="missing_rescale"):
        read_volume(series)


def test_groups_that_an_archive_wrote_as_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(pydicom.config, "replace_un_with_known_vr", False)
    frames = [frame(place) for place in range(3)]
    plain = enhanced(tmp_path / "plain", frames, TransferSyntaxUID=ImplicitVRLittleEndian).read_bytes()
    start = plain.index(struct.pack("<HH", 0x5200, 0x9230))
    (length,) = struct.unpack("<L", plain[start + 4 : start + 8])
    path = enhanced(tmp_path / "in" / "a", [frame(place) for place in range(3)])
    data = pydicom.dcmread(path)
    del data.PerFrameFunctionalGroupsSequence
    data.add_new(0x52009230, "UN", plain[start + 8 : start + 8 + length])
    data.save_as(path)
    (series,) = parts(tmp_path / "in")
    assert values(series) == [0, 1, 2]


def test_private_sequences_with_the_same_elements_decide_nothing(tmp_path):
    frames = [frame(place) for place in range(3)]
    for each in frames:
        block = each.private_block(0x2005, "ACME", create=True)
        block.add_new(0x0F, "SQ", [item(ImagePositionPatient=[9, 9, 9], RescaleSlope=7)])
    enhanced(tmp_path / "in" / "a", frames)
    (series,) = parts(tmp_path / "in")
    assert values(series) == [0, 1, 2]


def test_damage_in_the_groups_is_refused_in_time(tmp_path):
    path = enhanced(tmp_path / "good", [frame(place) for place in range(5)])
    good = path.read_bytes()
    start = good.index(struct.pack("<HH", 0x5200, 0x9230))
    end = good.index(struct.pack("<HH", 0x7FE0, 0x0010))
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for _ in range(200):
        raw = bytearray(good)
        for place in rng.integers(start, end, 3):
            raw[place] = rng.integers(256)
        (tmp_path / "in" / "a").write_bytes(raw)
        before = time.perf_counter()
        for study in scan(tmp_path / "in").studies:
            for series in study.series:
                with contextlib.suppress(DicomError):
                    read_volume(series)
        assert time.perf_counter() - before < 2


def test_thousands_of_frames_take_seconds(tmp_path):
    count = 1500
    frames = [
        frame(n // 30, FrameContentSequence={"TemporalPositionIndex": 1 + n % 30, "StackID": "1"}) for n in range(count)
    ]
    pixels = np.zeros((count, 4, 6), np.int16)
    enhanced(tmp_path / "in" / "a", frames, pixels=pixels)
    before = time.perf_counter()
    found = parts(tmp_path / "in")
    taken = time.perf_counter() - before
    assert [series.num_slices for series in found] == [50] * 30
    assert all(series.refused is None for series in found)
    assert taken < 20  # about one second, but for the checks of types that run in tests
