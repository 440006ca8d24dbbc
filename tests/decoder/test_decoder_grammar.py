"""Constrained decoding, judged by jsonschema, by Python's own JSON and by finite languages written out."""

import json
import random
import sys
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from test_decoder_beam import history

from mm.batch import SPECIAL_IDS, Padded, Slots, Tokens, Writing
from mm.decoder.beam import beam_search
from mm.decoder.decoder import MoEDecoder
from mm.decoder.engine import Engine
from mm.decoder.generate import Sampling, choose, write
from mm.decoder.grammar import Grammar, forbidden
from mm.report.answer import findings_schema

SPARE = 6  # rows of the decoder's table that the tokenizer has no token for
SMALL = {
    "type": "object",
    "properties": {
        "code": {"enum": ["nodule", "实变", 'a "b"\n']},
        "size": {"anyOf": [{"type": "integer", "minimum": 3, "maximum": 60}, {"type": "null"}]},
    },
    "required": ["code", "size"],
    "additionalProperties": False,
}


def make_pieces(*, joined=120, seed=0):
    """All bytes, and tokens that join them within and across the parts of JSON and of characters."""
    rng = random.Random(seed)
    pieces = [b""] * 10 + [bytes([byte]) for byte in range(256)]
    pieces += [b'{"', b'":', b'","', b"true", b"null", b"12", b'"}', b"\xed\xa0\x80", b"x\xed", b"\x01a", b"\xed\x95"]
    letters = [*b'abcnou ",:{}[]0123456789.-', 0xED, 0xA1, 0x95, 0xE4, 0x80, 5]
    while len(pieces) < 266 + joined:
        pieces.append(bytes(rng.choices(letters, k=rng.randint(2, 4))))
    return pieces


PIECES = make_pieces()
VOCAB = len(PIECES) + SPARE


def decode(ids):
    return b"".join(PIECES[token] for token in ids).decode()


def written(grammar, rng, *, most=2000):
    """A text from random logits; None where it was cut."""
    matcher, ids, row = grammar.begin(), [], np.empty(VOCAB, dtype=np.bool_)
    for _ in range(most):
        matcher.forbid(row)
        may = (~row).nonzero()[0]
        token = SPECIAL_IDS.end if SPECIAL_IDS.end in may and rng.random() < 0.3 else int(rng.choice(may))
        matcher.accept(token)
        if token == SPECIAL_IDS.end:
            return decode(ids)
        ids.append(token)
    return None


def test_thirty_of_thirty_texts_from_random_logits_are_answers():
    schema, rng = findings_schema(), random.Random(0)
    grammar = Grammar.of_schema(schema, PIECES)
    texts = [written(grammar, rng) for _ in range(30)]
    for text in texts:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert len(set(texts)) > 10


def random_schema(rng, depth):
    def value():
        return rng.choice(
            [None, True, 3, -2, 2.5, "a", "é", "한", 'x\n"\\\x01', {"b": [1, None]}, [], {}, "", 1e22, 1e-7]
        )

    def maybe(**keywords):
        return {name: make() for name, make in keywords.items() if rng.random() < 0.6}

    flat = ["const", "enum", "null", "boolean", "integer", "number", "string"]
    kind = rng.choice(flat + ["anyOf", "array", "object"] * 2 * (depth > 0))
    if kind == "const":
        return {"const": value()}
    if kind == "enum":
        return {"enum": [value() for _ in range(rng.randint(1, 4))]}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    schema = {"type": kind, "description": "as a note"}
    if kind in ("integer", "number"):
        digits = 0 if kind == "integer" else rng.randint(0, 7)
        low, high = (rng.choice(["m", "exclusiveM"]) + end for end in ("inimum", "aximum"))
        for name, span in ((low, (-30, 30)), (high, (-10, 300))):
            bound = round(rng.uniform(*span), digits)
            schema |= maybe(**{name: lambda bound=bound: int(bound) if kind == "integer" else bound})
    if kind == "string":
        schema |= maybe(maxLength=lambda: rng.randint(0, 9), minLength=lambda: rng.randint(0, 5))
    if kind == "array":
        schema |= maybe(items=lambda: random_schema(rng, depth - 1), minItems=lambda: rng.randint(0, 3))
        schema |= maybe(prefixItems=lambda: [random_schema(rng, depth - 1)]) | {"maxItems": rng.randint(0, 4)}
    if kind == "object":
        names = rng.sample(["a", "b", "é", 'q"\\'], rng.randint(0, 3))
        schema["properties"] = {name: random_schema(rng, depth - 1) for name in names}
        schema |= maybe(required=lambda: rng.sample(names, rng.randint(0, len(names))))
        schema |= maybe(additionalProperties=lambda: False)
    return schema


