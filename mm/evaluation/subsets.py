"""What the finding head says with every subset of the inputs: facts that one modality carries, and the whole grid.

Each modality is encoded alone, so that one pass of the encoders serves every subset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm import ontology
from mm.batch import Batch, BySource, Modality, Sample
from mm.evaluation import baselines
from mm.evaluation.balanced import balanced_accuracy
from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.conspicuous import conspicuous_f1
from mm.evaluation.evaluate import table
from mm.evaluation.reports import macro_f1
from mm.training.checkpoint import Loaded

Input = Modality | Literal["priors"]
INPUTS: Final[tuple[Input, ...]] = ("volume", "image", "audio", "record", "priors")
NAMES: Final[dict[Input, str]] = {
    "volume": "volume", "image": "X-ray", "audio": "sound", "record": "record", "priors": "priors",
}  # fmt: skip
SUBSETS: Final = tuple(
    kept
    for number in range(len(INPUTS) + 1)
    for kept in combinations(INPUTS, number)
    if "priors" not in kept or "volume" in kept
)
"""Priors are earlier volumes, compared with the current one: without it there is nothing to compare."""
CHANGES: Final = tuple(name for name in ontology.CHANGES if name != "unknown")
STAYING: Final = tuple(name for name in CHANGES if name != "resolved")
"""Changes of a finding that is there."""


@dataclass(frozen=True)
class Bound:
    """A fact that one modality carries: balanced accuracy with it and without, and chance."""

    fact: str
    modality: str
    with_it: Score
    without: Score
    chance: float


@dataclass(frozen=True)
class Cell:
    """One subset of the inputs: macro-F1 over all findings and over conspicuous ones, and the change class of five."""

    inputs: tuple[str, ...]
    macro_f1: Score
    conspicuous_f1: Score
    change: Score


class Answers:
    """What the head says of patients with each subset of their inputs."""

    def __init__(self) -> None:
        self._truth: list[np.ndarray] = []
        self._only_image: list[bool] = []
        self._change: list[np.ndarray] = []
        self._probability: list[np.ndarray] = []
        self._present: dict[tuple[Input, ...], list[np.ndarray]] = {kept: [] for kept in SUBSETS}
        self._changed: dict[tuple[Input, ...], list[np.ndarray]] = {kept: [] for kept in SUBSETS}

    def add(self, loaded: Loaded, batch: Batch, samples: Sequence[Sample]) -> BySource[Tensor]:
        """Encodes a batch once, asks the head with each subset, and returns the embeddings."""
        self._truth += list(baselines.truth_labels(samples))
        for sample in samples:
            assert sample.truth is not None
            row = np.zeros(len(ontology.CODES), dtype=int)
            for item in sample.truth.findings:
                row[ontology.INDEX[item.code]] = ontology.CHANGES.index(item.change)
            self._change.append(row)
            sources = [item.sources for item in sample.truth.findings if item.code == "rib_fracture" and item.present]
            self._only_image.append(bool(sources) and all(set(item) == {"image"} for item in sources))
        head = loaded.model.findings
        assert head is not None
        with torch.inference_mode():
            encoded = loaded.model.encode(batch)
            for kept in SUBSETS:
                part = encoded
                for name in INPUTS:
                    part = part if name in kept else part.without(name)
                outputs = loaded.model.find(part)
                assert outputs is not None
                probability = head.probability(outputs.presence)
                found = probability >= head.threshold
                if outputs.assessable is not None:  # as in reports: a prior above its threshold is no sight of anything
                    found = found & outputs.assessable
                self._present[kept] += list(found.cpu().numpy())
                self._changed[kept] += list(outputs.change.float().cpu().numpy())
                if kept == INPUTS:
                    self._probability += list(probability.cpu().numpy())
        return encoded.embeddings

    def labels(self) -> Bool[np.ndarray, "N K"]:
        """Truth of presence."""
        return np.stack(self._truth)

    def probability(self) -> Float[np.ndarray, "N K"]:
        """Calibrated probability of each finding from all inputs."""
        return np.stack(self._probability).astype(np.float64)

    def changes(self) -> Int[np.ndarray, "N K"]:
        """True change of each finding, an index into `mm.ontology.CHANGES`."""
        return np.stack(self._change)

    def present(self, *without: Input) -> Bool[np.ndarray, "N K"]:
        """What the head calls present without some inputs."""
        return np.stack(self._present[_kept(without)])

    def bound(self) -> list[Bound]:
        """Facts that one modality carries, each beside its ablation."""
        truth = self.labels()
        airflow, infection, fracture = (
            ontology.INDEX[code] for code in ("airflow_obstruction", "infection", "rib_fracture")
        )
        opacity = truth[:, ontology.INDEX["consolidation"]] | truth[:, ontology.INDEX["atelectasis"]]
        only_image = np.array(self._only_image)
        facts: tuple[tuple[str, Input, int, Bool[np.ndarray, " N"]], ...] = (
            ("airflow obstruction", "audio", airflow, np.ones(len(truth), dtype=bool)),
            ("infection, given an opacity", "record", infection, opacity),
            ("rib fracture seen on the X-ray only", "image", fracture, only_image | ~truth[:, fracture]),
        )
        result = [
            Bound(
                fact,
                modality,
                balanced_accuracy(self.present()[kept, column], truth[kept, column]),
                balanced_accuracy(self.present(modality)[kept, column], truth[kept, column]),
                0.5,
            )
            for fact, modality, column, kept in facts
        ]
        for fact, names in (
            ("change class of a finding that is there (4 classes)", STAYING),
            ("change class, resolved included (5 classes)", CHANGES),
        ):
            result.append(Bound(fact, "priors", self.change(names), self.change(names, "priors"), 1 / len(names)))
        return result

    def change(self, names: Sequence[str], *without: Input) -> Score:
        """A forced choice among classes: "unknown" is no answer, and without a prior all are as likely."""
        truth, said = self.forced(names, *without)
        return balanced_accuracy(said, truth)

    def forced(self, names: Sequence[str], *without: Input) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
        """True class and chosen one of every finding whose true change is among `names`."""
        truth = self.changes()
        classes = np.array([ontology.CHANGES.index(name) for name in names])
        kept = np.isin(truth, classes)
        chosen = classes[np.stack(self._changed[_kept(without)])[..., classes].argmax(-1)]
        return truth[kept], chosen[kept]

    def grid(self, counted: Bool[np.ndarray, "N K"]) -> list[Cell]:
        """Every subset of the inputs.

        Args:
            counted: Which studies count for each finding as conspicuous or absent.
        """
        return [self._cell(kept, counted) for kept in SUBSETS]

    def _cell(self, inputs: tuple[Input, ...], counted: Bool[np.ndarray, "N K"]) -> Cell:
        truth, found = self.labels(), np.stack(self._present[inputs])
        gone = [name for name in INPUTS if name not in inputs]
        return Cell(
            tuple(NAMES[name] for name in inputs),
            bootstrap(lambda drawn: macro_f1(found[drawn], truth[drawn]), len(truth), rounds=300),
            bootstrap(lambda drawn: conspicuous_f1(found[drawn], truth[drawn], counted[drawn]), len(truth), rounds=300),
            self.change(CHANGES, *gone),
        )


def _kept(without: Sequence[Input]) -> tuple[Input, ...]:
    """The largest subset without some inputs."""
    gone = {*without, *(("priors",) if "volume" in without else ())}
    return tuple(name for name in INPUTS if name not in gone)


def grid_table(cells: Sequence[Cell]) -> str:
    """The grid as Markdown: a cross for each input that is there."""
    rows: list[tuple[Any, ...]] = [
        (
            *("x" if name in cell.inputs else "" for name in NAMES.values()),
            str(cell.macro_f1),
            str(cell.conspicuous_f1),
            str(cell.change) if "priors" in cell.inputs else "chance",
        )
        for cell in cells
    ]
    head = (*NAMES.values(), "macro-F1, all findings", "conspicuous", "change class, 5 classes")
    return table(head, rows)
