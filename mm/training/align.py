"""Second stage: each modality's embedding meets the report's, and tokens learn whether two sets belong together."""

import logging
from dataclasses import replace
from typing import Any, ClassVar, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mm.batch import Batch, Padded, Tokens
from mm.data.datamodule import MultimodalData
from mm.encoded import Encoded
from mm.fusion.alignment import select
from mm.model import MultimodalModel
from mm.training.cached import CachedTask
from mm.training.pairs import MODALITIES, Duplicates, Loss, PairLosses, PairWeights, Partners
from mm.training.text_memory import TextMemory, by_length

log = logging.getLogger(__name__)

LOOKED_AT: Final = 64
"""Samples in which a text is looked for before training."""
AT_ONCE: Final = 2048
"""Rows of a similarity matrix that are held at a time."""


class TextTokens(nn.Module):
    """A report's words in the shared width, for the matching loss only; no part of the model."""

    def __init__(self, model: MultimodalModel) -> None:
        super().__init__()
        assert model.text is not None
        self.project = nn.Linear(model.text.token_width, model.fusion.width)

    def forward(self, model: MultimodalModel, text: Padded) -> Tokens:
        """Tokens of each text."""
        assert model.text is not None
        tokens = model.text.tokens(text)
        return Tokens(self.project(tokens.values), tokens.mask)


