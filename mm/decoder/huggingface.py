"""Weights of the open language models: a Hugging Face folder (config.json and safetensors) read and written.

Only safetensors is read, never a pickle. Names and shapes of every tensor are compared with what config.json asks
for before anything is allocated.
"""

import json
import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm.decoder.huggingface_config import config_entries, family_of, read_config, read_json
from mm.decoder.huggingface_names import Entry, entries_of
from mm.decoder.language import LanguageModel
from mm.decoder.told import listed

log = logging.getLogger(__name__)

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
LARGEST_INDEX: Final = 2**26
DTYPES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_language_model(folder: Path | str) -> LanguageModel:
    """A model of one of the published families, in evaluation mode and in the precision it lies in.

    Llama, Qwen3, OLMoE, Mixtral, Qwen3-MoE, DeepSeek-V2 and DeepSeek-V3. What DeepSeek-V3 has for predicting several
    tokens at once isn't read; a warning says so.

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
                raise ValueError(f"{name}: tensors stand in two files: {listed(twice)}")
            found |= dict.fromkeys(file.keys(), file)
        if family == "deepseek_v3":
            found = _without_predictors(found, depth=config.depth)
        least = config.depth + 3 * config.num_experts * (config.depth - len(config.dense_layers))
        if least > len(found):
            raise ValueError(f"config.json asks for more than {least} tensors, the files hold {len(found)}")
        with torch.device("meta"):
            model = LanguageModel(config)
        parameters = model.state_dict()
        entries = list(entries_of(config, family))
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
    parameters = model.state_dict()
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    if len(dtypes) != 1 or dtypes[0] not in DTYPES.values():
        raise ValueError(f"parameters must be of one dtype of {', '.join(DTYPES.values())}, got {', '.join(dtypes)}")
    settings = config_entries(model.config, dtype=dtypes[0])
    tensors: dict[str, Tensor] = {}
    for entry in entries_of(model.config, family_of(model.config)):
        tensors |= entry.split(parameters[entry.ours].cpu())
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


def _without_predictors(found: dict[str, Any], *, depth: int) -> dict[str, Any]:
    """Leaves out the layers behind the last that DeepSeek-V3 predicts further tokens with; each has an `eh_proj`."""
    layer_of = {name: match[1] for name in found if (match := re.match(r"model\.layers\.(\d{1,6})\.", name))}
    behind = {layer for layer in layer_of.values() if int(layer) >= depth}
    predictors = {layer for layer in behind if f"model.layers.{layer}.eh_proj.weight" in found}
    if predictors:
        log.warning("left out: tensors of layer %s, which predicts further tokens", listed(predictors))
    return {name: file for name, file in found.items() if layer_of.get(name) not in predictors}


def _check(entries: list[Entry], parameters: Mapping[str, Tensor], found: dict[str, Any]) -> torch.dtype:
    """Compares names, shapes and dtypes with the files' headers; no tensor is read."""
    wanted = {name: entry.shape(parameters[entry.ours]) for entry in entries for name in entry.theirs}
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or unknown:
        parts = [f"missing: {listed(missing)}"] if missing else []
        parts += [f"unsupported: {listed(unknown)}"] if unknown else []
        raise ValueError(f"tensors don't match config.json; {'; '.join(parts)}")
    dtypes, apart = set(), {entry.theirs[0] for entry in entries if entry.kind == "apart"}
    for name, shape in wanted.items():
        header = found[name].get_slice(name)
        if header.get_shape() != shape:
            raise ValueError(f"{name} must have the shape {shape} by config.json, got {header.get_shape()}")
        if name not in apart:
            dtypes.add(header.get_dtype())
        elif header.get_dtype() not in DTYPES:
            raise ValueError(f"{name} must be of a dtype of {', '.join(DTYPES)}, got {header.get_dtype()}")
    if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
        raise ValueError(f"tensors must be of one dtype of {', '.join(DTYPES)}, got {', '.join(sorted(dtypes))}")
    dtype = getattr(torch, DTYPES[dtypes.pop()])
    assert isinstance(dtype, torch.dtype)
    return dtype
