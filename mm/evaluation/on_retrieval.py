"""Volume to report and back on phantom patients, with the shuffled-pairs control."""

from dataclasses import asdict, astuple, replace
from typing import Any

import numpy as np
import torch

import mm
from mm.data.collate import collate
from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.evaluate import Evaluation, Results, batches, table, tracked
from mm.evaluation.ranking import rank_all, text_groups
from mm.evaluation.retrieval import Retrieval, equal_texts, retrieval, shuffled
from mm.phantom.dataset import PhantomDataset
from mm.phantom.table import table_digest


class RetrievalEvaluation(Evaluation):
    """Recall at 1, 5 and 10, median rank, mAP and nDCG, both ways, duplicate-aware and strict.

    Args:
        checkpoint: A checkpoint folder, or the name of a shipped one.
        studies: Test patients; all are candidates.
        seed: Of the test patients.
        batch_size: Studies a batch.
    """

    def __init__(self, *, checkpoint: str = "default", studies: int = 200, seed: int = 3, batch_size: int = 8) -> None:
        if studies < 2 or batch_size < 1:
            raise ValueError("studies must be at least 2 and batch_size at least 1")
        self.checkpoint, self.studies, self.seed, self.batch_size = checkpoint, studies, seed, batch_size

    def run(self) -> Results:
        """Embeds volumes and reports, each alone, and ranks."""
        loaded = mm.load(self.checkpoint)
        kept = loaded.preprocessing
        patients = PhantomDataset(studies=self.studies, seed=self.seed, split="test")
        images, words, texts = [], [], []
        for part in tracked(batches(self.studies, self.batch_size), what="retrieval"):
            samples = [patients[index] for index in part]
            texts += [sample.text for sample in samples]
            batch = collate(samples, loaded.tokenizer, rows=(), max_words=kept.max_words, max_text=kept.max_text)
            assert batch.text is not None
            with torch.inference_mode():
                # The volume is embedded without any other modality in the batch.
                alone = replace(batch, image=None, audio=None, record=None, text=None, targets=None)
                embedded = loaded.model.encode(alone).embeddings.volume
                words.append(loaded.model.embed_text(batch.text))
            if embedded is None:
                raise ValueError(f"checkpoint {self.checkpoint!r} has no volume encoder to retrieve with")
            images.append(embedded)
        volumes, reports = torch.cat(images).float().cpu(), torch.cat(words).float().cpu()
        same = equal_texts(texts)
        rows: dict[str, Retrieval] = {
            "volume -> report": retrieval(volumes, reports, same),
            "report -> volume": retrieval(reports, volumes, same.T),
            "volume -> report, strict": retrieval(volumes, reports),
            "report -> volume, strict": retrieval(reports, volumes),
            "control: shuffled pairs": shuffled(volumes, reports, same, seed=0),
        }
        scores: dict[str, Any] = {name: asdict(row) for name, row in rows.items()}
        groups, each = text_groups(texts), np.arange(len(texts))
        ordered = {
            "volume -> report": rank_all(volumes, reports, groups, groups),
            "report -> volume": rank_all(reports, volumes, groups, groups),
            "volume -> report, strict": rank_all(volumes, reports, each, each),
            "report -> volume, strict": rank_all(reports, volumes, each, each),
        }
        for name, ranking in ordered.items():
            for title, values in (("map", ranking.average_precision), ("ndcg", ranking.ndcg)):
                scores[name][title] = asdict(_mean(values))
        return Results(
            title=f"Retrieval over {self.studies} phantom patients",
            facts={
                "checkpoint": str(loaded.identity),
                "test patients": f"{self.studies}, seed {self.seed}, split test (held-out paraphrases included)",
                "distinct reports": str(len(set(texts))),
                "phantom table": table_digest()[:16],
            },
            scores=scores,
            tables={
                "Recall": table(
                    ("direction", "R@1", "R@5", "R@10 [95 %]", "median rank", "chance R@10"),
                    [
                        (
                            name,
                            f"{row.recall_at_1:.3f}",
                            f"{row.recall_at_5:.3f}",
                            str(row.recall_at_10),
                            f"{row.median_rank:.0f}",
                            f"{row.chance_at_10:.3f}",
                        )
                        for name, row in rows.items()
                    ],
                ),
                "Order of all items": table(
                    ("direction", "mAP [95 %]", "nDCG [95 %]"),
                    [(name, str(_mean(row.average_precision)), str(_mean(row.ndcg))) for name, row in ordered.items()],
                ),
            },
            bars=[
                *((name, *astuple(row.recall_at_10)) for name, row in rows.items()),
                ("baseline: chance", *(rows["volume -> report"].chance_at_10,) * 3),
            ],
            axis="R@10",
        )


def _mean(values: np.ndarray) -> Score:
    return bootstrap(lambda drawn: float(values[drawn].mean()), len(values))
