"""The contrastive losses of a batch: one for each kind of pair that it holds, over the studies that have both."""

from dataclasses import dataclass, fields
from typing import Final, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mm.batch import SLOT_KINDS, SPECIAL_IDS, Batch, Modality, Padded
from mm.encoded import Encoded
from mm.fusion.contrastive import info_nce, squared_distance, text_numbers
from mm.fusion.ranks import largest
from mm.fusion.siglip import LogitBias, siglip
from mm.fusion.soft import soft_targets
from mm.model import MultimodalModel

Loss = Literal["info_nce", "siglip"]
Duplicates = Literal["soft", "negatives"]

MODALITIES: Final[tuple[Modality, ...]] = get_args(Modality)
NUM_SPECIAL: Final = len(fields(SPECIAL_IDS))


@dataclass(frozen=True)
class PairWeights:
    """Weight of each kind of pair; 0 leaves it away.

    The defaults are for chest phantoms: a report is mostly about what a volume shows, and a sound or a record alone
    can't tell it from others.

    Attributes:
        volume: Volume and text.
        image: X-ray or picture and text.
        audio: Sound and text.
        record: Record and text.
        volume_image: Volume and X-ray of one study.
    """

    volume: float = 1.0
    image: float = 0.5
    audio: float = 0.1
    record: float = 0.1
    volume_image: float = 0.25

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 0:
                raise ValueError(f"weights.{item.name} must be at least 0, got {getattr(self, item.name)}")


@dataclass(frozen=True)
class Partners:
    """The texts of a batch as the other side of its pairs.

    Attributes:
        ids: A text each study; empty where it has none.
        valid: Which studies have one.
        same: Equal numbers for equal texts, over all ranks; None where all differ, or where it shall not matter.
        said: What a frozen text tower says of each, for soft targets; None without them.
    """

    ids: Padded
    valid: Bool[Tensor, " B"]
    same: Int[Tensor, " B"] | None
    said: Float[Tensor, "B D"] | None = None


class PairLosses(nn.Module):
    """Contrastive losses by pair: each modality with the text, and the volume with the X-ray.

    Args:
        loss: "info_nce" (CLIP) or "siglip", whose bias is learnt here and is no part of the model.
        duplicates: Whether texts that are the same, token by token, are positives of one another ("soft": hundreds
            of normal reports are one text) or negatives.
        lambda2: Weight of the squared distance of partners beside either loss.
        alike: Share of InfoNCE's targets that goes to other pairs by how alike their texts are, see `mm.fusion.soft`.
        weights: Of the kinds of pairs.

    Raises:
        ValueError: `alike` is no share, or beside another loss than InfoNCE.
    """

    def __init__(
        self,
        *,
        loss: Loss = "info_nce",
        duplicates: Duplicates = "soft",
        lambda2: float = 0.0,
        alike: float = 0.0,
        weights: PairWeights | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= alike < 1 or (alike and loss != "info_nce"):
            raise ValueError(f"alike must be at least 0 and below 1, and 0 with a loss of {loss}; got {alike}")
        self.duplicates, self.lambda2, self.weights = duplicates, lambda2, weights or PairWeights()
        self.alike = alike
        self.bias = LogitBias() if loss == "siglip" else None

    def partners(self, batch: Batch) -> Partners:
        """The batch's texts; without a report, the first question of a study and its answer."""
        ids = batch.text if batch.text is not None else first_answers(batch)
        return Partners(ids, ids.lengths > 0, text_numbers(ids) if self.duplicates == "soft" else None)

    def forward(
        self, model: MultimodalModel, encoded: Encoded, partners: Partners, text: Float[Tensor, "B E"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Weighted losses by name; a single zero with a gradient where the batch holds no pair.

        All ranks compute the same losses: what one of them lacks has no valid row there.

        Args:
            model: Its scale is used.
            encoded: With embeddings.
            partners: Of the batch.
            text: Their unit vectors.
        """
        scale = model.logit_scale()
        own = dict(encoded.embeddings.items())
        flags = [*(source in own for source in MODALITIES), bool(partners.valid.any())]
        *some, any_text = largest(torch.tensor(flags, dtype=torch.uint8, device=text.device)).bool().tolist()
        seen = {
            source: own[source] if source in own else torch.zeros_like(text, requires_grad=True)
            for source, there in zip(MODALITIES, some, strict=True)
            if there
        }
        # What is absent is zero. NaN is not, nor above 0: it has to come out in the loss.
        valid = {source: (embedding.detach() != 0).any(-1) for source, embedding in seen.items()}
        losses: dict[str, Float[Tensor, ""]] = {}
        for source, embedding in seen.items() if any_text else ():
            if (weight := getattr(self.weights, source)) > 0:
                both = valid[source] & partners.valid
                losses[f"{source}_text"] = weight * self._loss(
                    embedding, text, scale=scale, valid=both, same=partners.same, said=partners.said
                )
        if "volume" in seen and "image" in seen and self.weights.volume_image > 0:
            both = valid["volume"] & valid["image"]
            loss = self._loss(seen["volume"], seen["image"], scale=scale, valid=both, same=None)
            losses["volume_image"] = self.weights.volume_image * loss
        return losses or {"no_pair": 0.0 * scale}

    def _loss(
        self,
        first: Float[Tensor, "B E"],
        second: Float[Tensor, "B E"],
        *,
        scale: Float[Tensor, ""],
        valid: Bool[Tensor, " B"],
        same: Int[Tensor, " B"] | None,
        said: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, ""]:
        if self.bias is None:
            targets = None if said is None else soft_targets(said, share=self.alike, valid=valid)
            loss = info_nce(first, second, scale=scale, valid=valid, same=same, targets=targets)
        else:
            loss = siglip(first, second, scale=scale, bias=self.bias(), valid=valid, same=same)
        return loss + self.lambda2 * squared_distance(first, second, valid=valid) if self.lambda2 else loss


def first_answers(batch: Batch) -> Padded:
    """The words of each study's first question and its answer; empty where there is none."""
    rows: list[list[int]] = [[] for _ in range(batch.size)]
    writing = batch.writing
    device = torch.device("cpu")
    if writing is not None and writing.target is not None:
        device = writing.study.device
        asked = (writing.slots.kind == SLOT_KINDS.index("answer")).tolist()
        texts = zip(writing.prompt.rows(), writing.target.rows(), strict=True)
        for study, is_asked, (prompt, target) in zip(writing.study.tolist(), asked, texts, strict=True):
            if is_asked and not rows[study]:
                rows[study] = [*(item for item in prompt if item >= NUM_SPECIAL), *target]
    return Padded.of(rows).to(device)
