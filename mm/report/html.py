"""report.html: one file without scripts or outside addresses, in English and Chinese, for screen and paper."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from html import escape
from importlib.resources import files
from typing import Final, Literal, TypeAlias

from mm.batch import Language
from mm.report import figure
from mm.report.schema import NOTICE, KeyImage, Report, ReportedFinding, ReportedSentence
from mm.report.words import (
    CHANGES,
    INPUT_NAMES,
    LABELS,
    SIDES,
    WINDOWS,
    input_detail,
    label,
    name,
    pick,
    quality_told,
    size,
)

Said: TypeAlias = Callable[[Language], str]
LANGUAGE_NAMES: Final[dict[Language, str]] = {"en": "English", "zh": "中文"}
ARROWS: Final = {"new": "✚", "larger": "▲", "stable": "＝", "smaller": "▼", "resolved": "✓"}
TONE: Final = {"new": "worse", "larger": "worse", "smaller": "better", "resolved": "better"}
POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def to_html(report: Report) -> str:
    """The page of a report; the same report gives the same bytes."""
    languages: tuple[Language, ...] = report.languages or ("en",)
    page = _Page(report, languages)
    checked = [" checked" if language == languages[0] else "" for language in languages]
    switches = "".join(
        f'<input class="lang" type="radio" name="lang" id="lang-{language}" aria-label="{LANGUAGE_NAMES[language]}"'
        f"{on}>"
        for language, on in zip(languages, checked, strict=True)
    )
    return (
        f'<!DOCTYPE html>\n<html lang="{languages[0]}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(label('title', languages[0]))} {escape(report.study)}</title>\n"
        f"<style>\n{_style()}</style>\n</head>\n<body>\n{switches}\n"
        f'<div class="page">\n{page.body()}\n</div>\n</body>\n</html>\n'
    )


@cache
def _style() -> str:
    return files("mm.report").joinpath("report.css").read_text(encoding="utf-8")


class _Page:
    """The parts of one page; every text is said in each language and escaped where it comes in."""

    def __init__(self, report: Report, languages: tuple[Language, ...]) -> None:
        self.report = report
        self.languages = languages
        self.told = [i for i, item in enumerate(report.findings) if item.present or item.change == "resolved"]
        self.number = {index: place for place, index in enumerate(self.told, start=1)}
        self.pictured = {image.finding for image in report.evidence}

    def body(self) -> str:
        """Everything inside the page."""
        return "\n".join(
            filter(
                None,
                (
                    self.notices(),
                    self.header(),
                    self.impression(),
                    f'<div class="columns">{self.text()}{self.inputs()}</div>',
                    self.findings(),
                    self.gallery(),
                    self.footer(),
                ),
            )
        )

    # ------------------------------------------------------------------------------------------- language

    def say(self, said: Said, tag: Literal["span", "p", "div"] = "span") -> str:
        """The same in every language of the page; the style sheet shows one."""
        return "".join(f'<{tag} lang="{language}">{escape(said(language))}</{tag}>' for language in self.languages)

    def label(self, key: str) -> str:
        """A label in every language."""
        return self.say(lambda language: label(key, language))

    def pair(self, words: tuple[str, str]) -> str:
        """(English, Chinese)."""
        return words[0] if words[0] == words[1] else self.say(lambda language: pick(words, language))

    # ---------------------------------------------------------------------------------------------- parts

    def notices(self) -> str:
        """That this is research software, and whether the model knows such patients."""
        model = self.report.model
        told = f'<div class="notice" role="note">{self.say(lambda language: NOTICE[language])}</div>'
        if model.kind == "demonstration" or model.domain == "outside":
            told += f'<div class="domain {model.domain}" role="note">{self.label(model.domain)}</div>'
        return told

    def tag(self) -> str:
        """On what a reader may take out of the page: that the model doesn't know such patients."""
        return f'<span class="tag">{self.label("tag")}</span>' if self.report.model.domain == "outside" else ""

    def header(self) -> str:
        """Title, study key, and the switch of languages."""
        switch = "".join(f'<label for="lang-{item}">{LANGUAGE_NAMES[item]}</label>' for item in self.languages)
        switch = f'<div class="switch">{switch}</div>' if len(self.languages) > 1 else ""
        return (
            f'<header class="top"><div><h1>{self.label("title")}</h1><div class="key">{self.label("study")} '
            f"<code>{escape(self.report.study)}</code></div></div>{switch}</header>"
        )

    def impression(self) -> str:
        """The conclusion first, as a reader looks for it."""
        sentences = [item for item in self.report.sentences if item.kind == "impression"]
        if not sentences:
            return ""
        told = "".join(f'<p lang="{item.language}">{escape(_without_label(item.text))}</p>' for item in sentences)
        return f'<section class="impression"><h2>{self.label("impression")}{self.tag()}</h2>{told}</section>'

    def text(self) -> str:
        """The sentences in the order they were written, each with the number of its finding."""
        rows = [
            self._sentence(index, item) for index, item in enumerate(self.report.sentences) if item.kind != "impression"
        ]
        return f'<section class="text"><h2>{self.label("report")}</h2>{"".join(rows)}</section>'

    def _sentence(self, index: int, item: ReportedSentence) -> str:
        words = f'<span class="words">{escape(item.text)}</span>'
        if item.finding is None or item.finding not in self.number:
            return f'<p class="plain" lang="{item.language}" id="s{index}">{words}</p>'
        title = escape(label("to_table", item.language))
        badge = f'<a class="badge" href="#f{item.finding}" title="{title}">{self.number[item.finding]}</a>'
        return f'<p class="linked" lang="{item.language}" id="s{index}">{badge}{words}</p>'

    def inputs(self) -> str:
        """What the model read, and what it had to do without."""
        rows = []
        for row in self.report.inputs:
            sign, style = (
                ('<span class="yes">✓</span>', "") if row.used else ('<span class="no">–</span>', ' class="gone"')
            )
            detail = self.say(partial(input_detail, row, self.report))
            rows.append(f"<div{style}>{sign}<dt>{self.pair(INPUT_NAMES[row.name])}</dt><dd>{detail}</dd></div>")
        return f"<section><h2>{self.label('inputs')}</h2><dl>{''.join(rows)}</dl>{self._quality()}</section>"

    def _quality(self) -> str:
        """One line, where something is flagged."""
        if not quality_told(self.report, self.languages[0]):
            return ""
        told = self.say(partial(quality_told, self.report))
        return f'<p class="small"><strong>{self.label("quality")}</strong> {told}</p>'

    def findings(self) -> str:
        """The table of what is there, and below it what is not."""
        keys = ("finding", "side", "size", "change", "probability", "evidence")
        heads = "".join(f"<th{' class=number' if key == 'size' else ''}>{self.label(key)}</th>" for key in keys)
        rows = "".join(self._row(index, self.report.findings[index]) for index in self.told)
        head = f"<thead><tr><th>#</th>{heads}<th class=jump>{self.label('sentence')}</th></tr></thead>"
        table = f'<div class="wide"><table>{head}<tbody>{rows}</tbody></table></div>'
        content = table if self.told else f"<p>{self.label('none')}</p>"
        absent = [item for item in self.report.findings if not item.present and item.change != "resolved"]
        content += self._absent("absent", [item for item in absent if item.sources], shown=True)
        content += self._absent("unassessed", [item for item in absent if not item.sources], shown=False)
        content += f'<p class="small">{self.label("threshold")}</p>'
        return f"<section><h2>{self.label('findings')}{self.tag()}</h2>{content}</section>"

    def _row(self, index: int, item: ReportedFinding) -> str:
        change = self.pair(CHANGES[item.change])
        if item.change in ARROWS:
            change = f'<span class="{TONE.get(item.change, "")}">{ARROWS[item.change]} {change}</span>'
        percent = 100 * item.probability
        bar = f'<div class="bar"><i><b style="width:{percent:.0f}%"></b></i>{item.probability:.2f}</div>'
        told = [place for place, sentence in enumerate(self.report.sentences) if sentence.finding == index]
        jumps = "".join(
            f'<a lang="{self.report.sentences[place].language}" href="#s{place}"'
            f' title="{escape(label("to_text", self.report.sentences[place].language))}">¶</a>'
            for place in told
        )
        return (
            f'<tr id="f{index}"><td><span class="badge">{self.number[index]}</span></td>'
            f'<td class="name">{self.say(partial(name, item.code))}</td>'
            f'<td>{self.pair(SIDES[item.side])}</td><td class="number">{escape(size(item))}</td>'
            f'<td>{change}</td><td>{bar}</td><td>{self._where(index, item)}</td><td class="jump">{jumps}</td></tr>'
        )

    def _where(self, index: int, item: ReportedFinding) -> str:
        """Where a reader can check it: slice, radiograph, or the sources that show it."""
        if item.slice_index is not None:
            stack = next((series.num_slices for series in self.report.series if series.role == "volume"), 0)
            said = self.say(lambda language: _slice(item.slice_index or 0, stack, language))
        elif item.image_pixel is not None:
            said = self.label("radiograph")
        else:
            said = ", ".join(self.pair(INPUT_NAMES[source]) for source in item.sources if source in INPUT_NAMES) or "–"
        return f'<a href="#k{index}">{said}</a>' if index in self.pictured else said

    def _absent(self, key: str, items: Sequence[ReportedFinding], *, shown: bool) -> str:
        if not items:
            return ""
        chips = "".join(
            f'<span class="chip">{self.say(partial(name, item.code))}'
            + (f" <em>{item.probability:.2f}</em>" if shown else "")
            + "</span>"
            for item in items
        )
        return f'<div class="absent{"" if shown else " un"}"><span>{self.label(key)}:</span> {chips}</div>'

    def gallery(self) -> str:
        """The key images; a picture that several findings share is stored once."""
        drawn: dict[bytes, str] = {}
        seen: set[int] = set()
        figures = []
        for image in self.report.evidence:
            anchor = "" if image.finding in seen else f' id="k{image.finding}"'
            seen.add(image.finding)
            figures.append(self._figure(image, anchor, drawn))
        if not figures:
            return ""
        return f'<section><h2>{self.label("key_images")}</h2><div class="gallery">{"".join(figures)}</div></section>'

    def _figure(self, image: KeyImage, anchor: str, drawn: dict[bytes, str]) -> str:
        item = self.report.findings[image.finding]
        content = image.pixels.tobytes() + repr(image.pixels.shape).encode()
        if content in drawn:
            picture = f'<use href="#{drawn[content]}"/>'
        else:
            drawn[content] = f"p{len(drawn)}"
            picture = figure.picture_of(image, drawn[content])
        title = f"{name(item.code, 'en')}, {item.side}" if item.side != "none" else name(item.code, "en")
        whole = figure.overview(image, picture, title=escape(title))
        close = figure.detail(
            image, f'<use href="#{drawn[content]}"/>', title=escape(f"{title}, {label('detail', 'en')}")
        )
        number = self.number.get(image.finding, 0)
        what = self.say(lambda language: _headline(item, language))
        how = self.say(lambda language: _technique(image, item, language))
        return (
            f'<figure{anchor}><div class="panels{"" if close else " single"}">{whole}{close}</div>'
            f'<figcaption><a class="badge" href="#f{image.finding}">{number}</a>'
            f'<div><div class="what">{what}</div><div class="how">{how}</div></div></figcaption></figure>'
        )

    def footer(self) -> str:
        """The model's identity."""
        model = self.report.model
        return (
            f"<footer>{self.label('model')}: <strong>{escape(model.name)}</strong> ({self.label(model.kind)}) · "
            f"SHA-256 <code>{escape(model.sha256)}</code></footer>"
        )


