"""The finding head: what each source says of each finding, and what all of them say together.

Every source gives *evidence* alone: a volume and an X-ray by their maps (`mm.finding_maps`), sounds and records by
a learned query for each finding. Only sources that can show a finding (`mm.ontology`) are heard on it. Presence is
read from the evidence of whichever sources a study has; without any it is the learned prior. An LSTM over the
visits says how a finding has changed; without a prior visit the change is unknown by construction.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mm import ontology
from mm.attention import Keys
from mm.batch import BySource, DetectedFinding, Movable, Targets, Tokens
from mm.calibration import best_instance_threshold, best_threshold, fit_scaling
from mm.finding_loss import WEIGHTS, image_truth, picture_losses, volume_truth
from mm.finding_maps import NUM_FINDINGS, FeaturePyramid, ImageCells, MapHead, Maps, PeakHead
from mm.finding_small import SMALL, SmallFindings
from mm.history import FOLLOWED, IMPOSSIBLE, History, HistoryHead, no_history, scatter
from mm.transformer import CrossAttention, RMSNorm, SwiGLU

SHOWN: Final[dict[str, tuple[int, ...]]] = {
    source: tuple(k for k, item in enumerate(ontology.FINDINGS) if source in item.sources)
    for source in ontology.SOURCES
}
"""Which findings a source can show."""
MAPPED: Final[dict[str, tuple[int, ...]]] = {
    source: tuple(k for k in shown if ontology.FINDINGS[k].focal) for source, shown in SHOWN.items()
}
"""Which findings a source can show at a place."""


@dataclass(frozen=True)
class Evidence(Movable):
    """What one source says of each finding; zeros in studies without it.

    Attributes:
        values: One vector a finding.
        logits: Of presence, by this source alone.
        available: Which studies have the source.
    """

    values: Float[Tensor, "B K D"]
    logits: Float[Tensor, "B K"]
    available: Bool[Tensor, " B"]


@dataclass(frozen=True)
class FindingOutputs(Movable):
    """What the head says of a batch.

    Attributes:
        presence: Raw logits; `FindingHead.probability` calibrates them.
        change: Logits in the order of `ontology.CHANGES`.
        before: Logit that the last prior shows the finding.
        tokens: One a finding, for the decoder's memory.
        volume: Maps of all visits of all studies, or None.
        image: Maps of all X-rays, or None.
        assessable: Which findings some source of a study can show; presence of any other is the learned prior, and
            `decode` never says that it is there. None: all of them.
    """

    presence: Float[Tensor, "B K"]
    change: Float[Tensor, "B K C"]
    before: Float[Tensor, "B K"]
    tokens: Float[Tensor, "B K D"]
    volume: Maps | None
    image: Maps | None
    assessable: Bool[Tensor, "B K"] | None = None


class QueryEvidence(nn.Module):
    """Evidence from tokens: each finding asks with a query of its own.

    Args:
        in_width: Of tokens.
        width: Of evidence.
        heads: Of attention; divides `width`.
    """

    def __init__(self, in_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Embedding(NUM_FINDINGS, width)
        self.norm = RMSNorm(in_width)
        self.attention = CrossAttention(width, heads, memory_width=in_width)
        self.logit = nn.Linear(width, NUM_FINDINGS)

    def forward(self, tokens: Tokens) -> Evidence:
        """Evidence of one source."""
        asked = self.query.weight.expand(len(tokens.values), -1, -1)
        values = asked + self.attention(asked, self.norm(tokens.values), mask=Keys(tokens.mask))
        available = tokens.mask.any(1)
        values = values.float() * available[:, None, None]
        logits = self.logit(values).diagonal(dim1=1, dim2=2).float() * available[:, None]
        return Evidence(values, logits, available)


class FindingHead(nn.Module):
    """Finds, places, sizes and follows findings from whatever sources a study has.

    Args:
        width: Of evidence.
        volume_widths: Channels of the volume encoder's four pyramid levels, before them those of its cells' statistics
            where it gives any; None: no volumes.
        image_widths: Channels of the image encoder's pyramid; None: no X-rays.
        audio_width: Of the audio encoder's tokens; None: no sounds.
        record_width: Of the record encoder's tokens; None: no records.
        channels: Of the volume's features.
        image_channels: Of the X-ray's features.
        hidden: Of the perceptrons behind the maps.
        history: Width of the LSTM over visits.
        heads: Of attention to audio and record; divides `width`.
        source_dropout: Probability that a source of a study is not heard on presence in training, so that each
            source learns to do without the others, and the prior is learnt.
        volume_stride: Voxels a cell of the pyramid's second level.
        image_stride: Pixels a cell of the image pyramid's finest level.
        spacing_mm: Of the model's volume grid (z, y, x).
        pixel_mm: Of the model's image grid, about.
    """

    temperature: Tensor
    bias: Tensor
    threshold: Tensor
    peak_threshold: Tensor
    before_threshold: Tensor
    heard: Tensor
    followed: Tensor

    def __init__(
        self,
        *,
        width: int = 192,
        volume_widths: tuple[int, ...] | None = (24, 48, 96, 192),
        image_widths: tuple[int, ...] | None = (96, 192),
        audio_width: int | None = 128,
        record_width: int | None = 128,
        channels: int = 48,
        image_channels: int = 64,
        hidden: int = 128,
        history: int = 64,
        heads: int = 4,
        source_dropout: float = 0.15,
        volume_stride: tuple[int, int, int] = (2, 4, 4),
        image_stride: int = 8,
        spacing_mm: tuple[float, float, float] = (5.0, 2.75, 2.75),
        pixel_mm: float = 1.4,
    ) -> None:
        super().__init__()
        if volume_widths is not None and len(volume_widths) not in (4, 5):
            raise ValueError(f"volume_widths must be of four levels, or of statistics and four, got {volume_widths}")
        if not 0 <= source_dropout < 1:
            raise ValueError(f"source_dropout must be at least 0 and below 1, got {source_dropout}")
        self.width, self.history_width, self.source_dropout = width, history, source_dropout
        self.volume_widths, self.image_widths = volume_widths, image_widths
        self.volume_stride, self.image_stride = volume_stride, (image_stride, image_stride)
        self.spacing_mm, self.pixel_mm = spacing_mm, (pixel_mm, pixel_mm)

        self.pyramid = self.small = self.volume_maps = self.volume_peaks = self.history = None
        if volume_widths is not None:
            *statistics, detail, fine, middle, coarse = volume_widths
            self.pyramid = FeaturePyramid((detail, fine, middle, coarse), channels=channels)
            self.small = SmallFindings(statistics[0]) if statistics else None
            self.volume_maps = MapHead(channels, stride=volume_stride, width=width, hidden=hidden)
            self.volume_peaks = PeakHead(channels, dims=3)
            self.history = HistoryHead(width, history)
        self.image_cells = self.image_maps = self.image_peaks = None
        if image_widths is not None:
            self.image_cells = ImageCells(image_widths, channels=image_channels)
            self.image_maps = MapHead(image_channels, stride=self.image_stride, width=width, hidden=hidden)
            self.image_peaks = PeakHead(image_channels, dims=2)
        self.audio_width, self.record_width = audio_width, record_width
        self.audio = None if audio_width is None else QueryEvidence(audio_width, width, heads)
        self.record = None if record_width is None else QueryEvidence(record_width, width, heads)

        self.name = nn.Embedding(NUM_FINDINGS, width)
        self.norm = RMSNorm(width)
        self.mix_norm = RMSNorm(width)
        self.mix = SwiGLU(width, width)
        self.out = nn.Linear(width, NUM_FINDINGS)
        self.trust = nn.Embedding(NUM_FINDINGS, len(ontology.SOURCES))
        self.prior = nn.Embedding(NUM_FINDINGS, 1)
        self.course = nn.Linear(history + len(ontology.CHANGES), width) if volume_widths is not None else None
        nn.init.normal_(self.name.weight, std=0.2)
        nn.init.constant_(self.trust.weight, 0.7)
        nn.init.constant_(self.prior.weight, -1.4)

        heard = torch.tensor([[s in item.sources for s in ontology.SOURCES] for item in ontology.FINDINGS])
        self.register_buffer("heard", heard, persistent=False)
        self.register_buffer("followed", torch.tensor(FOLLOWED), persistent=False)
        self.register_buffer("temperature", torch.ones(NUM_FINDINGS))
        self.register_buffer("bias", torch.zeros(NUM_FINDINGS))
        self.register_buffer("threshold", torch.full((NUM_FINDINGS,), 0.5))
        self.register_buffer("peak_threshold", torch.full((NUM_FINDINGS,), 0.5))
        self.register_buffer("before_threshold", torch.full((NUM_FINDINGS,), 0.5))

    # ------------------------------------------------------------------------------ each source alone

    def see_volumes(self, pyramid: tuple[Tensor, ...], *, study: Int[Tensor, " N"], visit: Int[Tensor, " N"]) -> Maps:
        """Maps of volumes, given as the levels of their pyramid; visits are flattened."""
        assert self.pyramid is not None, "this head was made without volumes"
        assert self.volume_maps is not None
        features, given = self.pyramid(pyramid[-4:]), {}
        if self.small is not None:
            given = dict(zip(SMALL, self.small(pyramid[0]).unbind(1), strict=True))
        return self.volume_maps(features, study=study, visit=visit, given=given)  # type: ignore[no-any-return]

    def see_images(self, pyramid: tuple[Tensor, ...], *, study: Int[Tensor, " N"]) -> Maps:
        """Maps of X-rays, given as the levels of their pyramid."""
        assert self.image_cells is not None, "this head was made without images"
        assert self.image_maps is not None
        return self.image_maps(self.image_cells(pyramid), study=study, visit=torch.zeros_like(study))  # type: ignore[no-any-return]

    def pictured(self, maps: Maps, *, size: int) -> Evidence:
        """Evidence of the current pictures, by study of a batch of `size`."""
        current = maps.visit == 0
        study = maps.study[current]
        values = scatter(maps.evidence[current], (study,), (size,))
        logits = scatter(maps.presence[current, :, 0], (study,), (size,))
        available = torch.zeros(size, dtype=torch.bool, device=study.device)
        available[study] = True
        return Evidence(values, logits, available)

    def follow(self, maps: Maps, *, count: Int[Tensor, " B"], days: Float[Tensor, "B V"]) -> History:
        """The course over visits, from their maps."""
        assert self.history is not None, "this head was made without volumes"
        return self.history(maps, count=count, days=days)  # type: ignore[no-any-return]

    def hear(self, tokens: Tokens) -> Evidence:
        """Evidence of sounds."""
        assert self.audio is not None, "this head was made without audio"
        return self.audio(tokens)  # type: ignore[no-any-return]

    def read(self, tokens: Tokens) -> Evidence:
        """Evidence of records."""
        assert self.record is not None, "this head was made without records"
        return self.record(tokens)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------ all together

    def forward(
        self,
        evidence: BySource[Evidence],
        *,
        size: int,
        history: History | None = None,
        volume: Maps | None = None,
        image: Maps | None = None,
    ) -> FindingOutputs:
        """Decides on `size` studies.

        Args:
            evidence: Of each source, or None.
            size: B; a batch without any source still has its studies.
            history: Of volumes.
            volume: Passed on.
            image: Passed on.
        """
        device = self.prior.weight.device
        with torch.autocast(device.type, enabled=False):
            total = torch.zeros(size, NUM_FINDINGS, self.width, device=device)
            direct = torch.zeros(size, NUM_FINDINGS, device=device)
            some = torch.zeros(size, NUM_FINDINGS, dtype=torch.bool, device=device)
            assessable = torch.zeros_like(some)
            for source, item in evidence.items():
                column = ontology.SOURCES.index(source)
                heard = item.available[:, None] & self.heard[:, column]
                assessable = assessable | heard
                if self.training and self.source_dropout > 0:
                    heard = heard & (torch.rand(size, 1, device=device) >= self.source_dropout)
                total = total + item.values.float() * heard[..., None]
                direct = direct + item.logits.float() * heard * self.trust.weight[:, column]
                some = some | heard
            mixed = self.norm(total) + self.name.weight
            mixed = mixed + self.mix(self.mix_norm(mixed))
            said = self.out(mixed).diagonal(dim1=1, dim2=2) + direct
            presence = torch.where(some, said, self.prior.weight[:, 0])
            if history is None:
                change, before = no_history(size, device)
                tokens = mixed
            else:
                assert self.course is not None
                change, before = history.change, history.before
                course = torch.cat([history.values.float(), change.softmax(-1)], dim=-1)
                tokens = mixed + self.course(course) * history.known[:, None, None]
        return FindingOutputs(presence, change, before, tokens, volume, image, assessable)

    # ---------------------------------------------------------------------------------- truth and use

    def losses(self, outputs: FindingOutputs, targets: Targets) -> dict[str, Float[Tensor, ""]]:
        """Weighted losses by name (`finding_loss.WEIGHTS`); their sum is what is trained."""
        zero = outputs.presence.sum() * 0
        losses = dict.fromkeys(WEIGHTS, zero)
        pictures = [
            (outputs.volume, volume_truth, self.volume_peaks, "volume", self.volume_stride, self.spacing_mm),
            (outputs.image, image_truth, self.image_peaks, "image", self.image_stride, self.pixel_mm),
        ]
        for maps, truth_of, peaks, source, stride, spacing in pictures:
            truth = None if maps is None else truth_of(targets, (maps.study, maps.visit), stride)
            if maps is None or truth is None or len(maps.study) == 0:
                continue
            assert peaks is not None
            parts = picture_losses(maps, truth, peaks, relevant=MAPPED[source], stride=stride, spacing_mm=spacing)
            losses |= {name: losses[name] + value for name, value in parts.items()}
        # What no source of a study can show isn't asked: else a stage without volumes would unlearn the others.
        asked = torch.ones_like(targets.present) if outputs.assessable is None else outputs.assessable
        if asked.any():
            said, true = outputs.presence[asked], targets.present[asked].float()
            losses["presence"] = F.binary_cross_entropy_with_logits(said, true)
        learnt = (targets.change > 0) & (outputs.before > IMPOSSIBLE) & self.followed
        if learnt.any():
            losses["change"] = F.cross_entropy(outputs.change[learnt], targets.change[learnt])
        return {name: WEIGHTS[name] * value for name, value in losses.items()}

    def probability(self, presence: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Calibrated probability of each finding."""
        return (presence.float() / self.temperature + self.bias).sigmoid()

    @torch.no_grad()
    def calibrate(self, presence: Float[Tensor, "N K"], labels: Bool[Tensor, "N K"]) -> None:
        """Seals temperature, bias and the threshold of the best F1 of each finding, from studies not trained on.

        Args:
            presence: Raw logits.
            labels: Truth.
        """
        for k in range(NUM_FINDINGS):
            self.temperature[k], self.bias[k] = fit_scaling(presence[:, k], labels[:, k])
            self.threshold[k] = best_threshold(self.probability(presence)[:, k], labels[:, k])

    @torch.no_grad()
    def calibrate_before(self, before: Float[Tensor, "N K"], labels: Bool[Tensor, "N K"]) -> None:
        """Seals from where on a finding counts as shown by the last prior, which decides whether it has resolved.

        Args:
            before: Raw logits (`FindingOutputs.before`); those of studies without a prior are left out.
            labels: Whether the last prior shows the finding.
        """
        for k in range(NUM_FINDINGS):
            known = before[:, k] > IMPOSSIBLE
            if known.any():
                self.before_threshold[k] = best_threshold(before[known, k].sigmoid(), labels[known, k])

    @torch.no_grad()
    def calibrate_instances(
        self,
        scores: Float[Tensor, " N"],
        hits: Bool[Tensor, " N"],
        finding: Int[Tensor, " N"],
        num_true: Int[Tensor, " K"],
    ) -> None:
        """Seals from which score on a place counts as an instance, by the best F1 over instances.

        Args:
            scores: Of candidates (`instances.candidates`) in studies that have the finding and were not trained on.
            hits: Which of them are true.
            finding: Which finding each is a candidate of.
            num_true: True instances of each finding.
        """
        for k in range(NUM_FINDINGS):
            of_k = finding == k
            self.peak_threshold[k] = best_instance_threshold(scores[of_k], hits[of_k], num_true=int(num_true[k]))

    @torch.no_grad()
    def decode(self, outputs: FindingOutputs) -> list[tuple[DetectedFinding, ...]]:
        """The findings of each study, instances spelt out; see `mm.instances`."""
        from mm.instances import decode  # the other way round it needs our outputs' type

        return decode(self, outputs)
