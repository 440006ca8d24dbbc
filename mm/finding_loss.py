"""What the finding head is trained on: dense maps, presence, places, sizes, sides and change.

Cells are graded by the share of them that a mask fills. Small lesions fill one cell among 30 thousand, so a
picture's cells of one finding weigh more the fewer they are, and easy empty cells weigh little (focal loss,
Lin et al. 2017; penalty of CenterNet, Zhou et al. 2019). The middle cell of every instance counts as filled even
where the lesion is too small for a voxel of the mask.
"""

from dataclasses import dataclass
from itertools import product
from types import EllipsisType
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mm import ontology
from mm.batch import Targets
from mm.finding_maps import NUM_FINDINGS, NUM_SLOTS, PEAKS, Maps, PeakHead, cell_centers, encode_size

SMALL_LESION_WEIGHT: Final = 10.0
"""Weight of the only cell of a lesion; n cells weigh 10 / sqrt(n) each, but never less than 1."""
REGION_SHARE: Final = 0.1
"""A cell belongs to an extended finding from this share on; below it is neither trained as full nor as empty."""
NEIGHBOUR_WEIGHT: Final = 0.25
PEAK_RADIUS: Final = 1.1
"""Cells whose middle is nearer than this many cells to an instance's learn its offset and size."""
BETA: Final = 0.1
WEIGHTS: Final[dict[str, float]] = {
    "map": 1.0,
    "fill": 0.25,
    "side": 0.25,
    "region": 0.5,
    "center": 0.5,
    "size": 1.0,
    "presence": 1.0,
    "change": 1.0,
}


@dataclass(frozen=True)
class PictureTruth:
    """Truth of the pictures of one source, parallel to its `Maps`."""

    share: Float[Tensor, "N K *cells"]
    valid: Bool[Tensor, "N K I"]
    centers: Float[Tensor, "N K I d"]
    sizes: Float[Tensor, "N K I"]
    sides: Int[Tensor, "N K I"]


At: TypeAlias = tuple[Int[Tensor, " N"], Int[Tensor, " N"]]
"""Study and visit of each picture."""


def volume_truth(targets: Targets, at: At, stride: tuple[int, ...]) -> PictureTruth | None:
    """Truth of the volumes that were seen, or None where the batch has none."""
    if targets.volume_bits is None or targets.count is None:
        return None
    assert targets.centers is not None
    assert targets.sizes is not None
    assert targets.sides is not None
    count, centers = targets.count[at], targets.centers[at]
    valid = torch.arange(centers.shape[2], device=count.device) < count[..., None]
    share = pool_bits(targets.volume_bits[at], stride)
    return PictureTruth(share, valid, centers, targets.sizes[at], targets.sides[at])


def image_truth(targets: Targets, at: At, stride: tuple[int, ...]) -> PictureTruth | None:
    """Truth of the images that were seen, or None where the batch has none.

    An image has no sizes of its own: those of the current volume are its targets, where they are known.
    """
    if targets.image_bits is None or targets.image_count is None:
        return None
    study = at[0]
    assert targets.image_centers is not None
    assert targets.image_sides is not None
    count, centers, sides = (item[study] for item in (targets.image_count, targets.image_centers, targets.image_sides))
    valid = torch.arange(centers.shape[2], device=count.device) < count[..., None]
    sizes = torch.zeros_like(centers[..., 0])
    if targets.sizes is not None and targets.sides is not None and targets.count is not None:
        # Of the volume's instances on the same side, the largest.
        current = targets.sizes[study, 0]
        there = torch.arange(current.shape[2], device=count.device) < targets.count[study, 0][..., None]
        for side in range(NUM_SLOTS):
            same = there & (targets.sides[study, 0] == side)
            largest = (current * same).amax(-1, keepdim=True)
            sizes = torch.where(valid & (sides == side), largest, sizes)
    return PictureTruth(pool_bits(targets.image_bits[study], stride), valid, centers, sizes, sides)


