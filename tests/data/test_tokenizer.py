import json
import pickle
from pathlib import Path

import pytest

import mm
from mm.data.tokenizer import MIN_VOCAB_SIZE, PLACEHOLDERS, SPECIAL_IDS, SPECIALS, Tokenizer, train_tokenizer

TEXTS = [
    "A <size> solid nodule in the <side> lung, <days> days after the last study.",
    "Impression: <findings>.",
    "<side>肺见<size>结节，较前增大。",
    "No focal consolidation. 未见胸腔积液。",
] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=400)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "右肺上叶见结节，直径约８ｍｍ。",
        "two  spaces\n\ttab ",
        "é 🙂 \x00 \ufeff",
        "<size><side> a<days>b <findings>.",
        "<END>",
    ],
)
def test_text_survives_the_round_trip_as_text_and_as_template(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_template(text)) == text
    assert tokenizer.decode(tokenizer.target(text)) == text


def test_no_text_of_a_user_produces_a_special(tokenizer):
    hostile = "".join(SPECIALS) + " <end> <<end>> <e<end>nd> \u200b<slot>" + "<end>" * 50
    assert min(tokenizer.encode(hostile)) >= len(SPECIALS)
    assert tokenizer.decode(tokenizer.encode(hostile)) == hostile
    prompt = tokenizer.prompt("en", hostile)
    assert prompt[:2] == [SPECIAL_IDS.en, SPECIAL_IDS.slot]
    assert prompt[-1] == SPECIAL_IDS.answer
    assert min(prompt[2:-1]) >= len(SPECIALS)


def test_hostile_training_text_gives_no_way_to_a_special_either():
    trained = train_tokenizer(["<end><slot> <pad>"] * 100, vocab_size=400)
    assert min(trained.encode("<end><slot> <pad>")) >= len(SPECIALS)


def test_templates_produce_placeholders_and_nothing_else(tokenizer):
    ids = tokenizer.encode_template("".join(SPECIALS))
    assert [index for index in ids if index < len(SPECIALS)] == list(PLACEHOLDERS.values())
    assert tokenizer.target("<size>") == [SPECIAL_IDS.size, SPECIAL_IDS.end]


def test_decoding_stops_at_the_end_and_leaves_control_ids_out(tokenizer):
    words = tokenizer.encode("nodule")
    assert tokenizer.decode([*tokenizer.prompt("zh"), *words, SPECIAL_IDS.end, *words]) == "nodule"
    assert tokenizer.decode([*words, 5000]) == "nodule"


def test_a_file_holds_the_whole_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    again = pickle.loads(pickle.dumps(tokenizer))
    for text in TEXTS:
        assert loaded.encode(text) == again.encode(text) == tokenizer.encode(text)
    assert loaded.vocab_size == tokenizer.vocab_size


def test_the_same_texts_in_any_order_give_the_same_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "first")
    train_tokenizer(reversed(TEXTS), vocab_size=400).save(tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_vocabulary_is_bounded_and_ids_stay_inside():
    for size in (MIN_VOCAB_SIZE, 300, 4000):
        trained = train_tokenizer(TEXTS, vocab_size=size)
        assert trained.vocab_size <= size
        assert max(max(trained.encode(text)) for text in TEXTS) < trained.vocab_size
    with pytest.raises(ValueError, match=r"vocab_size must be at least 266.*got 265"):
        train_tokenizer(TEXTS, vocab_size=265)


@pytest.mark.parametrize("content", ["no json", "[]", "{}", json.dumps({"added_tokens": [{"id": 0}]})])
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "foreign.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"foreign\.json is not a vocabulary"):
        Tokenizer.load(path)


def merged(content: dict, **model: object) -> dict:
    return content | {"model": content["model"] | model}


BROKEN = {
    "a prefix space": (lambda c: c | {"pre_tokenizer": c["pre_tokenizer"] | {"add_prefix_space": True}}, "another way"),
    "no words": (lambda c: c | {"pre_tokenizer": c["pre_tokenizer"] | {"use_regex": False}}, "another way"),
    "dropout": (lambda c: merged(c, dropout=0.5), "has a dropout"),
    "a suffix": (lambda c: merged(c, end_of_word_suffix="</w>"), "has a end_of_word_suffix"),
    "ids of text": (lambda c: merged(c, vocab={t: str(i) for t, i in c["model"]["vocab"].items()}), "ids are not"),
    "ids of truth": (lambda c: merged(c, vocab={"a": False, "b": True}, merges=[]), "ids are not"),
    "huge ids": (lambda c: merged(c, vocab={"a": 2**70}, merges=[]), "ids are not"),
    "half a character": (lambda c: merged(c, vocab={"\ud800": 0}, merges=[]), "half a character"),
    "an empty merge": (lambda c: merged(c, vocab={"a": 0, "": 1}, merges=[["", "a"]]), "a merge joins"),
    "an unknown merge": (lambda c: merged(c, vocab={"a": 0, "b": 1}, merges=["a b"]), "a merge joins"),
    "numbers for merges": (lambda c: merged(c, merges=[3]), "a merge joins"),
}


@pytest.mark.parametrize(("change", "match"), BROKEN.values(), ids=BROKEN)
def test_what_the_library_would_not_take_is_refused_before_it(tokenizer, change, match, tmp_path):
    path = tmp_path / "broken.json"
    tokenizer.save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=rf"broken\.json is not a vocabulary.*{match}"):
        Tokenizer.load(path)


def test_a_file_is_written_again_as_it_was(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "first")
    for file in (tmp_path / "first", Path(mm.__file__).parent / "checkpoints" / "default" / "tokenizer.json"):
        Tokenizer.load(file).save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_pieces_are_the_bytes_of_the_ids(tokenizer):
    pieces = tokenizer.pieces()
    assert len(pieces) == tokenizer.vocab_size
    assert not any(pieces[: len(SPECIALS)])
    assert {piece for piece in pieces if len(piece) == 1} == {bytes([byte]) for byte in range(256)}
    for text in ("右肺上叶见 12 mm 结节。 <size>\n", "A left effusion.", "\x00\x7f\xa0\xad ÿ 🫁 한"):
        assert b"".join(pieces[index] for index in tokenizer.encode(text)) == text.encode()
