"""Left and right in words, English and Chinese: which sides a text names, and the same text of the mirrored picture."""

import re
from typing import Final

# Words that only look like a side; they are the same in a mirror.
_NEITHER: Final = re.compile(
    r"\ball right\b|\bright (?:now|away|after|before|next to)\b|\br/o\b"
    r"|\b(?:dextro(?:se|methorphan|amphetamine)|dextran|levo(?:thyroxine|floxacin|dopa|cetirizine|norgestrel|"
    r"bupivacaine|carnitine|milnacipran|phed))\w*"
    r"|左右|左氧氟沙星|左旋多巴|左(?:旋)?甲状腺素|左西孟旦|左卡尼汀|左乙拉西坦|右美沙芬|右旋糖酐|右美托咪定",
    re.IGNORECASE,
)
# What a mirror would make untrue: it lies on one side in nearly everybody, or the word may be no side at all.
_ONE_SIDED: Final = re.compile(
    r"\bmiddle lobes?\b|\brml\b|\blingul\w*"
    r"|\b(?:left|right)[ -](?:sided )?(?:heart|cardiac|ventric\w*|atri\w*|coronary|main(?:stem)?)\b"
    r"|\b[lr](?:v|a|vh|ad|ca)\b"
    r"|\b(?:liver|hepat\w*|spleen|splen\w*|gallbladder|biliary|cholecyst\w*|append\w*|ca?ecum|stomach|gastric|pancrea\w*"
    r"|aort\w*|azygos|vena cava|[si]vc|sigmoid|ascending|descending|cardiac apex|situs|dextrocardia|levocardia)\b"
    r"|\bleft (?:in|untreated|alone|over|behind|off|out|the|as|with|for|to|at|against medical)\b|\bhas left\b"
    r"|\bright[ -]angled?\b|\bo['’]?clock\b|\b(?:counter|anti)?-?clockwise\b|\b(?:od|os)\b"
    r"|\b\d+(?:\.\d+)? ?l\b|\b[lr] \d"
    r"|\b(?:dextro|levo)(?!scoli|convex|curv|rotat|position|deviat)\w*"
    r"|中叶|舌[段叶]|[左右](?:室|心|房|冠|位心|旋心|主支气管)|镜面人|内脏反位|转位"
    r"|肝|脾(?!气)|胆|胃|胰|阑尾|盲肠|结肠|主动脉|奇静脉|腔静脉|点钟|[顺逆]时针",
    re.IGNORECASE,
)
_PAIRS: Final = (
    ("left", "right"),
    ("lt", "rt"),
    ("lul", "rul"),
    ("lll", "rll"),
    ("luq", "ruq"),
    ("llq", "rlq"),
    ("dextro", "levo"),
    ("左", "右"),
)
_OTHER: Final = {word: other for pair in _PAIRS for word, other in (pair, pair[::-1])}
# A letter alone is a side only in capitals: "L", "(R)", "R-sided"; behind an L may come a vertebra's number.
_SIDE: Final = re.compile(
    r"(?<![A-Za-z])(?:left|right)(?=s?(?![A-Za-z])|sided|wards?(?![A-Za-z])|most)"
    r"|\b(?:lt|rt|lul|rul|lll|rll|luq|ruq|llq|rlq)\b|\b(?:dextro|levo)(?=[a-z])|左|右|(?-i:\b[LR]\b(?!/[A-Z]))",
    re.IGNORECASE,
)
_LETTERS: Final = {"L": "R", "R": "L"}
_LEFT: Final = frozenset({"left", "lt", "lul", "lll", "luq", "llq", "l", "左"})
_RIGHT: Final = frozenset({"right", "rt", "rul", "rll", "ruq", "rlq", "r", "右"})
_BOTH: Final = re.compile(r"\bbilateral\w*|\bboth\b|双侧|两侧|左右|双肺|两肺", re.IGNORECASE)


def mirrored(text: str) -> str | None:
    """The text that says of the mirrored picture what `text` says of the picture; twice gives `text` again.

    Returns:
        The text with its sides exchanged, or None where that can't be said truly: the middle lobe is on the right
        only and the lingula on the left only, unpaired organs would lie on the wrong side, and some words may be
        a side or none ("left in place").
    """
    rest = _NEITHER.sub("", text)
    if _ONE_SIDED.search(rest):
        return None
    parts, start = [], 0
    for kept in _NEITHER.finditer(text):
        parts += [_SIDE.sub(_exchange, text[start : kept.start()]), kept[0]]
        start = kept.end()
    return "".join([*parts, _SIDE.sub(_exchange, text[start:])])


def sides_of(text: str) -> frozenset[str]:
    """The sides that a text names: of "left" and "right" none, one or both ("bilateral" is both)."""
    rest = _NEITHER.sub(lambda found: "左右" if found[0] == "左右" else " ", text)
    said = {found[0].lower() for found in _SIDE.finditer(rest)}
    both = _BOTH.search(rest) is not None
    return frozenset([*(["left"] if both or said & _LEFT else []), *(["right"] if both or said & _RIGHT else [])])


def sideless(text: str) -> str:
    """The text in lower case with every side replaced by one sign: two that agree here differ in sides alone."""
    return " ".join(_SIDE.sub("*", text).lower().split())


def _exchange(found: re.Match[str]) -> str:
    word = found[0]
    if word in _LETTERS:
        return _LETTERS[word]
    other = _OTHER[word.lower()]
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
