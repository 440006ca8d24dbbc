"""What one picture shows of each finding: a map over its cells, and what is pooled from the map.

A volume's cells are those of the second level of the 3-D ResNet's pyramid, brought together top-down from the
coarser levels (feature pyramid network, Lin et al. 2017); an X-ray's cells are half of a ViT's patch wide.
From there on both go the same way, so `MapHead` knows cells in a row and their coordinates only.

Axes: N pictures (flattened visits, or studies), K findings, P findings with peaks, W side slots in the order of
`mm.ontology.SIDES` ("none" stands for both sides together), C channels, D width of evidence, d spatial dimensions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm import ontology
from mm.batch import Movable

NUM_FINDINGS: Final = len(ontology.FINDINGS)
NUM_SLOTS: Final = len(ontology.SIDES)
PEAKS_BELOW_MM: Final = 60.0
"""Findings whose instances lie nearer than this are found as peaks; wider ones have one instance a side."""
PEAKS: Final = tuple(
    k for k, item in enumerate(ontology.FINDINGS) if item.focal and item.separation_mm < PEAKS_BELOW_MM
)
PRIOR_LOGIT: Final = -4.0
"""Logit at which maps start: nearly all cells are empty (Lin et al. 2017, focal loss, section 4.1)."""
SHARPNESS: Final = 2.0
SCALARS: Final = 4


@dataclass(frozen=True)
class Maps(Movable):
    """One imaging source of a batch; pictures that a study lacks are left out.

    Attributes:
        study: Which study of the batch each picture belongs to.
        visit: Which visit of it (0 is the current one; always 0 for an X-ray).
        features: What the maps are read from.
        maps: Logit that a finding is in a cell.
        fill: Logit of the share of a cell that the finding fills, given that it is there.
        side: Logit that a cell lies on the patient's left (against the right).
        presence: Logit that the picture shows the finding: anywhere, on the left, on the right.
        sizes: Normalised log size (see `encode_size`), by the same slots.
        centers: Voxel or pixel index of the middle, by the same slots.
        summary: Log mass, log filled mass and size by slot, for comparing visits.
        evidence: One vector a finding, what this source alone says of it.
    """

    study: Int[Tensor, " N"]
    visit: Int[Tensor, " N"]
    features: Float[Tensor, "N C *cells"]
    maps: Float[Tensor, "N K *cells"]
    fill: Float[Tensor, "N K *cells"]
    side: Float[Tensor, "N *cells"]  # noqa: F821
    presence: Float[Tensor, "N K W"]
    sizes: Float[Tensor, "N K W"]
    centers: Float[Tensor, "N K W d"]
    summary: Float[Tensor, "N K U"]
    evidence: Float[Tensor, "N K D"]


def cell_centers(
    shape: tuple[int, ...], stride: tuple[int, ...], device: torch.device | str
) -> Float[Tensor, "cells d"]:
    """Middle of each cell in voxel (or pixel) indices, the last axis fastest."""
    axes = [torch.arange(n, device=device) * s + (s - 1) / 2 for n, s in zip(shape, stride, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2).float()


class FeaturePyramid(nn.Module):
    """Top-down over the levels of stride (2,4,4), (4,8,8) and (8,16,16), to the finest of them.

    The level before, of stride (1,2,2), is folded in: the eight of its cells under each cell, for what is as small as
    one of them (a nodule of 4 mm).

    Args:
        widths: Channels of the four levels, the finest first.
        channels: Of the result.
    """

    def __init__(self, widths: tuple[int, int, int, int], *, channels: int = 48) -> None:
        super().__init__()
        self.detail = nn.Conv3d(widths[0], channels, 2, stride=2, bias=False)
        self.lateral = nn.ModuleList(nn.Conv3d(width, channels, 1) for width in widths[1:])
        self.place = nn.Conv3d(3, channels, 1, bias=False)
        self.smooth_middle = _smooth(nn.Conv3d(channels, channels, 3, padding=1, bias=False), channels)
        self.smooth_fine = _smooth(nn.Conv3d(channels, channels, 3, padding=1, bias=False), channels)

    def forward(self, levels: tuple[Tensor, ...]) -> Float[Tensor, "N C z y x"]:
        """Features on the second level; the cells know where they are by coordinates from -1 to 1."""
        fine, middle, coarse = (lateral(level) for lateral, level in zip(self.lateral, levels[1:], strict=True))
        middle = self.smooth_middle(middle + F.interpolate(coarse, size=middle.shape[2:]))
        fine = fine + self.detail(levels[0]) + F.interpolate(middle, size=fine.shape[2:])
        return self.smooth_fine(fine + self.place(coordinates(fine)))  # type: ignore[no-any-return]


class ImageCells(nn.Module):
    """The ViT's patches and, from its stem, the finer cells under them, on the finest grid; cells know their place.

    Args:
        widths: Channels of the levels, the finest first.
        channels: Of the result.
    """

    def __init__(self, widths: tuple[int, ...], *, channels: int = 64) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.place = nn.Conv2d(2, channels, 1, bias=False)
        self.smooth = _smooth(nn.Conv2d(channels, channels, 3, padding=1, bias=False), channels)

    def forward(self, levels: tuple[Tensor, ...]) -> Float[Tensor, "N C y x"]:
        """Features on the finest level's grid."""
        size = levels[0].shape[2:]
        scaled = [F.interpolate(lateral(x), size=size) for lateral, x in zip(self.lateral, levels, strict=True)]
        cells = torch.stack(scaled).sum(0)
        return self.smooth(cells + self.place(coordinates(cells)))  # type: ignore[no-any-return]


