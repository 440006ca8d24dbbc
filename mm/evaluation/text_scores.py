"""Every score of a set of reports against one reference each, in the shape results.json keeps."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float

from mm.batch import Language
from mm.evaluation.audits import Audit, audit
from mm.evaluation.bleu import bleu_counts, bleu_of
from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.cider import cider_d
from mm.evaluation.collapse import collapse
from mm.evaluation.evaluate import table
from mm.evaluation.meteor import meteor
from mm.evaluation.paired import paired_p
from mm.evaluation.rouge import rouge_l_coco, rouge_l_f1
from mm.evaluation.tokens import rouge_words, words


def text_scores(
    runs: dict[str, Sequence[str]],
    references: Sequence[str],
    language: Language,
    *,
    training: Sequence[str] = (),
    rounds: int = 500,
) -> tuple[dict[str, Any], dict[str, Float[np.ndarray, " N"]]]:
    """BLEU-1 to 4, ROUGE-L, METEOR (exact, stem) and CIDEr-D with bootstrap intervals, and how far the texts collapse.

    Args:
        runs: Texts by who wrote them; the first is compared with each of the others by paired randomisation.
        references: One a text.
        language: Of all.
        training: Texts that copies are looked for in.
        rounds: Of the bootstrap.

    Returns:
        For each run: `bleu` (four), `rouge_l_coco`, `rouge_l_f1` (English), `meteor`, `cider_d`, `collapse` and,
        except for the first, `p` of its difference from the first in CIDEr-D; `references`: their `collapse`. And
        the scores of the first run's single texts (BLEU is of a whole corpus and has none).
    """
    known = [words(text, language) for text in references]
    result: dict[str, Any] = {"references": {"collapse": asdict(collapse(references, language, training=training))}}
    first: dict[str, np.ndarray] = {}
    for name, texts in runs.items():
        given = [words(text, language) for text in texts]
        counts = bleu_counts(given, [[item] for item in known])
        each = {"rouge_l_coco": rouge_l_coco(given, [[item] for item in known])}
        if language == "en":
            each["rouge_l_f1"] = rouge_l_f1([rouge_words(t) for t in texts], [rouge_words(t) for t in references])
        each["meteor"] = meteor(given, [[item] for item in known], language)
        each["cider_d"] = cider_d(given, [[item] for item in known])
        row: dict[str, Any] = {"bleu": [asdict(_bleu(counts, order, rounds)) for order in range(4)]}
        row |= {title: asdict(_mean(values, rounds)) for title, values in each.items()}
        row["collapse"] = asdict(collapse(texts, language, training=training))
        if first:
            row["p"] = paired_p(first["cider_d"], each["cider_d"])
        first = first or each
        result[name] = row
    return result, first


def _bleu(counts: np.ndarray, order: int, rounds: int) -> Score:
    return bootstrap(lambda drawn: float(bleu_of(counts[drawn])[order]), len(counts), rounds=rounds)


def _mean(values: np.ndarray, rounds: int) -> Score:
    return bootstrap(lambda drawn: float(values[drawn].mean()), len(values), rounds=rounds)


def text_table(scores: dict[str, Any]) -> str:
    """What `text_scores` found, as Markdown."""
    rows = []
    for name, row in scores.items():
        own = row["collapse"]
        collapsed = (f"{own['distinct']:.3f}", f"{own['self_bleu']:.3f}", f"{own['copied']:.3f}")
        if "bleu" not in row:
            rows.append((name, "-", "-", "-", "-", "-", *collapsed))
            continue
        bleu = " / ".join(f"{item['value']:.3f}" for item in row["bleu"])
        rouge, meteored, cider = (str(Score(**row[key])) for key in ("rouge_l_coco", "meteor", "cider_d"))
        rows.append((name, bleu, rouge, meteored, cider, f"{row['p']:.4f}" if "p" in row else "-", *collapsed))
    head = (
        "who",
        "BLEU-1/2/3/4",
        "ROUGE-L (beta 1.2)",
        "METEOR (exact, stem)",
        "CIDEr-D",
        "p",
        "distinct",
        "self-BLEU",
        "copied",
    )
    return table(head, rows)


def audit_sections(
    references: Sequence[str], texts: Sequence[str] | None, language: Language
) -> tuple[dict[str, Any], dict[str, str]]:
    """Scores and tables of the references made wrong, and of the texts of a model where there are any."""
    scores: dict[str, Any] = {}
    tables: dict[str, str] = {}
    for key, name, own in (("audit_of_references", "reference", references), ("audit", "model's", texts)):
        audited = {} if own is None else audit(own, references, language)
        if audited:
            scores[key] = {title: {what: asdict(one) for what, one in row.items()} for title, row in audited.items()}
            heading = f"Share of the score lost when the {name} texts are made wrong (bold: noticed)"
            tables[heading] = audit_table(audited)
    return scores, tables


def audit_table(audited: dict[str, dict[str, Audit]]) -> str:
    """What `mm.evaluation.audits.audit` found, as Markdown: the share of each score lost, in bold where it noticed."""
    measures = list(next(iter(audited.values()), {}))
    rows = [
        (name, str(next(iter(row.values())).changed), *(_lost(row[title]) for title in measures))
        for name, row in audited.items()
    ]
    return table(("alteration", "texts", *measures), rows)


def _lost(found: Audit) -> str:
    share = f"{100 * found.lost.value:.0f} %"
    return f"**{share}**" if found.noticed else share
