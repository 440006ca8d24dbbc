"""Scores of generated reports: findings from the head and from the text, place, copied facts, overlap.

A `Judged` pairs what a model said of a study with the truth. The text is read by `mm.evaluation.labels`, which
knows nothing of the head: a sentence the decoder garbles costs F1.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool

from mm import ontology
from mm.batch import FindingTruth, GeneratedReport, Language
from mm.evaluation.labels import labels
from mm.report.text import SIDE_WORDS

_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?")
SIZE_BINS_MM: Final = ((3.0, 8.0), (8.0, 15.0), (15.0, 31.0))
FOUND_WITHIN_MM: Final = 30.0
"""A detected nodule farther than this from a true one is another thing, not an inexact place."""


@dataclass(frozen=True)
class Judged:
    """One study: the report, its filled sentences (parallel to `report.sentences`), and the truth.

    `voxels` is the true place of each finding on the model grid, (z, y, x), or None.
    """

    report: GeneratedReport
    sentences: tuple[str, ...]
    days: float | None
    findings: tuple[FindingTruth, ...]
    voxels: tuple[tuple[float, float, float] | None, ...]

    @property
    def text(self) -> str:
        """The whole report."""
        return "\n".join(self.sentences)


@dataclass(frozen=True)
class Agreement:
    """Precision, recall and F1 of one finding."""

    precision: float
    recall: float
    f1: float
    positives: int

    @classmethod
    def of(cls, predicted: Bool[np.ndarray, " N"], truth: Bool[np.ndarray, " N"]) -> "Agreement":
        """Zero where nothing could be right."""
        hits = int((predicted & truth).sum())
        precision = hits / max(int(predicted.sum()), 1)
        recall = hits / max(int(truth.sum()), 1)
        f1 = 2 * hits / max(int(predicted.sum()) + int(truth.sum()), 1)
        return cls(precision, recall, f1, int(truth.sum()))


def macro_f1(predicted: Bool[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"]) -> float:
    """Mean F1 over the findings that the studies have at all."""
    scores = [Agreement.of(p, t).f1 for p, t in zip(predicted.T, truth.T, strict=True) if t.any()]
    return float(np.mean(scores)) if scores else 0.0


def head_labels(judged: Sequence[Judged]) -> Bool[np.ndarray, "N K"]:
    """What the finding head calls present."""
    result = np.zeros((len(judged), len(ontology.CODES)), dtype=bool)
    for row, item in enumerate(judged):
        for finding in item.report.findings:
            result[row, ontology.INDEX[finding.code]] |= finding.present
    return result


def text_labels(judged: Sequence[Judged]) -> Bool[np.ndarray, "N K"]:
    """What the text asserts. A finding in doubt is not asserted."""
    result = np.zeros((len(judged), len(ontology.CODES)), dtype=bool)
    for row, item in enumerate(judged):
        found = labels(item.text, item.report.language)
        result[row] = [found[code] == "present" for code in ontology.CODES]
    return result


def copied_facts(judged: Sequence[Judged]) -> tuple[float, int]:
    """The share of numbers and side words in finding sentences that equal the head's, and how many there are."""
    right = total = 0
    for item in judged:
        for sentence, text in zip(item.report.sentences, item.sentences, strict=True):
            if sentence.finding is None:
                continue
            finding = item.report.findings[sentence.finding]
            allowed = set()
            # "mm3" and the like end in a digit that is no number of the sentence.
            words = text
            if finding.size is not None and ontology.finding(finding.code).measure is not None:
                size = ontology.format_size(finding.code, finding.size)
                allowed |= set(_NUMBER.findall(size.split(" ")[0]))
                unit = size.partition(" ")[2]
                words = words.replace(unit, "") if unit else words
            if item.days is not None:
                allowed.add(str(round(item.days)))
            for number in _NUMBER.findall(words):
                total += 1
                right += number in allowed
            for side in _sides(words, item.report.language):
                total += 1
                right += side == finding.side
    return (right / total if total else float("nan")), total


def _sides(text: str, language: Language) -> list[str]:
    found = []
    for side, word in SIDE_WORDS[language].items():
        pattern = rf"\b{word}\b" if language == "en" else word
        found += [side] * len(re.findall(pattern, text.lower()))
    return found


@dataclass(frozen=True)
class NodulePlaces:
    """Of all true nodules of at least 8 mm seen in the volume; a missed one is a wrong slice."""

    total: int
    found: int
    key_slice_within_one: float
    median_error_mm: float


