"""The system on one page: encode each modality alone, find, bring together, write.

`encode` gives tokens, evidence and embeddings, in which no modality has seen another; `find` decides what is there,
where, how large and changed how; `fuse` makes the decoder's memory, tokens that have read each other and one token
a finding; `generate` writes a sentence a finding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mm import ontology
from mm.answers import AnswerHead
from mm.batch import (
    SPECIAL_IDS,
    Batch,
    BySource,
    DetectedFinding,
    GeneratedReport,
    GeneratedSentence,
    Images,
    Language,
    Modality,
    Movable,
    Padded,
    SlotKind,
    Slots,
    Tokens,
    Volumes,
    Writing,
    slot,
)
from mm.decoder.generate import GREEDY, Generated, Sampling
from mm.decoder.output import DecoderOutput
from mm.decoder.score import score_answers
from mm.decoder.sentences import SentenceDecoder
from mm.encoders.base import ImageEncoder, TextTower
from mm.encoders.record import RecordEncoder
from mm.encoders.resnet3d import ResNet3DEncoder
from mm.encoders.wav2vec import Wav2VecEncoder
from mm.finding_maps import NUM_FINDINGS, Maps
from mm.findings import Evidence, FindingHead, FindingOutputs
from mm.fusion.adapters import Adapter, Projection, perceptron
from mm.fusion.alignment import CrossModalAlignment, concatenate, select
from mm.fusion.contrastive import LogitScale
from mm.history import History


@runtime_checkable
class DecodesText(Protocol):
    """The part of a tokenizer that generation needs."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...


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
    tokens: BySource[Tokens]
    evidence: BySource[Evidence]
    history: History | None = None
    volume: Maps | None = None
    image: Maps | None = None
    embeddings: BySource[Tensor] = field(default_factory=BySource)

    def without_maps(self) -> "Encoded":
        """What later stages of training need, small enough to keep for thousands of studies."""
        return replace(self, volume=None, image=None)

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


@dataclass(frozen=True)
class Outputs(Movable):
    """Everything that training needs of a batch; None where the batch or the model lacks it.

    Attributes:
        encoded: Tokens, evidence and embeddings.
        findings: What the head decides.
        text: Unit vectors of the batch's texts.
        writing: What the decoder makes of the batch's rows.
    """

    encoded: Encoded
    findings: FindingOutputs | None
    text: Float[Tensor, "B E"] | None
    writing: DecoderOutput | None


@dataclass(frozen=True)
class Reading(Movable):
    """What a batch holds, before it is put into words.

    Attributes:
        findings: Of each study.
        compared: Which studies have a prior.
        memory: What the decoder reads beside a finding's slot.
    """

    findings: tuple[tuple[DetectedFinding, ...], ...]
    compared: tuple[bool, ...]
    memory: Tokens


