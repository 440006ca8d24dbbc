"""Phantom patients in words only: nothing is rendered, and every visit words the same facts anew."""

from functools import lru_cache
from typing import Final, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from mm.batch import FindingTruth, Language, Sample, Truth
from mm.data.record import parse_record
from mm.phantom import text
from mm.phantom.dataset import PhantomDataset, Words, labelled, language_of, words
from mm.phantom.patient import Patient, draw_patient
from mm.phantom.questions import questions
from mm.phantom.record import render_record

CHINESE: Final = 0.4
"""Share of training texts in Chinese; half would cost English, which retrieval is measured on."""

UNMEASURED: Final = 0.1
"""Share of the training sentences on findings in which the size isn't known."""

KEPT: Final = 4096
"""Patients that a process remembers, a few kilobytes each."""


class PhantomWords(Dataset[Sample]):
    """What is said of the patients of a `PhantomDataset`, index by index, with none of its inputs.

    In the training split language, templates and questions are drawn afresh each time (from torch's random state,
    which differs by worker and epoch), and some sentences leave the size away, which `text` never does; in the others
    they are the data set's own.
    """

    def __init__(self, rendered: PhantomDataset, *, record: Literal["without", "with"] = "without") -> None:
        self.rendered = rendered
        self.record = record

    def __len__(self) -> int:
        """Number of patients."""
        return len(self.rendered)

    def __getitem__(self, index: int) -> Sample:
        """Report, text, questions and findings of patient `index`."""
        source = self.rendered
        patient = _drawn(source.patient_seed(index))
        visits = patient.visits[: 1 + source.priors]
        days = visits[1].days if len(visits) > 1 else None
        findings = labelled(patient.findings, inputs=source.inputs, compared=days is not None)
        if source.split == "train":
            language, said = _afresh(findings, days=days)
        else:
            language = language_of(patient)
            split: text.Split = "test" if source.split == "test" else "train"
            said = words(patient, findings, days=days, language=language, split=split)
        return Sample(
            study=str(index),
            record=parse_record(render_record(patient)) if self.record == "with" else None,
            language=language,
            report=said.report,
            text=said.text,
            questions=said.questions,
            truth=Truth(findings, (), None, (None,) * len(findings)),
        )


@lru_cache(maxsize=KEPT)
def _drawn(seed: int) -> Patient:
    """The same every epoch, and sixteen times as long to draw as what is said of it."""
    return draw_patient(seed)


def _afresh(findings: tuple[FindingTruth, ...], *, days: float | None) -> tuple[Language, Words]:
    """Training templates and questions in a language, all drawn from torch's random state."""
    rng = np.random.default_rng([int(torch.randint(2**62, ())), 41])
    language: Language = "zh" if rng.random() < CHINESE else "en"
    report = text.report(findings, language=language, days=days, split="train", rng=rng)
    asked = questions(findings, rng=rng)
    filled = text.filled(report, findings, days=days, language=language)
    told = text.unmeasured(report, findings, share=UNMEASURED, language=language, split="train", rng=rng)
    return language, Words(told, filled, tuple(pair.en if language == "en" else pair.zh for pair in asked))
