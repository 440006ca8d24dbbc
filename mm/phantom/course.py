"""Which findings a patient has, where, and how they come and go over the visits; with the exact truth."""

import math
from dataclasses import dataclass

import numpy as np

from mm.batch import FindingTruth
from mm.phantom.anatomy import BODY_SIDES, Anatomy, BodySide, breathe
from mm.phantom.findings import (
    Lesions,
)
from mm.phantom.place import (
    draw_effusions,
    draw_emphysema,
    draw_fractures,
    draw_log,
    draw_nodules,
    draw_opacities,
    draw_plaques,
    draw_pneumothorax,
    room_of,
)
from mm.phantom.plan import FOLLOWED, draw_plan
from mm.phantom.table import TABLE
from mm.phantom.truth import Reader, resolved


@dataclass(frozen=True)
class Step:
    """One visit of a course."""

    anatomy: Anatomy
    lesions: Lesions
    findings: tuple[FindingTruth, ...]


def draw_course(
    rng: np.random.Generator, anatomy: Anatomy, *, visits: int, rolls: tuple[float, ...]
) -> tuple[Step, ...]:
    """Draws the findings of all visits, the current one first.

    Args:
        rng: Source of chance.
        anatomy: The patient at rest.
        visits: How many CTs there are.
        rolls: Roll of the patient in each, in degrees (turns body into LPS).
    """
    plans = {code: draw_plan(rng, code, visits) for code in FOLLOWED}
    atelectasis = draw_log(rng, TABLE.atelectasis_ml)
    loss_side = BODY_SIDES[int(rng.integers(2))]
    losses = plans["atelectasis"].sizes(atelectasis, cap=TABLE.prior_opacity_ml)
    anatomies = tuple(_breathed(rng, anatomy, loss, loss_side) for loss in losses)
    sides = {side: room_of(anatomies, side) for side in BODY_SIDES}

    pneumothoraces = draw_pneumothorax(rng, plans["pneumothorax"], sides)
    taken = next((item.side for visit in pneumothoraces for item in visit), None)
    effusions = draw_effusions(rng, plans["effusion"], sides, taken)
    opacities = draw_opacities(rng, plans, sides, atelectasis, loss_side)
    nodules = draw_nodules(rng, plans["nodule"], sides)
    emphysema = draw_emphysema(rng)
    fractures = draw_fractures(rng, anatomies[0])
    plaques = draw_plaques(rng, anatomy)
    steps = []
    for index in range(visits):
        lesions = Lesions(
            emphysema=emphysema,
            nodules=nodules[index],
            opacities=opacities[index],
            effusions=effusions[index],
            pneumothoraces=pneumothoraces[index],
            fractures=fractures if index == 0 else (),
            plaques=plaques,
        )
        truth = Reader(anatomies[index], lesions, rolls[index], plans, current=index == 0)
        found = truth.findings()
        if index == 0 and visits > 1:
            found += resolved(plans, pneumothoraces[1], effusions[1], opacities[1], nodules[1])
        steps.append(Step(anatomies[index], lesions, found))
    return tuple(steps)


def _breathed(rng: np.random.Generator, anatomy: Anatomy, loss: float | None, side: BodySide) -> Anatomy:
    breath = float(rng.uniform(*TABLE.breath_mm))
    rise = 0.0
    if loss is not None:
        low, high = TABLE.diaphragm_rise_mm
        share = math.log(loss / TABLE.atelectasis_ml[0]) / math.log(TABLE.atelectasis_ml[1] / TABLE.atelectasis_ml[0])
        rise = low + (high - low) * min(max(share, 0.0), 1.0)
    return breathe(anatomy, both=breath, left=rise if side == "left" else 0.0, right=rise if side == "right" else 0.0)
