"""The folder of a language model of ours: its configuration, weights and vocabulary, sealed by hashes.

config.json           format and version, LanguageConfig, SHA-256 of the two files below and of all this
model.safetensors     names of our modules, ten rows for our special ids in front
tokenizer.json        as `mm.data.tokenizer.Tokenizer` saves it
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm.decoder.huggingface_config import LARGEST_CONFIG, read_json
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.settings import entries_of, settings_from
from mm.decoder.told import listed
from mm.files import file_digest, folder_in_place, write_atomically

FORMAT: Final = "mm decoder"
VERSION: Final = 1
CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
VOCABULARY: Final = "tokenizer.json"
DTYPES: Final = frozenset({"F32", "BF16", "F16"})


@runtime_checkable
class Vocabulary(Protocol):
    """What this room knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    def save(self, path: Path) -> None:
        """Writes one file."""
        ...


def write_decoder(model: LanguageModel, tokenizer: Vocabulary, folder: Path | str) -> None:
    """Writes a folder, whole or not at all.

    Args:
        model: Of floats; ids 0..9 are the special ones.
        tokenizer: Its vocabulary.
        folder: New or empty.

    Raises:
        ValueError: The folder holds something, or the model has no room for the vocabulary.
        OSError: It can't be written.
    """
    folder = Path(folder)
    check_empty(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model room for {model.config.vocab_size}")
    with folder_in_place(folder) as fresh:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, fresh / WEIGHTS)
        (fresh / WEIGHTS).chmod(0o644)  # as the other two; safetensors lets nobody else read
        tokenizer.save(fresh / VOCABULARY)
        files = {name: file_digest(fresh / name) for name in (WEIGHTS, VOCABULARY)}
        content = {"format": FORMAT, "version": VERSION, "config": entries_of(model.config), "files": files}
        content["seal"] = _seal(content)
        write_atomically(fresh / CONFIG, (json.dumps(content, indent=1) + "\n").encode())


def read_decoder(folder: Path | str) -> tuple[LanguageModel, Path]:
    """Opens a folder.

    Returns:
        The model in evaluation mode, in the precision it lies in, and the file for `Tokenizer.load`.

    Raises:
        ValueError: It is no such folder, was changed after it was sealed, or contradicts itself; the message says
            what is wrong and where.
        OSError: A file is missing or can't be read.
    """
    folder = Path(folder)
    try:
        config = _sealed_config(folder)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            model = _fill(config, file)
    except SafetensorError as error:
        raise ValueError(f"decoder {str(folder)!r}: {WEIGHTS}: not a safetensors file, or cut short") from error
    except ValueError as error:
        raise ValueError(f"decoder {str(folder)!r}: {error}") from error
    return model, folder / VOCABULARY


def check_empty(folder: Path) -> None:
    """Raises ValueError where something stands in a place that is to be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} must be a new or empty folder; it holds something already")


def _sealed_config(folder: Path) -> LanguageConfig:
    content = read_json(folder / CONFIG, most=LARGEST_CONFIG)
    if content.get("format") != FORMAT:
        raise ValueError(f"{CONFIG} is not of the format {FORMAT!r}: `mm import-decoder` makes such a folder")
    if content.get("version") != VERSION:
        told = repr(content.get("version"))[:60]
        raise ValueError(f"{CONFIG}: format version {told}; this version of mm reads {VERSION}")
    files = content.get("files")
    if not isinstance(files, dict) or files.keys() != {WEIGHTS, VOCABULARY}:
        raise ValueError(f"{CONFIG}: files must have a hash of {WEIGHTS} and of {VOCABULARY}")
    for name in (WEIGHTS, VOCABULARY):
        if file_digest(folder / name) != files[name]:
            raise ValueError(f"{name} was changed after it was sealed, or is cut short")
    config = settings_from(content.get("config"), LanguageConfig, where=f"{CONFIG}: config")
    if content.get("seal") != _seal(content):
        raise ValueError(f"{CONFIG} was changed by hand: its seal doesn't fit")
    return config


def _fill(config: LanguageConfig, file: Any) -> LanguageModel:
    """The model with the weights of an open file; names, shapes and types are compared before any is read."""
    names = set(file.keys())
    if config.depth > len(names):
        raise ValueError(f"{CONFIG}: depth {config.depth} asks for more tensors than the {len(names)} of {WEIGHTS}")
    try:
        with torch.device("meta"):
            model = LanguageModel(config)
    except RuntimeError as error:  # sizes whose product is beyond 64 bits
        raise ValueError(f"{CONFIG}: config asks for tensors that are too large") from error
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - names), sorted(names - wanted.keys())
    if missing or unknown:
        told = [f"{word} {listed(found)}" for word, found in (("missing", missing), ("unknown", unknown)) if found]
        raise ValueError(f"{WEIGHTS} doesn't hold the tensors of {CONFIG}: {'; '.join(told)}")
    for name, tensor in wanted.items():
        part = file.get_slice(name)
        if part.get_shape() != list(tensor.shape):
            raise ValueError(f"{WEIGHTS}: {name} must have the shape {list(tensor.shape)}, got {part.get_shape()}")
        if part.get_dtype() not in DTYPES:
            raise ValueError(f"{WEIGHTS}: {name} must be of {', '.join(sorted(DTYPES))}, got {part.get_dtype()}")
    # Copies: what safetensors gives lies in the file, which another may cut short.
    weights: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in wanted}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _seal(content: dict[str, Any]) -> str:
    sealed = {name: value for name, value in content.items() if name != "seal"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
