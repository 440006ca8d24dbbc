"""What the statistics of a volume's cells say of findings that are a voxel or two wide, such as arterial calcium.

They go beside the network and not through it: features of the pyramid that have seen 9,000 patients tell nothing of
calcification (a head of its own on them: AUROC .43), the statistics do (.85 for 50 mm3 and more, docs/results.md).
Learning it takes thousands of steps all the same: the shipped model has not got there.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.finding_maps import NUM_FINDINGS, coordinates


class SmallFindings(nn.Module):
    """Two convolutions over statistics and places; their result is added to the features and to the maps.

    Args:
        in_channels: Of the statistics (`mm.encoders.cells`).
        channels: Of the features they are added to.
        hidden: Channels in between.
    """

    def __init__(self, in_channels: int, *, channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv3d(in_channels + 3, hidden, 3, padding=1)
        self.second = nn.Conv3d(hidden, hidden, 3, padding=1)
        self.features = nn.Conv3d(hidden, channels, 1, bias=False)
        self.maps = nn.Conv3d(hidden, NUM_FINDINGS, 1, bias=False)
        for added in (self.features, self.maps):
            nn.init.normal_(added.weight, std=0.02)  # a head that has learnt without them hardly notices

    def forward(
        self, statistics: Float[Tensor, "N S z y x"]
    ) -> tuple[Float[Tensor, "N C z y x"], Float[Tensor, "N K z y x"]]:
        """What is added to the features, and to the logits of the maps."""
        place = coordinates(statistics).expand(len(statistics), -1, -1, -1, -1)
        hidden = F.gelu(self.second(F.gelu(self.first(torch.cat([statistics, place], dim=1)))))
        return self.features(hidden), self.maps(hidden)
