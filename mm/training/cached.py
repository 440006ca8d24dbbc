"""What the stages behind the first share: encoders whose output is computed once and kept while they are frozen."""

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm.batch import Batch, BySource, Modality, Tokens
from mm.data.datamodule import MultimodalData, Numbered
from mm.data.spec import Split
from mm.encoded import Encoded
from mm.findings import Evidence
from mm.training.cache import FROZEN, Cache, build
from mm.training.canonical import fit_canonical
from mm.training.task import Task


class CachedTask(Task):
    """A stage on frozen encoders and a frozen finding head.

    Each study is encoded once; from then on batches hold words and labels only, and the encoders' output is looked
    up by the study's number. Words are drawn afresh every epoch. Where a part of an encoder is unfrozen, or there
    shall be no cache, every batch is encoded when it comes.
    """

    def __init__(
        self,
        *,
        cache: str | None = "runs/cache",
        modality_dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        """Makes the stage.

        Args:
            cache: Folder of what the encoders said; None to encode every batch when it comes, which augmented
                inputs need.
            modality_dropout: Probability that a study is trained on without one of its modalities, each for itself.
            **kwargs: Of `Task`.

        Raises:
            ValueError: The dropout isn't a probability, or the model has a canonical head and towers that learn, or
                see `Task`.
        """
        super().__init__(**kwargs)
        if not 0 <= modality_dropout < 1:
            raise ValueError(f"modality_dropout must be at least 0 and below 1, got {modality_dropout}")
        self.modality_dropout = modality_dropout
        parts = {part.split(".")[0] for part in self.learning}
        self.cache_root = None if cache is None or parts & set(FROZEN) else Path(cache)
        if self.model.canonical is not None and (self.cache_root is None or "text" in parts):
            raise ValueError("canonical is fitted to towers that don't learn: freeze image and text, and give a cache")
        self._caches: dict[Split, Cache] = {}

    def setup(self, stage: str) -> None:
        """Opens the caches, computing what is missing, and tells the data to make nothing but words.

        To predict is to look at every study once: there is nothing to keep.
        """
        if stage == "predict" or self.cache_root is None:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by fit
        assert isinstance(data, MultimodalData)
        wanted: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        self.model.to(self.trainer.strategy.root_device)
        for split in wanted.get(stage, ("test",)):
            if split not in self._caches:
                self._caches[split] = build(self.model, data, split, self.cache_root)
        data.texts_only = True
        if stage == "fit" and self.model.canonical is not None:
            fit_canonical(self.model, self._caches["train"], data)

    def encoded(self, numbered: Numbered, split: Split) -> Encoded:
        """What the encoders said of a batch, with embeddings of the present projections."""
        index, batch = numbered
        if self.cache_root is None:
            encoded = self.model.encode(batch).without_maps()
        else:
            encoded = self._caches[split].select(index, self.device)
        if split == "train" and self.modality_dropout > 0:
            encoded = without_some(encoded, self.modality_dropout)
        return self.model.embed(encoded)

    def losses(self, numbered: Numbered) -> dict[str, Float[Tensor, ""]]:
        """The stage's losses."""
        return self.cached_losses(self.encoded(numbered, "train"), numbered[1])

    @abstractmethod
    def cached_losses(self, encoded: Encoded, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Weighted losses by name."""

    def validation_step(self, numbered: Numbered, batch_idx: int) -> None:  # noqa: ARG002
        """Logs the losses on the validation split."""
        split, batch = self.judged, numbered[1]
        encoded = self.encoded(numbered, split)
        losses = self.cached_losses(encoded, batch)
        self.log(f"{split}_loss", torch.stack([item.float() for item in losses.values()]).sum(), batch_size=batch.size)
        self.log_dict({f"{split}_loss_{name}": item.float() for name, item in losses.items()}, batch_size=batch.size)
        self.judge(encoded, batch)

    @abstractmethod
    def judge(self, encoded: Encoded, batch: Batch) -> None:
        """Keeps or logs what the stage's scores are made of."""


def without_some(encoded: Encoded, probability: float) -> Encoded:
    """The same studies, some of them without some of their modalities."""
    tokens: dict[Modality, Tokens] = {}
    evidence: dict[Modality, Evidence] = {}
    history = encoded.history
    said = dict(encoded.evidence.items())
    for source, item in encoded.tokens.items():
        kept = torch.rand(encoded.size, device=item.mask.device) >= probability
        tokens[source] = Tokens(item.values, item.mask & kept[:, None])
        if source in said:
            own = said[source]
            evidence[source] = Evidence(
                own.values * kept[:, None, None], own.logits * kept[:, None], own.available & kept
            )
        if source == "volume" and history is not None:
            history = replace(history, known=history.known & kept)
    return replace(encoded, tokens=BySource(**tokens), evidence=BySource(**evidence), history=history)
