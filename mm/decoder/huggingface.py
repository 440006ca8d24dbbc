"""Weights of the open language models: a Hugging Face folder (config.json and safetensors) read and written.

Only safetensors is read, never a pickle. Names and shapes of every tensor are compared with what config.json asks
for before anything is allocated.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm.decoder.huggingface_config import Family, config_entries, family_of, read_config, read_json
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
LARGEST_INDEX: Final = 2**26
DTYPES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TOLD: Final = 5
"""So many names of wrong tensors stand in an error."""


@dataclass(frozen=True)
class _Entry:
    """One parameter of ours and the tensors on disk that it is made of.

    "same": one tensor as it is. "gate_up": of every expert gate [f D], then up [f D], to [E D 2f]. "down": of every
    expert [D f], to [E f D].
    """

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["same", "gate_up", "down"] = "same"

    def shape(self, parameter: Tensor) -> list[int]:
        """Of each tensor on disk."""
        if self.kind == "same":
            return list(parameter.shape)
        _, rows, columns = parameter.shape
        return [columns // 2, rows] if self.kind == "gate_up" else [columns, rows]

    def join(self, tensors: Iterator[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Ours from theirs, one tensor in memory beside it at a time."""
        if self.kind == "same":
            return next(tensors).clone()  # what safetensors gives lies in the file, which another may cut short
        whole = torch.empty(like.shape, dtype=dtype)
        parts = whole.chunk(2, dim=-1) if self.kind == "gate_up" else (whole,)
        for expert in range(len(whole)):
            for part in parts:
                part[expert] = next(tensors).T
        return whole

    def split(self, parameter: Tensor) -> dict[str, Tensor]:
        """Theirs from ours."""
        if self.kind == "same":
            return {self.theirs[0]: parameter.contiguous()}
        parts = parameter.chunk(2, dim=-1) if self.kind == "gate_up" else (parameter,)
        tensors = (part[expert].T.contiguous() for expert in range(len(parameter)) for part in parts)
        return dict(zip(self.theirs, tensors, strict=True))


def read_language_model(folder: Path | str) -> LanguageModel:
    """A Llama, Qwen3, OLMoE, Mixtral or Qwen3-MoE model, in evaluation mode and in the precision it lies in.

    Args:
        folder: With config.json and model.safetensors, or the shards that model.safetensors.index.json names.

    Raises:
        ValueError: An unknown family, an unsupported setting, or files that are damaged or don't hold the tensors
            that config.json asks for; the message names them.
        OSError: A file can't be read.
    """
    folder = Path(folder)
    family, config = read_config(folder / "config.json")
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for name in _shards(folder):
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{name}: not a safetensors file, or cut short") from error
            twice = found.keys() & set(file.keys())
            if twice:
                raise ValueError(f"{name}: tensors stand in two files: {_told(twice)}")
            found |= dict.fromkeys(file.keys(), file)
        least = config.depth + 3 * config.num_experts * (config.depth - len(config.dense_layers))
        if least > len(found):
            raise ValueError(f"config.json asks for more than {least} tensors, the files hold {len(found)}")
        with torch.device("meta"):
            model = LanguageModel(config)
        parameters = dict(model.named_parameters())
        entries = list(_entries(config, family))
        dtype = _check(entries, parameters, found)
        weights = {}
        for entry in entries:
            tensors = (found[name].get_tensor(name) for name in entry.theirs)
            weights[entry.ours] = entry.join(tensors, parameters[entry.ours], dtype)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def write_language_model(model: LanguageModel, folder: Path | str) -> None:
    """Writes config.json and model.safetensors as transformers names and stores them; the family follows from both.

    Args:
        model: Of a family that `read_language_model` reads.
        folder: Made if need be; files of these names are replaced.

    Raises:
        ValueError: No published family computes such a model, its parameters are of several dtypes, or the folder
            holds shards of another model.
        OSError: It can't be written.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise ValueError(f"{folder.name} holds {INDEX} of a sharded model; choose another folder")
    parameters = dict(model.named_parameters())
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters.values()})
    if len(dtypes) != 1 or dtypes[0] not in DTYPES.values():
        raise ValueError(f"parameters must be of one dtype of {', '.join(DTYPES.values())}, got {', '.join(dtypes)}")
    settings = config_entries(model.config, dtype=dtypes[0])
    tensors: dict[str, Tensor] = {}
    for entry in _entries(model.config, family_of(model.config)):
        tensors |= entry.split(parameters[entry.ours].detach().cpu())
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{WEIGHTS}.part"
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(folder / WEIGHTS)
        part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        part.replace(folder / "config.json")
    finally:
        part.unlink(missing_ok=True)


def _shards(folder: Path) -> list[str]:
    """Names of the weight files, all directly in the folder."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder.name} must hold {WEIGHTS} or {INDEX}; other formats are not read")
    places = read_json(folder / INDEX, most=LARGEST_INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{INDEX}: weight_map must give a file for every tensor")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX}: shards must be safetensors files in the folder itself, got {name[:60]!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{INDEX}: {name[:60]} is missing")
    return names


def _check(entries: list[_Entry], parameters: Mapping[str, Tensor], found: dict[str, Any]) -> torch.dtype:
    """Compares names, shapes and dtypes with the files' headers; no tensor is read."""
    wanted = {name: entry.shape(parameters[entry.ours]) for entry in entries for name in entry.theirs}
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or unknown:
        parts = [f"missing: {_told(missing)}"] if missing else []
        parts += [f"unsupported: {_told(unknown)}"] if unknown else []
        raise ValueError(f"tensors don't match config.json; {'; '.join(parts)}")
    dtypes = set()
    for name, shape in wanted.items():
        header = found[name].get_slice(name)
        if header.get_shape() != shape:
            raise ValueError(f"{name} must have the shape {shape} by config.json, got {header.get_shape()}")
        dtypes.add(header.get_dtype())
    if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
        raise ValueError(f"tensors must be of one dtype of {', '.join(DTYPES)}, got {', '.join(sorted(dtypes))}")
    dtype = getattr(torch, DTYPES[dtypes.pop()])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _entries(config: LanguageConfig, family: Family) -> Iterator[_Entry]:
    yield _Entry("embedding.weight", ("model.embed_tokens.weight",))
    for index in range(config.depth):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        names = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
        names |= {f"attention.{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v")}
        names["attention.out"] = "self_attn.o_proj"
        if config.norm != "none":
            names |= {f"attention.{part}_norm": f"self_attn.{part}_norm" for part in ("q", "k")}
        sparse = "block_sparse_moe" if family == "mixtral" else "mlp"
        if config.has_experts(index):
            names["feed_forward.router.logits"] = f"{sparse}.gate"
        else:
            names |= {f"feed_forward.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
        for one, other in names.items():
            yield _Entry(f"{ours}.{one}.weight", (f"{theirs}.{other}.weight",))
        if config.has_experts(index):
            gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
            experts = [f"{theirs}.{sparse}.experts.{expert}" for expert in range(config.num_experts)]
            pairs = tuple(f"{expert}.{part}.weight" for expert in experts for part in (gate, up))
            yield _Entry(f"{ours}.feed_forward.experts.gate_up", pairs, "gate_up")
            lasts = tuple(f"{expert}.{down}.weight" for expert in experts)
            yield _Entry(f"{ours}.feed_forward.experts.down", lasts, "down")
    yield _Entry("norm.weight", ("model.norm.weight",))
    if not config.tied:
        yield _Entry("output.weight", ("lm_head.weight",))


def _told(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - TOLD} more" if len(listed) > TOLD else ""
    return ", ".join(name[:100] for name in listed[:TOLD]) + more
