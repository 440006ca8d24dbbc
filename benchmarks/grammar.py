"""Constrained decoding: how many texts keep the schema of the report's answers, and what a token costs.

python benchmarks/grammar.py

One thread, process time. A token's cost is all that the grammar adds to it: the mask, the mask onto the logits, and the
step on. Logits are random, then those of a decoder that has learnt nothing; jsonschema judges every text. The larger
vocabulary is made up: 49,152 ids, as SmolLM2 has.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import jsonschema
import torch

import mm
from mm.batch import SPECIAL_IDS, Padded, Slots, Tokens, Writing
from mm.data.tokenizer import Tokenizer
from mm.decoder.decoder import MoEDecoder
from mm.decoder.engine import Engine
from mm.decoder.generate import Sampling, choose
from mm.decoder.grammar import Grammar, forbidden
from mm.report.answer import findings_schema

TEXTS, MOST, ROUNDS = 1000, 4096, 5
SCHEMA = findings_schema()
SCHEMA["properties"]["findings"]["minItems"] = 1  # half of the texts would be an empty list
VALID = jsonschema.Draft202012Validator(SCHEMA)


def made_up(size: int) -> list[bytes]:
    """All bytes, and distinct tokens of two to eight letters, digits and marks of JSON."""
    rng = random.Random(0)
    pieces = [b""] * 10 + [bytes([byte]) for byte in range(256)]
    joined = dict.fromkeys(
        bytes(rng.choices(b'aceilmnorstu {}[]",:_0123456789.-', k=rng.randint(2, 8))) for _ in range(2 * size)
    )
    return [*pieces, *list(joined)[: size - len(pieces)]]


def is_valid(pieces: list[bytes], ids: list[int]) -> bool:
    """Whether a row has ended, and is JSON of the schema."""
    if ids[-1] != SPECIAL_IDS.end:
        return False
    try:
        return VALID.is_valid(json.loads(b"".join(pieces[token] for token in ids).decode()))
    except ValueError:
        return False


def from_random_logits(grammar: Grammar, generator: torch.Generator) -> list[int]:
    matcher, ids, none = grammar.begin(), [], torch.zeros(1)
    while len(ids) < MOST and ids[-1:] != [SPECIAL_IDS.end]:
        logits = torch.randn(1, grammar.vocab_size, generator=generator)
        chosen, _ = choose(logits, sampling=Sampling(), draw=none, forbidden=forbidden([matcher], grammar.vocab_size))
        ids.append(int(chosen))
        matcher.accept(ids[-1])
    return ids


def microseconds(grammar: Grammar, texts: list[list[int]]) -> float:
    """Of a token, over all tokens of some texts that are written again."""
    logits, tokens = torch.zeros(1, grammar.vocab_size), sum(map(len, texts))
    start = time.process_time()
    for ids in texts:
        matcher = grammar.begin()
        for token in ids:
            mask = forbidden([matcher], grammar.vocab_size)
            assert mask is not None
            logits.masked_fill_(mask, -torch.inf)
            matcher.accept(token)
    return (time.process_time() - start) / tokens * 1e6


def random_logits(pieces: list[bytes]) -> dict[str, object]:
    start = time.process_time()
    grammar = Grammar.of_schema(SCHEMA, pieces)
    compiled = time.process_time() - start
    generator = torch.Generator().manual_seed(0)
    texts = [from_random_logits(grammar, generator) for _ in range(TEXTS)]
    costs = [microseconds(grammar, texts[: TEXTS // 10]) for _ in range(ROUNDS)]
    return {
        "vocabulary": len(pieces),
        "valid": sum(is_valid(pieces, ids) for ids in texts),
        "of": TEXTS,
        "tokens": sum(map(len, texts)),
        "longest": max(map(len, texts)),
        "different": len({tuple(ids) for ids in texts}),
        "compile_s": round(compiled, 3),
        "us_per_token": round(statistics.median(costs), 1),
        "us_per_token_worst_round": round(max(costs), 1),
    }


def untrained(pieces: list[bytes]) -> dict[str, object]:
    """The engine with sixteen rows at a time, each with a seed of its own."""
    torch.manual_seed(0)
    sizes = {"width": 48, "depth": 1, "heads": 2, "num_experts": 4, "expert_width": 32, "shared_expert_width": 0}
    decoder = MoEDecoder(len(pieces), **sizes).eval()
    prompts = Padded.of([[SPECIAL_IDS.en, SPECIAL_IDS.slot]] * TEXTS)
    writing = Writing(torch.arange(TEXTS), Slots(*torch.zeros(5, TEXTS, dtype=torch.long)), prompts, None)
    memory = Tokens(torch.randn(TEXTS, 4, 48), torch.ones(TEXTS, 4, dtype=torch.bool))
    grammar = Grammar.of_schema(SCHEMA, pieces)
    sampling = Sampling(MOST, temperature=1.0, seed=tuple(range(TEXTS)), grammar=grammar)
    engine = Engine(decoder, num_blocks=4096)
    done = engine.run(engine.requests(writing, memory, sampling=sampling))
    return {
        "vocabulary": len(pieces),
        "valid": sum(is_valid(pieces, list(each.ids)) for each in done),
        "of": TEXTS,
        "tokens": sum(len(each.ids) for each in done),
        "longest": max(len(each.ids) for each in done),
        "different": len({each.ids for each in done}),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    assert mm.__file__ is not None
    shipped = Tokenizer.load(Path(mm.__file__).parent / "checkpoints" / "default" / "tokenizer.json")
    Grammar.of_rules('root ::= "a"', shipped.pieces())  # xgrammar is imported before anything is timed
    print(
        json.dumps(
            {
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "random_logits": [random_logits(shipped.pieces()), random_logits(made_up(49152))],
                "untrained_decoder": untrained(shipped.pieces()),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
