"""Second stage: each modality's embedding meets the report's, and tokens learn whether two sets belong together."""

import logging
from typing import Any, ClassVar, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.batch import Batch, Modality, Padded, Tokens
from mm.fusion.contrastive import contrastive_mse
from mm.model import Encoded, MultimodalModel
from mm.training.cached import CachedTask

log = logging.getLogger(__name__)

WEIGHTS: Final[dict[Modality, float]] = {"volume": 1.0, "image": 0.5, "audio": 0.1, "record": 0.1}
"""A report is mostly about what a volume shows; a sound or a record alone can't tell it from others."""


def align_losses(
    model: MultimodalModel, encoded: Encoded, batch: Batch, *, lambda2: float = 0.0
) -> dict[str, Float[Tensor, ""]]:
    """Contrastive losses by pair: each modality with the text, and the volume with the X-ray.

    Args:
        model: With a text encoder.
        encoded: With embeddings.
        batch: Its text is the partner.
        lambda2: Weight of the squared distance of partners beside InfoNCE.

    Raises:
        ValueError: The data has no report.
    """
    if batch.text is None:
        raise ValueError("the align stage needs a data set with a report or caption for every study")
    text = model.embed_text(batch.text)
    scale = model.logit_scale()
    losses: dict[str, Float[Tensor, ""]] = {}
    seen = dict(encoded.embeddings.items())
    for source, embedding in seen.items():
        valid = embedding.square().sum(-1) > 0
        loss = contrastive_mse(embedding, text, scale=scale, lambda2=lambda2, valid=valid)
        losses[f"{source}_text"] = WEIGHTS[source] * loss
    if "volume" in seen and "image" in seen:
        valid = (seen["volume"].square().sum(-1) > 0) & (seen["image"].square().sum(-1) > 0)
        loss = contrastive_mse(seen["volume"], seen["image"], scale=scale, lambda2=lambda2, valid=valid)
        losses["volume_image"] = 0.25 * loss
    return losses


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

    Embeddings never see another modality; the matching loss works on tokens.
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

    def __init__(self, *, lambda2: float = 0.0, matching: float = 0.5, **kwargs: Any) -> None:
        """Makes the stage.

        Args:
            lambda2: Weight of the squared distance of partners beside InfoNCE.
            matching: Weight of the token-level matching loss; 0 leaves it away.
            **kwargs: Of `CachedTask`.

        Raises:
            ValueError: The model has no text encoder, or see `CachedTask`.
        """
        super().__init__(**kwargs)
        if self.model.text is None:
            raise ValueError("the align stage needs a model with `text`")
        self.lambda2, self.matching = lambda2, matching
        self.words = TextTokens(self.model)
        self._seen: list[tuple[dict[str, Tensor], Tensor]] = []

    def cached_losses(self, encoded: Encoded, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """InfoNCE by pair, and matching of the volume's tokens with the text's."""
        losses = align_losses(self.model, encoded, batch, lambda2=self.lambda2)
        volume = encoded.embeddings.volume
        if self.matching > 0 and volume is not None and batch.size > 1:
            assert batch.text is not None
            tokens = self.model.adapt(encoded).volume
            assert tokens is not None
            similarity = self.model.logit_scale() * volume @ self.model.embed_text(batch.text).T
            words = self.words(self.model, batch.text)
            losses["matching"] = self.matching * self.model.fusion.matching_loss(tokens, words, similarity=similarity)
        return losses

    def on_validation_epoch_start(self) -> None:
        """Forgets the last validation."""
        self._seen = []

    def judge(self, encoded: Encoded, batch: Batch) -> None:
        """Keeps embeddings for retrieval over the whole split."""
        assert batch.text is not None
        seen: dict[str, Tensor] = {source: item.float().cpu() for source, item in encoded.embeddings.items()}
        self._seen.append((seen, self.model.embed_text(batch.text).float().cpu()))

    def on_validation_epoch_end(self) -> None:
        """Logs recall at 1, 5 and 10 from each modality to the text."""
        if not self._seen:
            return
        text = torch.cat([item for _, item in self._seen])
        scores: dict[str, float] = {}
        for source in self._seen[0][0]:
            similarity = torch.cat([seen[source] for seen, _ in self._seen]) @ text.T
            ranks = (similarity > similarity.diagonal()[:, None]).sum(1)
            scores |= {f"{source}_recall@{k}": float((ranks < k).float().mean()) for k in (1, 5, 10)}
        self.log_dict({f"{self.judged}_{name}": value for name, value in scores.items()})
        recalls = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        log.info("step %d, %d studies. %s", self.trainer.global_step, len(text), recalls)
