"""Volume to report and back on phantom patients, or image (or sound) to text on a table, with a shuffled control."""

from dataclasses import asdict, astuple, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mm.batch import Language, Modality
from mm.data.readers import INPUTS, open_split
from mm.data.spec import PhantomSpec, Split, load_spec
from mm.evaluation.audit_pairs import preference_table, preferences
from mm.evaluation.bootstrap import Score
from mm.evaluation.embed import check_embeds, check_one, check_source, embed_input, embed_texts
from mm.evaluation.evaluate import Evaluation, Results, batches, table, tracked
from mm.evaluation.items import Items
from mm.evaluation.pairs import Pairs, by_image, control, rank_both
from mm.evaluation.ranking import Ranking
from mm.evaluation.retrieval import Retrieval, chance
from mm.evaluation.split import captions_of, check_captions, size_of, split_facts


class RetrievalEvaluation(Evaluation):
    """Recall at 1, 5 and 10, median rank, mAP and nDCG, both ways, duplicate-aware and strict.

    Where an image has several captions, image to text counts the best of them, and text to image asks with every one
    (Karpathy and Fei-Fei, CVPR 2015).

    Args:
        checkpoint: A checkpoint folder, or the name of a shipped one.
        spec: A data spec with texts: `phantom`, `flickr8k`, `medpix2` or a file.
        root: Takes the place of the spec's own root folder.
        source: What is paired with texts; a table has `image` or `audio`.
        split: Choose on `val`, read `test` once.
        studies: Only the first so many; None: all of a table, or as many procedural patients as the spec says.
        seed: Of procedural patients; None: the spec's.
        batch_size: Studies a batch.
        audit: Whether inputs are nearer to their own text than to the same made wrong.
    """

    checkpoint: str

    def __init__(
        self,
        *,
        checkpoint: str = "default",
        spec: str = "phantom",
        root: str | None = None,
        source: Modality = "volume",
        split: Split = "test",
        studies: int | None = None,
        seed: int | None = None,
        batch_size: int = 8,
        audit: bool = False,
    ) -> None:
        if (studies is not None and studies < 2) or batch_size < 1:
            raise ValueError("studies must be at least 2 and batch_size at least 1")
        given = load_spec(spec, root=root)
        if seed is not None:
            if not isinstance(given, PhantomSpec):
                raise ValueError(f"seed is of procedural patients and data spec {given.name} has none; leave it out")
            given = replace(given, **{split: replace(getattr(given, split), seed=seed)})
        self.checkpoint, self.spec, self.root = checkpoint, given, root
        self.source, self.studies, self.seed, self.batch_size = source, studies, seed, batch_size
        self.audit = audit
        self.split: Split = split
        check_captions(self.spec, what="retrieval")
        check_source(self.spec, source)

    def check(self) -> None:
        """Whether the checkpoint has both encoders, and they take what the data set has."""
        super().check()
        check_embeds(self.loaded, self.source)
        check_one(self.loaded, self.spec, self.source, self.split)

    def run(self) -> Results:
        """Embeds inputs and texts, each alone, and ranks."""
        images, texts, captions, ids, languages = self._embedded()
        count, text = len(captions), "report" if isinstance(self.spec, PhantomSpec) else "text"
        forward, back = f"{self.source} -> {text}", f"{text} -> {self.source}"
        loose, strict = Pairs.forgiving(captions), Pairs.strict(captions)
        several = len(texts) > count
        each = np.arange(count)
        rankings: dict[str, tuple[Ranking, np.ndarray, float]] = {}
        for note, pairs in (("", loose), (", strict", strict)):
            to_texts, to_images = rank_both(images, texts, pairs)
            lucky = chance([len(own) for own in pairs.texts], len(texts), 10)
            rankings[forward + note] = to_texts, each, lucky
            lucky = chance([len(own) for own in pairs.images], count, 10)
            rankings[back + note] = to_images, pairs.owner, lucky
        rows = {name: Retrieval.of(ranking.rank, chance_at_10=lucky) for name, (ranking, _, lucky) in rankings.items()}
        recalls = {
            name: {k: by_image((ranking.rank <= k).astype(float), owner) for k in (1, 5, 10)}
            for name, (ranking, owner, _) in rankings.items()
        }
        if several:  # Wilson's interval would take five captions of one image for five images
            rows = {name: replace(row, recall_at_10=recalls[name][10]) for name, row in rows.items()}
        rows = {name: rows[name] for name in (forward, back, f"{forward}, strict", f"{back}, strict")}
        rows["control: shuffled pairs"] = control(images, texts, loose, seed=0)
        scores: dict[str, Any] = {name: asdict(row) for name, row in rows.items()}
        order: dict[str, tuple[Score, Score]] = {}
        for name, (ranking, owner, _) in rankings.items():
            order[name] = by_image(ranking.average_precision, owner), by_image(ranking.ndcg, owner)
            scores[name] |= {"map": asdict(order[name][0]), "ndcg": asdict(order[name][1])}
            scores[name]["by_image"] = {f"recall_at_{k}": asdict(score) for k, score in recalls[name].items()}
        audited: dict[str, str] = {}
        if self.audit:
            found = preferences(images, [own[0] for own in captions], languages, partial(embed_texts, self.loaded))
            scores["audit"] = {name: asdict(item) for name, item in found.items()}
            audited[f"Its own {text}, or the same made wrong"] = preference_table(found)
        return Results(
            title=f"Retrieval over {count} "
            + ("phantom patients" if isinstance(self.spec, PhantomSpec) else f"{self.source}s of {self.spec.name}"),
            facts=self._facts(captions, ids, text),
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
                f"Recall [95 %, {self.source}s resampled]": table(
                    ("direction", "R@1", "R@5", "R@10"),
                    [(name, *(str(score) for score in found.values())) for name, found in recalls.items()],
                ),
                "Order of all items": table(
                    ("direction", "mAP [95 %]", "nDCG [95 %]"),
                    [(name, str(precision), str(gain)) for name, (precision, gain) in order.items()],
                ),
                **audited,
            },
            bars=[
                *((name, *astuple(row.recall_at_10)) for name, row in rows.items()),
                ("baseline: chance", *(rows[forward].chance_at_10,) * 3),
            ],
            axis="R@10",
            items=_items(ids, {name: rankings[f"{name}, strict"] for name in (forward, back)}),
        )

    def _embedded(
        self,
    ) -> tuple[Float[Tensor, "N E"], Float[Tensor, "T E"], list[tuple[str, ...]], list[str], list[Language]]:
        """Inputs, texts, the captions of each input, and the ids and languages of the studies."""
        # A phantom's text tells of the inputs that are asked for.
        inputs = INPUTS if isinstance(self.spec, PhantomSpec) else (self.source,)
        samples = open_split(self.spec, self.split, inputs=inputs, studies=self.studies)
        images, words, captions, ids = [], [], list[tuple[str, ...]](), list[str]()
        languages: list[Language] = []
        for part in tracked(batches(size_of(samples), self.batch_size), what="retrieval"):
            some = [samples[index] for index in part]
            said = [captions_of(samples, index, sample) for index, sample in zip(part, some, strict=True)]
            images.append(embed_input(self.loaded, some, self.source))
            words.append(embed_texts(self.loaded, [text for own in said for text in own]))
            captions += said
            ids += [sample.study for sample in some]
            languages += [sample.language for sample in some]
        return torch.cat(images), torch.cat(words), captions, ids, languages

    def _facts(self, captions: list[tuple[str, ...]], ids: list[str], text: str) -> dict[str, str]:
        facts = {"checkpoint": str(self.loaded.identity)}
        if isinstance(self.spec, PhantomSpec):
            seed = getattr(self.spec, self.split).seed
            held_out = " (held-out paraphrases included)" if self.split == "test" else ""
            facts[f"{self.split} patients"] = f"{len(ids)}, seed {seed}, split {self.split}{held_out}"
        every = [caption for own in captions for caption in own]
        facts[f"distinct {text}s"] = f"{len(set(every))}" + (f" of {len(every)}" if len(every) > len(ids) else "")
        return {**facts, **split_facts(self.spec, self.split, ids)}


def _items(ids: list[str], rankings: dict[str, tuple[Ranking, np.ndarray, float]]) -> Items:
    """Strict hits of each image; of its texts the mean, because the texts of one image are not independent."""
    scores = {}
    for name, (ranking, owner, _) in rankings.items():
        for k in (1, 5, 10):
            hits = np.bincount(owner, weights=(ranking.rank <= k).astype(float))
            scores[f"{name}, R@{k}"] = hits / np.bincount(owner)
    return Items(tuple(ids), scores)
