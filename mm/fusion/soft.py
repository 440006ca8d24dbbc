"""Soft targets: texts that are nearly alike are no negatives of one another, and a frozen text tower knows which are.

Gao et al., "SoftCLIP: Softer Cross-modal Alignment Makes CLIP Stronger" (AAAI 2024): similarity within a modality
becomes a part of the target across modalities.
"""

from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mm.fusion.contrastive import own_pairs
from mm.fusion.ranks import gather_values

TEMPERATURE: Final = 0.1
"""Of the similarity: a text at a cosine of .8 gets e times the mass of one at .7."""


def soft_targets(
    texts: Float[Tensor, "N D"], *, share: float, valid: Bool[Tensor, " N"] | None = None
) -> Float[Tensor, "N M"]:
    """Each row's target over all ranks' columns, 1 in sum: 1 - share its own pair, the rest by likeness of texts.

    Args:
        texts: What a frozen tower says of each text; every rank must have the same N.
        share: Of the other pairs.
        valid: Pairs that exist; the others get nothing. None: all.
    """
    with torch.no_grad(), torch.autocast(texts.device.type, enabled=False):
        unit = F.normalize(texts.float(), dim=-1)
        own = own_pairs(unit)
        others = ~own if valid is None else ~own & gather_values(valid)
        alike = (unit @ gather_values(unit).T / TEMPERATURE).masked_fill(~others, -torch.inf).softmax(1)
        some = others.any(1, keepdim=True)  # alone in a batch, a pair keeps all
        return torch.where(some, share * alike.nan_to_num() + (1 - share) * own, own.float())
