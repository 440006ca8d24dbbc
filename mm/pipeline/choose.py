"""Which series of a study is read: the rules of `LoadVolume` and `LoadImage`."""

from typing import Final

from mm.dicom.instance import Instance
from mm.dicom.quality import CHEST, names_chest
from mm.dicom.scan import Series, Study

FRONTAL: Final = {"PA": 0, "AP": 0}
"""ViewPosition by preference; any other comes behind."""
LATERAL: Final = ("LL", "RL", "LATERAL", "LAT")


def of_chest(series: Series) -> bool:
    """False where BodyPartExamined names another region; where it names none anything may be seen."""
    return names_chest(series.body_part)


def best_volume(study: Study, modality: str, min_slices: int) -> Series | None:
    """The series of a study that the rules of `LoadVolume` pick, or None.

    A refused one is taken where there is no other: reading it then says why.
    """
    fitting = [
        item
        for item in study.series
        if item.kind == "volume" and item.modality == modality and item.num_slices >= min_slices and of_chest(item)
    ]
    return max(
        fitting,
        key=lambda item: (
            item.refused is None,
            item.body_part.upper().startswith(CHEST),
            item.num_slices,
            item.series_instance_uid,
        ),
        default=None,
    )


def is_lateral(instance: Instance) -> bool:
    """True for a side view, by ViewPosition or by rows that run from front to back (PatientOrientation)."""
    rows = instance.patient_orientation[0][:1] if len(instance.patient_orientation) == 2 else ""
    return instance.view.upper() in LATERAL or rows in ("A", "P")


def best_image(study: Study, modalities: tuple[str, ...]) -> tuple[Series, int] | None:
    """The radiograph of a study, as series and index in it, or None: a frontal one first, a lateral one never."""
    fitting = [
        (item.refused is not None, FRONTAL.get(instance.view.upper(), 1), modalities.index(item.modality), item, index)
        for item in study.series
        if item.kind == "image" and item.modality in modalities and of_chest(item)
        for index, instance in enumerate(item.instances)
        if not is_lateral(instance)
    ]
    best = min(fitting, key=lambda choice: (*choice[:3], choice[3].series_instance_uid, choice[4]), default=None)
    return None if best is None else best[3:]
