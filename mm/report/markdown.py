"""report.md: the text and the findings for a terminal, a note or a pull request."""

from mm.report.schema import NOTICE, Report
from mm.report.words import CHANGES, INPUT_NAMES, SIDES, input_detail, label, name, pick, quality_told, size


def to_markdown(report: Report) -> str:
    """The report in its first language, other languages' text below; the same report gives the same bytes."""
    first = report.languages[0] if report.languages else "en"
    lines = [
        f"# {label('title', first)} {report.study}",
        "",
        f"> **{NOTICE[first]}**",
        *([f">\n> {label('outside', first)}"] if report.model.domain == "outside" else []),
        "",
        f"## {label('report', first)}",
        "",
        *(
            f"{_plain(sentence.text)}{_mark(sentence.finding)}  "
            for sentence in report.sentences
            if sentence.language == first
        ),
        "",
        f"## {label('findings', first)}",
        "",
    ]
    told = [(index, item) for index, item in enumerate(report.findings) if item.present or item.change == "resolved"]
    if told:
        titles = ("finding", "side", "size", "change", "probability", "slice")
        lines += [
            "| # | " + " | ".join(label(title, first) for title in titles) + " |",
            "|" + "---|" * (len(titles) + 1),
            *(
                f"| {index + 1} | {name(item.code, first)} | {pick(SIDES[item.side], first)} | {size(item)} | "
                f"{pick(CHANGES[item.change], first)} | {item.probability:.2f} | "
                f"{'–' if item.slice_index is None else item.slice_index + 1} |"
                for index, item in told
            ),
        ]
    else:
        lines.append(label("none", first))
    absent = [item for item in report.findings if not item.present and item.change != "resolved"]
    for key, items in (
        ("absent", [i for i in absent if i.sources]),
        ("unassessed", [i for i in absent if not i.sources]),
    ):
        if items:
            told_absent = ", ".join(
                name(item.code, first) + (f" ({item.probability:.2f})" if item.sources else "") for item in items
            )
            lines += ["", f"{label(key, first)}: {told_absent}"]
    lines += ["", f"## {label('inputs', first)}", ""]
    lines += [
        f"- {pick(INPUT_NAMES[row.name], first)}: {_plain(input_detail(row, report, first))}" for row in report.inputs
    ]
    if told_quality := quality_told(report, first):
        lines += ["", f"{label('quality', first)}: {_plain(told_quality)}"]
    for language in report.languages[1:]:
        lines += ["", f"## {label('report', language)}", "", _plain(report.text(language))]
    identity = f"{_plain(report.model.name)} ({label(report.model.kind, first)}), SHA-256 {report.model.sha256[:16]}"
    lines += ["", f"{label('model', first)}: {identity}", ""]
    return "\n".join(lines)


def _mark(finding: int | None) -> str:
    return "" if finding is None else f" [{finding + 1}]"


def _plain(text: str) -> str:
    """Header values and generated words can't start markup or a link."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in text.replace("\n", " "))
