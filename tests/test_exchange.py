"""Open models in and out: the same logits at shifted ids, weights byte for byte, and what can't be read is said."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from mm.batch import SPECIAL_IDS
from mm.cli import main
from mm.data.tokenizer import Tokenizer
from mm.decoder.folder import read_decoder
from mm.decoder.imported import upcycled
from mm.exchange import import_decoder

transformers = pytest.importorskip("transformers")
NUM = 10
TEXTS = ["No focal consolidation. The heart isn't enlarged.", "右肺上叶见结节，直径约８ｍｍ。"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
DEEP = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "olmoe": ("Olmoe", EXPERTS),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS | {"moe_intermediate_size": 24, "head_dim": 16}),
    "deepseek v2": ("DeepseekV2", DEEP | {"topk_method": "greedy"}),
    "deepseek v3": ("DeepseekV3", DEEP | {"n_group": 2, "topk_group": 1}),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()  # what others have written so far
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, output.out, output.err


def words() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def save(folder: Path, kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A random model of theirs and a vocabulary, in a folder; the embedding has spare rows."""
    torch.manual_seed(0)
    made = words()
    config = getattr(transformers, f"{kind}Config")(
        **SIZES | {"vocab_size": made.get_vocab_size() + 12, "eos_token_id": [1, 0]} | settings
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if "norm" in name else torch.randn_like(parameter) * 0.2)
    model = model.to(dtype)
    model.save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    return model


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_import_keeps_the_model_and_export_gives_it_back(
    kind: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = save(tmp_path / "theirs", kind, settings)
    code, out, err = run(capsys, "import-decoder", tmp_path / "theirs", "-o", tmp_path / "ours")
    assert (code, err) == (0, "")
    assert theirs.config.model_type in out
    assert f"{sum(p.numel() for p in read_decoder(tmp_path / 'ours')[0].parameters()):,} parameters" in out
    assert f"folder: {tmp_path / 'ours'}" in out
    ours, file = read_decoder(tmp_path / "ours")
    tokenizer = Tokenizer.load(file)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == [NUM + index for index in words().encode(text).ids]
        with torch.no_grad():
            expected = theirs(torch.tensor([ids]) - NUM).logits
            found = ours(torch.tensor([ids])).logits
        torch.testing.assert_close(found[..., NUM:], expected, atol=1e-5, rtol=1e-5)
        # <end> is as likely as the model's own end of text was, the first of the two
        torch.testing.assert_close(found[..., SPECIAL_IDS.end], expected[..., 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[..., SPECIAL_IDS.pad], expected.mean(-1), atol=1e-5, rtol=1e-5)
    assert ours.config.end_ids == (SPECIAL_IDS.end, NUM + 1, NUM)
    assert tokenizer.decode([*tokenizer.encode("a"), NUM + 1, *tokenizer.encode("b")]) == "ab"

    code, out, _ = run(capsys, "export-decoder", tmp_path / "ours", "-o", tmp_path / "again")
    assert code == 0
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "theirs/tokenizer.json").read_bytes()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert again.config.eos_token_id == [1, 0]
    with torch.no_grad():
        assert torch.equal(again(torch.tensor([[5, 6, 7]])).logits, theirs(torch.tensor([[5, 6, 7]])).logits)
    again_words = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again_words(TEXTS[0])["input_ids"] == words().encode(TEXTS[0]).ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path / "theirs", "Llama", {}, dtype)
    import_decoder(tmp_path / "theirs", tmp_path / "ours")
    assert {parameter.dtype for parameter in read_decoder(tmp_path / "ours")[0].parameters()} == {dtype}
    import_decoder(tmp_path / "theirs", tmp_path / "wide", dtype="float32")
    assert {parameter.dtype for parameter in read_decoder(tmp_path / "wide")[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(("kind", "family"), [("Llama", "mixtral"), ("Qwen3", "qwen3_moe")])
def test_an_upcycled_model_equals_its_parent(
    kind: str, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = save(tmp_path / "theirs", kind, {"head_dim": 8})
    code, out, _ = run(capsys, "import-decoder", tmp_path / "theirs", "-o", tmp_path / "ours", "--experts", "4")
    assert code == 0
    assert "4 experts, 2 a token" in out
    ours, _ = read_decoder(tmp_path / "ours")
    ids = torch.randint(NUM, 300, (3, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits[..., NUM:], theirs(ids - NUM).logits, atol=1e-5, rtol=1e-5)
    assert {len(routing.load) for routing in ours(ids).routings} == {4}
    code, _, _ = run(capsys, "export-decoder", tmp_path / "ours", "-o", tmp_path / "again")
    assert code == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert again.config.model_type == family
    with torch.no_grad():
        torch.testing.assert_close(again(ids - NUM).logits, theirs(ids - NUM).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="upcycling starts from a dense model, this one has 4 experts"):
        upcycled(ours, num_experts=8)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save(folder, "Llama", {})
    return folder


def edit(folder: Path, **entries: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | entries))


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def rename(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.magic.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spell_the_end(folder: Path) -> None:
    edit(folder, eos_token_id=words().token_to_id("a"))


def narrow(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, vocab_size=100)


BAD = {
    "no folder": (shutil.rmtree, "must be a Hugging Face folder .* or a .gguf file"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "must be a Hugging Face folder .* or a .gguf file"),
    "an unknown family": (
        lambda f: edit(f, model_type="mamba"),
        "model_type must be one of llama, qwen3, olmoe, mixtral.* got 'mamba'",
    ),
    "cut weights": (cut, r"model\.safetensors: not a safetensors file, or cut short"),
    "tensors of other names": (
        rename,
        r"missing: model\.layers\.0\.mlp\.up_proj\.weight; unsupported: model\.layers\.0\.magic\.weight",
    ),
    "no vocabulary": (lambda f: (f / "tokenizer.json").unlink(), r"holds no tokenizer\.json"),
    "a vocabulary of another kind": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}'),
        r"tokenizer\.json: its model must be BPE with a vocab, got 'WordPiece'",
    ),
    "a vocabulary that is no text": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), r"tokenizer\.json: "),
    "more tokens than rows": (narrow, "tokens, the model rows for 100"),
    "an end that a text can spell": (spell_the_end, "ends a text, and a text can spell it"),
    "an end that is no token": (lambda f: edit(f, eos_token_id=5000), "end_ids must be below vocab_size"),
}


