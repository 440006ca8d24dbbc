"""The tables of a report evaluation, section by section, from what was heard of every patient."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from jaxtyping import Bool

from mm import ontology
from mm.evaluation.balanced import balanced_accuracy
from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.calibration_error import calibration, calibration_table
from mm.evaluation.conspicuous import CUT_OFFS, Conspicuous, counted, largest, macro_table, recall_by_grade, size_table
from mm.evaluation.evaluate import table
from mm.evaluation.heard import Heard
from mm.evaluation.mirror import mirror_consistency, mirror_table
from mm.evaluation.reports import (
    Agreement,
    bleu4,
    copied_facts,
    head_labels,
    macro_f1,
    nodule_places,
    nodule_recall,
    rouge_l,
    text_labels,
)
from mm.evaluation.sizes import change_by_sizes, nodule_size_errors, size_error_table
from mm.evaluation.subsets import CHANGES, STAYING, grid_table
from mm.evaluation.text_scores import audit_sections, text_scores, text_table

Section = tuple[dict[str, Any], dict[str, str]]


def sections(heard: Heard, spacing_mm: tuple[float, float, float], *, audited: bool) -> Section:
    """All scores, and all tables by heading."""
    scores: dict[str, Any] = {}
    tables: dict[str, str] = {}
    parts: tuple[Callable[[], Section], ...] = (
        lambda: _findings(heard),
        lambda: _conspicuous(heard),
        lambda: _nodules(heard, spacing_mm),
        lambda: _one_source(heard),
        lambda: _change(heard),
        lambda: _mirror(heard),
        lambda: _calibration(heard),
        lambda: _grid(heard),
        lambda: _texts(heard),
        lambda: audit_sections(heard.references, heard.texts if audited else None, heard.language),
    )
    for part in parts:
        found, shown = part()
        scores |= found
        tables |= shown
    return scores, tables


def bars(scores: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """What the plot shows."""
    macro = {name: Score(**item) for name, item in scores["macro_f1"].items()}
    clear = {name: Score(**item["conspicuous"]) for name, item in scores["conspicuous"]["macro_f1"].items()}
    rows = [("ours, from the text", macro["text"]), ("ours, from the head", macro["head"])]
    rows += [("ours, conspicuous findings", clear["ours, from the text"])]
    rows += [(f"baseline: {name}", macro[name]) for name in macro if name not in ("text", "head")]
    rows += [("baseline: shallow, conspicuous", clear["baseline: shallow"])]
    return [(name, score.value, score.low, score.high) for name, score in rows]


def _findings(heard: Heard) -> Section:
    truth = heard.answers.labels()
    text, head = text_labels(heard.judged), head_labels(heard.judged)
    macro = {name: _macro(found, truth) for name, found in (("text", text), ("head", head), *heard.rivals.items())}
    each = {
        code: (Agreement.of(text[:, k], truth[:, k]), Agreement.of(head[:, k], truth[:, k]))
        for k, code in enumerate(ontology.CODES)
    }
    shallow = {code: Agreement.of(heard.rivals["shallow"][:, k], truth[:, k]) for k, code in enumerate(ontology.CODES)}
    tables = {
        "Macro-F1 over findings": table(
            ("who", "macro-F1 [95 %]"),
            [("ours, from the text", str(macro["text"])), ("ours, from the head", str(macro["head"]))]
            + [(f"baseline: {name}", str(macro[name])) for name in heard.rivals],
        ),
        "Each finding": table(
            ("finding", "positives", "text P / R / F1", "head F1", "shallow F1"),
            [
                (
                    code,
                    str(text_f1.positives),
                    f"{text_f1.precision:.2f} / {text_f1.recall:.2f} / {text_f1.f1:.2f}",
                    f"{head_f1.f1:.2f}",
                    f"{shallow[code].f1:.2f}",
                )
                for code, (text_f1, head_f1) in each.items()
            ],
        ),
    }
    scores = {
        "macro_f1": {name: asdict(score) for name, score in macro.items()},
        "labeler_on_references_macro_f1": macro_f1(heard.said(heard.references), truth),
        "findings": {code: {"text": asdict(a), "head": asdict(b)} for code, (a, b) in each.items()},
    }
    return scores, tables


def _conspicuous(heard: Heard) -> Section:
    truth, sizes = heard.answers.labels(), largest([item.findings for item in heard.judged])
    kept, text = counted(truth, sizes), text_labels(heard.judged)
    who = {"ours, from the text": text, "ours, from the head": head_labels(heard.judged)}
    who |= {f"baseline: {name}": found for name, found in heard.rivals.items()}
    rows = {name: Conspicuous.of(found, truth, kept) for name, found in who.items()}
    each = {}
    for k, item in enumerate(ontology.FINDINGS):
        if item.measure is not None:
            clear = Agreement.of(text[kept[:, k], k], truth[kept[:, k], k])
            each[item.code] = {
                "conspicuous": asdict(clear) if item.code in CUT_OFFS else None,
                "recall_by_grade": recall_by_grade(text[:, k], sizes[:, k], item.code),
            }
    scores = {"conspicuous": {"macro_f1": {name: asdict(row) for name, row in rows.items()}, "findings": each}}
    return scores, {
        "Conspicuous findings": macro_table(rows),
        "Findings by size (from the text)": size_table(text, truth, sizes),
    }


def _nodules(heard: Heard, spacing_mm: tuple[float, float, float]) -> Section:
    places, recall = nodule_places(heard.judged, spacing_mm), nodule_recall(heard.judged, spacing_mm)
    errors = nodule_size_errors(heard.judged, spacing_mm)
    tables = {
        "Nodules": table(
            ("what", "value"),
            [(f"recall {name}", f"{share:.2f} of {number}") for name, (share, number) in recall.items()]
            + [
                (">= 8 mm: key slice within one, of all", f"{places.key_slice_within_one:.2f} of {places.total}"),
                (">= 8 mm: median centre error of the found", f"{places.median_error_mm:.1f} mm"),
            ],
        ),
        "Size of the nodules found": size_error_table(errors),
    }
    scores = {
        "nodules_8mm": asdict(places),
        "nodule_recall": recall,
        "nodule_size": {name: asdict(item) for name, item in errors.items()},
    }
    return scores, tables


def _one_source(heard: Heard) -> Section:
    bound = heard.answers.bound()
    rows = [(b.fact, b.modality, str(b.with_it), str(b.without), f"{b.chance:.2f}") for b in bound]
    head = ("fact", "modality", "with it", "without", "chance")
    shown = {"Facts that one modality carries (balanced accuracy)": table(head, rows)}
    return {"bound": [asdict(item) for item in bound]}, shown


def _change(heard: Heard) -> Section:
    """The head's change class beside what the sizes in both volumes say."""
    truth = heard.answers.changes()
    scores, rows = {}, []
    for number, names in (("4", STAYING), ("5", CHANGES)):
        kept = np.isin(truth, [ontology.CHANGES.index(name) for name in names])
        by_sizes = change_by_sizes(heard.now, heard.before, resolved="resolved" in names)
        ours, rival = heard.answers.change(names), balanced_accuracy(by_sizes[kept], truth[kept])
        scores[f"{number} classes"] = {"ours": asdict(ours), "by_sizes": asdict(rival), "num": int(kept.sum())}
        rows.append((f"{number} classes", str(int(kept.sum())), str(ours), str(rival), f"{1 / len(names):.2f}"))
    head = ("change", "findings", "ours", "baseline: difference of two predicted sizes", "chance")
    return {"change": scores}, {"Change class (balanced accuracy)": table(head, rows)}


