"""How the open models split a text before their merges: what is known of it, and that it takes linear time.

A foreign regular expression could take forever on a text that was made for it. So only those of the known families are
run, and such as are too plain to be tried in two ways.
"""

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import tokenizers

LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN: Final = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK_V3: Final = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN: Final = {
    **{pattern: pattern for pattern in (LLAMA3, QWEN, DEEPSEEK_V3)},
    # DeepSeek-V2. As it stands it takes quadratic time in a run of spaces; the same matches start where a run does.
    r"\s+$": r"(?<!\s)\s+$",
}
"""Regular expressions as they stand in files, ends of lines written out, and what is run in their place."""
PLAIN: Final = re.compile(r"(\\s\?| \?)?(\[\^?([^\[\]\\&]|\\.)+\]|\\p\{[A-Z][a-z]?\})(\+|\{1,3\})?", re.DOTALL)
"""Perhaps a space, then characters of one class: nothing that could ever be tried in two ways."""
LONGEST_PATTERN: Final = 4096
MOST_SPLITS: Final = 16


def split_bytes(backend: "tokenizers.Tokenizer", content: dict[str, Any]) -> None:
    """Byte-level BPE: a known split into words, then bytes.

    Args:
        backend: Is given a normalizer, a pre-tokenizer and a decoder.
        content: Of the tokenizer.json.

    Raises:
        ValueError: It splits in a way that isn't known.
    """
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    for part in _parts(content.get("normalizer"), "normalizers"):
        if part.get("type") != "NFC":
            raise ValueError(f"normalizer must be NFC, got {told(part.get('type'))}")
        backend.normalizer = normalizers.NFC()
    *splits, last = _parts(content.get("pre_tokenizer"), "pretokenizers") or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError("pre_tokenizer must end with ByteLevel without add_prefix_space")
    if len(splits) > MOST_SPLITS:
        raise ValueError(f"pre_tokenizer: at most {MOST_SPLITS} splits are read, got {len(splits)}")
    made: list[Any] = []
    for part in splits:
        if part.get("type") == "Digits":
            made.append(pre_tokenizers.Digits(individual_digits=part.get("individual_digits") is True))
        elif part.get("type") == "Split":
            made.append(pre_tokenizers.Split(Regex(_pattern(part)), "isolated"))
        else:
            raise ValueError(f"pre_tokenizer must be Split, Digits or ByteLevel, got {told(part.get('type'))}")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last.get("use_regex", True) is True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*made, bytewise])
    backend.decoder = decoders.ByteLevel()


def _pattern(split: dict[str, Any]) -> str:
    """The regular expression of a split, or a quicker one that matches the same."""
    given = split.get("pattern")
    pattern = given.get("Regex") if isinstance(given, dict) else None
    if not isinstance(pattern, str) or split.get("behavior") != "Isolated" or split.get("invert"):
        raise ValueError("pre_tokenizer: a Split must be an isolated Regex")
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
    if pattern not in KNOWN and (len(pattern) > LONGEST_PATTERN or PLAIN.fullmatch(pattern) is None):
        raise ValueError(f"pre_tokenizer: unknown regular expression {told(pattern)}")
    return KNOWN.get(pattern, pattern)


def split_characters(backend: "tokenizers.Tokenizer", content: dict[str, Any]) -> None:
    """The BPE of SentencePiece (Llama 2, Mixtral): the whole text as one word, spaces written as U+2581.

    Args:
        backend: Is given a normalizer and a decoder.
        content: Of the tokenizer.json.

    Raises:
        ValueError: It splits in a way that isn't known.
    """
    from tokenizers import decoders, normalizers

    norms = _parts(content.get("normalizer"), "normalizers")
    splits = _parts(content.get("pre_tokenizer"), "pretokenizers")
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not splits and norms in ([prepend, replace], [replace]):
        prefixed = len(norms) == 2
    elif not norms and len(splits) == 1 and splits[0].get("type") == "Metaspace":
        scheme = splits[0].get("prepend_scheme", "always")
        if splits[0].get("replacement") != "▁" or splits[0].get("split") is not False:
            raise ValueError("pre_tokenizer: Metaspace must write spaces as U+2581 and not split")
        if scheme not in ("first", "always", "never"):
            raise ValueError(f"prepend_scheme must be first, always or never, got {told(scheme)}")
        # It puts no space in front of a text that begins with one, so that "a" and " a" are the same to it. Here they
        # are told apart, as with the normalizers above: behind a placeholder the space would be lost.
        prefixed = scheme != "never"
    else:
        raise ValueError("normalizer and pre_tokenizer must be those of Llama 2: a space in front, spaces as U+2581")
    front, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if prefixed else ([], [])
    backend.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _parts(part: object, inner: str) -> list[dict[str, Any]]:
    """Of a Sequence, of one part, or of none."""
    items: Any = [] if part is None else [part]
    if isinstance(part, dict) and part.get("type") == "Sequence":
        items = part.get(inner, [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{inner} must be a list of objects")
    return items


def told(value: object) -> str:
    """A value, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
