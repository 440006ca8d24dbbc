"""What every encoder is."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from mm.batch import Tokens


class Encoder(nn.Module, ABC):
    """One modality to tokens. It sees no other modality, and padding never changes what it returns.

    Attributes:
        width: Width of its tokens.
    """

    width: int

    @abstractmethod
    def forward(self, x: Any) -> Tokens:
        """Encodes a batch of one modality; each subclass says which type it takes."""
