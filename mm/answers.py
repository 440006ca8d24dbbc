"""Answers by kernel ridge regression: alike questions on alike images have alike answers.

Saunders, Gammerman and Vovk, "Ridge Regression Learning Algorithm in Dual Variables" (ICML 1998), with a product of
a kernel of questions and one of images (Hofmann et al., "Kernel methods in machine learning", 2008). It suits the few
thousand questions of a medical data set: nothing to tune by gradients, and no seed.
"""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.answer_words import YES_NO
from mm.batch import Padded, Tokens

_SENTENCES: Final = 3.0
_WORDS: Final = 1.5
_IMAGES: Final = 2.0
_IMAGES_OF_A_REGION: Final = 8.0
"""How fast the kernel falls with the angle between two vectors: exp(c (cosine - 1))."""
_BESIDE: Final = 2.0
"""What an alike image adds to an alike question, and what one of the same part of the body adds."""
_SAME: Final = 2.0
"""What another question on the very same image adds where both are answered by yes or no."""
_VERY_SAME: Final = 0.999
"""Cosine of two images above which they are one."""


class AnswerHead(nn.Module):
    """Scores of listed answers to a question about an image.

    Two questions are as alike as k = (exp(3 (s - 1)) + exp(1.5 (w - 1))) / 2, with s the cosine of their sentence
    vectors and w that of their words weighted by rarity (TF-IDF); with images, k (1 + 2 exp(2 (i - 1))), with i the
    cosine of the images' vectors: mean, deviation and maximum of an image's tokens, standardised over the training
    images. Nothing is learnt by gradients: `fit` solves for the coefficients.

    Where training says which part of the body each image shows, the factor is 1 + 2 [same part] + 2 exp(8 (i - 1)):
    a new image is of the part that the fitted image most like it is of. Then two questions on one image that begin as
    yes-or-no questions do are alike by another 2 max(s, 0), with the sign turned where one of them asks for what is
    well ("normal", "clear") and the other doesn't: a yes to the one speaks for a no to the other.

    Args:
        text_width: Of the text tower's sentence vectors.
        image_width: Of the image tower's tokens; 0 to look at questions alone.
        ridge: Added to the diagonal: how little a single answer counts.
        decoder_weight: Of the decoder's log-probability beside these scores, where there is a decoder.
        num_questions: Of those fitted; a checkpoint says so of itself.
        num_openings: Ids that yes-or-no questions begin with, likewise.
        num_well: Ids of words for what is well, likewise.
        num_answers: Distinct answers likewise.
        longest_question: In ids, likewise.
        longest_answer: In bytes, likewise.
    """

    asked: Tensor
    sentences: Tensor
    pictures: Tensor
    picture_mean: Tensor
    picture_std: Tensor
    coefficients: Tensor
    answer_bytes: Tensor
    regions: Tensor
    openings: Tensor
    well: Tensor

    def __init__(
        self,
        *,
        text_width: int,
        image_width: int = 0,
        ridge: float = 0.6,
        decoder_weight: float = 0.05,
        num_questions: int = 0,
        num_answers: int = 0,
        num_openings: int = 0,
        num_well: int = 0,
        longest_question: int = 0,
        longest_answer: int = 0,
    ) -> None:
        super().__init__()
        if ridge <= 0 or decoder_weight < 0:
            raise ValueError(f"ridge must be above 0 and decoder_weight at least 0, got {ridge} and {decoder_weight}")
        self.text_width, self.image_width = text_width, image_width
        self.ridge, self.decoder_weight = ridge, decoder_weight
        self.register_buffer("asked", torch.zeros(num_questions, longest_question, dtype=torch.long))
        self.register_buffer("sentences", torch.zeros(num_questions, text_width))
        self.register_buffer("pictures", torch.zeros(num_questions, 3 * image_width))
        self.register_buffer("picture_mean", torch.zeros(3 * image_width))
        self.register_buffer("picture_std", torch.ones(3 * image_width))
        self.register_buffer("coefficients", torch.zeros(num_questions, num_answers))
        self.register_buffer("answer_bytes", torch.zeros(num_answers, longest_answer, dtype=torch.uint8))
        self.register_buffer("regions", torch.full((num_questions,), -1, dtype=torch.long))
        self.register_buffer("openings", torch.zeros(num_openings, dtype=torch.long))
        self.register_buffer("well", torch.zeros(num_well, dtype=torch.long))

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers, in the order of the scores."""
        rows = self.answer_bytes.cpu().numpy()
        return tuple(bytes(row).rstrip(b"\0").decode("utf-8", errors="replace") for row in rows)

    def sealed(self) -> dict[str, int]:
        """Sizes of what was fitted."""
        return {
            "num_questions": len(self.asked),
            "num_answers": len(self.answer_bytes),
            "num_openings": len(self.openings),
            "num_well": len(self.well),
            "longest_question": self.asked.shape[1],
            "longest_answer": self.answer_bytes.shape[1],
        }

    def describe(self, image: Tokens | None, rows: int) -> Float[Tensor, "M F"]:
        """Mean, deviation and maximum of each image's tokens; of width 0 where only questions are looked at."""
        if self.image_width == 0:
            return self.pictures.new_zeros(rows, 0)
        if image is None:
            return self.picture_mean.expand(rows, -1)  # a question without an image is on the mean of all images
        seen = statistics(image)
        return torch.where(image.mask.any(1)[:, None], seen, self.picture_mean)

    @torch.no_grad()
    def fit(
        self,
        sentences: Float[Tensor, "N E"],
        asked: Padded,
        pictures: Float[Tensor, "N F"],
        answers: Sequence[str],
        *,
        regions: Sequence[str] = (),
        well: Sequence[int] = (),
    ) -> None:
        """Learns from training questions; what was learnt before is forgotten.

        Args:
            sentences: The text tower's vectors of the questions.
            asked: The questions in the text tower's words.
            pictures: From `describe`, one a question.
            answers: One a question; equal strings are one answer.
            regions: Part of the body on the image of each question; none where it isn't known.
            well: Ids of the words in which a question asks for what is well; only looked at with `regions`.

        Raises:
            ValueError: There are no questions, or regions of only some.
        """
        if not answers:
            raise ValueError("answers: there are no questions to fit")
        if regions and (len(regions) != len(answers) or not all(regions)):
            got = sum(map(bool, regions))
            raise ValueError(f"regions must be of all {len(answers)} questions or of none, got {got}")
        listed = sorted(set(answers))
        place = {answer: index for index, answer in enumerate(listed)}
        self.picture_mean = pictures.mean(0)
        self.picture_std = (pictures - self.picture_mean).square().mean(0).sqrt() + 1e-3
        self.asked = asked.values * asked.mask
        # As a checkpoint keeps them, so that what is fitted is what will be used.
        self.sentences = F.normalize(sentences.float(), dim=-1).bfloat16().float()
        self.pictures = self._standard(pictures).bfloat16().float()
        spelt = [torch.frombuffer(bytearray(answer.encode()), dtype=torch.uint8) for answer in listed]
        self.answer_bytes = nn.utils.rnn.pad_sequence(spelt, batch_first=True).to(self.asked.device)
        device = self.asked.device
        parts = {part: index for index, part in enumerate(sorted(set(regions)))}
        self.regions = torch.tensor([parts[part] for part in regions] or [-1] * len(answers), device=device)
        self.well = torch.tensor(sorted(set(well)), dtype=torch.long, device=device)
        decided = torch.tensor([answer in YES_NO for answer in answers], dtype=torch.float64, device=device)
        words, which = self._begin(self.asked).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        share = torch.zeros(len(words), dtype=torch.float64, device=device)
        self.openings = words[share.scatter_reduce(0, which, decided, "mean", include_self=False) > 0.5]
        alike = self._alike(self.sentences, self.asked, self.pictures).double()
        wanted = F.one_hot(torch.tensor([place[item] for item in answers]), len(listed)).to(alike)
        eye = torch.eye(len(alike), dtype=alike.dtype, device=alike.device)
        self.coefficients = torch.linalg.solve(alike + self.ridge * eye, wanted).float()

    def forward(
        self, sentences: Float[Tensor, "M E"], asked: Padded, pictures: Float[Tensor, "M F"]
    ) -> Float[Tensor, "M A"]:
        """Scores: about 1 for an answer that all alike questions have, 0 for one that none has.

        Raises:
            ValueError: Nothing was fitted.
        """
        if len(self.coefficients) == 0:
            raise ValueError("the answer head was never fitted; train it with AnswerTask")
        vectors = F.normalize(sentences.float(), dim=-1)
        return self._alike(vectors, asked.values * asked.mask, self._standard(pictures)) @ self.coefficients

    def _standard(self, pictures: Float[Tensor, "M F"]) -> Float[Tensor, "M F"]:
        return F.normalize((pictures.float() - self.picture_mean) / self.picture_std, dim=-1)

    def _alike(
        self, sentences: Float[Tensor, "M E"], asked: Int[Tensor, "M L"], pictures: Float[Tensor, "M F"]
    ) -> Float[Tensor, "M N"]:
        """The kernel between questions and those fitted."""
        words = self._bags(asked) @ self._bags(self.asked).T
        alike = 0.5 * _falling(sentences @ self.sentences.T, _SENTENCES) + 0.5 * _falling(words, _WORDS)
        if not self.image_width:
            return alike
        seen = pictures @ self.pictures.T
        if len(self.regions) == 0 or int(self.regions.min()) < 0:
            return alike * (1 + _BESIDE * _falling(seen, _IMAGES))
        nearest = seen.max(1)
        own = torch.where(nearest.values > 0, self.regions[nearest.indices], -1)  # an absent image is of no part
        same_part = (own[:, None] == self.regions).float()
        alike = alike * (1 + _BESIDE * same_part + _BESIDE * _falling(seen, _IMAGES_OF_A_REGION))
        both = self._decides(asked)[:, None] * self._decides(self.asked)
        return alike + _SAME * both * (sentences @ self.sentences.T) * (seen > _VERY_SAME)

    def _decides(self, ids: Int[Tensor, "M L"]) -> Float[Tensor, " M"]:
        """1 for a question that begins as yes-or-no questions do, -1 if it asks for what is well; else 0."""
        sign = 1.0 - 2.0 * torch.isin(ids, self.well).any(1).float()
        return sign * torch.isin(self._begin(ids), self.openings)

    def _begin(self, ids: Int[Tensor, "M L"]) -> Int[Tensor, " M"]:
        """The first word of each question, marks that all fitted questions have left out; 0 where there is none."""
        known, rows = self.asked.unique(), len(self.asked)  # type: ignore[no-untyped-call]
        marks = known[(self.asked[:, :, None] == known).any(1).sum(0) == rows]
        word = ~torch.isin(ids, marks) & (ids != 0)
        first = ids.gather(1, word.int().argmax(1, keepdim=True))[:, 0]
        return torch.where(word.any(1), first, 0)

    def _bags(self, ids: Int[Tensor, "M L"]) -> Float[Tensor, "M W"]:
        return word_bags(ids, self.asked)


