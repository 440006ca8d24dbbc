"""The vocabularies of open models: a foreign tokenizer.json, of which only what is known to be harmless is used.

Nothing of the file reaches the tokenizers library but tokens and merges that were checked; the rest is made anew from
a short list of known parts. What the file calls an added or special token (`<|im_end|>`, `<think>`) is no token at
all for a text, whatever it spells; its id stays taken. The exception are runs of white space, which GPT-NeoX and
OLMoE write as added tokens and which can steer nothing.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mm.data.foreign_splits import split_bytes, split_characters, told

if TYPE_CHECKING:
    import tokenizers

FORMAT: Final = "mm foreign tokenizer"
VERSION: Final = 1
LARGEST_FILE: Final = 2**27
"""Bytes of any vocabulary."""
LARGEST: Final = 2**26
"""Characters; the largest published file has about half."""
MOST_IDS: Final = 2**22
LONGEST_BLANK: Final = 256
MOST_BLANKS: Final = 256
BYTES: Final = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class ForeignVocabulary:
    """A sealed vocabulary.

    Attributes:
        source: The text that it was read from.
        backend: Never gives an added or special token; its ids are those of the source.
        num_ids: One more than the largest id that a text can give. Added tokens may have larger ones, which, as any
            spare row of an embedding, stand for nothing.
        bytewise: Whether its tokens are spelt in bytes (GPT-2); else in characters, with U+2581 for a space and
            `<0x0A>` for a byte that has no other token.
    """

    source: str
    backend: "tokenizers.Tokenizer"
    num_ids: int
    bytewise: bool

    def sealed(self) -> str:
        """The text of a file that `read_sealed` reads."""
        return json.dumps({"format": FORMAT, "version": VERSION, "source": self.source}, ensure_ascii=False)


def read_vocabulary(source: str) -> ForeignVocabulary:
    """Seals the text of a tokenizer.json: byte-level BPE, or BPE of characters with bytes to fall back on.

    Ordinary texts get the ids that the tokenizers library gives them. Bytes that the vocabulary doesn't have are left
    out, as there.

    Raises:
        ValueError: It is no such file, or has a part that isn't known.
    """
    import tokenizers
    from tokenizers import models

    if len(source) > LARGEST:
        raise ValueError(f"at most {LARGEST} characters are read, got {len(source)}")
    try:
        content = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("no JSON object with a model")
    model = content["model"]
    _check_model(model)
    vocab, added = model["vocab"], _added(content.get("added_tokens"))
    ids = vocab | {token["content"]: token["id"] for token in added}
    if any(vocab.get(token["content"], token["id"]) != token["id"] for token in added):
        raise ValueError("an added token has another id in the vocabulary")
    if not ids or not all(type(index) is int and 0 <= index < MOST_IDS for index in ids.values()):
        raise ValueError(f"ids must be whole numbers 0..{MOST_IDS - 1}")
    if len(set(ids.values())) != len(ids):
        raise ValueError("two tokens have one id")
    bytewise = not model.get("byte_fallback")
    blanks = [token for token in added if bytewise and _is_blank(token)]
    if len(blanks) > MOST_BLANKS:
        raise ValueError(f"at most {MOST_BLANKS} added tokens of white space are read, got {len(blanks)}")
    hidden = {token["content"] for token in added} | {model.get("unk_token")}
    pieces = {piece: index for piece, index in vocab.items() if piece not in hidden}
    merges = [
        pair for pair in _merges(model.get("merges"), vocab) if hidden.isdisjoint(pair) and "".join(pair) not in hidden
    ]
    pieces |= {token["content"]: token["id"] for token in blanks}
    if not pieces:
        raise ValueError("its vocabulary is empty")
    if not bytewise and not pieces.keys() >= BYTES:
        raise ValueError("byte_fallback needs the 256 tokens <0x00> to <0xFF>")
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab=pieces,
                merges=merges,
                byte_fallback=not bytewise,
                ignore_merges=bool(model.get("ignore_merges")),
            )
        )
        if bytewise:
            split_bytes(backend, content)
        else:
            split_characters(backend, content)
        for token in blanks:
            made = tokenizers.AddedToken(token["content"], normalized=token.get("normalized") is True)
            backend.add_tokens([made])
    except ValueError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the tokenizers library refuses it: {str(error)[:200]}") from error
    return ForeignVocabulary(source, backend, 1 + max(pieces.values()), bytewise)


def read_sealed(content: dict[str, Any], name: str) -> ForeignVocabulary:
    """What `ForeignVocabulary.sealed` wrote; the source is sealed anew, so that nothing in the file is trusted.

    Raises:
        ValueError: It is of another version, or `read_vocabulary` refuses what is in it.
    """
    if content.get("version") != VERSION:
        found = told(content.get("version"))
        raise ValueError(f"tokenizer: {name} has format version {found}; this version of mm reads {VERSION}")
    try:
        return read_vocabulary(str(content.get("source")))
    except ValueError as error:
        raise ValueError(f"tokenizer: {name} is not a vocabulary written by `mm import-decoder`: {error}") from error


def _check_model(model: dict[str, Any]) -> None:
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"its model must be BPE with a vocab, got {told(model.get('type'))}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name) not in (None, "", 0):
            raise ValueError(f"its model has a {name}: {told(model[name])}")
    for name in ("byte_fallback", "ignore_merges", "fuse_unk"):
        if model.get(name) not in (None, True, False):
            raise ValueError(f"{name} must be true or false, got {told(model[name])}")
    if not isinstance(model.get("unk_token"), str | None):
        raise ValueError(f"unk_token must be a text, got {told(model['unk_token'])}")


def _added(tokens: object) -> list[dict[str, Any]]:
    """The added tokens, each with an id and a content."""
    listed = [] if tokens is None else tokens
    if not isinstance(listed, list):
        raise ValueError("added_tokens must be a list")
    for token in listed:
        if not isinstance(token, dict) or type(token.get("id")) is not int or not isinstance(token.get("content"), str):
            raise ValueError("an added token must have an id and a content")
    if len({token["content"] for token in listed}) != len(listed):
        raise ValueError("an added token stands there twice")
    return listed


def _is_blank(token: dict[str, Any]) -> bool:
    """Whether it is a run of white space and nothing else."""
    odd = any(token.get(name) for name in ("special", "lstrip", "rstrip", "single_word"))
    return bool(token["content"].isspace()) and len(token["content"]) <= LONGEST_BLANK and not odd


def _merges(merges: object, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """As pairs; the library doesn't survive all that could stand there."""
    if not isinstance(merges, list):
        raise ValueError("its model must have a list of merges")
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError("a merge must be two tokens")
        if "" in parts or parts[0] not in vocab or parts[1] not in vocab or parts[0] + parts[1] not in vocab:
            raise ValueError("a merge joins what is not in its vocabulary")
        pairs.append((parts[0], parts[1]))
    return pairs