class MultimodalModel(nn.Module):
    """Encoders, finding head, fusion and decoder. What is None is not there, and its modality is not looked at.

    Args:
        fusion: Attention across modalities; owns the shared width.
        volume: Encoder of CT volumes.
        image: Encoder of X-rays, or of any other images.
        audio: Encoder of lung sounds.
        record: Encoder of clinical records.
        text: Encoder of reports, for retrieval.
        findings: Finds and places; its widths are those of the encoders.
        decoder: Writes; its memory has the width of `fusion`.
        embedding_width: Of the vectors that are compared; without effect on a model that is `compared` as it is.
        temperature: Of contrastive learning, to start from.
        answers: Scores listed answers to questions about images; reads the question through `text`.
        compared: "projected": by learned projections. "as_is": image and text by what their towers say, which is for
            towers that were trained on each other (an open_clip model's) and makes retrieval open_clip's own.
        projection_hidden: Hidden width of the projections of all inputs; None for matrices in the perceptrons' place.
        text_hidden: The same of the texts' projection.
        input_dropout: Of the numbers of every encoder of an input, in training only. What comes from frozen towers and
            few pairs is learnt by heart without it.
        hidden_dropout: Of the projections' hidden numbers, in training only.
    """

    def __init__(
        self,
        *,
        fusion: CrossModalAlignment,
        volume: ResNet3DEncoder | None = None,
        image: ImageEncoder | None = None,
        audio: Wav2VecEncoder | None = None,
        record: RecordEncoder | None = None,
        text: TextTower | None = None,
        findings: FindingHead | None = None,
        decoder: SentenceDecoder | None = None,
        embedding_width: int = 128,
        temperature: float = 0.07,
        compared: Literal["projected", "as_is"] = "projected",
        projection_hidden: int | None = 128,
        text_hidden: int | None = None,
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        answers: AnswerHead | None = None,
    ) -> None:
        super().__init__()
        self.fusion, self.compared = fusion, compared
        self.volume, self.image, self.audio, self.record, self.text = volume, image, audio, record, text
        self.findings, self.decoder, self.answers = findings, decoder, answers
        self._check_widths()
        width = fusion.width
        adapter = partial(Adapter, width=width, dropout=input_dropout)
        self.volume_adapter = None if volume is None else adapter(volume.width)
        self.image_adapter = None if image is None else adapter(image.width)
        self.audio_adapter = None if audio is None else adapter(audio.width)
        self.record_adapter = None if record is None else adapter(record.width)
        said = 0 if findings is None else findings.width + 1
        past = 0 if findings is None else findings.history_width + len(ontology.CHANGES)
        project = partial(
            Projection,
            width,
            num_findings=NUM_FINDINGS,
            embedding_width=embedding_width,
            hidden=projection_hidden,
            dropout=hidden_dropout,
        )
        self.volume_projection = None if volume is None else project(said=said + past)
        self.image_projection = None if image is None else project(said=said)
        self.audio_projection = None if audio is None else project(said=said)
        self.record_projection = None if record is None else project(said=said)
        into = partial(perceptron, hidden=text_hidden, out_width=embedding_width, dropout=hidden_dropout)
        self.text_projection = None if text is None else into(text.width)
        if compared == "as_is":
            if image is None or text is None or image.width != text.width:
                raise ValueError('compared="as_is" needs an image and a text encoder that share a width')
            self.image_projection = self.text_projection = None
        self.finding_tokens = None if findings is None else nn.Linear(findings.width, width)
        self.question_adapter = None
        if answers is not None and decoder is not None and text is not None:
            self.question_adapter = Adapter(text.token_width, width)
        self.logit_scale = LogitScale(temperature=temperature)

    def _check_widths(self) -> None:
        """The widths that two parts must agree on.

        Raises:
            ValueError: They don't.
        """
        head = self.findings
        pairs: list[tuple[str, object, object]] = []
        if self.answers is not None:
            if self.text is None:
                raise ValueError("answers reads questions through the text tower; give it `text`")
            if self.record is not None:
                raise ValueError("answers puts the question in the record's seat of the fusion; leave out `record`")
            pairs.append(("answers.text_width", self.answers.text_width, self.text.width))
            if self.answers.image_width:
                pairs.append(
                    ("answers.image_width", self.answers.image_width, None if self.image is None else self.image.width)
                )
        if self.decoder is not None and self.decoder.memory_width != self.fusion.width:
            raise ValueError(
                f"decoder.memory_width must be the fusion's width {self.fusion.width}, got {self.decoder.memory_width}"
            )
        if head is not None:
            if self.volume is not None:
                pairs.append(("findings.volume_widths", head.volume_widths, tuple(self.volume.widths)))
            if self.image is not None:
                pairs.append(("findings.image_widths", head.image_widths, self.image.widths))
                if head.image_widths is not None:
                    pairs.append(("findings.image_stride", head.image_stride[0], self.image.stride))
            if self.audio is not None:
                pairs.append(("findings.audio_width", head.audio_width, self.audio.width))
            if self.record is not None:
                pairs.append(("findings.record_width", head.record_width, self.record.width))
        for name, got, allowed in pairs:
            if got is not None and got != allowed:
                raise ValueError(f"{name} must be the encoder's {allowed}, got {got}")

    # --------------------------------------------------------------------------------------- encode

    def encode(self, batch: Batch) -> Encoded:
        """Every modality alone: tokens, what they say of the findings, and an embedding."""
        encoded = Encoded(batch.size, BySource(), BySource())
        if self.volume is not None and batch.volumes is not None and bool((batch.volumes.count > 0).any()):
            encoded = self._encode_volumes(self.volume, batch.volumes, encoded)
        if self.image is not None and batch.image is not None and bool(batch.image.present.any()):
            encoded = self._encode_images(self.image, batch.image, encoded)
        head = self.findings
        if self.audio is not None and batch.audio is not None:
            tokens = self.audio(batch.audio)
            encoded = replace(encoded, tokens=replace(encoded.tokens, audio=tokens))
            if head is not None and head.audio is not None:
                encoded = replace(encoded, evidence=replace(encoded.evidence, audio=head.hear(tokens)))
        if self.record is not None and batch.record is not None:
            tokens = self.record(batch.record)
            tokens = Tokens(tokens.values, tokens.mask & batch.record.present[:, None])
            encoded = replace(encoded, tokens=replace(encoded.tokens, record=tokens))
            if head is not None and head.record is not None:
                encoded = replace(encoded, evidence=replace(encoded.evidence, record=head.read(tokens)))
        return self.embed(encoded)

    def _encode_volumes(self, encoder: ResNet3DEncoder, volumes: Volumes, encoded: Encoded) -> Encoded:
        """Visits are flattened, so that padding costs nothing and no statistics are taken of it."""
        visits = torch.arange(volumes.values.shape[1], device=volumes.count.device)
        study, visit = (visits < volumes.count[:, None]).nonzero(as_tuple=True)
        pyramid = encoder.pyramid(volumes.values[study, visit])
        current = visit == 0
        tokens = _to_studies(encoder.tokens(pyramid[-1][current]), study[current], encoded.size)
        encoded = replace(encoded, tokens=replace(encoded.tokens, volume=tokens))
        head = self.findings
        if head is None or head.volume_maps is None:
            return encoded
        maps = head.see_volumes(pyramid, study=study, visit=visit)
        evidence = replace(encoded.evidence, volume=head.pictured(maps, size=encoded.size))
        history = head.follow(maps, count=volumes.count, days=volumes.days)
        return replace(encoded, evidence=evidence, history=history, volume=maps)

    def _encode_images(self, encoder: ImageEncoder, images: Images, encoded: Encoded) -> Encoded:
        if images.values.shape[1] not in encoder.channels:
            raise ValueError(
                f"the image encoder takes images of {' or '.join(map(str, encoder.channels))} channels, the data has"
                f" {images.values.shape[1]}: set `colour` of the data spec's image accordingly"
            )
        study = images.present.nonzero()[:, 0]
        pyramid, seen = encoder.look(images.values[study])
        tokens = _to_studies(seen, study, encoded.size)
        encoded = replace(encoded, tokens=replace(encoded.tokens, image=tokens))
        head = self.findings
        if head is None or head.image_maps is None:
            return encoded
        maps = head.see_images(pyramid, study=study)
        evidence = replace(encoded.evidence, image=head.pictured(maps, size=encoded.size))
        return replace(encoded, evidence=evidence, image=maps)

    def adapt(self, encoded: Encoded) -> BySource[Tokens]:
        """Tokens in the shared width, each modality alone."""
        adapters = BySource(self.volume_adapter, self.image_adapter, self.audio_adapter, self.record_adapter)
        made = dict(adapters.items())
        return BySource(**{source: made[source](tokens) for source, tokens in encoded.tokens.items()})

    def embed(self, encoded: Encoded) -> Encoded:
        """The same with embeddings made anew; for training them on tokens and evidence that are kept."""
        projections = dict(
            BySource(
                self.volume_projection, self.image_projection, self.audio_projection, self.record_projection
            ).items()
        )
        evidence, embeddings = dict(encoded.evidence.items()), {}
        own = dict(encoded.tokens.items())
        for source, tokens in self.adapt(encoded).items():
            if source not in projections:  # compared as it is: the first token is the tower's own embedding
                unit = F.normalize(own[source].values[:, 0].float(), dim=-1)
                embeddings[source] = unit * own[source].mask[:, :1]
                continue
            projection, said = projections[source], None
            if projection.keep is not None:
                said = self._said(evidence.get(source), encoded.history if source == "volume" else None, tokens)
                said = F.pad(said, (0, projection.keep.in_features - said.shape[-1]))
            embeddings[source] = projection(tokens, said)
        return replace(encoded, embeddings=BySource(**embeddings))

    def _said(self, evidence: Evidence | None, history: History | None, tokens: Tokens) -> Float[Tensor, "B K S"]:
        """Evidence, presence and course in one vector a finding; empty without evidence."""
        if evidence is None:
            return tokens.values.new_zeros(len(tokens.values), NUM_FINDINGS, 0)
        parts = [evidence.values, evidence.logits[..., None]]
        if history is not None:
            parts += [history.values, history.change.softmax(-1)]
        return torch.cat(parts, dim=-1)

    def embed_text(self, text: Padded) -> Float[Tensor, "M E"]:
        """Unit vectors of texts.

        Raises:
            ValueError: The model has no text encoder.
        """
        if self.text is None:
            raise ValueError("this model has no text encoder; give it `text`")
        return self.project_text(self.text(text))

    def project_text(self, vectors: Float[Tensor, "M D"]) -> Float[Tensor, "M E"]:
        """Unit vectors from what the text encoder made of texts."""
        if self.text_projection is not None:
            vectors = self.text_projection(vectors)
        return F.normalize(vectors.float(), dim=-1)

    # ---------------------------------------------------------------------------------- find and fuse

    def find(self, encoded: Encoded) -> FindingOutputs | None:
        """What the head decides from all evidence; None without a head."""
        if self.findings is None:
            return None
        return self.findings(  # type: ignore[no-any-return]
            encoded.evidence,
            size=encoded.size,
            history=encoded.history,
            volume=encoded.volume,
            image=encoded.image,
        )

    def fuse(self, encoded: Encoded, found: FindingOutputs | None) -> Tokens:
        """The decoder's memory: all modalities' tokens after reading each other, and one token a finding."""
        parts = [tokens for _, tokens in self.fusion(self.adapt(encoded)).items()]
        if found is not None:
            assert self.finding_tokens is not None
            values = self.finding_tokens(found.tokens)
            parts.append(Tokens(values, torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)))
        memory = concatenate(parts)
        if memory is None:  # no head and no input: a memory of one empty token
            place = self.fusion.kind.weight
            return Tokens(place.new_zeros(encoded.size, 1, self.fusion.width), _none(encoded.size, place.device))
        return memory

    def remember(
        self, encoded: Encoded, writing: Writing, *, said: Tokens | None = None
    ) -> tuple[Tokens, Int[Tensor, " M"]]:
        """The decoder's memory for rows of text, and the place in it that each row reads.

        In a model with an answer head the question itself, in the seat of the record, and the image read each other;
        each row then has a memory of its own. In all others it is `fuse`, one memory a study.

        Args:
            encoded: Of the batch.
            writing: The rows.
            said: What the text tower says of `writing.asked`; None: it is asked.
        """
        found = self.find(encoded)
        if self.question_adapter is None or self.text is None or writing.asked is None:
            return self.fuse(encoded, found), writing.study
        seats = {source: select(tokens, writing.study) for source, tokens in self.adapt(encoded).items()}
        seats["record"] = self.question_adapter(self.text.tokens(writing.asked) if said is None else said)
        parts = [tokens for _, tokens in self.fusion(BySource(**seats)).items()]
        if found is not None:
            assert self.finding_tokens is not None
            values = self.finding_tokens(found.tokens)[writing.study]
            parts.append(Tokens(values, torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)))
        memory = concatenate(parts)
        assert memory is not None
        return memory, torch.arange(len(writing.study), device=memory.values.device)

    def forward(self, batch: Batch) -> Outputs:
        """Everything at once, for training; `batch.targets` is not looked at."""
        encoded = self.encode(batch)
        found = self.find(encoded)
        writing = None
        if self.decoder is not None and batch.writing is not None and batch.writing.target is not None:
            memory, rows = self.remember(encoded, batch.writing)
            writing = self.decoder(batch.writing, memory, rows=rows)
        text = None if self.text is None or batch.text is None else self.embed_text(batch.text)
        return Outputs(encoded, found, text, writing)

    # ------------------------------------------------------------------------------------------ write

    @torch.no_grad()
    def read(self, batch: Batch) -> Reading:
        """Findings and memory of a batch: all that a report in any language is written from.

        Args:
            batch: Its inputs; neither `writing` nor `targets` is looked at.

        Raises:
            ValueError: The model has no finding head or no decoder.
        """
        if self.findings is None or self.decoder is None:
            raise ValueError("to write reports a model needs `findings` and `decoder`")
        encoded = self.encode(batch)
        found = self.find(encoded)
        assert found is not None
        return Reading(tuple(self.findings.decode(found)), _compared(batch), self.fuse(encoded, found))

    @torch.no_grad()
    def write(
        self, reading: Reading, *, tokenizer: DecodesText, language: Language = "en", sampling: Sampling = GREEDY
    ) -> list[GeneratedReport]:
        """One report a study: a sentence each for the comparison, every finding, the rest, and the impression.

        Args:
            reading: Of a batch.
            tokenizer: Of the checkpoint.
            language: Of the sentences.
            sampling: Greedy by default.
        """
        assert self.decoder is not None
        findings = reading.findings
        plan = [
            (study, kind, index)
            for study, compared in enumerate(reading.compared)
            for kind, index in _plan(findings[study], compared)
        ]
        writing = _rows(plan, findings, language).to(reading.memory.values.device)
        written = self.decoder.generate(writing, reading.memory, sampling=sampling, rows=writing.study)
        sentences: list[list[GeneratedSentence]] = [[] for _ in findings]
        for (study, kind, index), ids, score in zip(
            plan, written.rows(), written.log_probability.tolist(), strict=True
        ):
            sentences[study].append(GeneratedSentence(kind, tokenizer.decode(ids), index, score))
        return [GeneratedReport(language, rows, tuple(lines)) for rows, lines in zip(findings, sentences, strict=True)]

    def generate(
        self, batch: Batch, *, tokenizer: DecodesText, language: Language = "en", sampling: Sampling = GREEDY
    ) -> list[GeneratedReport]:
        """Reads a batch and writes its reports in one language; see `read` and `write`."""
        return self.write(self.read(batch), tokenizer=tokenizer, language=language, sampling=sampling)

    @torch.no_grad()
    def answer(self, batch: Batch, *, sampling: Sampling = GREEDY) -> Generated:
        """Writes the rows of `batch.writing` (questions, or any others); their targets are not looked at.

        Raises:
            ValueError: The model has no decoder, or the batch no rows.
        """
        decoder, writing, memory, rows = self._asked(batch)
        return decoder.generate(writing, memory, sampling=sampling, rows=rows)

    @torch.no_grad()
    def score(self, batch: Batch, answers: Sequence[Sequence[int]]) -> Float[Tensor, "M A"]:
        """Log-probability of each of some answers (ids, `<end>` included) to each row of `batch.writing`.

        Raises:
            ValueError: As in `answer`, or see `mm.decoder.score.score_answers`.
        """
        decoder, writing, memory, rows = self._asked(batch)
        longest = max((len(answer) for answer in answers), default=0)
        logits, state = decoder.begin(writing, memory, room=longest, rows=rows)
        return score_answers(decoder, logits, state, answers)

    @torch.no_grad()
    def read_questions(self, encoded: Encoded, writing: Writing) -> tuple[Tensor, Padded, Tensor]:
        """What the answer head takes: sentence vectors and words of the questions, and what is seen on their images.

        Raises:
            ValueError: There is no answer head, or the questions aren't in the text tower's words.
        """
        if self.answers is None or self.text is None:
            raise ValueError("this model has no answer head; give it `answers` and `text`")
        if writing.asked is None:
            raise ValueError("questions must be split with the text tower's own words; see data.text")
        seen = self.answers.describe(encoded.tokens.image, encoded.size)[writing.study]
        return self.text(writing.asked), writing.asked, seen

    @torch.no_grad()
    def weigh(self, batch: Batch) -> Float[Tensor, "M A"]:
        """Scores of the answer head's answers to each row of `batch.writing`.

        Raises:
            ValueError: See `read_questions`, or the batch has no rows.
        """
        if batch.writing is None:
            raise ValueError("batch.writing must hold the questions, got None")
        sentences, asked, seen = self.read_questions(self.encode(batch), batch.writing)
        assert self.answers is not None
        return self.answers(sentences, asked, seen)  # type: ignore[no-any-return]

    def _asked(self, batch: Batch) -> tuple[SentenceDecoder, Writing, Tokens, Int[Tensor, " M"]]:
        if self.decoder is None:
            raise ValueError("to answer questions a model needs `decoder`")
        if batch.writing is None:
            raise ValueError("batch.writing must hold the questions, got None")
        memory, rows = self.remember(self.encode(batch), batch.writing)
        return self.decoder, replace(batch.writing, target=None), memory, rows


