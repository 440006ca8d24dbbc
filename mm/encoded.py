"""Every modality alone: what the encoders make of a batch, and what each source says of the findings.

`with_volumes`, `with_images`, `with_sounds` and `with_records` each add one modality to an `Encoded`, and look at
nothing else that it holds.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mm.batch import Audio, BySource, Images, Modality, Movable, Records, Tokens, Volumes
from mm.encoders.base import ImageEncoder
from mm.encoders.record import RecordEncoder
from mm.encoders.resnet3d import ResNet3DEncoder
from mm.encoders.wav2vec import Wav2VecEncoder
from mm.finding_maps import NUM_FINDINGS, Maps
from mm.findings import Evidence, FindingHead
from mm.fusion.alignment import spread
from mm.history import History


@dataclass(frozen=True)
class Encoded(Movable):
    """A batch after the encoders; nothing in it has seen more than one modality.

    Attributes:
        size: B.
        tokens: As the encoders return them, the current visit only, in the encoders' own widths.
        evidence: What each modality says of the findings.
        history: The course over visits, from volumes.
        volume: Maps of all visits.
        image: Maps of X-rays.
        embeddings: Unit vectors; zeros in studies without the modality.
    """

    size: int
    tokens: BySource[Tokens] = field(default_factory=BySource)
    evidence: BySource[Evidence] = field(default_factory=BySource)
    history: History | None = None
    volume: Maps | None = None
    image: Maps | None = None
    embeddings: BySource[Tensor] = field(default_factory=BySource)

    def said(self, source: Modality) -> Float[Tensor, "B K S"]:
        """What a modality says of each finding, in one vector: evidence, presence, and the course of volumes.

        Of width 0 where there is no evidence of it.
        """
        evidence = dict(self.evidence.items()).get(source)
        if evidence is None:
            return dict(self.tokens.items())[source].values.new_zeros(self.size, NUM_FINDINGS, 0)
        parts = [evidence.values, evidence.logits[..., None]]
        if source == "volume" and self.history is not None:
            parts += [self.history.values, self.history.change.softmax(-1)]
        return torch.cat(parts, dim=-1)

    def adding(self, source: Modality, tokens: Tokens, evidence: Evidence | None) -> "Encoded":
        """The same with one more modality."""
        return replace(
            self,
            tokens=replace(self.tokens, **{source: tokens}),
            evidence=replace(self.evidence, **{source: evidence}),
        )

    def without(self, modality: Modality | Literal["priors"]) -> "Encoded":
        """The same studies with one input taken away, as if the batch had been `Batch.without` it.

        Without priors the volume's embedding is gone as well: it holds the course.
        """
        if modality == "priors":
            return replace(self, history=None, embeddings=replace(self.embeddings, volume=None))
        left = replace(
            self,
            tokens=replace(self.tokens, **{modality: None}),
            evidence=replace(self.evidence, **{modality: None}),
            embeddings=replace(self.embeddings, **{modality: None}),
        )
        if modality == "volume":
            return replace(left, history=None, volume=None)
        return replace(left, image=None) if modality == "image" else left

    def without_maps(self) -> "Encoded":
        """What later stages of training need, small enough to keep for thousands of studies."""
        return replace(self, volume=None, image=None)


def with_volumes(encoded: Encoded, volumes: Volumes, encoder: ResNet3DEncoder, head: FindingHead | None) -> Encoded:
    """Adds volumes of all visits. Visits are flattened, so that padding costs nothing and no statistics see it."""
    if not bool((volumes.count > 0).any()):
        return encoded
    visits = torch.arange(volumes.values.shape[1], device=volumes.count.device)
    study, visit = (visits < volumes.count[:, None]).nonzero(as_tuple=True)
    pyramid = encoder.pyramid(volumes.values[study, visit])
    current = visit == 0
    tokens = spread(encoder.tokens(pyramid[-1][current]), study[current], size=encoded.size)
    if head is None or head.volume_maps is None:
        return encoded.adding("volume", tokens, None)
    maps = head.see_volumes(pyramid, study=study, visit=visit)
    history = head.follow(maps, count=volumes.count, days=volumes.days)
    added = encoded.adding("volume", tokens, head.pictured(maps, size=encoded.size))
    return replace(added, history=history, volume=maps)


def with_images(encoded: Encoded, images: Images, encoder: ImageEncoder, head: FindingHead | None) -> Encoded:
    """Adds X-rays, or any other images.

    Raises:
        ValueError: They have a number of channels that the encoder doesn't take.
    """
    if not bool(images.present.any()):
        return encoded
    if images.values.shape[1] not in encoder.channels:
        raise ValueError(
            f"the image encoder takes images of {' or '.join(map(str, encoder.channels))} channels, the data has"
            f" {images.values.shape[1]}: set `colour` of the data spec's image accordingly"
        )
    study = images.present.nonzero()[:, 0]
    pyramid, seen = encoder.look(images.values[study])
    tokens = spread(seen, study, size=encoded.size)
    if head is None or head.image_maps is None:
        return encoded.adding("image", tokens, None)
    maps = head.see_images(pyramid, study=study)
    return replace(encoded.adding("image", tokens, head.pictured(maps, size=encoded.size)), image=maps)


def with_sounds(encoded: Encoded, audio: Audio, encoder: Wav2VecEncoder, head: FindingHead | None) -> Encoded:
    """Adds lung sounds."""
    tokens = encoder(audio)
    return encoded.adding("audio", tokens, None if head is None or head.audio is None else head.hear(tokens))


def with_records(encoded: Encoded, records: Records, encoder: RecordEncoder, head: FindingHead | None) -> Encoded:
    """Adds clinical records."""
    every = encoder(records)
    tokens = Tokens(every.values, every.mask & records.present[:, None])
    return encoded.adding("record", tokens, None if head is None or head.record is None else head.read(tokens))
