"""Studies as a decoder alone sees them: memories made once from the encoders' cache, and words drawn as in training."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from torch.utils.data import Dataset

from mm import ontology
from mm.batch import Language, Question, Sample, Tokens, Writing
from mm.data.collate import collate
from mm.data.datamodule import MultimodalData
from mm.data.spec import Split
from mm.data.tokenizer import Tokenizer
from mm.model import MultimodalModel
from mm.phantom.text import Template, finding_templates, summary_templates
from mm.training.cache import Cache, build
from mm.training.checkpoint import load

PRESENT: dict[Language, str] = {"en": "Is there {name}?", "zh": "有{name}吗？"}
"""One of the training wordings of the question that is asked about every finding."""
AT_ONCE = 24
"""Studies that pass the frozen parts together, or are judged together."""


@dataclass(frozen=True)
class Words:
    """Some studies by number, what is said of them, and the decoder's rows of it."""

    numbers: list[int]
    samples: list[Sample]
    writing: Writing


class Studies:
    """One split of phantom patients: words, and a memory a study that is the same in every step.

    Attributes:
        detected: Which findings the head calls present.
    """

    def __init__(
        self, words: Dataset[Sample], tokenizer: Tokenizer, memory: Tokens, *, detected: Bool[np.ndarray, "N K"]
    ) -> None:
        self.words, self.tokenizer, self.detected = words, tokenizer, detected
        self._values, self._mask = memory.values.to(torch.bfloat16), memory.mask

    def __len__(self) -> int:
        return len(self._mask)

    def memory(self, numbers: list[int]) -> Tokens:
        return Tokens(self._values[numbers].float(), self._mask[numbers])

    def draw(self, numbers: list[int]) -> Words:
        """Reports and questions of some studies; in training worded from torch's random state."""
        return self._words(numbers, [self.words[number] for number in numbers])

    def asked(self, words: Words) -> Words:
        """The same studies, asked in their own language whether each finding is there."""
        samples = [replace(item, report=(), questions=every_question(item.language)) for item in words.samples]
        return self._words(words.numbers, samples)

    def _words(self, numbers: list[int], samples: list[Sample]) -> Words:
        writing = collate(samples, self.tokenizer).writing
        assert writing is not None
        return Words(numbers, samples, writing)

    def in_order(self) -> list[Words]:
        """All studies."""
        return [self.draw(numbers.tolist()) for numbers in torch.arange(len(self)).split(AT_ONCE)]

    def shuffled(self, *, steps: int, size: int, seed: int) -> list[Words]:
        """What every row of the experiment is trained on with this seed, in this order."""
        order: list[int] = []
        generator = random.Random(seed)
        while len(order) < steps * size:
            order += generator.sample(range(len(self)), len(self))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            return [self.draw(order[step * size : (step + 1) * size]) for step in range(steps)]


def open_studies(checkpoint: Path, cache: Path, *, spec: str, train: int | None, val: int | None) -> list[Studies]:
    """Training and validation split; computes what the cache lacks."""
    model, data = open_both(checkpoint, spec=spec, train=train, val=val)
    return [frozen(model, data, split, cache) for split in ("train", "val")]


def open_both(
    checkpoint: Path, *, spec: str, train: int | None, val: int | None
) -> tuple[MultimodalModel, MultimodalData]:
    """A checkpoint's model, put to evaluation, and data as it reads them."""
    loaded = load(str(checkpoint))
    data = MultimodalData(
        spec=spec,
        tokenizer=str(checkpoint),
        workers=0,
        train_studies=train,
        val_studies=val,
        max_words=loaded.preprocessing.max_words,
        max_text=loaded.preprocessing.max_text,
    )
    return loaded.model.eval(), data


def frozen(model: MultimodalModel, data: MultimodalData, split: Split, cache: Path) -> Studies:
    """One split through encoders (from the cache), finding head, fusion and finding tokens."""
    return remembered(model, build(model, data, split, cache), data, split)


@torch.no_grad()
def remembered(model: MultimodalModel, kept: Cache, data: MultimodalData, split: Split) -> Studies:
    """One split with the memory that the model, put to evaluation, makes now of what its encoders said."""
    model.eval()
    parts: list[Tokens] = []
    found: list[list[str]] = []
    assert model.findings is not None
    with torch.autocast("cpu", torch.bfloat16):
        for numbers in torch.arange(len(kept)).split(AT_ONCE):
            encoded = kept.select(numbers, "cpu")
            head = model.find(encoded)
            assert head is not None
            found += [[item.code for item in row if item.present] for row in model.findings.decode(head)]
            parts.append(model.fuse(encoded, head))
    memory = Tokens(torch.cat([part.values for part in parts]), torch.cat([part.mask for part in parts]))
    return Studies(data.words(split), data.tokenizer, memory, detected=truth_table(found))


def every_question(language: Language) -> tuple[Question, ...]:
    """Is it there?, once a finding, in the order of the ontology. The answer is a stand-in that nobody looks at."""
    names = [kind.en if language == "en" else kind.zh for kind in ontology.FINDINGS]
    return tuple(Question(PRESENT[language].format(name=name), "?", True) for name in names)


def truth_table(present: list[list[str]]) -> Bool[np.ndarray, "N K"]:
    """Which findings are present, from their codes."""
    table = np.zeros((len(present), len(ontology.CODES)), dtype=bool)
    for row, codes in enumerate(present):
        table[row, [ontology.INDEX[code] for code in codes]] = True
    return table


def truth_of(words: list[Words]) -> Bool[np.ndarray, "N K"]:
    """Which findings the studies have."""
    truths = [sample.truth for part in words for sample in part.samples]
    return truth_table([[] if t is None else [item.code for item in t.findings if item.present] for t in truths])


def situations(sample: Sample) -> list[tuple[Template, ...]]:
    """For each sentence of a report: every wording of what it says, held-out frames included.

    A text among them names the right finding, grade and change, has placeholders for side and size where these are
    known and only there, and says nothing else.
    """
    assert sample.truth is not None
    found = []
    for sentence in sample.report:
        if sentence.finding is None:
            found.append(summary_templates(sample.language, sentence.kind))
            continue
        item = sample.truth.findings[sentence.finding]
        grade = ontology.grade(item.code, item.size if sentence.measured else None)
        sided = item.side in ("left", "right")
        found.append(finding_templates(sample.language, item.code, item.change, grade, sided=sided))
    return found


def chance(templates: tuple[Template, ...]) -> float:
    """Nats: a wording is drawn evenly from the training templates, and nothing tells which."""
    texts = [item.text for item in templates if item.split == "train"]
    shares = np.array([texts.count(text) / len(texts) for text in set(texts)])
    return float(-(shares * np.log(shares)).sum())
