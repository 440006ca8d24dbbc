"""Texts of a data set without truth: what is free, what a file of texts scores, and what a labeler reads in them."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mm.data.collate import collate
from mm.data.json_lines import json_lines
from mm.data.readers import TableDataset
from mm.data.spec import Split, TableSpec, load_spec
from mm.decoder.generate import Sampling
from mm.evaluation.bootstrap import Score
from mm.evaluation.chest_labels import Kind
from mm.evaluation.chest_scores import Labelled, chest_scores, chest_tables
from mm.evaluation.embed import check_one, embed_all
from mm.evaluation.evaluate import Evaluation, Results, batches, tracked
from mm.evaluation.items import Items
from mm.evaluation.split import check_captions, split_facts
from mm.evaluation.text_baselines import likest_text, most_frequent_text, random_texts
from mm.evaluation.text_scores import audit_sections, text_scores, text_table


class TextEvaluation(Evaluation):
    """Overlap, finding F1 and collapse of free baselines, and of texts in a file where one is given.

    Args:
        spec: A data spec with reports or captions: `iu_xray`, `medpix2` or a file.
        checkpoint: Its decoder, where it has one, describes each image. Its image embedding finds the nearest training
            image, whose text is the baseline; None: no images.
        texts: JSON lines `{"study": "iu_xray-17", "text": "..."}` of any model, one for each study of the split: a
            study is the data set's name and the row of its index from 0. None: the checkpoint's own, if it writes.
        labeler: Which findings are read in the texts, of chest X-rays or chest CT; None: no findings.
        root: Takes the place of the spec's own root folder.
        split: Choose on `val`, read `test` once.
        studies: Only the first so many studies of the split; None for all.
        batch_size: Images a batch.
        audit: Which scores notice it when the references, and the texts of the file, are made wrong.
    """

    def __init__(
        self,
        *,
        spec: str,
        checkpoint: str | None = None,
        texts: str | None = None,
        labeler: Kind | None = None,
        root: str | None = None,
        split: Split = "test",
        studies: int | None = None,
        batch_size: int = 16,
        audit: bool = False,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("studies", studies)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        given = load_spec(spec, root=root)
        check_captions(given, what="scores of texts")
        if not isinstance(given, TableSpec):
            raise ValueError(f"data spec {given.name} has exact truth; eval_report scores its reports")
        if labeler is not None and given.language != "en":
            raise ValueError(f"labeler {labeler!r} reads English, data spec {given.name} is in {given.language!r}")
        if checkpoint is not None and given.image is None:
            raise ValueError(f"checkpoint finds like images, and data spec {given.name} has none; leave it out")
        self.spec, self.root, self.checkpoint, self.texts = given, root, checkpoint, texts
        self.labeler, self.studies, self.batch_size = labeler, studies, batch_size
        self.split: Split = split
        self.audit = audit

    def check(self) -> None:
        """Whether each study has one text, the file has one for each, and the checkpoint sees images."""
        super().check()
        self._known("train"), self._known(self.split)
        self._written()
        if self.checkpoint is not None and self.loaded.model.image is None:
            raise ValueError(f"checkpoint {self.loaded.identity} has no image encoder to find like images with")
        if self.checkpoint is not None:
            check_one(self.loaded, self.spec, "image", self.split)

    def run(self) -> Results:
        """Scores every run against the references."""
        references, training = self._known(self.split), self._known("train")
        known, learnt = list(references.values()), list(training.values())
        language = self.spec.language
        number = len(known)
        runs: dict[str, Sequence[str]] = {}
        written = self._written()
        if written is None and self._writes():
            written = self._described()
        if written is not None:
            runs["ours"] = written
        if self.checkpoint is not None:
            runs["baseline: text of the nearest training image"] = [learnt[row] for row in self._nearest()]
        runs["baseline: constant, the training text likest to all"] = [likest_text(learnt, language)] * number
        runs["baseline: most frequent training text"] = [most_frequent_text(learnt)] * number
        runs["baseline: a random training text"] = random_texts(learnt, number)
        found, each = text_scores(runs, known, language, training=learnt)
        scores: dict[str, Any] = {"text": found}
        tables = {"Overlap, and collapse (p: CIDEr-D against the first run, paired randomisation)": text_table(found)}
        bars = [(name, Score(**found[name]["cider_d"])) for name in runs]
        if self.labeler is not None:
            truth = Labelled.of(known, self.labeler)
            judged = {
                name: chest_scores(Labelled.of(texts, self.labeler), truth, self.labeler)
                for name, texts in runs.items()
            }
            scores["findings"] = {name: asdict(row) for name, row in judged.items()}
            tables |= chest_tables(judged, self.labeler)
            bars = [(name, row.macro) for name, row in judged.items()]
        if self.audit:
            found_wrong, shown = audit_sections(known, written, language)
            scores |= found_wrong
            tables |= shown
        ids = tuple(references)
        facts = {
            "checkpoint": "none" if self.checkpoint is None else str(self.loaded.identity),
            "texts": self.texts or "none but the baselines'",
            "training texts": f"{len(learnt)}, {len(set(learnt))} distinct",
            **split_facts(self.spec, self.split, ids),
        }
        return Results(
            title=f"Texts of {self.spec.name}",
            facts=facts,
            scores=scores,
            tables=tables,
            bars=[(name, score.value, score.low, score.high) for name, score in bars],
            axis="CIDEr-D" if self.labeler is None else "macro-F1 over findings, positives only (line: 95 % interval)",
            items=Items(ids, {name: each[name] for name in ("cider_d", "rouge_l_coco", "meteor")}),
        )

    def _known(self, split: Split) -> dict[str, str]:
        """The text of each study.

        Raises:
            ValueError: A study has several texts.
        """
        samples = TableDataset(self.spec, split, inputs=(), studies=None if split == "train" else self.studies)
        texts = [samples.texts(index) for index in range(len(samples))]
        if any(len(own) > 1 for own in texts):
            raise ValueError(f"data spec {self.spec.name} has several captions an image; texts are scored against one")
        return {f"{self.spec.name}-{row['__row__']}": own[0] for row, own in zip(samples.rows, texts, strict=True)}

    def _written(self) -> list[str] | None:
        """The texts of the file in the order of the split.

        Raises:
            ValueError: The file is missing, broken, or lacks a study.
        """
        if self.texts is None:
            return None
        path = Path(self.texts)
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"texts: {str(path)!r} can't be read as UTF-8 text") from error
        given: dict[str, str] = {}
        for line, row in json_lines(content, where=path.name):
            study, text = row.get("study"), row.get("text")
            if not isinstance(study, str) or not isinstance(text, str) or study in given:
                raise ValueError(f"texts: {path.name} line {line}: a study, once, and its text are needed")
            given[study] = text
        asked = self._known(self.split)
        missing = [study for study in asked if study not in given]
        if missing:
            raise ValueError(f"texts: {path.name} lacks {len(missing)} of {len(asked)} studies, such as {missing[0]}")
        return [given[study] for study in asked]

    def _writes(self) -> bool:
        return self.checkpoint is not None and self.loaded.model.decoder is not None

    def _described(self) -> list[str]:
        """What the decoder writes about each image; it gets nothing else of a study."""
        samples = TableDataset(self.spec, self.split, inputs=("image",), studies=self.studies)
        kept, found = self.loaded.preprocessing, list[str]()
        for part in tracked(batches(len(samples), self.batch_size), what="captions"):
            blind = [replace(samples[index], text="") for index in part]
            batch = collate(blind, self.loaded.tokenizer, rows=("caption",), max_text=kept.max_text)
            with torch.inference_mode():
                written = self.loaded.model.answer(batch, sampling=Sampling(max_new_tokens=kept.max_text))
            found += [self.loaded.tokenizer.decode(ids) for ids in written.rows()]
        return found

    def _nearest(self) -> list[int]:
        """For each study the training row with the nearest image."""
        vectors = []
        for split in (self.split, "train"):
            samples = TableDataset(
                self.spec, split, inputs=("image",), studies=None if split == "train" else self.studies
            )
            rows = range(len(samples))
            vectors.append(
                embed_all(self.loaded, samples, "image", rows=rows, batch_size=self.batch_size, what=f"{split} images")
            )
        nearest: list[int] = (vectors[0] @ vectors[1].T).argmax(1).tolist()
        return nearest
