"""The checkpoint folder: weights, the model's configuration, tokenizer and preprocessing, sealed by a hash.

    model.safetensors     matrices and kernels in bf16, everything else as it is; names of the modules
    config.json           class_path and init_args of the model
    tokenizer.json        the vocabulary
    preprocessing.json    grids, sound rate, lengths of texts (the HU windows are in the model's configuration)
    card.json             name, what it is for, how it was trained
    seal.json             format version, digest of the ontology, SHA-256 of every file above

Lightning's own .ckpt files serve to resume a run and nothing else.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm import ontology
from mm.data.tokenizer import Tokenizer
from mm.files import file_digest, folder_in_place
from mm.training.card import NOTICE, Card, Identity, Preprocessing, to_card, to_preprocessing
from mm.training.rebuild import build, check_vocabulary, sealed

if TYPE_CHECKING:
    from mm.model import MultimodalModel

__all__ = [
    "FILES", "FORMAT", "NOTICE", "Card", "Identity", "Loaded", "Preprocessing",
    "build", "find", "initialise", "inspect", "load", "read_card", "read_seal", "save", "weights",
]  # fmt: skip

FORMAT: Final = 1
FILES: Final = ("model.safetensors", "config.json", "tokenizer.json", "preprocessing.json", "card.json")
DTYPES: Final = frozenset({"BF16", "F16", "F32", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL"})


@dataclass(frozen=True)
class Loaded:
    """A checkpoint folder, opened: the model in evaluation mode and all that belongs to it."""

    model: "MultimodalModel"
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    identity: Identity
    card: Card
    config: dict[str, Any]


def save(
    model: torch.nn.Module,
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    card: Card,
    preprocessing: Preprocessing | None = None,
) -> Identity:
    """Writes a checkpoint folder, whole or not at all; one that is there is replaced.

    Args:
        model: Its state dict is written.
        folder: Where to.
        config: `class_path` and `init_args` that build the same model again.
        tokenizer: The vocabulary it was trained with.
        card: What it says of itself.
        preprocessing: How its inputs were prepared; the default grids if None.

    Returns:
        The identity that `load` will report.
    """
    folder = Path(folder)
    with folder_in_place(folder) as fresh:
        save_file({name: _stored(tensor) for name, tensor in model.state_dict().items()}, fresh / "model.safetensors")
        _write_json(fresh / "config.json", sealed(config, model))
        tokenizer.save(fresh / "tokenizer.json")
        _write_json(fresh / "preprocessing.json", asdict(preprocessing or Preprocessing()))
        _write_json(fresh / "card.json", asdict(card))
        files = {name: file_digest(fresh / name) for name in FILES}
        sha256 = _digest(files)
        seal = {"format": FORMAT, "ontology": ontology.digest(), "files": files, "sha256": sha256}
        _write_json(fresh / "seal.json", seal)
        for file in fresh.iterdir():
            _flush(file)
    _flush(folder.parent)
    return Identity(card.name, sha256)


def load(path: str | Path = "default") -> Loaded:
    """Opens a checkpoint folder for inference, on the CPU and in float32.

    Args:
        path: A folder, or the name of one that ships with the package.

    Raises:
        ValueError: No such folder, no checkpoint, another format or ontology, files that don't match the seal, or
            files that do and are wrong themselves: a seal guards against accidents, not against its author.
    """
    folder = find(path)
    seal = read_seal(folder)
    config, card, preprocessing = _read_json(folder / "config.json"), read_card(folder), _preprocessing(folder)
    shapes = _shapes(folder)
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        model = build(config, weights=shapes)
        check_vocabulary(model, tokenizer.vocab_size, texts=tokenizer.texts_size)
    except ValueError as error:
        raise _wrong(folder, str(error)) from error
    weights(model, folder)
    model.eval()
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        preprocessing=preprocessing,
        identity=Identity(card.name, seal["sha256"]),
        card=card,
        config=config,
    )


def weights(model: torch.nn.Module, folder: Path) -> None:
    """Fills a model with a folder's weights; every name must fit.

    Raises:
        ValueError: Names or shapes differ.
    """
    found = _tensors(folder)
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        raise _wrong(folder, f"weights do not fit this model: {' '.join(str(error).split())[:300]}") from error


def initialise(model: torch.nn.Module, path: str | Path) -> tuple[str, ...]:
    """Starts a model from an earlier stage's folder; what the folder doesn't have stays as it was made.

    Args:
        model: Filled in place.
        path: A folder or a shipped name.

    Returns:
        Names that stayed as they were made.

    Raises:
        ValueError: The folder has a weight that the model hasn't, or one of another shape.
    """
    folder = find(path)
    read_seal(folder)
    found = _tensors(folder)
    own = model.state_dict()
    foreign = sorted(name for name in found if name not in own)
    if foreign:
        raise ValueError(
            f"init_from {str(path)!r} has {len(foreign)} weights that the model has no place for, such as"
            f" {', '.join(foreign[:3])}; leave `model` out to build the model of that checkpoint"
        )
    shapes = [name for name in found if found[name].shape != own[name].shape]
    if shapes:
        name = shapes[0]
        raise ValueError(
            f"init_from {str(path)!r}: {name} is {tuple(found[name].shape)}, the model's is {tuple(own[name].shape)}"
            f" ({len(shapes)} differ); leave `model` out to build the model of that checkpoint"
        )
    model.load_state_dict(found, strict=False)
    return tuple(sorted(set(own) - set(found)))


def inspect(path: str | Path = "default") -> str:
    """A checkpoint folder in plain words: identity, card, parts and their sizes, preprocessing, configuration.

    Raises:
        ValueError: As `load`, but that the configuration isn't tried.
    """
    folder = find(path)
    seal, card, preprocessing = read_seal(folder), read_card(folder), _preprocessing(folder)
    sizes: dict[str, int] = {}
    for name, shape in _shapes(folder).items():
        sizes[name.split(".")[0]] = sizes.get(name.split(".")[0], 0) + math.prod(shape)
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    lines = [
        f"{Identity(card.name, seal['sha256'])}   format {seal['format']}, {megabytes:.1f} MB",
        *filter(None, (card.description, f"{card.kind.capitalize()} model. {card.notice}")),
        "",
        f"parameters and buffers: {sum(sizes.values()):,}",
        *(f"  {part:<12} {size:>12,}" for part, size in sorted(sizes.items(), key=lambda item: -item[1])),
        "",
        "preprocessing:",
        *(f"  {name}: {value}" for name, value in asdict(preprocessing).items()),
        "",
        f"findings: {', '.join(ontology.CODES)}",
        "",
        "training:",
        *(f"  {json.dumps(_without_counts(stage), ensure_ascii=False)}" for stage in card.stages),
        "",
        "configuration:",
        json.dumps(_read_json(folder / "config.json"), indent=2, ensure_ascii=False),
    ]
    return "\n".join(lines)


def _without_counts(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage of a card but for the hundreds of counts that `mm.training.experts` draws."""
    return {name: value for name, value in stage.items() if name != "experts"}


