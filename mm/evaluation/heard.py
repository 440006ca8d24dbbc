"""All that a report evaluation gathers of its patients."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from mm import ontology
from mm.batch import DetectedFinding, Language
from mm.evaluation.labels import labels
from mm.evaluation.reports import Judged
from mm.evaluation.subsets import Answers
from mm.report.text import join


@dataclass
class Heard:
    """What was said of each patient, and what is true; lists have one entry a patient.

    Attributes:
        language: Of all texts.
        answers: Of the head, with each subset of the inputs.
        ids: Of the studies.
        judged: Reports beside the truth.
        mirrored: The report of the mirrored study, or None.
        now: What the head finds in the current volume alone.
        before: And in the last prior alone.
        references: Reports of the truth.
        training: Reports of training patients (one a training patient).
        rivals: What baselines call present.
        written: What baselines write.
    """

    language: Language
    answers: Answers
    ids: list[str] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    mirrored: list[str | None] = field(default_factory=list)
    now: list[tuple[DetectedFinding, ...]] = field(default_factory=list)
    before: list[tuple[DetectedFinding, ...]] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    training: list[str] = field(default_factory=list)
    rivals: dict[str, Bool[np.ndarray, "N K"]] = field(default_factory=dict)
    written: dict[str, list[str]] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """The reports as running text."""
        return [join(item.sentences, self.language) for item in self.judged]

    def said(self, texts: Sequence[str]) -> Bool[np.ndarray, "N K"]:
        """What a labeler reads in some texts."""
        return np.array([[labels(text, self.language)[code] == "present" for code in ontology.CODES] for text in texts])
