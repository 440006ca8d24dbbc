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
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from jsonargparse import ArgumentError, ArgumentParser
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm import ontology
from mm.data.tokenizer import Tokenizer
from mm.dicom.resample import IMAGE_GRID, MODEL_GRID, Grid
from mm.training.trust import restrict_imports

if TYPE_CHECKING:
    from mm.model import MultimodalModel

FORMAT: Final = 1
FILES: Final = ("model.safetensors", "config.json", "tokenizer.json", "preprocessing.json", "card.json")
NOTICE: Final = "Research software. Not a medical device, not for clinical use."


@dataclass(frozen=True)
class Preprocessing:
    """How inputs are prepared; inference uses these and nothing else.

    Attributes:
        grid: Shape [Z Y X] of the volumes.
        spacing_mm: (z, y, x) of the volumes.
        image_size: Pixels of the square image.
        sound_rate: Samples a second.
        max_words: Longest run of tokens of a record's words.
        max_text: Longest run of tokens of a whole report.
    """

    grid: tuple[int, int, int] = MODEL_GRID.shape
    spacing_mm: tuple[float, float, float] = MODEL_GRID.spacing_mm
    image_size: int = IMAGE_GRID
    sound_rate: int = ontology.SOUND_RATE
    max_words: int = 64
    max_text: int = 256

    @property
    def volume_grid(self) -> Grid:
        """The grid that volumes are resampled to."""
        return Grid(self.grid, self.spacing_mm)


@dataclass(frozen=True)
class Card:
    """What a model says of itself.

    Attributes:
        name: Of the model.
        description: What it is and what it was trained on, in one or two sentences.
        stages: One entry a stage of training: task, data, steps, seconds, last scores.
        notice: What it must not be used for.
    """

    name: str
    description: str = ""
    stages: tuple[dict[str, Any], ...] = ()
    notice: str = NOTICE


@dataclass(frozen=True)
class Identity:
    """Which model it is: the card's name and the SHA-256 over all files of the folder."""

    name: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}@{self.sha256[:12]}"


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
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    save_file({name: _stored(tensor) for name, tensor in model.state_dict().items()}, scratch / "model.safetensors")
    _write_json(scratch / "config.json", dict(config))
    tokenizer.save(scratch / "tokenizer.json")
    _write_json(scratch / "preprocessing.json", asdict(preprocessing or Preprocessing()))
    _write_json(scratch / "card.json", asdict(card))
    files = {name: _sha256(scratch / name) for name in FILES}
    sha256 = _digest(files)
    seal = {"format": FORMAT, "ontology": ontology.digest(), "files": files, "sha256": sha256}
    _write_json(scratch / "seal.json", seal)
    for file in scratch.iterdir():
        _flush(file)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        # A folder can't be exchanged in one step: for an instant there is none, but never half of one.
        folder.replace(old)
    scratch.replace(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    return Identity(card.name, sha256)


def load(path: str | Path = "default") -> Loaded:
    """Opens a checkpoint folder for inference, on the CPU and in float32.

    Args:
        path: A folder, or the name of one that ships with the package.

    Raises:
        ValueError: No such folder, no checkpoint, another format or ontology, or files that don't match the seal.
    """
    folder = find(path)
    seal = read_seal(folder)
    config = _read_json(folder / "config.json")
    model = build(config)
    weights(model, folder)
    model.eval()
    return Loaded(
        model=model,
        tokenizer=Tokenizer.load(folder / "tokenizer.json"),
        preprocessing=_preprocessing(folder),
        identity=Identity(read_card(folder).name, seal["sha256"]),
        card=read_card(folder),
        config=config,
    )


def weights(model: torch.nn.Module, folder: Path) -> None:
    """Fills a model with a folder's weights; every name must fit.

    Raises:
        ValueError: Names or shapes differ.
    """
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {str(folder)!r}: weights do not fit this model: {first}") from error


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
    found = load_file(folder / "model.safetensors")
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


def build(config: Mapping[str, Any]) -> "MultimodalModel":
    """Makes the model of a `config.json`, with fresh weights.

    Raises:
        ValueError: A key, type or class isn't accepted.
    """
    from mm.model import MultimodalModel

    restrict_imports()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MultimodalModel, "model", required=True)
    try:
        parsed = parser.parse_object({"model": dict(config)})
    except ArgumentError as error:
        raise ValueError(f"model configuration: {' '.join(str(error).split())}") from error
    model = parser.instantiate(parsed).model
    assert isinstance(model, MultimodalModel)
    return model


def inspect(path: str | Path = "default") -> str:
    """A checkpoint folder in plain words: identity, card, parts and their sizes, preprocessing, configuration."""
    folder = find(path)
    seal, card, preprocessing = read_seal(folder), read_card(folder), _preprocessing(folder)
    sizes: dict[str, int] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        sizes[name.split(".")[0]] = sizes.get(name.split(".")[0], 0) + tensor.numel()
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    lines = [
        f"{Identity(card.name, seal['sha256'])}   format {seal['format']}, {megabytes:.1f} MB",
        *filter(None, (card.description, card.notice)),
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
        *(f"  {json.dumps(stage, ensure_ascii=False)}" for stage in card.stages),
        "",
        "configuration:",
        json.dumps(_read_json(folder / "config.json"), indent=2, ensure_ascii=False),
    ]
    return "\n".join(lines)


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
    for name in FILES:
        if not (folder / name).is_file() or _sha256(folder / name) != seal["files"].get(name):
            raise ValueError(f"checkpoint {str(folder)!r}: {name} is missing or was changed after it was sealed")
    if _digest(seal["files"]) != seal["sha256"]:
        raise ValueError(f"checkpoint {str(folder)!r}: seal.json was changed by hand")
    return seal


def read_card(folder: Path) -> Card:
    """The card of a checkpoint folder."""
    content = _read_json(folder / "card.json")
    return Card(**{**content, "stages": tuple(content.get("stages", ()))})


def _preprocessing(folder: Path) -> Preprocessing:
    content = _read_json(folder / "preprocessing.json")
    return Preprocessing(**{**content, "grid": tuple(content["grid"]), "spacing_mm": tuple(content["spacing_mm"])})


def _stored(tensor: Tensor) -> Tensor:
    # Thresholds, temperatures and running statistics are short vectors: they keep their precision.
    narrow = tensor.is_floating_point() and tensor.ndim >= 2
    return tensor.detach().to("cpu", torch.bfloat16 if narrow else tensor.dtype, copy=True).contiguous()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(files: Mapping[str, str]) -> str:
    text = json.dumps({"format": FORMAT, "ontology": ontology.digest(), "files": dict(files)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {str(path.parent)!r}: {path.name} can't be read") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {str(path.parent)!r}: {path.name} must be a JSON object")
    return content


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems can't flush a folder
            os.fsync(handle)
    finally:
        os.close(handle)
