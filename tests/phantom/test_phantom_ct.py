import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from mm.ontology import FINDINGS, INDEX
from mm.phantom.anatomy import BODY_SIDES, cavity, cavity_box
from mm.phantom.ct import Rendered, render_ct, scanner_lattice
from mm.phantom.lungs import LAA_HU
from mm.phantom.patient import Patient, draw_patient

VOLUME_CODES = [item.code for item in FINDINGS if "volume" in item.sources and item.focal]


draw = functools.cache(draw_patient)


def patients_with(code: str, number: int, *, start: int = 0) -> Iterator[Patient]:
    found = 0
    for seed in range(start, start + 400):
        patient = draw(seed)
        if any(item.code == code and item.center_mm is not None for item in patient.findings):
            yield patient
            found += 1
            if found == number:
                return


def mask(rendered: Rendered, code: str) -> np.ndarray:
    return (rendered.bits >> INDEX[code] & 1) == 1


def voxel_mm3(rendered: Rendered) -> float:
    return abs(float(np.linalg.det(rendered.affine[:3, :3])))


def test_same_seed_same_bytes() -> None:
    one, other = (render_ct(draw_patient(3), 0) for _ in range(2))
    assert one.voxels.tobytes() == other.voxels.tobytes()
    assert one.bits.tobytes() == other.bits.tobytes()


def test_an_unknown_visit_is_refused() -> None:
    with pytest.raises(ValueError, match="visit_index"):
        render_ct(draw_patient(3), 9)


def test_voxels_look_like_a_ct() -> None:
    rendered = render_ct(draw_patient(1), 0)
    voxels = rendered.voxels
    assert voxels.dtype == np.float32
    assert rendered.bits.dtype == np.int32
    assert voxels.min() >= -1024
    assert voxels.max() <= 3071
    assert np.array_equal(voxels, np.rint(voxels))
    assert 0.05 < ((voxels > -950) & (voxels < -700)).mean() < 0.4
    assert (voxels > 300).mean() > 0.005


@pytest.mark.parametrize("code", VOLUME_CODES)
def test_the_mask_is_at_the_true_centre(code: str) -> None:
    for patient in patients_with(code, 3):
        rendered = render_ct(patient, 0)
        marked = np.argwhere(mask(rendered, code))
        assert len(marked)
        places = marked @ rendered.affine[:3, :3].T + rendered.affine[:3, 3]
        for item in patient.findings:
            if item.code == code and item.center_mm is not None:
                nearest = np.linalg.norm(places - item.center_mm, axis=1).min()
                assert nearest < (18.0 if code == "emphysema" else 8.0), (patient.seed, nearest)


@pytest.mark.parametrize("code", VOLUME_CODES)
def test_negatives_have_no_mask(code: str) -> None:
    patient = next(item for item in map(draw, range(200)) if code not in item.present)
    assert not mask(render_ct(patient, 0), code).any()


def test_nodules_keep_their_mass() -> None:
    """The density that a nodule adds, over the density that it would add at full size, is its volume."""
    for patient in patients_with("nodule", 4):
        with_it, without = (_rendered_without(patient, drop) for drop in (None, "nodules"))
        grid = without.voxels
        for nodule, truth in zip(
            patient.visits[0].lesions.nodules, (i for i in patient.findings if i.code == "nodule"), strict=True
        ):
            assert truth.center_mm is not None
            near = _ball(with_it, truth.center_mm, 0.6 * nodule.diameter_mm + 7.0)
            added = (with_it.voxels - grid)[near]
            contrast = nodule.hu - np.median(grid[near])
            volume = added.sum() * voxel_mm3(with_it) / contrast
            diameter = (6 * volume / np.pi) ** (1 / 3)
            # A vessel that runs through takes a little of the contrast away.
            assert diameter == pytest.approx(nodule.diameter_mm, rel=0.08), patient.seed


@pytest.mark.parametrize("code", ["consolidation", "atelectasis", "effusion"])
def test_regions_have_their_volume(code: str) -> None:
    for patient in patients_with(code, 4):
        rendered = render_ct(patient, 0, noise=False)
        truth = {item.side: item.size for item in patient.findings if item.code == code and item.present}
        middle = _body_x(patient)
        marked = mask(rendered, code)
        for side, size in truth.items():
            here = marked & ((middle > 0) if side == "left" else (middle < 0))
            measured = here.sum() * voxel_mm3(rendered) / 1e3
            # The mask counts voxels that are at least 40 % inside; the edges of thin layers add a little.
            assert measured == pytest.approx(size, rel=0.25, abs=4.0), (patient.seed, side)