class MapHead(nn.Module):
    """Maps of all findings from features, and what is pooled from each map.

    Each map pools features, masses and moments for both sides together and for either; the sides are a map of
    their own, shared by all findings. Presence is read from the greatest logit and the masses at once, so it is
    learnt as soon as the map is, and teaches the map where no mask is known.

    Args:
        channels: Of the features.
        stride: Voxels (or pixels) a cell.
        width: Of evidence.
        hidden: Of the perceptron behind the pooling.
    """

    def __init__(self, channels: int, *, stride: tuple[int, ...], width: int, hidden: int = 128) -> None:
        super().__init__()
        self.stride = stride
        dims = len(stride)
        self.cells = nn.Linear(channels, 2 * NUM_FINDINGS + 1)
        self.name = nn.Embedding(NUM_FINDINGS, 16)
        self.pool = nn.Sequential(
            nn.Linear(2 * channels + SCALARS + 2 * dims + 16 + NUM_SLOTS, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
        )
        self.read = nn.Linear(hidden, 2 + dims)
        self.direct = nn.Embedding(NUM_FINDINGS, 2 * (SCALARS + 1))
        self.context = nn.Sequential(nn.Linear(NUM_FINDINGS * NUM_SLOTS * SCALARS, 64), nn.GELU())
        self.evidence = nn.Linear(NUM_SLOTS * hidden + 64 + 16, width)
        self.init_weights()

    def init_weights(self) -> None:
        """Maps start at the prior, presence at the sum of what it reads directly."""
        nn.init.normal_(self.cells.weight, std=0.02)
        nn.init.zeros_(self.cells.bias)
        with torch.no_grad():
            self.cells.bias[:NUM_FINDINGS] = PRIOR_LOGIT
            # (weights on greatest logit, log-mean-exp, log mass, log filled mass; bias) for presence, then for size.
            start = torch.tensor([2.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0])
            self.direct.weight.copy_(start.expand(NUM_FINDINGS, -1))

    def forward(
        self,
        features: Float[Tensor, "N C *cells"],
        *,
        study: Int[Tensor, " N"],
        visit: Int[Tensor, " N"],
        given: Mapping[int, Float[Tensor, "N *cells"]] | None = None,  # noqa: F821
    ) -> Maps:
        """Maps and their sums, in float32 whatever autocast says (masses are sums over thousands of cells).

        Args:
            features: Of the cells.
            study: Which study each picture belongs to.
            visit: Which visit of it.
            given: Logits of the maps of findings that are read elsewhere (`mm.finding_small`), by finding.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self._forward(features.float(), study, visit, given or {})

    def _forward(self, features: Tensor, study: Tensor, visit: Tensor, given: Mapping[int, Tensor]) -> Maps:
        shape = tuple(features.shape[2:])
        x = features.flatten(2)
        cells = self.cells.weight @ x + self.cells.bias[:, None]
        maps, fill = cells[:, :NUM_FINDINGS], cells[:, NUM_FINDINGS : 2 * NUM_FINDINGS]
        side = cells[:, 2 * NUM_FINDINGS :]
        if given:
            rows = [given[k].float().flatten(1) if k in given else row for k, row in enumerate(maps.unbind(1))]
            maps = torch.stack(rows, dim=1)
        N, K = maps.shape[:2]
        # How much a cell belongs to a slot: the whole picture, the patient's left, the patient's right.
        slots = torch.cat([torch.ones_like(side), side.sigmoid(), (-side).sigmoid()], dim=1)

        # One product pools features and coordinates of all slots; no tensor of slots and cells is made but this.
        peak = maps.amax(-1)
        weights = (SHARPNESS * (maps - peak.detach()[..., None])).exp()
        weights = (weights[:, :, None] * slots[:, None]).flatten(1, 2)
        centers = cell_centers(shape, self.stride, x.device)
        scale = torch.tensor([n * s / 2 for n, s in zip(shape, self.stride, strict=True)], device=x.device)
        place = (centers / scale - 1).T
        fixed = torch.cat([place, place.square(), torch.ones_like(place[:1])])
        total = (weights @ fixed.T).reshape(N, K, NUM_SLOTS, -1)
        sums = total[..., -1:] + 1e-6
        pooled = (weights @ x.transpose(1, 2)).reshape(N, K, NUM_SLOTS, -1) / sums
        first, second = (total[..., :-1] / sums).chunk(2, dim=-1)
        spread = ((second - first.square()).clamp(min=0) + 1e-4).sqrt()

        gate = (3 * maps).sigmoid()
        mass = gate @ slots.transpose(1, 2)
        filled = (gate * fill.sigmoid()) @ slots.transpose(1, 2)
        top = peak[..., None].expand(-1, -1, NUM_SLOTS)
        soft = top + (sums[..., 0].log() - math.log(x.shape[-1])) / SHARPNESS
        scalars = torch.stack([top, soft, (mass + 0.5).log(), (filled + 0.1).log()], dim=-1) / 4

        name = self.name.weight[None, :, None].expand(N, -1, NUM_SLOTS, -1)
        which = torch.eye(NUM_SLOTS, device=x.device).expand(N, K, -1, -1)
        # Context only: what the mean would teach the features isn't worth a pass over all cells.
        everywhere = x.detach().mean(-1)[:, None, None].expand(-1, K, NUM_SLOTS, -1)
        hidden = self.pool(torch.cat([pooled, everywhere, scalars, first, spread, name, which], dim=-1))
        read = self.read(hidden)
        presence, size, shift = read[..., 0], read[..., 1], read[..., 2:]
        for_presence, for_size = self.direct.weight.chunk(2, dim=-1)
        presence = presence + _affine(scalars, for_presence)
        size = size + _affine(scalars, for_size)
        context = self.context(scalars.flatten(1))[:, None].expand(-1, K, -1)
        evidence = self.evidence(torch.cat([hidden.flatten(2), context, name[:, :, 0]], dim=-1))
        stride = torch.tensor(self.stride, device=x.device, dtype=torch.float32)
        return Maps(
            study=study,
            visit=visit,
            features=features,
            maps=maps.reshape(N, K, *shape),
            fill=fill.reshape(N, K, *shape),
            side=side.reshape(N, *shape),
            presence=presence,
            sizes=size,
            centers=(first + 1) * scale + shift * stride,
            summary=torch.cat([scalars[..., 2], scalars[..., 3], size], dim=-1),
            evidence=evidence,
        )


class PeakHead(nn.Module):
    """Where exactly an instance lies and how large it is, read at one cell and the cells around it.

    Args:
        channels: Of the features.
        dims: 3 for volumes, 2 for images.
        hidden: Of the perceptron.
    """

    def __init__(self, channels: int, *, dims: int, hidden: int = 96) -> None:
        super().__init__()
        self.dims = dims
        self.around = nn.Linear(channels * 3**dims, hidden)
        self.read = nn.Linear(hidden, len(PEAKS) * (dims + 1))

    def forward(
        self, features: Float[Tensor, "N C *cells"], *, picture: Int[Tensor, " M"], cell: Int[Tensor, "M d"]
    ) -> tuple[Float[Tensor, "M P d"], Float[Tensor, "M P"]]:
        """Offset from the cell's middle to the instance's, in cells, and normalised log size.

        Args:
            features: Of all pictures.
            picture: Which of them.
            cell: Index of the cell.
        """
        with torch.autocast(features.device.type, enabled=False):
            near = torch.tensor(list(product((-1, 0, 1), repeat=self.dims)), device=cell.device)
            last = torch.tensor(features.shape[2:], device=cell.device) - 1
            # Beyond the border the border goes on.
            places = torch.minimum((cell[:, None] + near).clamp(min=0), last).unbind(-1)
            around = features.movedim(1, -1)[(picture[:, None], *places)].float()
            read = self.read(F.gelu(self.around(around.flatten(1)))).unflatten(-1, (len(PEAKS), -1))
        return read[..., : self.dims], read[..., self.dims]


def encode_size(size: Float[Tensor, "*batch"], k: Int[Tensor, "*#batch"]) -> Float[Tensor, "*batch"]:
    """Log size from -1 at the lowest to 1 at the highest that the measure of finding k allows."""
    low, high = _size_range(k)
    middle, half = (high.log() + low.log()) / 2, (high.log() - low.log()) / 2
    return (torch.minimum(torch.maximum(size, low), high).log() - middle) / half


def decode_size(code: Float[Tensor, "*batch"], k: Int[Tensor, "*#batch"]) -> Float[Tensor, "*batch"]:
    """The inverse of `encode_size`, in the finding's own unit."""
    low, high = _size_range(k)
    middle, half = (high.log() + low.log()) / 2, (high.log() - low.log()) / 2
    return (code.clamp(-1, 1) * half + middle).exp()


def _size_range(k: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest size; where a measure begins at 0 its logarithm begins at a hundredth of the highest."""
    measures = [item.measure for item in ontology.FINDINGS]
    low = [1.0 if item is None else max(item.low, item.high / 100) for item in measures]
    high = [2.0 if item is None else item.high for item in measures]
    return torch.tensor(low, device=k.device)[k], torch.tensor(high, device=k.device)[k]


def _affine(scalars: Float[Tensor, "N K W S"], weights: Float[Tensor, "K T"]) -> Float[Tensor, "N K W"]:
    return torch.einsum("nkws,ks->nkw", scalars, weights[:, :-1]) + weights[:, -1:]


def _smooth(convolution: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.GroupNorm(8 if channels % 8 == 0 else 1, channels), nn.GELU())


def coordinates(like: Tensor) -> Tensor:
    """Each cell's place from -1 to 1 as channels [1 d *cells]."""
    axes = [torch.linspace(-1, 1, n, device=like.device, dtype=like.dtype) for n in like.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
