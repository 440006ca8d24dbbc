"""Byte-level BPE for English and Chinese, and the ids that no text can ever produce.

Ids 0..9 are special (`SpecialIds`); id 10 + i is token i of the BPE model. The BPE model itself knows nothing of
the specials, so whatever a user writes, `<end>` included, becomes ordinary bytes: there is nothing to escape and no
flag to forget. Only `encode_template`, which is for sentences of our own, turns placeholders into their ids.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mm.batch import SPECIAL_IDS, Language, SpecialIds
from mm.data.text_vocabulary import TextVocabulary, read_content

if TYPE_CHECKING:
    import tokenizers


__all__ = ["MIN_VOCAB_SIZE", "PLACEHOLDERS", "SPECIALS", "SPECIAL_IDS", "SpecialIds", "Tokenizer", "train_tokenizer"]

SPECIALS: Final[tuple[str, ...]] = tuple(f"<{item.name}>" for item in fields(SpecialIds))
PLACEHOLDERS: Final[dict[str, int]] = {
    "<size>": SPECIAL_IDS.size,
    "<side>": SPECIAL_IDS.side,
    "<days>": SPECIAL_IDS.days,
    "<findings>": SPECIAL_IDS.findings,
}
MIN_VOCAB_SIZE: Final = len(SPECIALS) + 256
_TEXTS: Final = "texts"
"""Where a file of ours keeps the vocabulary of a pretrained text tower; the BPE library knows no such key."""
_PLACEHOLDER: Final = re.compile("(" + "|".join(PLACEHOLDERS) + ")")


class Tokenizer:
    """Text to ids and back. Lossless for every string: bytes that no merge covers are tokens themselves.

    Args:
        backend: The BPE model.
        texts: What a pretrained text tower splits whole texts with; None where it reads this vocabulary.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", texts: TextVocabulary | None = None) -> None:
        self._backend, self.texts = backend, texts

    def with_texts(self, texts: TextVocabulary) -> "Tokenizer":
        """The same with a vocabulary for whole texts."""
        return Tokenizer(self._backend, texts)

    @property
    def texts_size(self) -> int:
        """Number of ids that whole texts are made of."""
        return self.vocab_size if self.texts is None else self.texts.size

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included; at most what training was asked for."""
        return len(SPECIALS) + int(self._backend.get_vocab_size(with_added_tokens=False))

    def encode(self, text: str) -> list[int]:
        """Ids of a user's text; never a special, not even where the text spells one."""
        return [index + len(SPECIALS) for index in self._backend.encode(text, add_special_tokens=False).ids]

    def encode_whole(self, text: str, longest: int) -> list[int]:
        """Ids of a whole report or caption for the text tower, at most `longest`, an end included."""
        if self.texts is not None:
            return self.texts.encode(text, longest)
        return [*self.encode(text)[: longest - 1], SPECIAL_IDS.end]

    def encode_template(self, text: str) -> list[int]:
        """Ids of one of our own sentences: `<size>`, `<side>`, `<days>` and `<findings>` become their special ids."""
        ids: list[int] = []
        for part in _PLACEHOLDER.split(text):
            ids.extend([PLACEHOLDERS[part]] if part in PLACEHOLDERS else self.encode(part))
        return ids

    def prompt(self, language: Language, question: str | None = None) -> list[int]:
        """The decoder's prefix: language, slot and, for a question, its words and `<answer>`."""
        ids = [SPECIAL_IDS.language(language), SPECIAL_IDS.slot]
        return ids if question is None else [*ids, *self.encode(question), SPECIAL_IDS.answer]

    def target(self, text: str) -> list[int]:
        """What the decoder learns to write: a sentence with placeholders, or an answer, and `<end>`."""
        return [*self.encode_template(text), SPECIAL_IDS.end]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids up to the first `<end>`.

        Placeholders come back as they are written in templates; other specials and ids beyond the vocabulary
        (a model may have spare rows) are left out. Bytes that form no character become U+FFFD.
        """
        parts: list[str] = []
        pending: list[int] = []
        for index in ids:
            if index == SPECIAL_IDS.end:
                break
            if index >= len(SPECIALS):
                pending.append(index - len(SPECIALS))
            elif SPECIALS[index] in PLACEHOLDERS:
                parts += [self._backend.decode(pending), SPECIALS[index]]
                pending = []
        return "".join([*parts, self._backend.decode(pending)])

    def save(self, path: str | Path) -> None:
        """Writes one JSON file; the same vocabulary gives the same bytes."""
        text = self._backend.to_str(pretty=False)
        if self.texts is not None:
            text = json.dumps({**json.loads(text), _TEXTS: self.texts.content()}, ensure_ascii=False)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Opens a file that `save` wrote.

        Raises:
            ValueError: The file is no such vocabulary.
        """
        import tokenizers

        text = Path(path).read_bytes().decode("utf-8", errors="replace")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        texts = None
        try:
            if isinstance(content, dict) and _TEXTS in content:
                texts = read_content(content.pop(_TEXTS))
                text = json.dumps(content, ensure_ascii=False)
            wrong = _flaw(content)
        except ValueError as error:
            wrong = str(error)
        if wrong is None:
            try:
                return cls(tokenizers.Tokenizer.from_str(text), texts)
            except Exception as error:  # noqa: BLE001  # the library raises nothing narrower
                wrong = str(error)
        raise ValueError(
            f"tokenizer: {Path(path).name} is not a vocabulary written by `mm tokenizer`: {' '.join(wrong.split())}"
        )


def _flaw(content: object) -> str | None:
    """What a vocabulary of ours can't be; None where nothing is wrong.

    A foreign file could split texts by a pattern of its own, match added tokens in plain text and so let users
    write specials, or name merges that the library doesn't survive.
    """
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return "no JSON object with a model"
    if content.get("added_tokens") != []:
        return "it has added tokens"
    for name in ("normalizer", "post_processor", "truncation", "padding"):
        if content.get(name) is not None:
            return f"it has a {name}"
    for name in ("pre_tokenizer", "decoder"):
        if not isinstance(content.get(name), dict) or content[name].get("type") != "ByteLevel":
            return f"its {name} is not ByteLevel"
    model = content["model"]
    vocab, merges = model.get("vocab"), model.get("merges")
    if model.get("type") != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        return "its model is not BPE with vocab and merges"
    if sorted(map(str, vocab.values())) != sorted(map(str, range(len(vocab)))):
        return "its ids are not 0, 1, 2 and so on"
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        known = isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)
        if not known or any(part not in vocab for part in (*parts, "".join(parts))):
            return "a merge joins what is not in its vocabulary"
    return None


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Learns a byte-level BPE (Sennrich 2016, Radford 2019) from sentences with or without placeholders.

    Args:
        texts: The sentences; their order doesn't matter.
        vocab_size: Number of ids, specials and the 256 bytes included. A small corpus may give fewer.

    Raises:
        ValueError: `vocab_size` has no room for the specials and the bytes.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE} (specials and bytes), got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    parts = (part for text in texts for part in _PLACEHOLDER.split(text) if part and part not in PLACEHOLDERS)
    backend.train_from_iterator(parts, trainer)
    return Tokenizer(backend)
