"""Texts that must have a form: a grammar compiled for one vocabulary, and where each row stands in it.

Compiling and matching are xgrammar's (Dong et al. 2024), which is imported here and nowhere else.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mm.batch import NUM_SPECIALS, SPECIAL_IDS
from mm.decoder.json_schema import check_schema

if TYPE_CHECKING:
    import xgrammar

_ALWAYS_NEEDED: Final = frozenset(range(0x20, 0x7F)) | frozenset(range(0x80, 0xC0))
"""With printable ASCII and every byte that goes on with a character no text gets stuck in the middle."""
_CONTROL: Final = re.compile(rb"[\x00-\x1f]")
_SURROGATE: Final = re.compile(rb"\xed[\xa0-\xbf]")


class Grammar:
    """Which texts a row may write, to be given to `Sampling`.

    Example:
        grammar = Grammar.of_schema(findings_schema(), tokenizer.pieces())
        engine.run(engine.requests(writing, memory, sampling=Sampling(512, grammar=grammar)))
    """

    def __init__(self, compiled: "xgrammar.CompiledGrammar", pieces: Sequence[bytes]) -> None:
        """Use `of_schema` or `of_rules`."""
        self._compiled = compiled
        self.vocab_size = len(pieces)
        # xgrammar's strings take the bytes of UTF-16 surrogates for characters; UTF-8 has none. A token that holds
        # one is left out from the start, one that would complete the token before it is forbidden behind that.
        self._opens = frozenset(index for index, piece in enumerate(pieces) if piece.endswith(b"\xed"))
        self._closes = np.array([b"\xa0" <= piece[:1] <= b"\xbf" for piece in pieces])

    @classmethod
    def of_schema(cls, schema: Mapping[str, Any], pieces: Sequence[bytes]) -> "Grammar":
        """JSON without white space, properties in the order in which the schema names them.

        Args:
            schema: A JSON schema; `check_schema` says which keywords it may have.
            pieces: The bytes of each id, empty for specials; `Tokenizer.pieces` gives them.

        Raises:
            ValueError: The schema can't be kept, nothing fulfils it, or the vocabulary can't spell it.
            ImportError: xgrammar is not installed (extra `grammar`).
        """
        check_schema(schema)
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"schema must be JSON: {error}") from error
        # Strings of limited length would take raw control characters, which JSON has only escaped.
        pieces = [b"" if _CONTROL.search(piece) else piece for piece in pieces]
        return _compiled(
            lambda compiler: compiler.compile_json_schema(text, any_whitespace=False, separators=(",", ":")),
            pieces,
            source=text,
        )

    @classmethod
    def of_rules(cls, rules: str, pieces: Sequence[bytes]) -> "Grammar":
        """What the rule `root` of an EBNF says, written as llama.cpp writes its GBNF.

        Args:
            rules: Such as 'root ::= "yes" | "no"'.
            pieces: As in `of_schema`.

        Raises:
            ValueError: The rules can't be read, nothing fulfils them, or the vocabulary can't spell them.
            ImportError: xgrammar is not installed (extra `grammar`).
        """
        return _compiled(lambda compiler: compiler.compile_grammar(rules), pieces, source=rules)

    def begin(self) -> "Matcher":
        """A row that has written nothing yet."""
        return Matcher(_xgrammar().GrammarMatcher(self._compiled), opens=self._opens, closes=self._closes)


class Matcher:
    """Where one row stands; made by `Grammar.begin`."""

    def __init__(
        self, matcher: "xgrammar.GrammarMatcher", *, opens: frozenset[int], closes: Bool[np.ndarray, " N"]
    ) -> None:
        self._matcher = matcher
        self._opens, self._closes = opens, closes
        self._open = False

    def forbid(self, row: Bool[np.ndarray, " V"]) -> None:
        """Sets what the next token can't be: True for all but what goes on with the text, or ends a whole one."""
        size = len(self._closes)
        words = np.empty((1, -(-size // 32)), dtype=np.int32)
        self._matcher.fill_next_token_bitmask(words)
        # Of 49,152 bits numpy makes booleans in a fifth of the time that xgrammar's kernel takes to apply them.
        np.equal(np.unpackbits(words.view(np.uint8)[0], count=size, bitorder="little"), 0, out=row[:size])
        row[size:] = True
        if self._open:
            row[:size] |= self._closes

    def accept(self, token: int) -> None:
        """One more token, which `forbid` must have left."""
        taken = self._matcher.accept_token(token)
        assert taken, f"the grammar doesn't go on with token {token}"
        self._open = token in self._opens


def forbidden(matchers: Sequence[Matcher | None], vocab_size: int) -> Bool[Tensor, "M V"] | None:
    """What no row may write next; None where no row has a grammar.

    Args:
        matchers: One a row, None for a row without grammar.
        vocab_size: Of the logits; ids beyond the grammar's own are forbidden.
    """
    if all(matcher is None for matcher in matchers):
        return None
    mask = np.zeros((len(matchers), vocab_size), dtype=np.bool_)
    for row, matcher in zip(mask, matchers, strict=True):
        if matcher is not None:
            matcher.forbid(row)
    return torch.from_numpy(mask)


def _compiled(
    compile_: Callable[["xgrammar.GrammarCompiler"], "xgrammar.CompiledGrammar"],
    pieces: Sequence[bytes],
    *,
    source: str,
) -> Grammar:
    library = _xgrammar()
    bytes_ = {piece[0] for piece in pieces[NUM_SPECIALS:] if len(piece) == 1}
    lacking = sorted((_ALWAYS_NEEDED | {*source.encode()} - {*range(0x20)}) - bytes_)
    if lacking:
        raise ValueError(f"pieces must hold every byte of the text as a token, got none for 0x{lacking[0]:02x}")
    pieces = [b""] * NUM_SPECIALS + [b"" if _SURROGATE.search(piece) else piece for piece in pieces[NUM_SPECIALS:]]
    info = library.TokenizerInfo(pieces, library.VocabType.RAW, stop_token_ids=[SPECIAL_IDS.end])
    try:
        made = Grammar(compile_(library.GrammarCompiler(info, max_threads=1, cache_enabled=False)), pieces)
    except RuntimeError as error:
        reason = re.sub(r"^\[.*?\] \S+: ", "", str(error)).strip()
        raise ValueError(f"grammar: {reason}") from error
    first = np.empty(len(pieces), dtype=np.bool_)
    made.begin().forbid(first)
    if first.all():
        raise ValueError("grammar: there is no text that it allows")
    return made


def _xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise ImportError("a grammar needs xgrammar: pip install 'mm-report[grammar]'") from error
    return xgrammar
