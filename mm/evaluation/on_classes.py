"""Classes told apart by prompt: the input goes to the class whose prompts' embedding is nearest to its own.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP, 2021), section 3.1.4.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mm.batch import Modality
from mm.data.index import targets, value
from mm.data.readers import TableDataset
from mm.data.spec import Split, TableSpec, load_spec
from mm.evaluation.balanced import balanced_accuracy, wilson
from mm.evaluation.bootstrap import Score
from mm.evaluation.embed import check_embeds, check_one, check_source, embed_all, embed_texts
from mm.evaluation.evaluate import Evaluation, Results, batches, table
from mm.evaluation.items import Items
from mm.evaluation.paired import paired_p
from mm.evaluation.plots import Confusion
from mm.evaluation.sound_baselines import mean_log_mels, nearest
from mm.evaluation.split import check_captions, split_facts
from mm.training.checkpoint import Loaded

MOST_CLASSES: Final = 1000
"""Of more, the texts are captions and no labels."""
_MOST_GROUPS: Final = 50
_LABEL: Final = "{label}"


class ClassifyEvaluation(Evaluation):
    """Accuracy over the distinct labels of a data set, in all and by class and group.

    Args:
        spec: A data spec whose target is a label: `fsdd` or a file.
        source: What is classified.
        templates: Prompts with `{label}` in them; of several a class has the mean of their embeddings.
        checkpoint: A checkpoint folder, or the name of a shipped one.
        root: Takes the place of the spec's own root folder.
        held_out: A value of the spec's `group` column, such as the speaker that the checkpoint was trained without:
            its rows are the test split.
        split: Choose on `val`, read `test` once.
        studies: Only the first so many rows of the split; None for all.
        batch_size: Inputs a batch.
    """

    checkpoint: str

    def __init__(
        self,
        *,
        spec: str,
        source: Modality,
        templates: list[str],
        checkpoint: str = "default",
        root: str | None = None,
        held_out: str | None = None,
        split: Split = "test",
        studies: int | None = None,
        batch_size: int = 16,
    ) -> None:
        wrong = [template for template in templates if template.count(_LABEL) != 1]
        if wrong or not templates:
            raise ValueError(f"templates must each have {_LABEL} once, got {wrong[0] if wrong else 'none'!r}")
        for name, number in (("batch_size", batch_size), ("studies", studies)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        given = load_spec(spec, root=root, held_out=held_out)
        check_captions(given, what="classification")
        if not isinstance(given, TableSpec):
            raise ValueError(f"data spec {given.name} has no labels to classify; give a table, such as fsdd")
        check_source(given, source)
        self.spec, self.root, self.checkpoint, self.source = given, root, checkpoint, source
        self.templates, self.studies, self.batch_size = templates, studies, batch_size
        self.split: Split = split

    def check(self) -> None:
        """Whether the checkpoint has both encoders and hasn't seen what is tested, and the data set labels."""
        super().check()
        check_held_out(self.loaded, self.spec)
        check_embeds(self.loaded, self.source)
        self._labels()
        check_one(self.loaded, self.spec, self.source, self.split)

    def run(self) -> Results:
        """Embeds prompts and inputs, and compares."""
        learnt, asked = self._labels()
        classes = tuple(sorted({*learnt, *asked}))
        place = {label: index for index, label in enumerate(classes)}
        truth = np.array([place[label] for label in asked])
        samples = TableDataset(self.spec, self.split, inputs=(self.source,), studies=self.studies)
        rows = range(len(samples))
        inputs = embed_all(
            self.loaded, samples, self.source, rows=rows, batch_size=self.batch_size, what=f"{self.source}s"
        )
        predicted = (inputs @ self._prompts(classes).T).argmax(1).numpy()
        usual = place[Counter(learnt).most_common(1)[0][0]]
        given = {
            "ours": predicted,
            f"baseline: constant, always {classes[0]}": np.zeros_like(truth),
            f"baseline: most frequent in training, {classes[usual]}": np.full_like(truth, usual),
        }
        if self.source == "audio":
            heard = TableDataset(self.spec, "train", inputs=("audio",))
            known, own = (mean_log_mels(of[row] for row in range(len(of))) for of in (heard, samples))
            given["baseline: nearest training sound by mean log-mel"] = nearest(known, [place[x] for x in learnt], own)
        right = {name: of == truth for name, of in given.items()}
        accuracy = {name: _share(of) for name, of in right.items()}
        ours = right["ours"].astype(float)
        p = {name: paired_p(ours, of.astype(float)) for name, of in right.items() if name != "ours"}
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(counts, (truth, predicted), 1)
        balanced = balanced_accuracy(predicted, truth)
        ids = tuple(f"{self.spec.name}-{row['__row__']}" for row in samples.rows)
        groups = self._groups(samples, right["ours"])
        trained = trained_on(self.loaded, self.spec)
        tables = {
            "Accuracy [95 %, Wilson]": table(
                ("who", "accuracy", "p of the difference, paired randomisation"),
                [(name, str(score), f"{p[name]:.4f}" if name in p else "-") for name, score in accuracy.items()],
            ),
            "Each class": _classes(classes, counts),
        }
        if groups:
            assert self.spec.group is not None
            tables[f"By {self.spec.group.column} [95 %, Wilson]"] = table(
                ("group", "accuracy"), [(name, str(score)) for name, score in groups.items()]
            )
        return Results(
            title=f"{len(classes)} classes of {self.spec.name}, "
            + ("supervised by prompt: the labels were trained on" if trained else "zero-shot by prompt"),
            facts={
                "checkpoint": str(self.loaded.identity),
                "prompts": "; ".join(self.templates),
                "labels": "trained on as texts: this is supervised classification, read out by prompt" if trained
                else "no stage of the checkpoint's training has this data set or these labels",
                **split_facts(self.spec, self.split, ids),
            },
            scores={
                "accuracy": {name: asdict(score) for name, score in accuracy.items()},
                "balanced_accuracy": asdict(balanced),
                "p_against_ours": p,
                "supervised": trained,
                "classes": list(classes),
                "confusion": counts.tolist(),
                "by_group": {name: asdict(score) for name, score in groups.items()},
            },
            tables=tables,
            bars=[(name, score.value, score.low, score.high) for name, score in accuracy.items()],
            axis="accuracy (line: Wilson's 95 % interval)",
            items=Items(ids, {"accuracy": ours}),
            confusion=Confusion(classes, counts),
        )  # fmt: skip

    def _labels(self) -> tuple[list[str], list[str]]:
        """Labels of the training split, and of what is tested; no input is read.

        Raises:
            ValueError: The texts are no labels, or there is only one.
        """
        learnt, asked = (
            [targets(row, self.spec) for row in TableDataset(self.spec, split, inputs=(), studies=number).rows]
            for split, number in (("train", None), (self.split, self.studies))
        )
        distinct = {text for own in (*learnt, *asked) for text in own}
        if any(len(own) > 1 for own in (*learnt, *asked)) or not 2 <= len(distinct) <= MOST_CLASSES:
            raise ValueError(f"data spec {self.spec.name}: a target must be one of 2 to {MOST_CLASSES} labels to be "
                             f"classified, got {len(distinct)} distinct texts")  # fmt: skip
        return [own[0] for own in learnt], [own[0] for own in asked]

    def _prompts(self, classes: Sequence[str]) -> Float[Tensor, "K E"]:
        """A unit vector a class: the mean over its templates."""
        texts = [template.replace(_LABEL, label) for label in classes for template in self.templates]
        vectors = torch.cat(
            [embed_texts(self.loaded, [texts[index] for index in part]) for part in batches(len(texts), 64)]
        )
        return F.normalize(vectors.view(len(classes), len(self.templates), -1).mean(1), dim=-1)

    def _groups(self, samples: TableDataset, right: np.ndarray) -> dict[str, Score]:
        """Accuracy by the spec's group (a speaker, a patient), where there are few."""
        if self.spec.group is None:
            return {}
        named = np.array([value(row, self.spec.group.column) for row in samples.rows])
        groups = np.unique(named)
        return {str(name): _share(right[named == name]) for name in groups} if len(groups) <= _MOST_GROUPS else {}


