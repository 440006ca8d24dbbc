"""The system on one page: encode each modality alone, find, bring together, write.

`encode` gives tokens, evidence and embeddings, in which no modality has seen another; `find` decides what is there,
where, how large and changed how; `fuse` makes the decoder's memory, tokens that have read each other and one token
a finding; `generate` writes a sentence a finding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm import ontology
from mm.answers import AnswerHead
from mm.batch import Batch, BySource, GeneratedReport, Language, Movable, Padded, Tokens, Writing
from mm.canonical import CanonicalHead
from mm.decoder.generate import GREEDY, Generated, Sampling
from mm.decoder.output import DecoderOutput
from mm.decoder.score import score_answers
from mm.decoder.sentences import SentenceDecoder
from mm.encoded import Encoded, with_images, with_records, with_sounds, with_volumes
from mm.encoders.base import ImageEncoder, TextTower
from mm.encoders.record import RecordEncoder
from mm.encoders.resnet3d import ResNet3DEncoder
from mm.encoders.wav2vec import Wav2VecEncoder
from mm.finding_maps import NUM_FINDINGS
from mm.findings import FindingHead, FindingOutputs
from mm.fusion.adapters import Adapter, Projection, perceptron
from mm.fusion.alignment import CrossModalAlignment, concatenate, select
from mm.fusion.contrastive import LogitScale
from mm.reading import DecodesText, Reading
from mm.widths import check_widths


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
        canonical: Compares images and texts by canonical correlations, in the place of their projections.
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
        canonical: CanonicalHead | None = None,
    ) -> None:
        super().__init__()
        check_widths(
            fusion=fusion, volume=volume, image=image, audio=audio, record=record, text=text,
            findings=findings, decoder=decoder, answers=answers, canonical=canonical, compared=compared,
        )  # fmt: skip
        self.fusion, self.compared = fusion, compared
        self.volume, self.image, self.audio, self.record, self.text = volume, image, audio, record, text
        self.findings, self.decoder, self.answers, self.canonical = findings, decoder, answers, canonical
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
        if compared == "as_is" or canonical is not None:
            self.image_projection = self.text_projection = None
        self.finding_tokens = None if findings is None else nn.Linear(findings.width, width)
        self.question_adapter = None
        if answers is not None and decoder is not None and text is not None:
            self.question_adapter = Adapter(text.token_width, width)
        self.logit_scale = LogitScale(temperature=temperature)

    # --------------------------------------------------------------------------------------- encode

    def encode(self, batch: Batch) -> Encoded:
        """Every modality alone: tokens, what they say of the findings, and an embedding."""
        encoded, head = Encoded(batch.size), self.findings
        if self.volume is not None and batch.volumes is not None:
            encoded = with_volumes(encoded, batch.volumes, self.volume, head)
        if self.image is not None and batch.image is not None:
            encoded = with_images(encoded, batch.image, self.image, head)
        if self.audio is not None and batch.audio is not None:
            encoded = with_sounds(encoded, batch.audio, self.audio, head)
        if self.record is not None and batch.record is not None:
            encoded = with_records(encoded, batch.record, self.record, head)
        return self.embed(encoded)

    def adapt(self, encoded: Encoded) -> BySource[Tokens]:
        """Tokens in the shared width, each modality alone."""
        adapters = BySource(self.volume_adapter, self.image_adapter, self.audio_adapter, self.record_adapter)
        made = dict(adapters.items())
        return BySource(**{source: made[source](tokens) for source, tokens in encoded.tokens.items()})

    def embed(self, encoded: Encoded) -> Encoded:
        """The same with embeddings made anew; for training them on tokens and evidence that are kept."""
        made = BySource(self.volume_projection, self.image_projection, self.audio_projection, self.record_projection)
        projections, own, embeddings = dict(made.items()), dict(encoded.tokens.items()), {}
        for source, tokens in self.adapt(encoded).items():
            if source in projections:
                embeddings[source] = projections[source](tokens, encoded.said(source))
            elif self.canonical is not None:
                embeddings[source] = self.canonical.image(own[source])
            else:  # compared as it is: the first token is the tower's own embedding
                unit = F.normalize(own[source].values[:, 0].float(), dim=-1)
                embeddings[source] = unit * own[source].mask[:, :1]
        return replace(encoded, embeddings=BySource(**embeddings))

    def embed_text(self, text: Padded) -> Float[Tensor, "M E"]:
        """Unit vectors of texts.

        Raises:
            ValueError: The model has no text encoder.
        """
        if self.text is None:
            raise ValueError("this model has no text encoder; give it `text`")
        return self.project_text(self.text(text), text)

    def project_text(self, vectors: Float[Tensor, "M D"], text: Padded) -> Float[Tensor, "M E"]:
        """Unit vectors from what the text encoder made of texts, and from the texts' words with a canonical head."""
        if self.canonical is not None:
            return self.canonical.text(vectors, text)
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
        memory = self._memory(self.adapt(encoded), found)
        if memory is None:  # no head and no input: a memory of one empty token
            place = self.fusion.kind.weight
            nothing = torch.zeros(encoded.size, 1, dtype=torch.bool, device=place.device)
            return Tokens(place.new_zeros(encoded.size, 1, self.fusion.width), nothing)
        return memory

    def _memory(
        self, seats: BySource[Tokens], found: FindingOutputs | None, rows: Int[Tensor, " M"] | None = None
    ) -> Tokens | None:
        """Adapted tokens after reading each other, and the findings' of each study, or of the study of each row."""
        parts = [tokens for _, tokens in self.fusion(seats).items()]
        if found is not None:
            assert self.finding_tokens is not None
            values = self.finding_tokens(found.tokens)
            values = values if rows is None else values[rows]
            parts.append(Tokens(values, torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)))
        return concatenate(parts)

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
        memory = self._memory(BySource(**seats), found, writing.study)
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
        visits = [1] * batch.size if batch.volumes is None else batch.volumes.count.tolist()
        compared = tuple(count > 1 for count in visits)
        return Reading(tuple(self.findings.decode(found)), compared, self.fuse(encoded, found))

    @torch.no_grad()
    def write(
        self, reading: Reading, *, tokenizer: DecodesText, language: Language = "en", sampling: Sampling = GREEDY
    ) -> list[GeneratedReport]:
        """One report a study: a sentence each for the comparison, every finding, the rest, and the impression.

        Args:
            reading: Of a batch.
            tokenizer: Of the checkpoint.
            language: Of the sentences.
            sampling: Greedy by default. Its seed is of all studies, or one a study.

        Raises:
            ValueError: There is not one seed a study.
        """
        assert self.decoder is not None
        plan = reading.plan()
        sampling = replace(sampling, seed=plan.seeds(sampling.seeds(len(reading.findings))))
        rows = plan.rows(language).to(reading.memory.values.device)
        written = self.decoder.generate(rows, reading.memory, sampling=sampling, rows=rows.study)
        return plan.reports(written, tokenizer=tokenizer, language=language)

    def generate(
        self, batch: Batch, *, tokenizer: DecodesText, language: Language = "en", sampling: Sampling = GREEDY
    ) -> list[GeneratedReport]:
        """Reads a batch and writes its reports in one language; see `read` and `write`."""
        return self.write(self.read(batch), tokenizer=tokenizer, language=language, sampling=sampling)

    # ----------------------------------------------------------------------------------------- answer

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
