"""The vocabulary that a pretrained text tower brings: whole reports and captions are split with it, nothing else is.

Records, prompts and what the decoder writes keep the data's own tokenizer. Both are sealed in one tokenizer.json.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    import tokenizers
    from open_clip.tokenizer import SimpleTokenizer

OPEN_CLIP: Final = "open_clip"
MOST_WORDS: Final = 2**18
LONGEST_WORD: Final = 256
LONGEST_TEXT: Final = 2**16
_FIRST, _LAST, _UNKNOWN = "[CLS]", "[SEP]", "[UNK]"


class TextVocabulary(ABC):
    """Whole texts to ids as one pretrained tower reads them.

    Attributes:
        kind: Its name in a file.
        limit: Longest text in ids that the tower reads.
    """

    kind: ClassVar[str]

    def __init__(self, *, limit: int) -> None:
        if not 2 <= limit <= LONGEST_TEXT:
            raise ValueError(f"text vocabulary: limit must be a whole number from 2 to {LONGEST_TEXT:,}, got {limit}")
        self.limit = limit

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of ids."""

    @abstractmethod
    def ids(self, text: str) -> list[int]:
        """Ids of a text of any length; the first and the last stand for beginning and end."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """All of it, as JSON has it."""

    def encode(self, text: str, longest: int) -> list[int]:
        """Ids of a text; of a longer one than the tower or `longest` allows, the end follows what was cut."""
        ids, longest = self.ids(text), min(self.limit, longest)
        return ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]


class ClipVocabulary(TextVocabulary):
    """open_clip's byte-pair encoding, the same for all models that have no other."""

    kind = OPEN_CLIP
    _made: "SimpleTokenizer | None" = None

    @property
    def _backend(self) -> "SimpleTokenizer":
        if self._made is None:
            from open_clip.tokenizer import SimpleTokenizer

            self._made = SimpleTokenizer()
        return self._made

    @property
    def size(self) -> int:
        """Number of ids."""
        return int(self._backend.vocab_size)

    def ids(self, text: str) -> list[int]:
        """Ids of a text between those of start and end."""
        backend = self._backend
        return [int(backend.sot_token_id), *backend.encode(text), int(backend.eot_token_id)]

    def content(self) -> dict[str, Any]:
        """Nothing but its name: open_clip has the words."""
        return {"kind": self.kind, "limit": self.limit}


class WordPiece(TextVocabulary):
    """BERT's vocabulary (Wu et al. 2016, Devlin et al. 2019). What looks like `[SEP]` in a text is plain text.

    Args:
        words: In the order of their ids.
        lowercase: Texts are put in lower case.
        strip_accents: None: as `lowercase` says, as in BERT.
        split_chinese: Chinese characters are words of their own.
        limit: Longest text in ids that the tower reads.

    Raises:
        ValueError: No vocabulary of BERT's.
    """

    kind = "wordpiece"

    def __init__(
        self, words: list[str], *, lowercase: bool, strip_accents: bool | None, split_chinese: bool, limit: int
    ) -> None:
        super().__init__(limit=limit)
        if not 3 <= len(words) <= MOST_WORDS or any(len(word) > LONGEST_WORD for word in words):
            raise ValueError(
                f"text vocabulary: it must have from 3 to {MOST_WORDS:,} words of at most {LONGEST_WORD} characters"
            )
        self.numbers = {word: number for number, word in enumerate(words)}
        lacking = [word for word in (_FIRST, _LAST, _UNKNOWN) if word not in self.numbers]
        if lacking or len(self.numbers) < len(words):
            raise ValueError(f"text vocabulary: {f'it has no {lacking[0]}' if lacking else 'a word occurs twice'}")
        self.words = words
        self.lowercase, self.strip_accents, self.split_chinese = lowercase, strip_accents, split_chinese
        self._backend = self._make()

    def _make(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        made = Tokenizer(models.WordPiece(self.numbers, unk_token=_UNKNOWN, max_input_chars_per_word=100))
        made.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=self.split_chinese,
            strip_accents=self.strip_accents,
            lowercase=self.lowercase,
        )
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return made

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.words)

    def ids(self, text: str) -> list[int]:
        """Ids of a text between those of `[CLS]` and `[SEP]`."""
        inner = self._backend.encode(text, add_special_tokens=False).ids
        return [self.numbers[_FIRST], *inner, self.numbers[_LAST]]

    def content(self) -> dict[str, Any]:
        """The words and how texts are prepared."""
        return {
            "kind": self.kind,
            "limit": self.limit,
            "words": self.words,
            "lowercase": self.lowercase,
            "strip_accents": self.strip_accents,
            "split_chinese": self.split_chinese,
        }


