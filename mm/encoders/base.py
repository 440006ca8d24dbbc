"""What every encoder is, and what the model asks of a tower for images and of one for texts."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mm.batch import Padded, Tokens


class Encoder(nn.Module, ABC):
    """One modality to tokens. It sees no other modality, and padding never changes what it returns.

    Attributes:
        width: Width of its tokens.
    """

    width: int

    @abstractmethod
    def forward(self, x: Any) -> Tokens:
        """Encodes a batch of one modality; each subclass says which type it takes."""


class ImageEncoder(Encoder):
    """Images (0 black to 1 white) to a pyramid of features, and to tokens.

    Attributes:
        channels: Numbers of channels that an image may have: 1 grey, 3 red, green and blue.
        widths: Channels of the pyramid's levels, the finest first.
        stride: Pixels of its own grid a cell of the finest level.
    """

    channels: tuple[int, ...] = (1,)
    widths: tuple[int, ...]
    stride: int

    @abstractmethod
    def pyramid(self, x: Float[Tensor, "N C Y X"]) -> tuple[Float[Tensor, "N _ _ _"], ...]:
        """Features in their places, the finest level first."""

    @abstractmethod
    def tokens(self, grid: Float[Tensor, "N D y x"]) -> Tokens:
        """Tokens from the coarsest level, row by row."""

    def look(self, x: Float[Tensor, "N C Y X"]) -> tuple[tuple[Float[Tensor, "N _ _ _"], ...], Tokens]:
        """Pyramid and tokens, in one pass through the network."""
        levels = self.pyramid(x)
        return levels, self.tokens(levels[-1])

    def forward(self, x: Float[Tensor, "N C Y X"]) -> Tokens:
        """Tokens of each image."""
        return self.look(x)[1]


class TextTower(nn.Module, ABC):
    """Whole texts to one vector each, for retrieval.

    Attributes:
        width: Width of the vector.
        token_width: Width of `tokens`.
        vocab_size: Ids that it has room for.
        context_length: Longest text in ids; a longer one is cut.
        texts_from: What a tower that brings weights needs its texts to be split with: "open_clip", or a folder with a
            WordPiece vocabulary. None for the data's own tokenizer, or the one that a checkpoint was sealed with.
    """

    width: int
    token_width: int
    vocab_size: int
    context_length: int
    texts_from: str | None = None

    @abstractmethod
    def tokens(self, x: Padded) -> Tokens:
        """Every token behind the last layer."""

    @abstractmethod
    def pool(self, tokens: Tokens) -> Float[Tensor, "M D"]:
        """The vector of each text from its tokens; an empty text's are zeros."""

    def forward(self, x: Padded) -> Float[Tensor, "M D"]:
        """One vector a text."""
        return self.pool(self.tokens(x))
