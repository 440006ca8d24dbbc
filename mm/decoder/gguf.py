"""Models of llama.cpp: a GGUF file read into a `LanguageModel`, quantised weights made whole again.

Llama, Qwen3 and, by the names that llama.cpp's converter gives their tensors, Mixtral, OLMoE and Qwen3-MoE.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.decoder.gguf_config import Architecture, gguf_config
from mm.decoder.gguf_file import GgufHeader, GgufTensor, read_bytes, read_header
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.told import listed, short


@dataclass(frozen=True)
class GgufVocabulary:
    """The vocabulary of the model, as `tokenizer.ggml` has it; see `mm.data.gguf_tokenizer`."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


@dataclass(frozen=True)
class GgufModel:
    """A file that was looked at: what it holds fits together, no tensor is read yet."""

    path: Path
    architecture: Architecture
    config: LanguageConfig
    vocabulary: GgufVocabulary
    header: GgufHeader

    def read(self, *, dtype: torch.dtype = torch.float32) -> LanguageModel:
        """The model in evaluation mode, its parameters of a dtype.

        Raises:
            ValueError: The file was changed since.
        """
        with torch.device("meta"):
            model = LanguageModel(self.config)
        weights = {}
        for name in model.state_dict():
            try:
                parts = [self._tensor(theirs) for theirs in _names(name)]
            except ValueError as error:
                raise ValueError(f"{self.path.name}: {error}") from error
            weights[name] = self._turned(name, parts).to(dtype).contiguous()
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def _tensor(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self.header.tensors[name]
        found = dequantize(read_bytes(self.path, tensor), _kinds()(tensor.kind))
        return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32)).view(tensor.shape)

    def _turned(self, name: str, parts: list[Tensor]) -> Tensor:
        """Theirs as ours lie: experts by columns, heads of Llama in halves."""
        if name.endswith("experts.gate_up"):
            return torch.cat(parts, dim=1).transpose(1, 2)
        if name.endswith("experts.down"):
            return parts[0].transpose(1, 2)
        if self.architecture == "llama" and name.endswith(("attention.q.weight", "attention.k.weight")):
            # llama.cpp turns neighbours by rotary positions where the original turns one half with the other.
            rows, columns = parts[0].shape
            pairs = parts[0].reshape(-1, self.config.head_width // 2, 2, columns)
            return pairs.transpose(1, 2).reshape(rows, columns)
        return parts[0]


def open_gguf(path: Path | str) -> GgufModel:
    """Looks at a file and compares its tensors with its metadata.

    Raises:
        ValueError: It is no GGUF file, is damaged, or holds a model or a vocabulary that isn't read; the message
            names what.
        ImportError: The package gguf is missing.
        OSError: It can't be read.
    """
    path = Path(path)
    kinds, sizes = _kinds(), _sizes()
    try:
        header = read_header(path, sizes)
        architecture, config = gguf_config(header)
        wanted = _wanted(config)
        _compare(wanted, header.tensors)
        for kind in {tensor.kind for tensor in header.tensors.values()}:
            if not _known(kinds(kind)):
                raise ValueError(f"tensors of type {kinds(kind).name} are not read")
        return GgufModel(path, architecture, config, _vocabulary(header.metadata, config), header)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _kinds() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF needs gguf: pip install 'mm-report[gguf]'") from error
    return gguf.GGMLQuantizationType


def _sizes() -> dict[int, tuple[int, int]]:
    import gguf

    return {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}


def _known(kind: Any) -> bool:
    """Whether the package can make such a tensor whole; tried with one block of zeros."""
    import gguf
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _wanted(config: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the file's tensors."""
    with torch.device("meta"):
        model = LanguageModel(config)
    wanted: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.state_dict().items():
        shape = tuple(parameter.shape)
        if name.endswith("experts.gate_up"):
            shape = (shape[0], shape[2] // 2, shape[1])
        elif name.endswith("experts.down"):
            shape = (shape[0], shape[2], shape[1])
        wanted |= dict.fromkeys(_names(name), shape)
    return wanted


def _names(ours: str) -> tuple[str, ...]:
    """Of the tensors that make up one parameter."""
    whole = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    if not ours.startswith("layers."):
        return (whole.get(ours, ours),)
    _, index, name = ours.split(".", 2)
    parts = {
        "attention_norm.weight": ("attn_norm.weight",),
        "attention.out.weight": ("attn_output.weight",),
        "feed_forward_norm.weight": ("ffn_norm.weight",),
        "feed_forward.router.logits.weight": ("ffn_gate_inp.weight",),
        "feed_forward.experts.gate_up": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
        "feed_forward.experts.down": ("ffn_down_exps.weight",),
    }
    plain = name.replace("attention.", "attn_").replace("feed_forward.", "ffn_")
    return tuple(f"blk.{index}.{part}" for part in parts.get(name, (plain,)))


def _compare(wanted: dict[str, tuple[int, ...]], found: dict[str, GgufTensor]) -> None:
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or unknown:
        parts = [f"missing: {listed(missing)}"] if missing else []
        parts += [f"unsupported: {listed(unknown)}"] if unknown else []
        raise ValueError(f"tensors don't match the metadata; {'; '.join(parts)}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(f"{name} must have the shape {shape} by the metadata, got {found[name].shape}")


def _vocabulary(metadata: dict[str, Any], config: LanguageConfig) -> GgufVocabulary:
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model must be 'gpt2' (byte-level BPE), got {short(kind)}")
    pre = metadata.get("tokenizer.ggml.pre")
    tokens, types, merges = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    if not isinstance(pre, str) or not isinstance(tokens, list) or not isinstance(merges, list):
        raise ValueError("tokenizer.ggml must have pre, tokens and merges")
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise ValueError("tokenizer.ggml.token_type must have a number for each token")
    if len(tokens) > config.vocab_size:
        raise ValueError(f"tokenizer.ggml has {len(tokens)} tokens, token_embd.weight has {config.vocab_size} rows")
    return GgufVocabulary(pre, tokens, types.tolist(), merges)
