"""Maps of findings that are a voxel or two wide, such as arterial calcium, from what the voxels of each cell say.

They go beside the network and not through it: features of the pyramid that have seen 9,000 patients tell nothing of
calcification (a head of its own on them: AUROC .43), statistics of the cells do (docs/results.md).
"""

from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm import ontology
from mm.finding_maps import PRIOR_LOGIT, coordinates

SMALL: Final = (ontology.INDEX["calcification"],)
"""Findings whose maps are made here."""


class SmallFindings(nn.Module):
    """Two convolutions over statistics and places.

    Args:
        in_channels: Of the statistics (`mm.encoders.cells`).
        hidden: Channels in between.
    """

    def __init__(self, in_channels: int, *, hidden: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv3d(in_channels + 3, hidden, 3, padding=1)
        self.second = nn.Conv3d(hidden, hidden, 3, padding=1)
        self.maps = nn.Conv3d(hidden, len(SMALL), 1)
        assert self.maps.bias is not None
        nn.init.constant_(self.maps.bias, PRIOR_LOGIT)

    def forward(
        self, statistics: Float[Tensor, "N S z y x"], *, place: Float[Tensor, "1 3 z y x"] | None = None
    ) -> Float[Tensor, "N M z y x"]:
        """Logits of the maps of `SMALL`.

        Args:
            statistics: Of the cells.
            place: Where the cells lie (`coordinates`) if they are a part of the volume; None: they are all of it.
        """
        place = coordinates(statistics) if place is None else place
        known = torch.cat([statistics, place.expand(len(statistics), -1, -1, -1, -1)], dim=1)
        hidden = F.gelu(self.second(F.gelu(self.first(known))))
        return self.maps(hidden)  # type: ignore[no-any-return]
