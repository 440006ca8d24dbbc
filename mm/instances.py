"""From maps to findings one can point at: sides, places, sizes, and one row for everything that is absent.

Findings of small separation are peaks of their map; a finding that fills a side has one instance a side; one that
knows no side has one. Voxels come from the volume, pixels from the X-ray; what only the X-ray shows has a pixel and
no voxel.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mm import ontology
from mm.batch import DetectedFinding
from mm.finding_maps import PEAKS, Maps, PeakHead, decode_size

if TYPE_CHECKING:
    from mm.findings import FindingHead, FindingOutputs

CANDIDATES = 64
"""Local maxima that are looked at in one map."""
MIDLINE_MM = {3: 10.0, 2: 40.0}
"""So near the middle of a volume (which is centred on the body) or of an X-ray (which is not) the map of sides is
asked for an instance's side; beyond it the instance's own place tells."""


@dataclass(frozen=True)
class Instance:
    """One instance in one picture: side, middle in voxels or pixels, size, and how sure the picture is."""

    side: str
    center: tuple[float, ...]
    size: float | None
    score: float


def decode(head: "FindingHead", outputs: "FindingOutputs") -> list[tuple[DetectedFinding, ...]]:
    """Findings of every study in the order of the ontology; see `FindingHead.decode`."""
    probability = head.probability(outputs.presence)
    probabilities: list[list[float]] = probability.tolist()
    shown = probability >= head.threshold
    if outputs.assessable is not None:  # a prior above its threshold is no sight of anything
        shown = shown & outputs.assessable
    present: list[list[bool]] = shown.tolist()
    before: list[list[bool]] = (outputs.before.sigmoid() >= head.before_threshold).tolist()
    studies = []
    for b in range(len(probabilities)):
        rows: list[DetectedFinding] = []
        for k, item in enumerate(ontology.FINDINGS):
            change = _change(outputs.change[b, k], present=present[b][k], before=before[b][k])
            if present[b][k] and item.focal:
                rows += _instances(head, outputs, b, k, probability=probabilities[b][k], change=change)
                continue
            sides = _resolved_sides(head, outputs, b, k) if change == "resolved" else ["none"]
            rows += [
                DetectedFinding(item.code, present[b][k], probabilities[b][k], side, None, None, None, change)
                for side in sides
            ]
        studies.append(tuple(rows))
    return studies


def candidates(head: "FindingHead", outputs: "FindingOutputs", b: int, k: int, *, least: float) -> list[Instance]:
    """Every instance of finding k that the current volume of study b may show, whatever the sealed threshold.

    Args:
        head: The finding head.
        outputs: Of a batch.
        b: Study.
        k: Finding.
        least: Fainter ones are left out, but for the first.
    """
    return _in_picture(outputs.volume, head.volume_peaks, head.volume_stride, head.spacing_mm, head, b, k, least=least)


def _change(logits: Tensor, *, present: bool, before: bool) -> str:
    """The likeliest change that fits with whether the finding is there now and was there before."""
    if int(logits.argmax()) == ontology.CHANGES.index("unknown"):
        return "unknown"
    resolved = ontology.CHANGES.index("resolved")
    if not present:
        return "resolved" if before and int(logits.argmax()) == resolved else "unknown"
    allowed = logits.clone()
    allowed[resolved] = -torch.inf
    return ontology.CHANGES[int(allowed.argmax())]


def _resolved_sides(head: "FindingHead", outputs: "FindingOutputs", b: int, k: int) -> list[str]:
    """The side of each instance in the last prior."""
    found = _in_picture(outputs.volume, head.volume_peaks, head.volume_stride, head.spacing_mm, head, b, k, visit=1)
    sure = [item.side for item in found if item.score >= float(head.peak_threshold[k])]
    return sure or [item.side for item in found[:1]] or ["none"]


def _instances(
    head: "FindingHead", outputs: "FindingOutputs", b: int, k: int, *, probability: float, change: str
) -> list[DetectedFinding]:
    """Rows of a finding that is present: the volume's instances, each with its place on the X-ray, then the X-ray's."""
    in_volume = _in_picture(outputs.volume, head.volume_peaks, head.volume_stride, head.spacing_mm, head, b, k)
    in_image = _in_picture(outputs.image, head.image_peaks, head.image_stride, head.pixel_mm, head, b, k)
    threshold = float(head.peak_threshold[k])
    sure_volume = [item for item in in_volume if item.score >= threshold]
    sure_image = [item for item in in_image if item.score >= threshold]
    if not sure_volume and not sure_image:
        # The head is sure of the finding, and neither map of its place: the likeliest place will do.
        best = max([*in_volume, *in_image], key=lambda item: item.score, default=None)
        if best is None:
            code = ontology.CODES[k]
            return [DetectedFinding(code, True, probability, "none", None, None, None, change)]
        sure_volume = [best] if best in in_volume else []
        sure_image = [] if sure_volume else [best]
    rows = []
    for item in sure_volume[: ontology.MAX_INSTANCES]:
        alike = [other for other in sure_volume if other.side == item.side]
        partners = [other for other in sure_image if other.side == item.side]
        # Heights in the two pictures are not calibrated: of several on a side nothing says which is which.
        partner = partners[0] if len(alike) == len(partners) == 1 else None
        rows.append(_row(k, probability, change, item, partner))
    sides = {item.side for item in sure_volume}
    # A CT is trusted over the X-ray on a side where it shows the finding itself.
    extra = [item for item in sure_image if item.side not in sides]
    rows += [_row(k, probability, change, None, item) for item in extra[: ontology.MAX_INSTANCES - len(rows)]]
    return rows


def _row(k: int, probability: float, change: str, volume: Instance | None, image: Instance | None) -> DetectedFinding:
    main = volume or image
    assert main is not None
    voxel = None if volume is None else (volume.center[0], volume.center[1], volume.center[2])
    pixel = None if image is None else (image.center[0], image.center[1])
    return DetectedFinding(ontology.CODES[k], True, probability, main.side, voxel, pixel, main.size, change)


def _in_picture(
    maps: Maps | None,
    peaks: PeakHead | None,
    stride: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    head: "FindingHead",
    b: int,
    k: int,
    *,
    visit: int = 0,
    least: float | None = None,
) -> list[Instance]:
    """Instances of finding k in one picture of study b, the surest first."""
    source = "volume" if len(stride) == 3 else "image"
    if maps is None or source not in ontology.FINDINGS[k].sources:
        return []
    rows = ((maps.study == b) & (maps.visit == visit)).nonzero()[:, 0].tolist()
    if not rows:
        return []
    n = int(rows[0])
    if k in PEAKS:
        assert peaks is not None
        least = float(head.peak_threshold[k]) if least is None else least
        return _peaks(maps, peaks, n, k, stride=stride, spacing_mm=spacing_mm, least=least)
    return _regions(maps, n, k)


def _regions(maps: Maps, n: int, k: int) -> list[Instance]:
    """One instance a side, or one."""
    slots = (1, 2) if ontology.FINDINGS[k].sided else (0,)
    scores = maps.presence[n, k].sigmoid().tolist()
    sizes = decode_size(maps.sizes[n, k], torch.tensor(k, device=maps.sizes.device)).tolist()
    found = [
        Instance(ontology.SIDES[slot], tuple(maps.centers[n, k, slot].tolist()), sizes[slot], scores[slot])
        for slot in slots
    ]
    return sorted(found, key=lambda item: -item.score)


def _peaks(
    maps: Maps,
    peaks: PeakHead,
    n: int,
    k: int,
    *,
    stride: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    least: float,
) -> list[Instance]:
    """Local maxima of the map; of two nearer than the finding's separation the greater one stays."""
    logits = maps.maps[n, k]
    pool = F.max_pool3d if logits.ndim == 3 else F.max_pool2d
    top = pool(logits[None, None], 3, stride=1, padding=1)[0, 0] == logits
    scores, order = logits.masked_fill(~top, -torch.inf).flatten().topk(min(CANDIDATES, logits.numel()))
    # The first is kept however faint: the caller decides.
    kept = scores.sigmoid() >= least
    kept[0] = True
    scores, order = scores[kept], order[kept]
    cells = torch.stack(torch.unravel_index(order, logits.shape), dim=-1)
    picture = torch.full_like(order, n)
    offset, size = peaks(maps.features, picture=picture, cell=cells)
    column = PEAKS.index(k)
    step = torch.tensor(stride, device=cells.device)
    offset = offset[:, column].clamp(-2.5, 2.5)
    last = torch.tensor([s * x - 1 for s, x in zip(stride, logits.shape, strict=True)], device=cells.device)
    centers = torch.minimum((cells * step + (step - 1) / 2 + offset * step).clamp(min=0), last)
    sizes = decode_size(size[:, column], torch.tensor(k, device=size.device)).tolist()
    left = _left(centers[:, -1], maps.side[n].flatten()[order], spacing_mm, logits.shape[-1] * stride[-1]).tolist()
    places = (centers * torch.tensor(spacing_mm, device=centers.device))[None]
    apart = torch.cdist(places, places)[0]
    item = ontology.FINDINGS[k]
    found: list[int] = []
    for i in range(len(order)):
        if len(found) < ontology.MAX_INSTANCES and all(apart[i, j] >= item.separation_mm for j in found):
            found.append(i)
    return [
        Instance(
            ("left" if left[i] else "right") if item.sided else "none",
            tuple(centers[i].tolist()),
            sizes[i] if len(stride) == 3 else None,
            float(scores[i].sigmoid()),
        )
        for i in found
    ]


def _left(x: Tensor, logits: Tensor, spacing_mm: tuple[float, ...], width: int) -> Tensor:
    """Which of some places lie on the patient's left, which is where x grows to.

    Args:
        x: Voxel or pixel index along the last axis.
        logits: What the map of sides says of them.
        spacing_mm: Of the picture.
        width: Voxels or pixels along the last axis.
    """
    beyond_mm = (x - (width - 1) / 2) * spacing_mm[-1]
    return torch.where(beyond_mm.abs() > MIDLINE_MM[len(spacing_mm)], beyond_mm > 0, logits > 0)
