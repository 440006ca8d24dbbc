"""From each encoder's own width to the shared one, and to an embedding that can be compared.

An embedding is made of its own modality only: contrastive learning on vectors that have seen their partner solves
pairs of pure noise. So nothing here takes more than one modality.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.batch import Tokens
from mm.transformer import RMSNorm


class Adapter(nn.Module):
    """One modality's tokens to the shared width, marked with what they are.

    Args:
        in_width: Of the encoder's tokens.
        width: Of the fused tokens.
        dropout: Of the encoder's numbers, in training only.
    """

    def __init__(self, in_width: int, width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = RMSNorm(in_width)
        self.drop = nn.Dropout(dropout)
        self.project = nn.Linear(in_width, width)

    def forward(self, tokens: Tokens) -> Tokens:
        """The same tokens in the shared width."""
        return Tokens(self.project(self.drop(self.norm(tokens.values))), tokens.mask)


def perceptron(in_width: int, hidden: int | None, out_width: int, *, dropout: float = 0.0) -> nn.Module:
    """Two layers with GELU between them, behind which numbers are dropped in training; a matrix without `hidden`."""
    if hidden is None:
        return nn.Linear(in_width, out_width)
    between = nn.Sequential(nn.GELU(), nn.Dropout(dropout))
    return nn.Sequential(nn.Linear(in_width, hidden), between, nn.Linear(hidden, out_width))


class Projection(nn.Module):
    """A unit vector a study from one modality's tokens and what it says of the findings.

    Args:
        width: Of adapted tokens.
        said: Width of what is said of each finding; 0 for nothing.
        num_findings: K.
        embedding_width: Of the unit vector.
        each: Numbers that are kept of each finding.
        hidden: Of the perceptron; None for a matrix in its place.
        dropout: Of the perceptron's hidden numbers, in training only.
    """

    def __init__(
        self,
        width: int,
        *,
        said: int = 0,
        num_findings: int = 0,
        embedding_width: int = 128,
        each: int = 16,
        hidden: int | None = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.keep = nn.Linear(said, each) if said else None
        self.norm = RMSNorm(width)
        in_width = width + (num_findings * each if said else 0)
        self.project = perceptron(in_width, hidden, embedding_width, dropout=dropout)

    def forward(self, tokens: Tokens, said: Float[Tensor, "B K S"] | None = None) -> Float[Tensor, "B E"]:
        """Unit vectors; zeros in studies without a token.

        Args:
            tokens: Adapted.
            said: Of each finding, where the projection was made with it; what it lacks at the end is 0.
        """
        parts = [self.norm(mean(tokens))]
        if self.keep is not None:
            assert said is not None, "this projection also reads what is said of the findings"
            said = F.pad(said, (0, self.keep.in_features - said.shape[-1]))
            parts.append(self.keep(said).flatten(1).to(parts[0].dtype))
        unit = F.normalize(self.project(torch.cat(parts, dim=-1)).float(), dim=-1)
        return unit * tokens.mask.any(1, keepdim=True)


def mean(tokens: Tokens) -> Float[Tensor, "B D"]:
    """Mean over the valid tokens of each study; zeros where there is none."""
    mask = tokens.mask[..., None]
    return tokens.values.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)