def test_whatever_schema_is_taken_is_kept():
    rng, judged, refused = random.Random(1), 0, 0
    while judged < 200:
        schema = random_schema(rng, 3)
        try:
            grammar = Grammar.of_schema(schema, PIECES)
        except ValueError as error:
            if "grammar: " not in str(error):  # bounds that leave nothing
                raise
            refused += 1
            continue
        text = written(grammar, rng, most=300)
        if text is not None:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
            judged += 1
    assert refused < 100


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "at # can't be kept: uniqueItems beside type 'array'"),
        ({"type": "string", "pattern": "a"}, "pattern beside type"),
        ({"type": "integer", "not": {"const": 3}}, "not beside type"),
        ({"enum": ["a", "bb"], "maxLength": 1}, "maxLength beside enum"),
        ({"anyOf": [{"type": "array", "items": {"oneOf": []}}]}, "at #/anyOf/0/items must be an object with one of"),
        ({"type": "object", "properties": {"a": {"type": "uuid"}}}, "type at #/properties/a must be one of null,"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "required at # .* got .'a'."),
        ({"type": "object", "additionalProperties": True}, "additionalProperties at # must be false, got True"),
        ({"type": "array", "items": {"$ref": "http://a.b/c"}}, r"\$ref at #/items must be one of #, got 'http"),
        ({"$defs": {"a": 3}, "$ref": "#/$defs/a"}, r"at #/\$defs/a must be an object"),
        ({"$ref": "#/$defs/a", "$defs": []}, r"\$defs must be an object"),
        ({"const": float("nan")}, "schema must be JSON"),
        ({"const": {1}}, "schema must be JSON"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "grammar: .*minimum greater than maximum"),
        ({"type": "integer", "minimum": 0.5}, "grammar: Integer constraint must be a whole number"),
        ({"$ref": "#"}, "no text that it allows|Circular"),  # ours, or that of xgrammar from 0.2.9 on
        ({"anyOf": []}, r"anyOf at # must be a list of at least one, got \[\]"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        Grammar.of_schema(schema, PIECES)


def test_a_schema_deeper_than_the_stack_is_refused():
    schema = {"type": "null"}
    for _ in range(5000):
        schema = {"anyOf": [schema]}
    with pytest.raises(ValueError, match="at most 64 deep"):
        Grammar.of_schema(schema, PIECES)


def test_exactly_the_tokens_that_go_on_with_a_text_are_left():
    rng = random.Random(3)
    words = [b"", b"ab", b"abc", b'"} {"', "한국\n".encode(), b"12", b"123450"]
    grammar = Grammar.of_rules("root ::= " + " | ".join(json.dumps(word.decode()) for word in words), PIECES)
    for _ in range(40):
        matcher, text, row = grammar.begin(), b"", np.empty(VOCAB, dtype=np.bool_)
        while True:
            matcher.forbid(row)
            goes_on = {i for i, piece in enumerate(PIECES) if piece and any(w.startswith(text + piece) for w in words)}
            assert {*(~row).nonzero()[0].tolist()} == goes_on | ({SPECIAL_IDS.end} if text in words else set())
            token = rng.choice(sorted({*(~row).nonzero()[0].tolist()}))
            if token == SPECIAL_IDS.end:
                break
            matcher.accept(token)
            text += PIECES[token]


# ---------------------------------------------------------------------------------------- decoder and engine


def make_decoder():
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 1, "heads": 2, "memory_width": 8, "num_experts": 2, "expert_width": 16}
    return MoEDecoder(VOCAB, shared_expert_width=0, **sizes).eval()