def test_effusion_adds_its_volume() -> None:
    for patient in patients_with("effusion", 3):
        with_it, without = (_rendered_without(patient, drop) for drop in (None, "effusions"))
        effusion = patient.visits[0].lesions.effusions
        total = sum(item.volume_ml for item in effusion)
        anatomy = patient.visits[0].anatomy
        lung = anatomy.lung_hu + 0.3 * anatomy.gravity_hu
        added = float((with_it.voxels - without.voxels).sum()) / (effusion[0].hu - lung)
        measured = added * voxel_mm3(with_it) / 1e3
        assert measured == pytest.approx(total, rel=0.12), patient.seed


def test_pneumothorax_is_its_share_of_the_hemithorax() -> None:
    for patient in patients_with("pneumothorax", 4):
        rendered = render_ct(patient, 0, noise=False)
        visit = patient.visits[0]
        lattice = scanner_lattice(visit.scanner)
        air = visit.lesions.pneumothoraces[0]
        box = cavity_box(visit.anatomy, air.side, lattice)
        room = cavity(visit.anatomy, air.side, lattice.crop(box)).coverage
        measured = 100 * mask(rendered, "pneumothorax").sum() / room.sum()
        assert measured == pytest.approx(air.percent, rel=0.2, abs=0.8), patient.seed


def test_emphysema_is_its_share_below_950() -> None:
    for patient in [*patients_with("emphysema", 3), draw_patient(5)]:
        if {"pneumothorax"} & patient.present:
            continue
        rendered = render_ct(patient, 0, noise=False)
        visit = patient.visits[0]
        lattice = scanner_lattice(visit.scanner)
        below = total = 0
        for side in BODY_SIDES:
            box = cavity_box(visit.anatomy, side, lattice)
            room = cavity(visit.anatomy, side, lattice.crop(box)).coverage
            hu = rendered.voxels[box]
            opaque = rendered.bits[box] & ((1 << INDEX["consolidation"]) | (1 << INDEX["atelectasis"]))
            lung = (room > 0.5) & (opaque == 0) & ((rendered.bits[box] >> INDEX["effusion"] & 1) == 0)
            total += lung.sum()
            below += (lung & (hu < LAA_HU)).sum()
        assert 100 * below / total == pytest.approx(visit.lesions.emphysema.percent, rel=0.1, abs=0.5), patient.seed


def test_calcium_keeps_its_mass() -> None:
    for patient in patients_with("calcification", 4):
        with_it, without = (_rendered_without(patient, drop) for drop in (None, "plaques"))
        added = with_it.voxels - without.voxels
        wanted = 0.0
        for plaque, truth in zip(
            patient.visits[0].lesions.plaques, (i for i in patient.findings if i.code == "calcification"), strict=True
        ):
            assert truth.center_mm is not None
            near = _ball(with_it, truth.center_mm, 9.0)
            wanted += plaque.volume_mm3 * (plaque.hu - float(np.median(without.voxels[near])))
        assert added.sum() * voxel_mm3(with_it) == pytest.approx(wanted, rel=0.3), patient.seed


def test_the_heart_has_its_ratio() -> None:
    for patient in patients_with("cardiomegaly", 3):
        rendered = render_ct(patient, 0, noise=False)
        x = _body_x(patient)[mask(rendered, "cardiomegaly")]
        anatomy = patient.visits[0].anatomy
        ratio = (x.max() - x.min()) / (2 * anatomy.half_width)
        assert ratio == pytest.approx(anatomy.ratio, abs=0.03)


def test_an_image_only_fracture_leaves_the_ct_as_it_is() -> None:
    for seed in range(300):
        patient = draw(seed)
        cracks = patient.visits[0].lesions.fractures
        if cracks and not cracks[0].on_ct:
            assert np.array_equal(
                _rendered_without(patient, None).voxels, _rendered_without(patient, "fractures").voxels
            )
            return
    pytest.fail("no such patient")


def _rendered_without(patient: Patient, lesion: str | None) -> Rendered:
    visit = patient.visits[0]
    # Emphysema depends on which lung is aerated; it would differ between the two renderings.
    lesions = replace(visit.lesions, emphysema=replace(visit.lesions.emphysema, percent=0.0))
    if lesion is not None:
        lesions = replace(lesions, **{lesion: ()})
    return render_ct(replace(patient, visits=(replace(visit, lesions=lesions),)), 0, noise=False)


def _ball(rendered: Rendered, center_mm: tuple[float, float, float], radius: float) -> np.ndarray:
    index = np.argwhere(np.ones(rendered.voxels.shape, bool))
    places = index @ rendered.affine[:3, :3].T + rendered.affine[:3, 3]
    return (np.linalg.norm(places - center_mm, axis=1) < radius).reshape(rendered.voxels.shape)


def _body_x(patient: Patient) -> np.ndarray:
    lattice = scanner_lattice(patient.visits[0].scanner)
    return np.broadcast_to(lattice.x, lattice.shape)