def _compared(batch: Batch) -> tuple[bool, ...]:
    """Which studies have a prior."""
    if batch.volumes is None:
        return (False,) * batch.size
    return tuple(count > 1 for count in batch.volumes.count.tolist())


def _plan(findings: tuple[DetectedFinding, ...], compared: bool) -> list[tuple[SlotKind, int | None]]:
    """The sentences of a report: what is there, then what has resolved."""
    present = [index for index, item in enumerate(findings) if item.present]
    resolved = [index for index, item in enumerate(findings) if not item.present and item.change == "resolved"]
    plan: list[tuple[SlotKind, int | None]] = [("comparison", None)] if compared else []
    plan += [("finding", index) for index in present + resolved]
    return [*plan, ("normal", None), ("impression", None)]


def _rows(
    plan: list[tuple[int, SlotKind, int | None]],
    findings: Sequence[tuple[DetectedFinding, ...]],
    language: Language,
) -> Writing:
    """The decoder's rows for a plan of (study, kind, finding)."""
    slots = [slot(kind, None if index is None else findings[study][index]) for study, kind, index in plan]
    columns = torch.tensor(slots, dtype=torch.long).reshape(-1, 5).unbind(1)
    prompt = Padded.of([[SPECIAL_IDS.language(language), SPECIAL_IDS.slot]] * len(plan))
    study = torch.tensor([row[0] for row in plan], dtype=torch.long)
    return Writing(study, Slots(*columns), prompt, None)


def _to_studies(tokens: Tokens, study: Int[Tensor, " N"], size: int) -> Tokens:
    """Rows to their studies; nothing is valid elsewhere."""
    values = tokens.values.new_zeros(size, *tokens.values.shape[1:]).index_copy(0, study, tokens.values)
    mask = torch.zeros(size, tokens.mask.shape[1], dtype=torch.bool, device=study.device)
    return Tokens(values, mask.index_copy(0, study, tokens.mask))


def _none(size: int, device: torch.device) -> Bool[Tensor, "B N"]:
    return torch.zeros(size, 1, dtype=torch.bool, device=device)