def _headline(item: ReportedFinding, language: Language) -> str:
    side = "" if item.side == "none" else pick(SIDES[item.side], language)
    if language == "zh":
        told = [f"{side}{name(item.code, language)}"]
    else:
        kind = name(item.code, language)
        told = [f"{side.capitalize()} {kind[:1].lower()}{kind[1:]}" if side else kind]
    if item.size is not None:
        told.append(size(item))
    if item.change in ARROWS:
        told.append(pick(CHANGES[item.change], language))
    return ("，" if language == "zh" else ", ").join(told)


def _technique(image: KeyImage, item: ReportedFinding, language: Language) -> str:
    told = []
    if image.place is None:
        told.append(label("radiograph", language))
    else:
        told.append(_slice(image.place[0] - 1, image.place[1], language))
    if image.level is not None:
        gap = "" if language == "zh" else " "
        window = pick(WINDOWS.get(image.window, (image.window, image.window)), language)
        told.append(f"{window}{gap}{label('window', language)} C {_number(image.level[0])} W {image.level[1]}")
    if image.place is not None and item.center_mm is not None:
        told.append("LPS " + ", ".join(map(_number, item.center_mm)) + " mm")
    return " · ".join(told)


def _number(value: float | int) -> str:
    return f"{value:.0f}".replace("-", "−")


def _slice(index: int, count: int, language: Language) -> str:
    if language == "zh":
        return f"第 {index + 1}/{count} 层"
    return f"slice {index + 1} of {count}"


def _without_label(text: str) -> str:
    """The heading says "Impression" already."""
    for head in ("Impression:", "IMPRESSION:", "印象：", "印象:"):
        if text.startswith(head):
            rest = text[len(head) :].strip()
            return rest[:1].upper() + rest[1:]
    return text


assert set(TONE) <= set(ARROWS) <= set(CHANGES)
assert {"demonstration", "trained", "inside", "outside"} <= set(LABELS)