@dataclass(frozen=True)
class NodulePair:
    """A true nodule and what it is matched with: (|slices|, mm) away and of which size; None where it is missed."""

    true_mm: float
    away: tuple[float, float] | None
    found_mm: float | None


def nodule_pairs(item: Judged, spacing_mm: tuple[float, float, float]) -> list[NodulePair]:
    """Every true nodule of the volume, matched to the detected ones.

    Matching is one to one, nearest pairs first, within `FOUND_WITHIN_MM`.
    """
    scale = np.array(spacing_mm)
    true = [
        (np.array(voxel), finding.size or 0.0)
        for finding, voxel in zip(item.findings, item.voxels, strict=True)
        if finding.code == "nodule" and finding.present and voxel is not None
    ]
    found = [
        (np.array(finding.voxel), finding.size)
        for finding in item.report.findings
        if finding.code == "nodule" and finding.present and finding.voxel is not None
    ]
    pairs = sorted(
        (float(np.linalg.norm((place - other) * scale)), t, f)
        for t, (place, _) in enumerate(true)
        for f, (other, _) in enumerate(found)
    )
    matched: dict[int, tuple[float, int]] = {}
    for distance, t, f in pairs:
        if distance <= FOUND_WITHIN_MM and t not in matched and f not in {used for _, used in matched.values()}:
            matched[t] = (distance, f)
    result = []
    for t, (place, size) in enumerate(true):
        if t in matched:
            distance, f = matched[t]
            other, found_mm = found[f]
            slices = abs(round(float(place[0])) - round(float(other[0])))
            result.append(NodulePair(size, (float(slices), distance), found_mm))
        else:
            result.append(NodulePair(size, None, None))
    return result


def nodule_matches(
    item: Judged, spacing_mm: tuple[float, float, float], *, minimum_mm: float = 0.0, maximum_mm: float = 1e9
) -> list[tuple[float, float] | None]:
    """For each true nodule in a size range: (|slices|, mm) to the detected one it is matched with, or None."""
    return [pair.away for pair in nodule_pairs(item, spacing_mm) if minimum_mm <= pair.true_mm < maximum_mm]


def nodule_places(judged: Sequence[Judged], spacing_mm: tuple[float, float, float]) -> NodulePlaces:
    """Where nodules of 8 mm and more were found; slices are those of the model grid."""
    every = [match for item in judged for match in nodule_matches(item, spacing_mm, minimum_mm=8.0)]
    found = [match for match in every if match is not None]
    within = sum(match[0] <= 1 for match in found)
    error = float(np.median([match[1] for match in found])) if found else float("nan")
    return NodulePlaces(len(every), len(found), within / len(every) if every else float("nan"), error)


def nodule_recall(judged: Sequence[Judged], spacing_mm: tuple[float, float, float]) -> dict[str, tuple[float, int]]:
    """Recall and number of true nodules by size bin."""
    result = {}
    for low, high in SIZE_BINS_MM:
        every = [m for item in judged for m in nodule_matches(item, spacing_mm, minimum_mm=low, maximum_mm=high)]
        hits = sum(match is not None for match in every)
        result[f"{low:g}-{high:g} mm"] = (hits / len(every) if every else float("nan"), len(every))
    return result


def bleu4(candidates: Sequence[str], references: Sequence[str], language: Language) -> float:
    """Corpus BLEU-4, 0 to 1 (sacrebleu).

    Raises:
        ImportError: sacrebleu is not installed (extra `evaluate`).
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'mm-report[evaluate]'") from error
    tokenize = "zh" if language == "zh" else "13a"
    score = sacrebleu.corpus_bleu(list(candidates), [list(references)], tokenize=tokenize, lowercase=True)
    return float(score.score) / 100


def rouge_l(candidates: Sequence[str], references: Sequence[str], language: Language) -> float:
    """Mean ROUGE-L F1 (Lin, 2004) over words, or characters for Chinese."""
    scores = []
    for candidate, reference in zip(candidates, references, strict=True):
        a, b = ([*text] if language == "zh" else re.findall(r"\w+", text.lower()) for text in (candidate, reference))
        common = _common(list(a), list(b))
        scores.append(2 * common / (len(a) + len(b)) if a or b else 0.0)
    return float(np.mean(scores)) if scores else 0.0


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for left in a:
        previous = 0
        for place, right in enumerate(b, start=1):
            kept = row[place]
            row[place] = previous + 1 if left == right else max(row[place], row[place - 1])
            previous = kept
    return row[-1]
