"""The vocabulary that a pretrained text tower brings: texts, limits, its place in tokenizer.json, hostile files."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest

from mm.batch import SPECIAL_IDS, Sample
from mm.data.collate import collate
from mm.data.text_vocabulary import ClipVocabulary, WordPiece, open_vocabulary, read_content
from mm.data.tokenizer import Tokenizer, train_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "no", "nodule", "##s", "left", "患", "cafe", ".", "[", "]", "sep"]


def vocabulary(**changes: Any) -> WordPiece:
    settings = {"lowercase": True, "strip_accents": None, "split_chinese": True, "limit": 8} | changes
    return WordPiece(settings.pop("words", WORDS), **settings)


def ours() -> Tokenizer:
    return train_tokenizer(["no nodules on the left"] * 3, vocab_size=300)


def test_words_pieces_accents_and_chinese() -> None:
    got = [WORDS[index] for index in vocabulary().ids("No nodules. Café 患?")]
    assert got == ["[CLS]", "no", "nodule", "##s", ".", "cafe", "患", "[UNK]", "[SEP]"]


def test_no_text_can_write_a_special() -> None:
    assert [WORDS[index] for index in vocabulary().ids("[SEP]")] == ["[CLS]", "[", "sep", "]", "[SEP]"]


def test_a_long_text_is_cut_before_its_end() -> None:
    for words in (vocabulary(), ClipVocabulary(limit=8)):
        whole, cut = words.ids("no nodule " * 9), words.encode("no nodule " * 9, 6)
        assert cut == [*whole[:5], whole[-1]]
        assert len(words.encode("no nodule " * 9, 100)) == 8


def test_open_clips_words_are_open_clips() -> None:
    lines = ["A chest radiograph, 5 mm!", "", "naïve café 患者", "nodule " * 100]
    theirs = open_clip.get_tokenizer("ViT-B-32")(lines)
    for line, row in zip(lines, theirs.tolist(), strict=True):
        mine = ClipVocabulary(limit=77).encode(line, 1000)
        assert mine == row[: len(mine)]
        assert not any(row[len(mine) :])


@pytest.mark.parametrize("words", [vocabulary(), ClipVocabulary(limit=77)], ids=["wordpiece", "open_clip"])
def test_both_vocabularies_are_kept_in_one_file(tmp_path: Path, words: WordPiece | ClipVocabulary) -> None:
    both, text = ours().with_texts(words), "No nodules. <end>"
    both.save(tmp_path / "tokenizer.json")
    opened = Tokenizer.load(tmp_path / "tokenizer.json")
    assert opened.encode_whole(text, 50) == both.encode_whole(text, 50) == words.encode(text, 50)
    assert opened.encode(text) == ours().encode(text)
    assert (opened.vocab_size, opened.texts_size) == (ours().vocab_size, words.size)
    opened.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_only_whole_texts_are_split_with_it() -> None:
    both = ours().with_texts(vocabulary())
    batch = collate([Sample("s", text="no nodule")], both, rows=())
    assert batch.text is not None
    assert batch.text.values.tolist() == [[2, 4, 5, 3]]
    alone = collate([Sample("s", text="no nodule")], ours(), rows=()).text
    assert alone is not None
    assert alone.values.tolist() == [[*ours().encode("no nodule"), SPECIAL_IDS.end]]
    assert both.prompt("en", "no nodule") == ours().prompt("en", "no nodule")


def test_a_folders_settings_are_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "No"]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = open_vocabulary(str(tmp_path), limit=9)
    assert isinstance(cased, WordPiece)
    assert not cased.lowercase
    assert cased.ids("No")[1] == len(WORDS)
    (tmp_path / "vocab.txt").unlink()
    fast = {"normalizer": {"type": "BertNormalizer", "lowercase": True}, "model": {"type": "WordPiece"}}
    fast["model"]["vocab"] = {word: index for index, word in enumerate(WORDS)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    read = open_vocabulary(str(tmp_path), limit=9)
    assert read.ids("No nodules") == vocabulary().ids("No nodules")
    fast["model"]["type"] = "BPE"
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    with pytest.raises(ValueError, match="must be BERT's"):
        open_vocabulary(str(tmp_path), limit=9)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it must have from 3"):
        open_vocabulary(str(tmp_path), limit=9)


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"kind": "other", "limit": 5},
        {"kind": "open_clip"},
        {"kind": "open_clip", "limit": 10**9},
        {"kind": "open_clip", "limit": 8, "bpe_path": "/etc/passwd"},
        {"kind": "wordpiece", "limit": 8},
        vocabulary().content() | {"words": WORDS[4:]},
        vocabulary().content() | {"words": [*WORDS, "no"]},
        vocabulary().content() | {"words": [*WORDS, 5]},
        vocabulary().content() | {"words": [*WORDS, "x" * 10_000]},
        vocabulary().content() | {"words": {"no": 1}},
        vocabulary().content() | {"lowercase": "yes"},
        vocabulary().content() | {"strip_accents": 3},
        vocabulary().content() | {"limit": "8"},
    ],
)
def test_hostile_vocabularies_are_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ValueError, match="text vocabulary"):
        read_content(content)
    ours().save(tmp_path / "tokenizer.json")
    whole = json.loads((tmp_path / "tokenizer.json").read_text()) | {"texts": content}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a vocabulary"):
        Tokenizer.load(tmp_path / "tokenizer.json")