def pool_bits(bits: Int[Tensor, "N *voxels"], stride: tuple[int, ...]) -> Float[Tensor, "N K *cells"]:  # noqa: F821
    """Share of each cell in which bit k is set, for every finding k."""
    pool = F.avg_pool3d if len(stride) == 3 else F.avg_pool2d
    shape = [n // s for n, s in zip(bits.shape[1:], stride, strict=True)]
    share = torch.zeros(len(bits), NUM_FINDINGS, *shape, device=bits.device)
    seen = _any_bits(bits)
    for k in range(NUM_FINDINGS):
        rows = (seen & (1 << k)).nonzero()[:, 0]
        if len(rows):
            share[rows, k] = pool((bits[rows] & (1 << k)).float(), stride) / (1 << k)
    return share


def _any_bits(bits: Int[Tensor, "N *voxels"]) -> Int[Tensor, " N"]:  # noqa: F821
    """All bits that are set somewhere in each picture."""
    rest = bits.flatten(1)
    while (width := rest.shape[1]) > 1:
        half = width // 2
        odd = rest[:, -1:] if width % 2 else rest[:, :0]
        rest = torch.cat([rest[:, :half] | rest[:, half : 2 * half], odd], dim=1)
    return rest[:, 0]


def picture_losses(
    maps: Maps,
    truth: PictureTruth,
    read_peaks: PeakHead,
    *,
    relevant: tuple[int, ...],
    stride: tuple[int, ...],
    spacing_mm: tuple[float, ...],
) -> dict[str, Float[Tensor, ""]]:
    """Losses of one imaging source.

    Args:
        maps: What the head says.
        truth: What is.
        read_peaks: The head's part that reads offset and size at cells.
        relevant: Findings that the source shows at a place.
        stride: Voxels a cell.
        spacing_mm: Of voxels.
    """
    chosen = list(relevant)
    center_cells = _center_cells(truth, maps.maps.shape[2:], stride)
    region, region_center, region_size = _slot_losses(maps, truth, relevant, stride)
    peak_center, peak_size = _peak_losses(maps, truth, read_peaks, relevant, stride, spacing_mm)
    positive = (truth.share >= REGION_SHARE) | (center_cells > 1)
    return {
        "map": _map_loss(maps.maps[:, chosen], truth.share[:, chosen], center_cells[:, chosen], relevant),
        "fill": _fill_loss(maps.fill, truth.share, relevant),
        "side": _side_loss(maps, truth, positive, relevant, stride),
        "region": region,
        "center": region_center + peak_center,
        "size": region_size + peak_size,
    }


def within(x: Tensor, window: tuple[slice, ...]) -> Tensor:
    """A window of the last axes."""
    index: tuple[slice | EllipsisType, ...] = (..., *window)
    return x[index]


def small_losses(
    maps: Float[Tensor, "N M *window"],
    truth: PictureTruth,
    *,
    findings: tuple[int, ...],
    stride: tuple[int, ...],
    window: tuple[slice, ...],
) -> dict[str, Float[Tensor, ""]]:
    """Losses of maps that are learnt alone: of the cells, and of presence as the surest cell tells it.

    Args:
        maps: Logits of `findings` in a window of the picture.
        truth: Of the whole picture.
        findings: Of which there are maps.
        stride: Voxels a cell.
        window: Which cells, axis by axis.
    """
    chosen = list(findings)
    center_cells = within(_center_cells(truth, truth.share.shape[2:], stride)[:, chosen], window)
    share = within(truth.share[:, chosen], window)
    present = ((share > 0) | (center_cells > 1)).flatten(2).any(-1).float()
    return {
        "map": _map_loss(maps, share, center_cells, findings),
        "presence": F.binary_cross_entropy_with_logits(maps.flatten(2).amax(-1), present),
    }


def _map_loss(
    maps: Float[Tensor, "N R *cells"],
    share: Float[Tensor, "N R *cells"],
    center_cells: UInt8[Tensor, "N R *cells"],
    relevant: tuple[int, ...],
) -> Float[Tensor, ""]:
    peaked = torch.tensor([k in PEAKS for k in relevant], device=maps.device)
    logits, share, middle, near = (item.flatten(2) for item in (maps, share, center_cells > 1, center_cells))
    peaked = peaked[:, None]
    positive = torch.where(peaked, (share > 0) | middle, share >= REGION_SHARE)
    undecided = ~peaked & (share > 0)
    empty = (~positive & ~undecided).float()
    empty = torch.where(peaked & (near > 0), NEIGHBOUR_WEIGHT * empty, empty)
    number = positive.sum(-1, keepdim=True)
    full = positive * (SMALL_LESION_WEIGHT * number.clamp(min=1).rsqrt()).clamp(min=1)
    full = torch.where(middle & peaked, SMALL_LESION_WEIGHT, full)
    probability, surprise = logits.sigmoid(), F.softplus(logits)
    # softplus(-x) = softplus(x) - x
    loss = full * (1 - probability) * (surprise - logits) + empty * probability.square() * surprise
    weight = full.sum((0, 2)).clamp(min=SMALL_LESION_WEIGHT * len(logits) / 2)
    return (loss.sum((0, 2)) / weight).mean()


def _fill_loss(
    fill: Float[Tensor, "N K *cells"], share: Float[Tensor, "N K *cells"], relevant: tuple[int, ...]
) -> Float[Tensor, ""]:
    share = share[:, list(relevant)].flatten(2)
    n, r, cell = (share > 0).nonzero(as_tuple=True)
    if not len(n):
        return fill.sum() * 0
    logits = fill.flatten(2)[n, torch.tensor(relevant, device=n.device)[r], cell]
    # A finding of thousands of cells must not drown one of three.
    weight = _group_weight(n * len(relevant) + r)
    loss = F.binary_cross_entropy_with_logits(logits, share[n, r, cell], reduction="none")
    return (loss * weight).sum() / weight.sum()


def _group_weight(group: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """1 / sqrt(members of the group)."""
    return torch.bincount(group)[group].float().rsqrt()


def _center_cells(truth: PictureTruth, shape: torch.Size, stride: tuple[int, ...]) -> UInt8[Tensor, "N K *cells"]:
    """2 at the cell in which an instance's middle lies, 1 at its neighbours, 0 elsewhere."""
    n, k, i = truth.valid.nonzero(as_tuple=True)
    middle = _cell_of(truth.centers[n, k, i], shape, stride)
    near = torch.tensor(list(product((-1, 0, 1), repeat=len(stride))), device=n.device)
    last = torch.tensor(shape, device=n.device) - 1
    around = torch.minimum((middle[:, None] + near).clamp(min=0), last)
    result = torch.zeros(*truth.valid.shape[:2], *shape, dtype=torch.uint8, device=n.device)
    result[(n[:, None], k[:, None], *around.unbind(-1))] = 1
    result[(n, k, *middle.unbind(-1))] = 2
    return result


def _cell_of(center: Float[Tensor, "M d"], shape: torch.Size, stride: tuple[int, ...]) -> Int[Tensor, "M d"]:
    step = torch.tensor(stride, device=center.device)
    last = torch.tensor(shape, device=center.device) - 1
    return torch.minimum(((center + 0.5) / step).floor().long().clamp(min=0), last)


def _side_loss(
    maps: Maps, truth: PictureTruth, positive: Tensor, relevant: tuple[int, ...], stride: tuple[int, ...]
) -> Float[Tensor, ""]:
    """Each full cell of a sided finding lies on the side of its nearest instance."""
    sided = torch.tensor([k in relevant and item.sided for k, item in enumerate(ontology.FINDINGS)])
    usable = truth.valid & (truth.sides > 0) & sided.to(truth.valid.device)[:, None]
    n, k, cell = (positive.flatten(2) & usable.any(-1)[..., None]).nonzero(as_tuple=True)
    places = cell_centers(tuple(positive.shape[2:]), stride, positive.device)[cell]
    far = (truth.centers[n, k] - places[:, None]).square().sum(-1).masked_fill(~usable[n, k], torch.inf)
    nearest = far.argmin(-1) if len(n) else n
    left = (truth.sides[n, k, nearest] == ontology.SIDES.index("left")).float()
    if not len(n):
        return maps.side.sum() * 0
    weight = _group_weight(n * NUM_FINDINGS + k)
    loss = F.binary_cross_entropy_with_logits(maps.side.flatten(1)[n, cell], left, reduction="none")
    return (loss * weight).sum() / weight.sum()


def _slot_losses(
    maps: Maps, truth: PictureTruth, relevant: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Presence, middle and size of each finding: anywhere, on the left, on the right."""
    chosen = list(relevant)
    slot = torch.arange(NUM_SLOTS, device=truth.sides.device)
    member = truth.valid[:, chosen, None] & ((truth.sides[:, chosen, None] == slot[:, None]) | (slot[:, None] == 0))
    present = member.any(-1)
    sided = torch.tensor([ontology.FINDINGS[k].sided for k in chosen], device=slot.device)
    asked = (sided[:, None] | (slot == 0)).expand_as(present)
    region = F.binary_cross_entropy_with_logits(maps.presence[:, chosen][asked], present[asked].float())

    spread = torch.tensor([k not in PEAKS for k in chosen], device=slot.device)
    placed = present & asked & spread[:, None]
    share = (member / member.sum(-1, keepdim=True).clamp(min=1)).float()
    middle = torch.einsum("nkwi,nkid->nkwd", share, truth.centers[:, chosen])
    step = torch.tensor(stride, device=slot.device)
    center = _mean(_smooth_l1((maps.centers[:, chosen] - middle) / step).mean(-1), placed)

    largest = (truth.sizes[:, chosen, None] * member).amax(-1)
    target = encode_size(largest, torch.tensor(chosen, device=slot.device)[:, None])
    size = _mean(_smooth_l1(maps.sizes[:, chosen] - target), asked & (largest > 0))
    return region, center, size


def _peak_losses(
    maps: Maps,
    truth: PictureTruth,
    read_peaks: PeakHead,
    relevant: tuple[int, ...],
    stride: tuple[int, ...],
    spacing_mm: tuple[float, ...],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Offset and size, learnt at the cells around an instance's middle (all cells within a nodule's radius)."""
    usable = torch.zeros_like(truth.valid)
    peaks = [k for k in PEAKS if k in relevant]
    usable[:, peaks] = truth.valid[:, peaks]
    n, k, i = usable.nonzero(as_tuple=True)
    center, sizes = truth.centers[n, k, i], truth.sizes[n, k, i]
    shape = maps.maps.shape[2:]
    near = torch.tensor(list(product((-2, -1, 0, 1, 2), repeat=len(stride))), device=center.device)
    cells = _cell_of(center, shape, stride)[:, None] + near
    inside = ((cells >= 0) & (cells < torch.tensor(shape, device=center.device))).all(-1)
    step = torch.tensor(stride, device=center.device)
    offset = (center[:, None] - (cells * step + (step - 1) / 2)) / step
    spacing = torch.tensor(spacing_mm, device=center.device)
    is_diameter = torch.tensor([_in_mm(item) for item in ontology.FINDINGS], device=center.device)[k]
    within = (offset * step * spacing).norm(dim=-1) <= (0.4 * sizes * is_diameter)[:, None]
    m, j = (inside & (within | (offset.norm(dim=-1) <= PEAK_RADIUS))).nonzero(as_tuple=True)
    place, size = read_peaks(maps.features, picture=n[m], cell=cells[m, j])
    if not len(m):
        return place.sum() * 0, size.sum() * 0
    column = torch.tensor([PEAKS.index(x) if x in PEAKS else 0 for x in range(NUM_FINDINGS)], device=k.device)[k[m]]
    row = torch.arange(len(m), device=m.device)
    each = 1 / torch.bincount(m, minlength=len(n)).clamp(min=1)[m]
    target = encode_size(sizes, k)
    center_loss = _smooth_l1(place[row, column] - offset[m, j]).mean(-1)
    size_loss = _smooth_l1(size[row, column] - target[m]) * (sizes[m] > 0)
    return (center_loss * each).sum() / each.sum(), (size_loss * each).sum() / each.sum()


def _in_mm(item: ontology.Finding) -> bool:
    return item.measure is not None and item.measure.name == "diameter" and item.measure.unit == "mm"


def _smooth_l1(difference: Tensor) -> Tensor:
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=BETA, reduction="none")


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the marked; 0 with a gradient of 0 where none is."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