def statistics(image: Tokens) -> Float[Tensor, "B F"]:
    """Mean, deviation and maximum of each image's tokens, side by side; -inf in the maximum of an image without any."""
    values, mask = image.values.float(), image.mask[..., None]
    count = mask.sum(1).clamp(min=1)
    mean = (values * mask).sum(1) / count
    spread = ((values - mean[:, None]).square() * mask).sum(1) / (count - 1).clamp(min=1)
    return torch.cat([mean, spread.sqrt(), values.masked_fill(~mask, -torch.inf).amax(1)], dim=1)


def word_bags(ids: Int[Tensor, "M L"], fitted: Int[Tensor, "N K"]) -> Float[Tensor, "M W"]:
    """Unit vectors over the words of `fitted` texts, each weighted by how rare it is there; 0 is no word."""
    known = fitted.unique()  # type: ignore[no-untyped-call]
    held = torch.zeros(len(fitted), len(known), device=ids.device)
    held.scatter_(1, torch.searchsorted(known, fitted), 1.0)
    rare = (len(held) / held.sum(0)).log() * (known != 0)
    place = torch.searchsorted(known, ids.contiguous()).clamp(max=len(known) - 1)
    bags = torch.zeros(len(ids), len(known), device=ids.device)
    bags.scatter_reduce_(1, place, (known[place] == ids).float(), "amax")
    return F.normalize(bags * rare, dim=-1)


def _falling(cosine: Float[Tensor, "M N"], rate: float) -> Float[Tensor, "M N"]:
    return torch.exp(rate * (cosine - 1))
