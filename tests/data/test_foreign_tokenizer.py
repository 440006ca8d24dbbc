"""Vocabularies of open models: the ids that the tokenizers library gives, and no way to a token that steers."""

import json
import pickle
import random
import time
from functools import cache
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from mm.data.foreign_splits import DEEPSEEK_V3, KNOWN, LLAMA3, QWEN
from mm.data.gguf_tokenizer import gguf_source
from mm.data.tokenizer import SPECIAL_IDS, SPECIALS, Tokenizer, import_tokenizer

TEXTS = [
    "No focal consolidation. The heart isn't enlarged; it's 12,345 mm on 2024-05-06.",
    "I'LL see   the  patient\r\n\r\n\tagain in 3 weeks  ",
    "右肺上叶见结节，直径约８ｍｍ。未见胸腔积液。 日本語のテキスト 한국어",
    "naïve café nai\u0308ve cafe\u0301 ½ ² 🙂🙂 – “quotes” … µg/ml",
    "def f(x):\n    return x**2  # comment\n\n\n\tif x: pass",
    "<|im_end|> <think>hidden</think> <s>[INST]</s> ▁ <0x0A>",
    "",
    " ",
    "   ",
    "\n",
]
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BLANKS = ["  ", "    ", "\t\t"]
# DeepSeek-V2 splits so; its class of letters is longer, and nothing but a class.
DEEPSEEK_V2 = ["[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+"]


def splits(*patterns: str, use_regex: bool = False, digits: bool = False) -> pre_tokenizers.PreTokenizer:
    parts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    parts += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def trained(
    pre_tokenizer: Any, *, normalizer: Any = None, ignore_merges: bool = False, byte_fallback: bool = False
) -> tokenizers.Tokenizer:
    """A vocabulary as a family makes it, from a few sentences."""
    made = tokenizers.Tokenizer(
        models.BPE(
            ignore_merges=ignore_merges, byte_fallback=byte_fallback, unk_token="<unk>" if byte_fallback else None
        )
    )
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    made.decoder = decoders.ByteLevel()
    alphabet = [] if byte_fallback else sorted(pre_tokenizers.ByteLevel.alphabet())
    front = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))] if byte_fallback else CONTROLS
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=front, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    made.train_from_iterator([text for text in TEXTS[:5] for _ in range(3)], trainer)
    if byte_fallback:  # only three of them are added tokens in the published files
        content = json.loads(made.to_str())
        content["added_tokens"] = content["added_tokens"][:3]
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return made


def neox() -> tokenizers.Tokenizer:
    made = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC())
    made.add_tokens([AddedToken(blank, normalized=True) for blank in BLANKS])
    return made


def llama2() -> tokenizers.Tokenizer:
    norms = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(None, normalizer=norms, byte_fallback=True)


def metaspace() -> tokenizers.Tokenizer:
    return trained(pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False), byte_fallback=True)


FAMILIES = {
    "gpt2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: trained(splits(digits=True, use_regex=True)),
    "olmoe": neox,
    "llama3": lambda: trained(splits(LLAMA3), ignore_merges=True),
    "qwen": lambda: trained(splits(QWEN), normalizer=normalizers.NFC()),
    "deepseek_v2": lambda: trained(splits(*DEEPSEEK_V2, digits=True)),
    # Published with the ends of lines themselves in its expressions.
    "deepseek_v3": lambda: trained(
        splits(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3.replace(r"\r", "\r").replace(r"\n", "\n"))
    ),
    "llama2": llama2,
    "mixtral as saved today": metaspace,
}
Pair = tuple[tokenizers.Tokenizer, Tokenizer]


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Theirs, and ours sealed from its file."""
    theirs = request.param()
    return theirs, import_tokenizer(theirs.to_str())


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    alphabet = "aeXz09 \t\n\r'.,<|>_-éµ中文。８▁\u0301\u00a0\u3000🙂\x00½"
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60)))


def plain(theirs: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids where no added token but white space is spelt."""
    return [10 + index for index in theirs.encode(text, add_special_tokens=False).ids]


def test_ordinary_texts_get_the_ids_of_the_library(pair: Pair) -> None:
    theirs, ours = pair
    for text in [*TEXTS[:5], *TEXTS[6:], *map(random_text, range(400))]:
        if "Metaspace" in str(theirs.pre_tokenizer) and text.startswith((" ", "▁")):
            continue  # to the library "a" and " a" are the same then; to us never
        assert ours.encode(text) == plain(theirs, text), repr(text)


