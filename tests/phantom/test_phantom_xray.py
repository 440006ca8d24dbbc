import functools
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from mm.ontology import FINDINGS, INDEX
from mm.phantom.patient import Patient, draw_patient
from mm.phantom.xray import RenderedImage, render_xray

IMAGE_CODES = [item.code for item in FINDINGS if "image" in item.sources and item.focal]


draw = functools.cache(draw_patient)


def shown(patient: Patient, code: str) -> bool:
    return any(item.code == code and item.image_center_mm is not None for item in patient.findings)


def mask(image: RenderedImage, code: str) -> np.ndarray:
    return (image.bits >> INDEX[code] & 1) == 1


def test_same_seed_same_bytes() -> None:
    one, other = (render_xray(draw_patient(3)) for _ in range(2))
    assert one.pixels.tobytes() == other.pixels.tobytes()
    assert one.bits.tobytes() == other.bits.tobytes()


def test_pixels_look_like_a_radiograph() -> None:
    image = render_xray(draw_patient(2))
    assert image.pixels.dtype == np.float32
    assert image.bits.dtype == np.int32
    assert image.pixels.min() >= 0
    assert image.pixels.max() <= 1
    rows, columns = image.pixels.shape
    lung = image.pixels[int(0.4 * rows), [int(0.3 * columns), int(0.7 * columns)]]
    assert (lung < image.pixels[int(0.4 * rows), columns // 2] - 0.15).all()


@pytest.mark.parametrize("code", IMAGE_CODES)
def test_masks_are_where_the_truth_is(code: str) -> None:
    chosen = list(islice((item for item in map(draw, range(200)) if shown(item, code)), 3))
    for patient in chosen:
        image = render_xray(patient)
        marked = np.argwhere(mask(image, code))
        assert len(marked), patient.seed
        for item in patient.findings:
            if item.code == code and item.image_center_mm is not None:
                distance = np.linalg.norm(marked - image.pixel(item.image_center_mm), axis=1).min()
                assert distance * image.spacing_mm[0] < 14.0, patient.seed
                if item.side != "none":
                    side = image.pixel((0.0, 0.0))[1]
                    assert (image.pixel(item.image_center_mm)[1] > side) == (item.side == "left")


@pytest.mark.parametrize("code", IMAGE_CODES)
def test_what_is_not_shown_has_no_mask(code: str) -> None:
    patient = next(item for item in map(draw, range(100)) if not shown(item, code))
    assert not mask(render_xray(patient), code).any()


@pytest.mark.parametrize("lesion", ["nodules", "opacities", "effusions", "pneumothoraces", "fractures"])
def test_a_lesion_changes_pixels_at_its_place(lesion: str) -> None:
    code = {
        "nodules": "nodule",
        "opacities": "consolidation",
        "effusions": "effusion",
        "pneumothoraces": "pneumothorax",
        "fractures": "rib_fracture",
    }[lesion]
    patient = next(item for item in map(draw, range(300)) if shown(item, code))
    visit = patient.visits[0]
    healthy = replace(patient, visits=(replace(visit, lesions=replace(visit.lesions, **{lesion: ()})),))
    change = np.abs(render_xray(patient, noise=False).pixels - render_xray(healthy, noise=False).pixels)
    at = mask(render_xray(patient), code)
    assert change[at].mean() > 3 * change[~at].mean()
    assert change[at].max() > 0.02
