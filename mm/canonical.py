"""Images and their texts side by side, by canonical correlations of what frozen towers say of them.

Canonical correlation analysis (Hotelling, "Relations between two sets of variates", Biometrika 1936) with kernels and
a ridge (Hardoon, Szedmak and Shawe-Taylor, Neural Computation 2004), its directions weighted by their correlations
(Gong et al., "A multi-view embedding space", IJCV 2014). For some thousand pairs: there is nothing to tune by
gradients, and no seed.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.answers import statistics, word_bags
from mm.batch import Padded, Tokens

_RATE: Final = 2.0
"""How fast both kernels fall with the angle between two vectors: exp(2 (cosine - 1))."""


@dataclass(frozen=True)
class _Side:
    """The principal components of one side's kernel, whitened with a ridge.

    Attributes:
        seen: Of the fitted pairs.
        directions: From the kernel between anything and the fitted pairs, less its mean, to the same.
    """

    seen: Float[Tensor, "N C"]
    directions: Float[Tensor, "N C"]

    @classmethod
    def of(cls, alike: Float[Tensor, "N N"], *, components: int, ridge: float) -> "_Side":
        """Of the kernel among the fitted pairs.

        Centred, its components are orthogonal to the constant: the mean of a new row never matters.
        """
        kernel = alike.double()
        kernel = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
        variances, vectors = (found.flip(-1)[..., :components] for found in torch.linalg.eigh(kernel))
        kept = variances > 1e-9 * variances[0]
        variances, vectors = variances[kept], vectors[:, kept]
        added = ridge * kernel.diagonal().mean()
        directions = vectors / (variances * (variances + added)).sqrt()
        return cls((kernel @ directions).float(), directions.float())


class CanonicalHead(nn.Module):
    """Unit vectors of images and texts whose cosine is high where training saw such an image with such a text.

    Two images are as alike as exp(2 (i - 1)), with i the cosine of their vectors: mean, deviation and maximum of an
    image's tokens, standardised over the training images. Two texts likewise, with the mean of two cosines: of the
    text tower's vectors, and of the words weighted by rarity (TF-IDF).

    Args:
        image_width: Of the image tower's tokens.
        text_width: Of the text tower's vectors.
        components: Principal components kept of either kernel.
        ridge: Added to their variances, in means of a kernel's variance over the pairs.
        num_pairs: Of those fitted; a checkpoint says so of itself.
        num_directions: Width of the vectors, likewise.
        longest_text: In ids, likewise.
    """

    pictures: Tensor
    picture_mean: Tensor
    picture_std: Tensor
    picture_directions: Tensor
    picture_shift: Tensor
    sentences: Tensor
    ids: Tensor
    text_directions: Tensor
    text_shift: Tensor

    def __init__(
        self,
        *,
        image_width: int,
        text_width: int,
        components: int = 400,
        ridge: float = 2.0,
        num_pairs: int = 0,
        num_directions: int = 0,
        longest_text: int = 0,
    ) -> None:
        super().__init__()
        if ridge <= 0 or components < 1:
            raise ValueError(f"ridge must be above 0 and components at least 1, got {ridge} and {components}")
        self.image_width, self.text_width = image_width, text_width
        self.components, self.ridge = components, ridge
        self.register_buffer("pictures", torch.zeros(num_pairs, 3 * image_width))
        self.register_buffer("picture_mean", torch.zeros(3 * image_width))
        self.register_buffer("picture_std", torch.ones(3 * image_width))
        self.register_buffer("picture_directions", torch.zeros(num_pairs, num_directions))
        self.register_buffer("picture_shift", torch.zeros(num_directions))
        self.register_buffer("sentences", torch.zeros(num_pairs, text_width))
        self.register_buffer("ids", torch.zeros(num_pairs, longest_text, dtype=torch.long))
        self.register_buffer("text_directions", torch.zeros(num_pairs, num_directions))
        self.register_buffer("text_shift", torch.zeros(num_directions))

    def sealed(self) -> dict[str, int]:
        """Sizes of what was fitted."""
        return {
            "num_pairs": len(self.pictures),
            "num_directions": len(self.text_shift),
            "longest_text": self.ids.shape[1],
        }

    @torch.no_grad()
    def fit(self, images: Tokens, sentences: Float[Tensor, "N E"], texts: Padded) -> None:
        """Learns from pairs; what was learnt before is forgotten.

        Args:
            images: Tokens of each pair's image.
            sentences: The text tower's vector of each pair's text.
            texts: The same texts in the text tower's words.

        Raises:
            ValueError: There are fewer than three pairs, or one has no image.
        """
        if len(sentences) < 3 or not bool(images.mask.any(1).all()):
            raise ValueError(f"canonical correlations need three pairs with an image or more, got {len(sentences)}")
        seen = statistics(images)
        self.picture_mean = seen.mean(0)
        self.picture_std = (seen - self.picture_mean).square().mean(0).sqrt() + 1e-3
        # As a checkpoint keeps them, so that what is fitted is what will be used.
        self.pictures = self._standard(seen).bfloat16().float()
        self.sentences = F.normalize(sentences.float(), dim=-1).bfloat16().float()
        self.ids = texts.values * texts.mask
        kernels = self._alike_images(self.pictures), self._alike_texts(self.sentences, self.ids)
        one, other = (_Side.of(kernel, components=self.components, ridge=self.ridge) for kernel in kernels)
        left, correlations, right = torch.linalg.svd(one.seen.T @ other.seen, full_matrices=False)
        for name, kernel, side, turn in (
            ("picture", kernels[0], one, left),
            ("text", kernels[1], other, right.T),
        ):
            directions = (side.directions @ (turn * correlations)).bfloat16().float()
            setattr(self, f"{name}_directions", directions)
            setattr(self, f"{name}_shift", kernel.mean(0) @ directions)

    def image(self, tokens: Tokens) -> Float[Tensor, "B E"]:
        """Unit vectors of images; zeros where there is none, and of width 0 before `fit`."""
        there = tokens.mask.any(1, keepdim=True)
        with torch.autocast(tokens.mask.device.type, enabled=False):  # half precision can't tell such cosines apart
            seen = self._standard(statistics(tokens).masked_fill(~there, 0))
            made = self._alike_images(seen) @ self.picture_directions - self.picture_shift
            return F.normalize(made, dim=-1) * there

    def text(self, sentences: Float[Tensor, "M D"], texts: Padded) -> Float[Tensor, "M E"]:
        """Unit vectors of texts, of width 0 before `fit`."""
        with torch.autocast(sentences.device.type, enabled=False):
            alike = self._alike_texts(F.normalize(sentences.float(), dim=-1), texts.values * texts.mask)
            return F.normalize(alike @ self.text_directions - self.text_shift, dim=-1)

    def _standard(self, seen: Float[Tensor, "M F"]) -> Float[Tensor, "M F"]:
        return F.normalize((seen - self.picture_mean) / self.picture_std, dim=-1)

    def _alike_images(self, seen: Float[Tensor, "M F"]) -> Float[Tensor, "M N"]:
        return torch.exp(_RATE * (seen @ self.pictures.T - 1))

    def _alike_texts(self, sentences: Float[Tensor, "M D"], ids: Int[Tensor, "M L"]) -> Float[Tensor, "M N"]:
        if len(self.ids) == 0:
            return sentences.new_zeros(len(sentences), 0)
        words = word_bags(ids, self.ids) @ word_bags(self.ids, self.ids).T
        return torch.exp(_RATE * ((sentences @ self.sentences.T + words) / 2 - 1))