def _mirror(heard: Heard) -> Section:
    pairs = [(a, b) for a, b in zip(heard.texts, heard.mirrored, strict=True) if b is not None]
    if not pairs:
        return {}, {}
    found = mirror_consistency([a for a, _ in pairs], [b for _, b in pairs], heard.language)
    return {"mirror": asdict(found)}, {f"Mirror consistency ({found.studies} studies)": mirror_table(found)}


def _calibration(heard: Heard) -> Section:
    found = calibration(heard.answers.probability(), heard.answers.labels())
    return {"calibration": asdict(found)}, {"Calibration error": calibration_table(found)}


def _grid(heard: Heard) -> Section:
    sizes = largest([item.findings for item in heard.judged])
    cells = heard.answers.grid(counted(heard.answers.labels(), sizes))
    return {"grid": [asdict(cell) for cell in cells]}, {"Every subset of the inputs (from the head)": grid_table(cells)}


_HEADLINE: Final = "Overlap as captions are scored, and collapse (p: of the CIDEr-D difference)"


def _texts(heard: Heard) -> Section:
    truth = heard.answers.labels()
    texts: dict[str, Sequence[str]] = {"ours": heard.texts, **heard.written}
    facts_right, num_facts = copied_facts(heard.judged)
    overlap = {
        name: tuple(score(texts[name], heard.references, heard.language) for score in (bleu4, rouge_l))
        for name in ("ours", "constant normal")
    }  # fmt: skip
    written, _ = text_scores(texts, heard.references, heard.language, training=heard.training)
    read = {name: _macro(heard.said(own), truth) for name, own in {"references": heard.references, **texts}.items()}
    tables = {
        "Text": table(
            ("what", "value"),
            [
                ("numbers and sides equal to the head's", f"{facts_right:.4f} of {num_facts}"),
                ("labeler on the reference reports, macro-F1", f"{read['references'].value:.3f}"),
                *((f"BLEU-4 / ROUGE-L, {name}", f"{both[0]:.3f} / {both[1]:.3f}") for name, both in overlap.items()),
            ],
        ),
        "Findings in the text, beside texts written without a decoder": table(
            ("who", "macro-F1 [95 %]"), [(name, str(score)) for name, score in read.items()]
        ),
        _HEADLINE: text_table(written),
    }  # fmt: skip
    scores = {
        "copied_facts": {"share": facts_right, "num": num_facts},
        "overlap": overlap,
        "text": written,
        "text_macro_f1": {name: asdict(score) for name, score in read.items()},
    }
    return scores, tables


def _macro(found: Bool[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"]) -> Score:
    return bootstrap(lambda drawn: macro_f1(found[drawn], truth[drawn]), len(truth), rounds=500)
