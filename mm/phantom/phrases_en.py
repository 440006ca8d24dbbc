"""What English report sentences are made of: frames, nouns, grades and how a size is said.

A frame holds slots in braces that are composed here and now (`{a}`, `{the}`, `{size}`) and yields a template
that keeps only placeholders in angle brackets. No sentence names a second finding, negates a present one
(`without change` reads as a negation) or contains a number of its own: a rule labeler must be able to read it.
"""

from typing import Final

from mm.ontology import Change, Grade

FRAMES: Final[dict[Change, tuple[str, ...]]] = {
    "unknown": (
        "there is {a}.",
        "{a} is seen.",
        "the study shows {a}.",
        "{a} is present.",
        "note is made of {a}.",
    ),
    "new": (
        "there is {a new}.",
        "{a new} has appeared.",
        "{a} is new since the prior study.",
        "{a} has developed in the interval.",
        "interval development of {a}.",
    ),
    "larger": (
        "{the} is larger{now}.",
        "{the} has increased{to}.",
        "{a} is larger than before.",
        "there is {a}, increased since the prior study.",
        "interval growth of {the}{to}.",
    ),
    "stable": (
        "{the} is unchanged{at}.",
        "{the} is stable{at}.",
        "there is {a}, similar to the prior study.",
        "{a} remains the same.",
        "{the} persists unchanged{at}.",
    ),
    "smaller": (
        "{the} is smaller{now}.",
        "{the} has decreased{to}.",
        "{a} is smaller than before.",
        "there is {a}, reduced since the prior study.",
        "partial regression of {the}{to}.",
    ),
    "resolved": (
        "{the} has resolved.",
        "{the} is no longer seen.",
        "the previously seen {bare} has disappeared.",
        "interval resolution of {the}.",
        "{the} has cleared completely.",
    ),
}
"""The last frame of each change is held out for the split "test"."""

COMPARISONS: Final = (
    "compared with the study of <days> earlier.",
    "comparison: prior study of <days> ago.",
    "a study made <days> before is available for comparison.",
    "the prior study dates from <days> ago.",
    "reference is made to the study <days> earlier.",
)
NORMALS: Final = (
    "the remaining structures are unremarkable.",
    "otherwise the study is unremarkable.",
    "no other abnormality is seen.",
    "the rest of the study is normal.",
    "nothing else of note.",
)
IMPRESSIONS: Final = (
    "impression: <findings>.",
    "conclusion: <findings>.",
    "in summary: <findings>.",
    "summary: <findings>.",
    "overall: <findings>.",
)

NOUNS: Final[dict[str, tuple[str, ...]]] = {
    "nodule": ("nodule", "pulmonary nodule", "nodular opacity", "rounded opacity"),
    "consolidation": ("consolidation", "airspace opacity", "airspace consolidation", "consolidative opacity"),
    "atelectasis": ("atelectasis", "atelectatic opacity", "subsegmental collapse"),
    "effusion": ("pleural effusion", "effusion", "hydrothorax"),
    "pneumothorax": ("pneumothorax",),
    "cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "emphysema": ("emphysema", "emphysematous change"),
    "rib_fracture": ("rib fracture", "fractured rib"),
    "calcification": ("arterial calcification", "vascular calcification", "calcified plaque"),
    "airflow_obstruction": ("airflow obstruction", "bronchial obstruction"),
    "infection": ("infection", "pneumonia", "infectious process"),
}
"""The first is the canonical name; synonyms that don't fit behind an article in the singular are left out."""

UNCOUNTED: Final = frozenset(
    {
        "consolidation", "airspace consolidation", "atelectasis", "subsegmental collapse", "cardiomegaly",
        "cardiac enlargement", "emphysema", "emphysematous change", "arterial calcification",
        "vascular calcification", "calcified plaque", "airflow obstruction", "bronchial obstruction",
        "infection", "pneumonia",
    }
)  # fmt: skip
"""Nouns that take no indefinite article."""

_EXTENT: Final[dict[Grade, str]] = {"none": "", "small": "small", "moderate": "moderate", "large": "large"}
_SEVERITY: Final[dict[Grade, str]] = {"none": "", "small": "mild", "moderate": "moderate", "large": "severe"}
GRADES: Final[dict[str, dict[Grade, str]]] = {
    "cardiomegaly": _SEVERITY,
    "emphysema": _SEVERITY,
    "calcification": _SEVERITY,
    "rib_fracture": {
        "none": "",
        "small": "slightly displaced",
        "moderate": "moderately displaced",
        "large": "markedly displaced",
    },
}
EXTENT: Final = _EXTENT

SIZES: Final[dict[str, str]] = {
    "nodule": "of <size>",
    "consolidation": "of about <size>",
    "atelectasis": "of about <size>",
    "effusion": "of about <size>",
    "pneumothorax": "taking up <size> of the hemithorax",
    "cardiomegaly": "with a cardiothoracic ratio of <size>",
    "emphysema": "involving <size> of the lung",
    "rib_fracture": "with a step of <size>",
    "calcification": "of <size>",
}
"""How the size is said behind the noun."""

PLACES: Final[dict[str, str]] = {
    "nodule": "in the <side> lung",
    "consolidation": "in the <side> lung",
    "atelectasis": "in the <side> lung",
}
ELSEWHERE: Final = "on the <side>"


def compose(frame: str, *, code: str, noun: str, grade: Grade, sided: bool, leading: bool) -> str:
    """One template.

    Args:
        frame: Of `FRAMES`.
        code: Of the finding.
        noun: Of `NOUNS[code]`.
        grade: "none" where the size is unknown; then no size is mentioned either.
        sided: Whether the side is known.
        leading: The side stands before the noun (`left nodule`) rather than behind (`nodule in the left lung`).
    """
    word = GRADES.get(code, EXTENT)[grade]
    before = "<side>" if sided and leading else ""
    behind = PLACES.get(code, ELSEWHERE) if sided and not leading else ""
    size = SIZES[code] if grade != "none" else ""
    bare = _words(before, noun, behind)
    text = frame.replace("{a new}", _indefinite(_words("new", word, before, noun, size, behind), noun))
    text = text.replace("{a}", _indefinite(_words(word, before, noun, size, behind), noun))
    text = text.replace("{the}", _words("the", word, before, noun, behind)).replace("{bare}", bare)
    for slot, said in (("{now}", ", now <size>"), ("{to}", " to <size>"), ("{at}", " at <size>")):
        text = text.replace(slot, said if size else "")
    return text


def _words(*words: str) -> str:
    return " ".join(word for word in words if word)


def _indefinite(phrase: str, noun: str) -> str:
    """A noun phrase with "a" or "an" where the noun takes one; sides begin with a consonant."""
    if noun in UNCOUNTED:
        return phrase
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"
