"""Byte-level BPE for English and Chinese, and the ids that no text can ever produce.

Ids 0..9 are special (`SpecialIds`); id 10 + i is token i of the BPE model. The BPE model itself knows nothing of
the specials, so whatever a user writes, `<end>` included, becomes ordinary bytes: there is nothing to escape and no
flag to forget. Only `encode_template`, which is for sentences of our own, turns placeholders into their ids.
A vocabulary of an open model (`mm.data.foreign_tokenizer`) is used the same way: its token i is id 10 + i.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mm.batch import NUM_SPECIALS, SPECIAL_IDS, Language, SpecialIds
from mm.data.foreign_tokenizer import FORMAT, LARGEST_FILE, ForeignVocabulary, read_sealed, read_vocabulary
from mm.data.text_vocabulary import TextVocabulary, read_content

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import models


__all__ = [
    "MIN_VOCAB_SIZE", "PLACEHOLDERS", "SPECIALS", "SPECIAL_IDS", "SpecialIds", "Tokenizer",
    "import_tokenizer", "train_tokenizer",
]  # fmt: skip

SPECIALS: Final[tuple[str, ...]] = tuple(f"<{item.name}>" for item in fields(SpecialIds))
PLACEHOLDERS: Final[dict[str, int]] = {
    "<size>": SPECIAL_IDS.size,
    "<side>": SPECIAL_IDS.side,
    "<days>": SPECIAL_IDS.days,
    "<findings>": SPECIAL_IDS.findings,
}
MIN_VOCAB_SIZE: Final = NUM_SPECIALS + 256
_PRINTED: Final = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
# How a byte-level vocabulary spells bytes (Radford 2019): printable Latin-1 as it is, the others from U+0100 on.
_BYTES: Final = {chr(byte): byte for byte in _PRINTED} | {
    chr(0x100 + place): byte for place, byte in enumerate(sorted({*range(0x100)} - {*_PRINTED}))
}
_TEXTS: Final = "texts"
"""Where a file of ours keeps the vocabulary of a pretrained text tower; the BPE library knows no such key."""
_UNSET: Final = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip
"""Options of the library's BPE that ours has none of."""
_PLACEHOLDER: Final = re.compile("(" + "|".join(PLACEHOLDERS) + ")")