def test_no_text_gives_a_token_that_steers(pair: Pair) -> None:
    theirs, ours = pair
    controls = [token for token in theirs.get_added_tokens_decoder().values() if not token.content.isspace()]
    ids = {10 + theirs.token_to_id(token.content) for token in controls}
    assert len(ids) >= 3
    spelt = [token.content for token in controls]
    for text in [*spelt, " ".join(spelt), "".join(spelt), "x" + "x".join(spelt), TEXTS[5], *SPECIALS]:
        found = ours.encode(text)
        assert ids.isdisjoint(found)
        assert min(found) >= 10
        assert ours.decode(found) == (text.replace("▁", " ") if theirs.model.byte_fallback else text)
    for index in ids:
        assert not ours.spells(index)
        assert ours.decode([*ours.encode("one"), index, *ours.encode("two")]).replace(" ", "") == "onetwo"


def test_texts_survive_the_round_trip(pair: Pair) -> None:
    theirs, ours = pair
    normal = theirs.normalizer.normalize_str if "NFC" in str(theirs.normalizer) else str
    written = " " if theirs.model.byte_fallback else "▁"  # SentencePiece has no other way to write a space
    for text in [*TEXTS, *map(random_text, range(400))]:
        assert ours.decode(ours.encode(text)) == normal(text).replace("▁", written)
    template = "A <size> nodule, <days> days."
    ids = ours.target(template)
    assert SPECIAL_IDS.size in ids
    assert ours.decode(ids) == template


def test_a_saved_file_and_a_pickle_give_the_same(pair: Pair, tmp_path) -> None:
    theirs, ours = pair
    ours.save(tmp_path / "tokenizer.json")
    for again in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(ours))):
        assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
        assert again.vocab_size == ours.vocab_size
        assert again.open_json() == theirs.to_str()


def test_ids_may_have_holes_and_added_tokens_lie_anywhere() -> None:
    content = json.loads(FAMILIES["qwen"]().to_str())
    content["model"]["vocab"] = {piece: 3 * index for piece, index in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["id"] *= 3
    sparse, dense = import_tokenizer(json.dumps(content)), import_tokenizer(FAMILIES["qwen"]().to_str())
    for text in TEXTS:
        assert sparse.encode(text) == [10 + 3 * (index - 10) for index in dense.encode(text)]
        assert sparse.decode(sparse.encode(text)) == dense.decode(dense.encode(text))
    assert sparse.decode([11, 12, 10_000]) == ""
    assert sparse.vocab_size - 10 == 3 * (dense.vocab_size - 11) + 1


def test_an_added_token_is_none_even_where_merges_would_make_it() -> None:
    content = json.loads(FAMILIES["gpt2"]().to_str())
    (word,) = [piece for piece in content["model"]["vocab"] if piece == "Ġthe"]
    token = {"id": content["model"]["vocab"][word], "content": word, "special": True}
    content["added_tokens"].append(token)
    for ignore_merges in (False, True):
        content["model"]["ignore_merges"] = ignore_merges
        sealed = import_tokenizer(json.dumps(content))
        ids = sealed.encode("see the patient")
        assert 10 + token["id"] not in ids
        assert sealed.decode(ids) == "see the patient"


def test_the_quicker_expression_matches_the_same() -> None:
    slow, quick = (pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (r"\s+$", KNOWN[r"\s+$"]))
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice(" \t\u3000\n\ra5.") for _ in range(rng.randint(0, 12)))
        assert slow.pre_tokenize_str(text) == quick.pre_tokenize_str(text), repr(text)


@pytest.mark.parametrize("family", ["llama3", "qwen", "deepseek_v2", "deepseek_v3", "olmoe", "llama2"])
def test_no_text_takes_more_than_linear_time(sealed: dict[str, Tokenizer], family: str) -> None:
    for unit in (" ", "\n ", "a", ".", "5", "\u0301", "　"):
        start = time.process_time()
        for end in ("5", "x"):
            sealed[family].encode(unit * 30_000 + end)
        assert time.process_time() - start < 2.0  # quadratic time is 5 s and more


@pytest.fixture(scope="module")
def sealed() -> dict[str, Tokenizer]:
    return {name: import_tokenizer(make().to_str()) for name, make in FAMILIES.items()}


@cache
def gpt2() -> str:
    return FAMILIES["gpt2"]().to_str()


def changed(**entries: Any) -> str:
    content = json.loads(gpt2())
    model = {name: value for name, value in entries.items() if name in content["model"]}
    content["model"] |= model
    return json.dumps(content | {name: value for name, value in entries.items() if name not in model})


def regex(pattern: str, **entries: Any) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | entries
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, last]}}