def make_rows(rows=6):
    g = torch.Generator().manual_seed(1)
    prompts = [[SPECIAL_IDS.en, SPECIAL_IDS.slot, *range(20, 20 + 2 * row), SPECIAL_IDS.answer] for row in range(rows)]
    slots = Slots(*torch.zeros(5, rows, dtype=torch.long))
    memory = Tokens(torch.randn(rows, 5, 8, generator=g), torch.ones(rows, 5, dtype=torch.bool))
    return Writing(torch.arange(rows), slots, Padded.of(prompts), None), memory


DRAWN = Sampling(200, temperature=1.0, seed=tuple(range(6)))


@pytest.mark.parametrize(
    "sampling", [Sampling(200), DRAWN, replace(DRAWN, top_p=0.8), Sampling(200, repetition_penalty=1.3)]
)
@pytest.mark.parametrize("pool", [{}, {"page_size": 2, "num_blocks": 140, "token_budget": 9, "max_sequences": 4}])
def test_an_untrained_decoder_writes_by_the_schema_alone_and_in_the_engine(sampling, pool):
    decoder, (writing, memory) = make_decoder(), make_rows()
    sampling = replace(sampling, grammar=Grammar.of_schema(SMALL, PIECES))
    expected = decoder.generate(writing, memory, sampling=sampling).rows()
    for row in expected:
        jsonschema.Draft202012Validator(SMALL).validate(json.loads(decode(row[:-1])))
        assert row[-1] == SPECIAL_IDS.end
    engine = Engine(decoder, **pool)
    got = engine.run(engine.requests(writing, memory, sampling=sampling))
    assert [list(each.ids) for each in got] == expected
    assert {each.finish for each in got} == {"end"}


def test_rows_with_and_without_grammars_run_side_by_side_as_if_alone():
    decoder, (writing, memory) = make_decoder(), make_rows()
    grammars = [None, Grammar.of_schema(SMALL, PIECES), Grammar.of_rules('root ::= "yes" | "no" " no"*', PIECES)]
    engine = Engine(decoder)
    rows = engine.requests(writing, memory, sampling=replace(DRAWN, max_new_tokens=24))
    rows = [replace(row, sampling=replace(row.sampling, grammar=grammars[i % 3])) for i, row in enumerate(rows)]
    together = engine.run(rows)
    assert [engine.run([row])[0].ids for row in rows] == [each.ids for each in together]
    free = decoder.generate(writing, memory, sampling=replace(DRAWN, max_new_tokens=24)).rows()
    assert [list(each.ids) for each in together[::3]] == free[::3]
    assert {decode(each.ids[:-1]).split()[0] for each in together[2::3]} <= {"yes", "no"}


def test_a_row_that_is_cut_says_so_and_is_the_beginning_of_a_whole_one():
    decoder, (writing, memory) = make_decoder(), make_rows()
    sampling = replace(DRAWN, grammar=Grammar.of_schema(SMALL, PIECES))
    engine = Engine(decoder)
    whole = engine.run(engine.requests(writing, memory, sampling=sampling))
    cut = engine.run(engine.requests(writing, memory, sampling=replace(sampling, max_new_tokens=5)))
    assert [each.ids for each in cut] == [each.ids[:5] for each in whole]
    assert {each.finish for each in cut} == {"length"}


def test_a_text_that_is_whole_is_ended_and_scores_are_the_models_own():
    grammar = Grammar.of_rules('root ::= "ab"', PIECES)
    matchers, ids = [grammar.begin()], []
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, SPECIAL_IDS.end] = -50.0
    while SPECIAL_IDS.end not in ids:
        mask = forbidden(matchers, VOCAB)
        token, score = choose(logits, sampling=Sampling(), draw=torch.zeros(1), forbidden=mask)
        assert score == logits.log_softmax(-1)[0, token]
        matchers[0].accept(int(token))
        ids.append(int(token))
    assert decode(ids[:-1]) == "ab"
    assert forbidden([None, None], VOCAB) is None
    assert not forbidden([None, grammar.begin()], VOCAB)[0].any()