class Tokenizer:
    """Text to ids and back.

    Lossless for every string where the vocabulary is ours: bytes that no merge covers are tokens themselves.

    Args:
        backend: The BPE model.
        texts: What a pretrained text tower splits whole texts with; None where it reads this vocabulary.
        foreign: What is known of an open model's vocabulary; None for one of ours.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        texts: TextVocabulary | None = None,
        *,
        foreign: ForeignVocabulary | None = None,
    ) -> None:
        self._backend, self.texts, self._foreign = backend, texts, foreign

    def __reduce__(self) -> tuple[object, ...]:
        if self._foreign is None:
            return Tokenizer, (self._backend, self.texts)
        return import_tokenizer, (self._foreign.source, self.texts)  # the library complains of ids with holes

    def with_texts(self, texts: TextVocabulary) -> "Tokenizer":
        """The same with a vocabulary for whole texts."""
        return Tokenizer(self._backend, texts, foreign=self._foreign)

    @property
    def texts_size(self) -> int:
        """Number of ids that whole texts are made of."""
        return self.vocab_size if self.texts is None else self.texts.size

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that a text can give; at most what training was asked for."""
        if self._foreign is not None:
            return NUM_SPECIALS + self._foreign.num_ids
        return NUM_SPECIALS + int(self._backend.get_vocab_size(with_added_tokens=False))

    def spells(self, index: int) -> bool:
        """Whether a user's text may give an id."""
        return index >= NUM_SPECIALS and self._backend.id_to_token(index - NUM_SPECIALS) is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a user's text; never a special, not even where the text spells one."""
        return [index + NUM_SPECIALS for index in self._backend.encode(text, add_special_tokens=False).ids]

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
            if index >= NUM_SPECIALS:
                pending.append(index - NUM_SPECIALS)
            elif SPECIALS[index] in PLACEHOLDERS:
                parts += [self._backend.decode(pending), SPECIALS[index]]
                pending = []
        return "".join([*parts, self._backend.decode(pending)])

    def pieces(self) -> list[bytes]:
        """The bytes of each id, none for specials: joined, those of `encode(text)` are the text's own."""
        pieces = [b""] * self.vocab_size
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            if self._foreign is not None and not self._foreign.bytewise:  # bytes that no token covers: <0x0A>
                byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
                spelt = token.replace("▁", " ").encode() if byte is None else bytes.fromhex(byte[1])
                pieces[NUM_SPECIALS + index] = spelt
                continue
            known = all(letter in _BYTES for letter in token)
            pieces[NUM_SPECIALS + index] = bytes(_BYTES[x] for x in token) if known else token.encode()
        return pieces

    def save(self, path: str | Path) -> None:
        """Writes one JSON file; the same vocabulary gives the same bytes."""
        text = self.open_json() if self._foreign is None else self._foreign.sealed()
        if self.texts is not None:
            text = json.dumps({**json.loads(text), _TEXTS: self.texts.content()}, ensure_ascii=False)
        Path(path).write_bytes(text.encode("utf-8"))

    def open_json(self) -> str:
        """The tokenizer.json for other programs: without our specials, of a foreign vocabulary as it was."""
        return str(self._backend.to_str(pretty=False)) if self._foreign is None else self._foreign.source

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Opens a file that `save` wrote.

        Raises:
            ValueError: The file is no such vocabulary.
        """
        from tokenizers import models

        path = Path(path)
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"tokenizer: at most {LARGEST_FILE} bytes are read, {path.name} has more")
        text = path.read_bytes().decode("utf-8", errors="replace")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        texts = None
        try:
            if isinstance(content, dict) and _TEXTS in content:
                texts = read_content(content.pop(_TEXTS))
        except ValueError as error:
            raise ValueError(
                f"tokenizer: {path.name} is not a vocabulary written by `mm tokenizer`: {error}"
            ) from error
        if isinstance(content, dict) and content.get("format") == FORMAT:
            foreign = read_sealed(content, path.name)
            return cls(foreign.backend, texts, foreign=foreign)
        wrong = _flaw(content)
        if wrong is not None:
            raise ValueError(f"tokenizer: {path.name} is not a vocabulary written by `mm tokenizer`: {wrong}")
        model = content["model"]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        return cls(_bytewise(models.BPE(vocab=model["vocab"], merges=merges)), texts)


def import_tokenizer(source: str, texts: TextVocabulary | None = None) -> Tokenizer:
    """The vocabulary of an open model, from the text of its tokenizer.json.

    Args:
        source: That text.
        texts: As of `Tokenizer`.

    Raises:
        ValueError: It has a part that isn't known to be harmless; see `read_vocabulary`.
    """
    foreign = read_vocabulary(source)
    return Tokenizer(foreign.backend, texts, foreign=foreign)


def _flaw(content: object) -> str | None:
    """What a vocabulary of ours can't be; None where nothing is wrong.

    A foreign file could split texts by a pattern of its own, match added tokens in plain text and so let users
    write specials, or name merges that the library doesn't survive. What passes, the library takes: it would raise
    nothing narrower than Exception.
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
    if content["pre_tokenizer"].get("add_prefix_space") or content["pre_tokenizer"].get("use_regex") is False:
        return "its pre_tokenizer splits in another way"
    model = content["model"]
    vocab, merges = model.get("vocab"), model.get("merges")
    for name in _UNSET:
        if model.get(name):
            return f"its model has a {name}"
    if model.get("type") != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        return "its model is not BPE with vocab and merges"
    if any(type(index) is not int for index in vocab.values()) or sorted(vocab.values()) != [*range(len(vocab))]:
        return "its ids are not 0, 1, 2 and so on"
    if any("\ud800" <= letter <= "\udfff" for piece in vocab for letter in piece):
        return "a token is half a character"
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        known = isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)
        if not known or "" in parts or any(part not in vocab for part in (*parts, "".join(parts))):
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
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE} (specials and bytes), got {vocab_size}")
    backend = _bytewise(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    parts = (part for text in texts for part in _PLACEHOLDER.split(text) if part and part not in PLACEHOLDERS)
    backend.train_from_iterator(parts, trainer)
    return Tokenizer(backend)


def _bytewise(model: "models.BPE") -> "tokenizers.Tokenizer":
    """A vocabulary of ours: texts are split into words as GPT-2 does, and words into bytes."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