BAD: dict[str, tuple[str, str]] = {
    "no json": ("{", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "a list": ("[]", "no JSON object"),
    "unigram": (json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}), "must be BPE.*Unigram"),
    "no vocabulary": (changed(vocab={}, merges=[], added_tokens=[]), "ids must be"),
    "ids that are no numbers": (changed(vocab={"a": "0"}, merges=[]), "whole numbers"),
    "huge ids": (changed(vocab={"a": 2**40}, merges=[]), "whole numbers"),
    "negative ids": (changed(vocab={"a": -1}, merges=[]), "whole numbers"),
    "two tokens of one id": (changed(vocab={"a": 7, "b": 7}, merges=[]), "one id"),
    "a token of two ids": (changed(added_tokens=[{"id": 5, "content": "a"}]), "another id"),
    "an added token twice": (changed(added_tokens=[{"id": 900, "content": "<x>"}] * 2), "twice"),
    "an added token without id": (changed(added_tokens=[{"content": "<x>"}]), "an id and a content"),
    "merges of unknown tokens": (changed(merges=[["q", "\u2603"]]), "joins what is not"),
    "merges of three": (changed(merges=["a b c"]), "two tokens"),
    "merges that are numbers": (changed(merges=[1]), "two tokens"),
    "dropout": (changed(dropout=0.1), "dropout"),
    "a suffix": (changed(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "a foreign normalizer": (changed(normalizer={"type": "Lowercase"}), "normalizer must be NFC.*Lowercase"),
    "a foreign pre-tokenizer": (
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel"}]}),
        "Split, Digits or ByteLevel.*Whitespace",
    ),
    "no pre-tokenizer": (changed(pre_tokenizer=None), "end with ByteLevel"),
    "a prefix space": (changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "add_prefix_space"),
    "an expression that backtracks": (changed(**regex(r"(a+)+$")), "unknown regular expression"),
    "a class of classes": (changed(**regex("[a-z&&[aeiou]]+")), "unknown regular expression"),
    "a class that is none": (changed(**regex("[z-a]+")), "refuses it"),
    "a long expression": (changed(**regex(f"[{'a' * 5000}]+")), "unknown regular expression"),
    "a split that removes": (changed(**regex(LLAMA3, behavior="Removed")), "isolated Regex"),
    "an inverted split": (changed(**regex(LLAMA3, invert=True)), "isolated Regex"),
    "splits without end": (
        changed(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}] * 20 + [{"type": "ByteLevel"}]}
        ),
        "at most 16 splits",
    ),
    "white space without end": (
        changed(
            added_tokens=[{"id": 1000 + place, "content": " " * place} for place in range(2, 257)]
            + [{"id": 2000 + place, "content": "\t" * place} for place in range(2, 9)]
        ),
        "at most 256 added tokens of white space",
    ),
    "bytes missing": (changed(byte_fallback=True), "256 tokens"),
    "half a character": (changed(vocab={"\ud800": 7}, merges=[]), "codec can't encode"),
}


@pytest.mark.parametrize(("source", "match"), BAD.values(), ids=BAD)
def test_what_is_not_known_is_refused(source: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        import_tokenizer(source)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"version": 2, "source": "{}"}, "format version 2; this version of mm reads 1"),
        ({"version": 1, "source": "{}"}, "written by `mm import-decoder`: no JSON object with a model"),
        ({"version": 1}, "written by `mm import-decoder`"),
    ],
)
def test_a_changed_file_of_ours_is_refused(content: dict[str, Any], match: str, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"format": "mm foreign tokenizer"} | content))
    with pytest.raises(ValueError, match=match):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("pre", "family"),
    [("gpt-2", "gpt2"), ("smollm", "smollm"), ("llama-bpe", "llama3"), ("qwen2", "qwen"), ("olmo", "olmoe")],
)
def test_a_vocabulary_in_gguf_is_the_one_it_was_made_from(pre: str, family: str, sealed: dict[str, Tokenizer]) -> None:
    content = json.loads(sealed[family].open_json())
    ids = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    special = {token["content"]: token.get("special") for token in content["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    # llama.cpp's numbers: 1 normal, 3 control, 4 defined by the user
    types = [1 if token not in special else 3 if special[token] else 4 for token in tokens]
    merges = [" ".join(merge) for merge in content["model"]["merges"]]
    ours = import_tokenizer(gguf_source(pre=pre, tokens=tokens, types=types, merges=merges))
    for text in [*TEXTS, *map(random_text, range(100))]:
        assert ours.encode(text) == sealed[family].encode(text)
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre must be one of gpt-2.*got 'magic'"):
        gguf_source(pre="magic", tokens=tokens, types=types, merges=merges)
    with pytest.raises(ValueError, match="two tokens are the same"):
        gguf_source(pre=pre, tokens=[*tokens, tokens[-1]], types=[*types, 1], merges=merges)
    with pytest.raises(ValueError, match="token types"):
        gguf_source(pre=pre, tokens=tokens, types=types[1:], merges=merges)