def trained_on(loaded: Loaded, spec: TableSpec) -> bool:
    """Whether a stage of the checkpoint's training had this data set, or one whose labels mean the same words."""
    for stage in loaded.card.stages:
        data = stage.get("data")
        if not isinstance(data, Mapping):
            continue
        target = data.get("target")
        words = target.get("words") if isinstance(target, Mapping) else None
        if data.get("name") == spec.name or (words is not None and words == spec.target.words):
            return True
    return False


def check_held_out(loaded: Loaded, spec: TableSpec) -> None:
    """Whether what is tested was kept out of training.

    Raises:
        ValueError: A stage of the checkpoint's training split this data set another way: it has seen test rows.
    """
    for stage in loaded.card.stages:
        data = stage.get("data")
        if isinstance(data, Mapping) and data.get("name") == spec.name and data.get("held_out") != spec.held_out:
            raise ValueError(f"held_out must be what training of checkpoint {loaded.identity} held out of {spec.name} "
                             f"({data.get('held_out') or 'nothing'}), or it is tested on what it has seen; "
                             f"got {spec.held_out or 'nothing'}")  # fmt: skip


def _share(right: np.ndarray) -> Score:
    return Score(float(right.mean()), *wilson(int(right.sum()), len(right)))


def _classes(classes: Sequence[str], counts: Int[np.ndarray, "K K"]) -> str:
    rows = []
    for index, label in enumerate(classes):
        number, called, hits = int(counts[index].sum()), int(counts[:, index].sum()), int(counts[index, index])
        recall = str(Score(hits / number, *wilson(hits, number))) if number else "-"
        others = np.where(np.arange(len(classes)) == index, 0, counts[index])
        mostly = f"{classes[int(others.argmax())]} ({others.max()})" if others.any() else "-"
        rows.append((label, str(number), recall, f"{hits / called:.3f}" if called else "-", mostly))
    return table(("class", "items", "recall [95 %]", "precision", "most often taken for"), rows)