class TestBadInput:
    def test_stop_strings_would_cut_the_text(self):
        with pytest.raises(ValueError, match=r"stop must be empty with a grammar, .* got \('}',\)"):
            Sampling(stop=("}",), grammar=Grammar.of_rules('root ::= "a"', PIECES))

    def test_a_grammar_for_another_vocabulary(self):
        grammar = Grammar.of_rules('root ::= "a"', [*PIECES, *[b"zz"] * (SPARE + 1)])
        decoder, (writing, memory) = make_decoder(), make_rows()
        message = f"grammar must be for at most the decoder's {VOCAB} ids, got {VOCAB + 1}"
        with pytest.raises(ValueError, match=message):
            decoder.generate(writing, memory, sampling=Sampling(grammar=grammar))
        engine = Engine(decoder)
        rows = engine.requests(writing, memory)
        with pytest.raises(ValueError, match=message):
            engine.run([*rows, replace(rows[0], sampling=Sampling(grammar=grammar))])
        assert not engine.scheduler.waiting

    @pytest.mark.parametrize("rules", ["", 'root ::= "a', 'root ::= "a" other', 'x ::= "a"', 'root ::= root "a"'])
    def test_rules_that_say_nothing(self, rules):
        with pytest.raises(ValueError, match="grammar: "):
            Grammar.of_rules(rules, PIECES)

    def test_a_vocabulary_that_cannot_spell(self):
        pieces = [b"" if piece == b"q" else piece for piece in PIECES]
        with pytest.raises(ValueError, match="every byte of the text as a token, got none for 0x71"):
            Grammar.of_schema(SMALL, pieces)

    def test_the_extra_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "xgrammar", None)
        with pytest.raises(ImportError, match=r"pip install 'mm-report\[grammar\]'"):
            Grammar.of_schema(SMALL, PIECES)


class Table:
    """A decoder whose next word depends on the last one and on the row."""

    def __init__(self):
        self.scores = 2 * torch.randn(2, VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))

    def logits(self, row):
        return self.scores[row[0], row[-1]]

    def step(self, ids, state):
        state = history(*((*row, token) for row, token in zip(state.rows, ids.tolist(), strict=True)))
        return torch.stack([self.logits(row) for row in state.rows]), state

    def start(self):
        state = history((0, 0), (1, 0))
        return torch.stack([self.logits(row) for row in state.rows]), state


def spellings(grammar, before=()):
    """Every list of tokens that a grammar allows."""
    matcher, row = grammar.begin(), np.empty(VOCAB, dtype=np.bool_)
    for token in before:
        matcher.accept(token)
    matcher.forbid(row)
    for token in (~row).nonzero()[0].tolist():
        if token == SPECIAL_IDS.end:
            yield [*before, token]
        else:
            yield from spellings(grammar, (*before, token))


def test_beams_find_the_best_text_of_a_grammar():
    grammar = Grammar.of_rules('root ::= "no" | "nab" | "bob" | "ban" "a"? | "ou"', PIECES)
    every, table = list(spellings(grammar)), Table()
    for length_penalty in (0.0, 1.0):
        got = beam_search(
            table, *table.start(), beams=60, max_new_tokens=8, length_penalty=length_penalty, grammar=grammar
        )
        for row, ids in enumerate(got.rows()):
            totals = []
            for spelling in every:
                each = [
                    table.logits((row, 0, *spelling[:i])).log_softmax(-1)[token] for i, token in enumerate(spelling)
                ]
                totals.append(float(sum(each)) / len(spelling) ** length_penalty)
            assert ids == every[totals.index(max(totals))]
    assert len(every) > 5


def test_one_beam_with_a_grammar_is_greedy_with_it_and_a_cut_one_is_a_beginning():
    grammar, table = Grammar.of_schema(SMALL, PIECES), Table()
    for most in (3, 200):
        expected = write(table, *table.start(), sampling=Sampling(most, grammar=grammar)).rows()
        assert beam_search(table, *table.start(), beams=1, max_new_tokens=most, grammar=grammar).rows() == expected
    logits, state = table.start()
    with pytest.raises(ValueError, match=f"grammar must be for at most the decoder's {VOCAB - SPARE - 1} ids"):
        beam_search(table, logits[:, : VOCAB - SPARE - 1], state, beams=1, max_new_tokens=3, grammar=grammar)
