"""From findings to a report: which sentences it has, the decoder's rows for them, and the report they become."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, runtime_checkable

import torch

from mm import ontology
from mm.batch import (
    SPECIAL_IDS,
    DetectedFinding,
    GeneratedReport,
    GeneratedSentence,
    Language,
    Movable,
    Padded,
    SlotKind,
    Slots,
    Tokens,
    Writing,
    slot,
)
from mm.decoder.generate import Generated


@runtime_checkable
class DecodesText(Protocol):
    """The part of a tokenizer that generation needs."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...


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

    def plan(self) -> "Plan":
        """The sentences of all studies: the comparison, what is there, what has resolved, the rest, the impression."""
        sentences: list[tuple[int, SlotKind, int | None]] = []
        for study, (found, compared) in enumerate(zip(self.findings, self.compared, strict=True)):
            present = [index for index, item in enumerate(found) if item.present]
            resolved = [index for index, item in enumerate(found) if not item.present and item.change == "resolved"]
            sentences += [(study, "comparison", None)] if compared else []
            sentences += [(study, "finding", index) for index in present + resolved]
            sentences += [(study, "normal", None), (study, "impression", None)]
        return Plan(self.findings, tuple(sentences))


@dataclass(frozen=True)
class Plan:
    """The sentences that the reports of a batch are made of.

    Attributes:
        findings: Of each study.
        sentences: Study, kind, and the finding that it is about, by its place among the study's.
    """

    findings: tuple[tuple[DetectedFinding, ...], ...]
    sentences: tuple[tuple[int, SlotKind, int | None], ...]

    def rows(self, language: Language) -> Writing:
        """The decoder's rows, a sentence each."""
        slots = [
            slot(kind, None if index is None else self.findings[study][index]) for study, kind, index in self.sentences
        ]
        columns = torch.tensor(slots, dtype=torch.long).reshape(-1, 5).unbind(1)
        prompt = Padded.of([[SPECIAL_IDS.language(language), SPECIAL_IDS.slot]] * len(slots))
        study = torch.tensor([study for study, _, _ in self.sentences], dtype=torch.long)
        return Writing(study, Slots(*columns), prompt, None)

    def seeds(self, studies: Sequence[int]) -> tuple[int, ...]:
        """One a sentence, from one a study: by what the report tells, and the place in it.

        Neither the study's name nor its neighbours in the batch decide what is drawn; studies of which different
        things are told get wordings drawn apart.
        """
        told: list[list[str]] = [[] for _ in self.findings]
        for study, kind, index in self.sentences:
            told[study].append(kind if index is None else _told(self.findings[study][index]))
        digests = [hashlib.sha256("\n".join(lines).encode()).digest()[:6] for lines in told]
        bases = [seed + int.from_bytes(digest, "big") for seed, digest in zip(studies, digests, strict=True)]
        places = chain.from_iterable(range(len(lines)) for lines in told)  # a study's sentences lie together
        return tuple(bases[study] + place for (study, _, _), place in zip(self.sentences, places, strict=True))

    def reports(self, written: Generated, *, tokenizer: DecodesText, language: Language) -> list[GeneratedReport]:
        """One report a study, from what the decoder made of `rows(language)`."""
        sentences: list[list[GeneratedSentence]] = [[] for _ in self.findings]
        scores = written.log_probability.tolist()
        for (study, kind, index), ids, score in zip(self.sentences, written.rows(), scores, strict=True):
            sentences[study].append(GeneratedSentence(kind, tokenizer.decode(ids), index, score))
        studies = zip(self.findings, sentences, strict=True)
        return [GeneratedReport(language, findings, tuple(lines)) for findings, lines in studies]


def _told(item: DetectedFinding) -> str:
    """A finding as far as a report tells it."""
    size = "unmeasured"
    if item.size is not None and ontology.finding(item.code).measure is not None:
        size = ontology.format_size(item.code, item.size)
    return f"{item.code} {item.side} {size} {item.change}"
