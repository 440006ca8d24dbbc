"""Series as the scanners of each vendor write them, made here, beside what dcm2niix makes of them in the same run."""

import numpy as np
import pytest
from conftest import save
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage
from test_dicom_dcm2niix import aligned, theirs
from test_dicom_multiframe import enhanced, frame

from mm.dicom.pixels import read_pixels
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume

PLACES, TIMES = 5, 4
EVERY = [(place, time) for time in range(TIMES) for place in range(PLACES)]
BY_PLACE = sorted(EVERY)


def mr(place, number, **elements):
    return {
        "SOPClassUID": MRImageStorage,
        "Modality": "MR",
        "Manufacturer": "SIEMENS",
        "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
        "RescaleSlope": None,
        "RescaleIntercept": None,
        "ImagePositionPatient": [0, 0, 2.0 * place],
        "InstanceNumber": number,
        "AcquisitionNumber": 1,
        "MRAcquisitionType": "2D",
        "ScanningSequence": "EP",
        "SliceThickness": 2.0,
        "RepetitionTime": 2000.0,
        "EchoTime": 30.0,
        **elements,
    }


def ct(place, number, **elements):
    kind = {"SOPClassUID": CTImageStorage, "Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}
    return mr(place, number, **{**kind, "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], **elements})


def ge(place, number, **elements):
    return mr(
        place,
        number,
        **{"Manufacturer": "GE MEDICAL SYSTEMS", "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"], **elements},
    )


def philips(place, number, kind="M_FFE", **elements):
    image_type = ["ORIGINAL", "PRIMARY", kind, kind[0], "FFE"]
    return mr(place, number, Manufacturer="Philips Medical Systems", ImageType=image_type, **elements)


def counted(order, make):
    return [make(place, number, time) for number, (place, time) in enumerate(order, 1)]


def pet(place, number, time):
    return mr(
        place,
        number,
        SOPClassUID=PositronEmissionTomographyImageStorage,
        Modality="PT",
        ImageType=["ORIGINAL", "PRIMARY"],
        Units="BQML",
        SeriesType=["DYNAMIC", "IMAGE"],
        NumberOfSlices=PLACES,
        NumberOfTimeSlices=TIMES,
        FrameReferenceTime=500.0 + 1000 * time,
        AcquisitionTime=f"1010{10 + time}",
        RescaleSlope=0.5 + number / 128,
        RescaleIntercept=0,
    )


def diffusion(place, number, time):
    direction = {"DiffusionGradientOrientation": [float(np.cos(time)), float(np.sin(time)), 0.0]}
    return mr(
        place,
        number,
        ImageType=["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"],
        AcquisitionNumber=time + 1,
        DiffusionBValue=0.0 if time < 2 else 1000.0,
        **({} if time < 2 else direction),
    )


def localizers(place, number):
    directions = ([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])[number % 3]
    position = np.array([-4.0, -4.0, -4.0]) + 5 * place * np.cross(directions[:3], directions[3:])
    return mr(0, number, ImageOrientationPatient=directions, ImagePositionPatient=position.tolist())


SERIES = {
    # name: number of volumes, slices
    "GE fMRI under one AcquisitionNumber": (
        TIMES,
        counted(EVERY, lambda place, number, time: ge(place, number, TriggerTime=2000 * time + 10 * place)),
    ),
    "GE, told apart by InstanceNumber alone": (TIMES, counted(EVERY, lambda place, number, _: ge(place, number))),
    "GE magnitude, phase, real and imaginary, place after place": (
        TIMES,
        counted(BY_PLACE, lambda place, number, _: ge(place, number)),
    ),
    "Philips dynamics, place after place": (
        TIMES,
        counted(
            BY_PLACE,
            lambda place, number, time: philips(
                place, number, TemporalPositionIdentifier=time + 1, RescaleSlope=2.5, RescaleIntercept=-3
            ),
        ),
    ),
    "Philips magnitude and phase with a scaling each": (
        2,
        counted(
            EVERY[: 2 * PLACES],
            lambda place, number, time: philips(
                place,
                number,
                ["M_FFE", "PHASE MAP"][time],
                RescaleSlope=[2.5, 1.75][time],
                RescaleIntercept=[0, -3142][time],
            ),
        ),
    ),
    "Siemens fMRI": (
        TIMES,
        counted(EVERY, lambda place, number, time: mr(place, number, AcquisitionNumber=time + 1)),
    ),
    "Siemens echoes, place after place": (
        TIMES,
        counted(
            BY_PLACE,
            lambda place, number, time: mr(place, number, EchoNumbers=time + 1, EchoTime=10.0 + 5 * time),
        ),
    ),
    "two b0 and two directions": (TIMES, counted(EVERY, diffusion)),
    "UIH fMRI": (
        TIMES,
        counted(
            EVERY,
            lambda place, number, time: mr(
                place,
                number,
                Manufacturer="UIH",
                AcquisitionNumber=time + 1,
                AcquisitionTime=f"1010{10 + time}.{place}",
            ),
        ),
    ),
    "dynamic PET with a slope a slice": (TIMES, counted(EVERY, pet)),
    "a slope that some slices lack": (
        1,
        [
            mr(place, place + 1, **({} if place == 2 else {"RescaleSlope": 2, "RescaleIntercept": 1}))
            for place in range(5)
        ],
    ),
    "CT in two phases": (
        2,
        counted(EVERY[: 2 * PLACES], lambda place, number, time: ct(place, number, AcquisitionNumber=time + 3)),
    ),
    "CT from head to feet": (1, [ct(place, PLACES - place) for place in range(PLACES)]),
    "localizers in three planes": (3, [localizers(number // 3, number + 1) for number in range(9)]),
    "CT of 12 signed bits": (
        1,
        [ct(place, place + 1, BitsStored=12, HighBit=11, PixelRepresentation=1) for place in range(PLACES)],
    ),
    "CT with uneven distances": (
        0,
        [ct(0, n + 1, ImagePositionPatient=[0, 0, z]) for n, z in enumerate((0, 2, 4, 9, 14))],
    ),
    "a time series of one slice": (0, [mr(0, time + 1, TemporalPositionIdentifier=time + 1) for time in range(6)]),
}


def compare(folder, out, count):
    """Each of our volumes is one of theirs, voxel by voxel, and rescaled with its slices' own slopes."""
    others = theirs(folder, out)
    (study,) = scan(folder).studies
    volumes = [series for series in study.series if series.refused is None]
    assert len(volumes) == count
    for series in volumes:
        volume = read_volume(series)
        stored = np.stack([read_pixels(frame.instance, frame.index) for frame in series.frames])
        slopes = np.array([1.0 if frame.slope is None else frame.slope for frame in series.frames])
        intercepts = np.array([frame.intercept or 0.0 for frame in series.frames])
        exact = slopes[:, None, None] * stored + intercepts[:, None, None]
        np.testing.assert_array_equal(volume.voxels, exact.astype(np.float32))
        for number, (values, affine, *_) in enumerate(others):
            found = aligned(values, affine, volume)
            if found is not None and np.array_equal(found[0], stored):
                assert found[1] < 1e-4
                del others[number]
                break
        else:
            pytest.fail("dcm2niix has no such volume")
    assert bool(others) == (count == 0)


@pytest.mark.parametrize("name", SERIES)
def test_a_series_becomes_dcm2niix_s_volumes(tmp_path, name):
    count, slices = SERIES[name]
    rng = np.random.default_rng(0)
    for number, elements in enumerate(slices):
        pixels = rng.integers(-900 if elements["Modality"] == "CT" else 0, 900, (8, 10)).astype(np.int16)
        save(tmp_path / "in" / f"{number * 7 % 97}", pixels, **elements | {"SOPInstanceUID": f"1.2.3.1.{number + 1}"})
    compare(tmp_path / "in", tmp_path / "out", count)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.uint32])
def test_integers_of_every_width(tmp_path, kind):
    rng = np.random.default_rng(1)
    for place in range(3):
        pixels = rng.integers(0, np.iinfo(kind).max >> 8 * (np.dtype(kind).itemsize > 2), (8, 10)).astype(kind)
        save(tmp_path / "in" / str(place), pixels, **mr(place, place + 1, SOPInstanceUID=f"1.2.3.1.{place + 1}"))
    compare(tmp_path / "in", tmp_path / "out", 1)


def shared_and_own(place, time, **macros):
    content = {"StackID": "1", "InStackPositionNumber": place + 1, "DimensionIndexValues": [1, place + 1, time + 1]}
    return frame(place, FrameContentSequence=content | macros.pop("content", {}), **macros)


def test_an_enhanced_object_of_several_echoes(tmp_path):
    rng = np.random.default_rng(2)
    frames = [
        shared_and_own(
            place,
            time,
            slope=2.5 + time,
            intercept=float(-time),
            MREchoSequence={"EffectiveEchoTime": 5.0 * (time + 1)},
        )
        for place, time in BY_PLACE
    ]
    pixels = rng.integers(0, 900, (len(frames), 4, 6)).astype(np.int16)
    enhanced(tmp_path / "in" / "a", frames, sop_class=EnhancedMRImageStorage, pixels=pixels, Manufacturer="Philips")
    compare(tmp_path / "in", tmp_path / "out", TIMES)


def test_enhanced_objects_of_one_time_each(tmp_path):
    rng = np.random.default_rng(3)
    for time in range(TIMES):
        frames = [shared_and_own(place, 0, content={"FrameAcquisitionNumber": time + 1}) for place in range(PLACES)]
        enhanced(
            tmp_path / "in" / str(time),
            frames,
            pixels=rng.integers(0, 900, (PLACES, 4, 6)).astype(np.int16),
            Manufacturer="SIEMENS",
            InstanceNumber=time + 1,
            AcquisitionNumber=time + 1,
            SOPInstanceUID=f"1.2.3.4.{time + 1}",
        )
    compare(tmp_path / "in", tmp_path / "out", TIMES)


def test_slices_that_turn_within_a_series_are_refused(tmp_path):
    for place in range(PLACES):
        turn = 0.0009 * (place % 2)
        row, column = [np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0]
        elements = {
            "PixelSpacing": [50, 50],
            "ImageOrientationPatient": [round(float(each), 8) for each in row + column],
        }
        save(
            tmp_path / str(place),
            np.zeros((8, 10), np.int16),
            **mr(place, place + 1, SOPInstanceUID=f"1.2.3.1.{place + 1}", **elements),
        )
    (series,) = scan(tmp_path).studies[0].series
    assert (series.refused, series.place) == ("shifted_slice", "slice 2 of 5")