@pytest.mark.parametrize(("spoil", "match"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_said_in_one_line_and_nothing_is_written(
    spoil: Any, match: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llama, tmp_path / "bad")
    spoil(tmp_path / "bad")
    code, out, err = run(capsys, "import-decoder", tmp_path / "bad", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("mm: ")
    assert re.search(match, err), err
    assert {file.name for file in tmp_path.iterdir()} <= {"bad"}


def test_nothing_is_overwritten(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for verb, path in (("import-decoder", llama), ("export-decoder", llama)):
        code, _, err = run(capsys, verb, path, "-o", tmp_path / "full")
        assert code == 2
        assert "must be a new or empty folder" in err
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    code, _, err = run(capsys, "export-decoder", llama, "-o", tmp_path / "out")
    assert code == 2
    assert "`mm import-decoder` makes such a folder" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(capsys, "import-decoder", llama, "-o", tmp_path / "out", "--experts", "1")
    assert code == 2
    assert "experts_per_token" in err


def test_bfloat16_rounds_the_weights_and_not_the_bias_that_experts_are_chosen_by(tmp_path: Path) -> None:
    kind, settings = CASES["deepseek v3"]
    save(tmp_path / "theirs", kind, settings)
    file, name = tmp_path / "theirs" / "model.safetensors", "model.layers.1.mlp.gate.e_score_correction_bias"
    weights = load_file(file)
    assert weights[name].dtype == torch.float32
    weights[name] = torch.linspace(0.5001, 0.5004, len(weights[name]))
    save_file(weights, file, metadata={"format": "pt"})
    import_decoder(tmp_path / "theirs", tmp_path / "ours", dtype="bfloat16")
    model, _ = read_decoder(tmp_path / "ours")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    bias = model.state_dict()["layers.1.feed_forward.router.selection_bias"]
    assert torch.equal(bias, weights[name])
    assert len(bias.bfloat16().unique()) == 1