class AlignTask(CachedTask):
    """Adapters, projections, text encoder and fusion; encoders and finding head are frozen.

    Embeddings never see another modality; the matching loss works on tokens. A batch may hold any mix of pairs.
    """

    trains: ClassVar[tuple[str, ...]] = (
        "fusion",
        "text",
        "text_projection",
        "logit_scale",
        *(
            f"{source}_{part}"
            for source in ("volume", "image", "audio", "record")
            for part in ("adapter", "projection")
        ),
    )

    def __init__(
        self,
        *,
        loss: Loss = "info_nce",
        duplicates: Duplicates = "soft",
        lambda2: float = 0.0,
        alike: float = 0.0,
        weights: PairWeights | None = None,
        matching: float = 0.5,
        **kwargs: Any,
    ) -> None:
        """Makes the stage.

        Args:
            loss: "info_nce" (CLIP) or "siglip"; start the latter with the model's `temperature` at 0.1.
            duplicates: Whether texts that are the same token by token are positives of one another ("soft") or
                negatives.
            lambda2: Weight of the squared distance of partners beside the loss.
            alike: Share of InfoNCE's targets that goes to other studies by how alike their texts are to the frozen
                text tower, see `mm.fusion.soft`.
            weights: Of the kinds of pairs; None: those of the phantoms, see `PairWeights`.
            matching: Weight of the token-level matching loss; 0 leaves it away.
            **kwargs: Of `CachedTask`.

        Raises:
            ValueError: The model has no text encoder, or `alike` and one that learns, a weight is negative, or see
                `CachedTask`.
        """
        super().__init__(**kwargs)
        if self.model.text is None:
            raise ValueError("the align stage needs a model with `text`")
        self.matching = matching
        self.pairs = PairLosses(loss=loss, duplicates=duplicates, lambda2=lambda2, alike=alike, weights=weights)
        self.words = TextTokens(self.model)
        still = not any(part.split(".")[0] == "text" for part in self.learning)
        self.memory = TextMemory() if still else None
        if alike and not still:
            raise ValueError(f"alike {alike} needs a text tower that doesn't learn: freeze: [text]")
        self._seen: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        """As `CachedTask`, once there is known to be a text.

        Raises:
            ValueError: None of the first samples has one.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by fit
        if stage == "fit" and isinstance(data, MultimodalData):
            words = data.words("train")
            number = min(LOOKED_AT, len(words))  # type: ignore[arg-type]  # every dataset of ours is sized
            samples = (words[index] for index in range(number))
            if not any(sample.text or ("questions" in data.rows and sample.questions) for sample in samples):
                raise ValueError(
                    "the align stage needs a data set with reports or captions, or questions with data.rows"
                    f" [questions]; {data.spec.name} with data.rows {list(data.rows)} has neither"
                )
        super().setup(stage)

    def cached_losses(self, encoded: Encoded, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Contrast by pair, and matching of one modality's tokens with the text's."""
        partners = self.pairs.partners(batch)
        said = self._said(partners.ids)
        text = self.model.project_text(said, partners.ids)
        if self.pairs.alike:
            partners = replace(partners, said=said)
        losses: dict[str, Float[Tensor, ""]] = self.pairs(self.model, encoded, partners, text)
        sound = all(bool(loss.isfinite()) for loss in losses.values())  # else there is nobody to draw: the step is over
        if sound and self.matching > 0 and (loss := self._matching(encoded, partners, text)) is not None:
            losses["matching"] = self.matching * loss
        return losses

    def _said(self, ids: Padded) -> Float[Tensor, "B D"]:
        """What the text tower makes of texts; of a frozen one it is remembered."""
        assert self.model.text is not None
        make = by_length if self.memory is None else self.memory
        return make(self.model.text, ids)

    def _matching(self, encoded: Encoded, partners: Partners, text: Float[Tensor, "B E"]) -> Float[Tensor, ""] | None:
        """Of the first modality (volume, image, audio, record) that two studies have beside a text; None of none.

        One modality, since a study's text tells the most of what a volume or a picture shows, and each further one
        costs three more passes of the fusion.
        """
        embeddings = dict(encoded.embeddings.items())
        for source, tokens in self.model.adapt(encoded).items():
            rows = (tokens.mask.any(1) & partners.valid).nonzero()[:, 0]
            if len(rows) < 2:
                continue
            same = None if partners.same is None else partners.same[rows]
            return self.model.fusion.matching_loss(
                select(tokens, rows),
                self.words(self.model, partners.ids.select(rows)),
                similarity=self.model.logit_scale() * embeddings[source][rows] @ text[rows].T,
                same=None if same is None else same[:, None] == same,
            )
        return None

    def on_validation_epoch_start(self) -> None:
        """Forgets the last validation."""
        self._seen = []

    def judge(self, encoded: Encoded, batch: Batch) -> None:
        """Keeps embeddings for retrieval over the whole split."""
        partners = self.pairs.partners(batch)
        text = self.model.project_text(self._said(partners.ids), partners.ids).float().cpu()
        own = {source: item.float().cpu() for source, item in encoded.embeddings.items()}
        seen: dict[str, Tensor] = {source: own.get(source, torch.zeros_like(text)) for source in MODALITIES}
        self._seen.append((seen, text, partners.valid.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Logs recall at 1, 5 and 10 from each modality to the text, over the studies that have both."""
        if not self._seen:
            return
        text = torch.cat([item for _, item, _ in self._seen])
        with_text = torch.cat([item for _, _, item in self._seen])
        scores: dict[str, float] = {}
        for source in MODALITIES:
            own = torch.cat([seen[source] for seen, _, _ in self._seen])
            valid = with_text & (own.square().sum(-1) > 0)
            if bool(valid.any()):
                scores |= {f"{source}_{name}": value for name, value in recalls(own, text, valid).items()}
        self.log_dict({f"{self.judged}_{name}": value for name, value in scores.items()})
        said = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        log.info("step %d, %d studies. %s", self.trainer.global_step, len(text), said or "no pair with a text")


def recalls(own: Float[Tensor, "N E"], text: Float[Tensor, "N E"], valid: Bool[Tensor, " N"]) -> dict[str, float]:
    """Share of the valid rows whose text is among the nearest 1, 5 and 10 of the valid texts."""
    own, text = own[valid], text[valid]
    ranks: list[Tensor] = []
    for start in range(0, len(own), AT_ONCE):
        similarity = own[start : start + AT_ONCE] @ text.T
        ranks.append((similarity > similarity.diagonal(start)[:, None]).sum(1))
    return {f"recall@{k}": float((torch.cat(ranks) < k).float().mean()) for k in (1, 5, 10)}