def read_content(content: Any) -> TextVocabulary:
    """The vocabulary of `TextVocabulary.content`, which may be anybody's.

    Raises:
        ValueError: It is none.
    """
    kind = content.get("kind") if isinstance(content, Mapping) else None
    if kind not in (ClipVocabulary.kind, WordPiece.kind):
        raise ValueError(f"text vocabulary: kind must be {OPEN_CLIP} or {WordPiece.kind}, got {str(kind)[:40]!r}")
    given = {str(key): value for key, value in content.items() if key != "kind"}
    types: dict[str, tuple[type, ...]] = {"limit": (int,)}
    if kind == WordPiece.kind:
        types |= {"words": (list,), "lowercase": (bool,), "strip_accents": (bool, type(None)), "split_chinese": (bool,)}
    if set(given) != set(types):
        got = ", ".join(sorted(given))[:80]
        raise ValueError(f"text vocabulary: it must have {', '.join(sorted(types))}, got {got}")
    wrong = [key for key, value in given.items() if type(value) not in types[key]]
    if wrong or not all(type(word) is str for word in given.get("words", [])):
        raise ValueError(f"text vocabulary: {wrong[0] if wrong else 'a word'} is of another type")
    return ClipVocabulary(**given) if kind == OPEN_CLIP else WordPiece(**given)


def open_vocabulary(source: str, *, limit: int) -> TextVocabulary:
    """The vocabulary of a tower that brings weights.

    Args:
        source: "open_clip", or a folder in the layout of transformers with a WordPiece vocabulary (vocab.txt or
            tokenizer.json).
        limit: Longest text in ids that the tower reads.

    Raises:
        ValueError: The folder has none, or one of another kind.
    """
    if source == OPEN_CLIP:
        return ClipVocabulary(limit=limit)
    folder = Path(source)
    fast, settings = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    model, normalizer = fast.get("model") or {}, fast.get("normalizer") or {}
    for part, wanted in ((model, "WordPiece"), (normalizer, "BertNormalizer")):
        if not isinstance(part, dict) or part.get("type", wanted) != wanted:
            raise ValueError(f"weights {source!r}: its tokenizer must be BERT's ({wanted})")
    words = folder / "vocab.txt"
    if words.is_file():
        listed = words.read_text(encoding="utf-8").split("\n")
        listed = listed[:-1] if listed and not listed[-1] else listed
    else:
        numbered = model.get("vocab")
        numbered = numbered if isinstance(numbered, dict) else {}
        listed = sorted(numbered, key=lambda word: str(numbered[word]).zfill(9))
    try:
        return read_content(
            {
                "kind": WordPiece.kind,
                "limit": limit,
                "words": [word.rstrip("\r") for word in listed],
                "lowercase": normalizer.get("lowercase", settings.get("do_lower_case", True)),
                "strip_accents": normalizer.get("strip_accents", settings.get("strip_accents")),
                "split_chinese": normalizer.get("handle_chinese_chars", settings.get("tokenize_chinese_chars", True)),
            }
        )
    except ValueError as error:
        raise ValueError(f"weights {source!r}: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    """An object from a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"weights {str(path.parent)!r}: {path.name} is no JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"weights {str(path.parent)!r}: {path.name} must be a JSON object")
    return content