def find(path: str | Path) -> Path:
    """The folder of a path or of a shipped name.

    Raises:
        ValueError: There is none; the message lists the shipped ones.
    """
    given = Path(path)
    if given.is_dir():
        return given
    shipped = Path(__file__).parents[1] / "checkpoints"
    if given.parent == Path() and (shipped / given / "seal.json").is_file():
        return shipped / given
    known = ", ".join(sorted(seal.parent.name for seal in shipped.glob("*/seal.json"))) or "none"
    raise ValueError(f"checkpoint {str(path)!r}: no such folder, and no shipped checkpoint of that name ({known})")


def read_seal(folder: Path) -> dict[str, Any]:
    """The seal of a folder, checked against its files.

    Raises:
        ValueError: See `load`.
    """
    if not (folder / "seal.json").is_file():
        raise ValueError(f"checkpoint {str(folder)!r}: no checkpoint folder, it has no seal.json")
    seal = _read_json(folder / "seal.json")
    if seal.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {str(folder)!r}: format version {seal.get('format')!r}; this version of mm reads {FORMAT}"
        )
    if seal.get("ontology") != ontology.digest():
        raise ValueError(
            f"checkpoint {str(folder)!r}: trained with another list of findings (ontology"
            f" {str(seal.get('ontology'))[:12]}, this version of mm has {ontology.digest()[:12]}); train it again"
        )
    files = seal.get("files")
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise _wrong(folder, f"seal.json must have 'files' with a hash of each of {', '.join(FILES)}")
    for name in FILES:
        if not (folder / name).is_file() or file_digest(folder / name) != files[name]:
            raise _wrong(folder, f"{name} is missing or was changed after it was sealed")
    if _digest(files) != seal.get("sha256"):
        raise _wrong(folder, "seal.json was changed by hand")
    return seal


def read_card(folder: Path) -> Card:
    """The card of a checkpoint folder.

    Raises:
        ValueError: There is none, or it isn't laid out as one.
    """
    content = _read_json(folder / "card.json")
    try:
        return to_card(content)
    except ValueError as error:
        raise _wrong(folder, f"card.json: {error}") from error


def _preprocessing(folder: Path) -> Preprocessing:
    content = _read_json(folder / "preprocessing.json")
    try:
        return to_preprocessing(content)
    except ValueError as error:
        raise _wrong(folder, f"preprocessing.json: {error}") from error


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the weights, from the file's header; safetensors has checked that the file is as long as they say."""
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            parts = {str(name): file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            kinds = {str(part.get_dtype()) for part in parts.values()}
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise _wrong(folder, f"model.safetensors can't be read: {error}") from error
    if kinds - DTYPES:
        raise _wrong(folder, f"model.safetensors has weights of unknown types: {', '.join(sorted(kinds - DTYPES))}")
    return shapes


def _tensors(folder: Path) -> dict[str, Tensor]:
    _shapes(folder)
    try:
        return load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise _wrong(folder, f"model.safetensors can't be read: {error}") from error


def _wrong(folder: Path, what: str) -> ValueError:
    """Names the folder, what is wrong with it and what to do; in one line."""
    return ValueError(f"checkpoint {str(folder)!r}: {' '.join(what.split())}; copy the folder anew, or train it again")


def _stored(tensor: Tensor) -> Tensor:
    # Thresholds, temperatures and running statistics are short vectors: they keep their precision.
    narrow = tensor.is_floating_point() and tensor.ndim >= 2
    return tensor.detach().to("cpu", torch.bfloat16 if narrow else tensor.dtype, copy=True).contiguous()


def _digest(files: Mapping[str, str]) -> str:
    text = json.dumps({"format": FORMAT, "ontology": ontology.digest(), "files": dict(files)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a deep nest of brackets ends the recursion
        raise _wrong(path.parent, f"{path.name} can't be read as JSON") from error
    if not isinstance(content, dict):
        raise _wrong(path.parent, f"{path.name} must be a JSON object")
    return content


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems can't flush a folder
            os.fsync(handle)
    finally:
        os.close(handle)
