"""The vocabulary in a GGUF file's metadata, written as the tokenizer.json that it was made from."""

import json
from collections.abc import Sequence
from typing import Any, Final

from mm.data.foreign_splits import LLAMA3, QWEN

NORMAL: Final = 1
CONTROL: Final = 3
USER_DEFINED: Final = 4
_BYTES: Final[dict[str, Any]] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_DIGITS: Final[dict[str, Any]] = {"type": "Digits", "individual_digits": True}
_NFC: Final[dict[str, Any]] = {"type": "NFC"}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _BYTES | {"use_regex": False}]


_FAMILIES: Final[dict[str, tuple[dict[str, Any] | None, list[dict[str, Any]], bool]]] = {
    "gpt-2": (None, [_BYTES | {"use_regex": True}], False),
    "olmo": (_NFC, [_BYTES | {"use_regex": True}], False),
    "smollm": (None, [_DIGITS, _BYTES | {"use_regex": True}], False),
    "llama-bpe": (None, _split(LLAMA3), True),
    "qwen2": (_NFC, _split(QWEN), False),
    "deepseek-r1-qwen": (_NFC, _split(QWEN), False),
}
"""By `tokenizer.ggml.pre`: normalizer, pre-tokenizers, and whether a word of the vocabulary is taken without merges."""


def gguf_source(*, pre: str, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> str:
    """The text of a tokenizer.json, for `read_vocabulary`.

    Args:
        pre: `tokenizer.ggml.pre`.
        tokens: `tokenizer.ggml.tokens`, by id.
        types: `tokenizer.ggml.token_type`, by id: all but normal ones become added tokens.
        merges: `tokenizer.ggml.merges`: two tokens and a space between.

    Raises:
        ValueError: An unknown `pre`, or lists that don't fit together.
    """
    if pre not in _FAMILIES:
        raise ValueError(f"tokenizer.ggml.pre must be one of {', '.join(_FAMILIES)}, got {pre[:60]!r}")
    if len(tokens) != len(types):
        raise ValueError(f"tokenizer.ggml: {len(tokens)} tokens and {len(types)} token types")
    normalizer, splits, ignore_merges = _FAMILIES[pre]
    added = [
        {"id": index, "content": token, "special": kind != USER_DEFINED, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != NORMAL
    ]
    pieces = {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    if len(set(tokens)) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens: two tokens are the same")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": _BYTES | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": pieces,
            "merges": list(merges),
        },
    }
    return json.dumps(content, ensure_ascii=False)
