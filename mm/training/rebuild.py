"""The model of a `config.json`, made again: from a file that may be anybody's, so nothing in it is believed."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mm.errors import one_line
from mm.trust import restrict_imports

if TYPE_CHECKING:
    from mm.model import MultimodalModel

Shapes = Mapping[str, tuple[int, ...]]
"""Of weights, by name."""

_WRONG: Final = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError, AttributeError)
"""What constructors, ours and those of timm, torchaudio and open_clip, raise at sizes that make no network."""
_LARGEST: Final = 2**16
"""Of a whole number in a configuration that is no size of a weight."""
_FINEST: Final = 64
"""Tokens along an axis: pooled, and so of no size that the weights tell."""
_LONGEST: Final = 2**24
"""Tokens that a language model may say it reads: a bound on positions, for which nothing is made."""
_LENGTHS: Final = ("context", "window", "original_context")
_MOST_CONSTANTS: Final = 2**26
"""Elements of tables that aren't weights, such as masks and frequencies."""


def build(config: Mapping[str, Any], *, weights: Shapes | None = None) -> "MultimodalModel":
    """Makes the model of a `config.json`, with fresh weights; nothing is downloaded.

    Args:
        config: `class_path` and `init_args`. `pretrained` and the paths `weights` and `folder` count as off: the
            weights are in the checkpoint's own folder.
        weights: Shapes of the weights that it is going to be filled with. The model is first made without memory
            (on torch's meta device) and compared with them, so that no configuration can ask for more than is
            there. None: it isn't compared.

    Raises:
        ValueError: A key, type, class or size isn't accepted, or names or shapes differ from `weights`.
    """
    from mm.model import MultimodalModel

    restrict_imports()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MultimodalModel, "model", required=True)
    try:
        parsed = parser.parse_object({"model": dict(config)})
    except (ArgumentError, *_WRONG) as error:
        raise ValueError(f"model configuration: {one_line(str(error))}") from error
    largest = None if weights is None else max([_LARGEST, *(size for shape in weights.values() for size in shape)])
    _tame(parsed, largest=largest)
    if weights is not None:
        with _at_most(4 * len(weights) + 512), torch.device("meta"):
            _compare(_make(parser, parsed), weights)
    model = _make(parser, parsed)
    assert isinstance(model, MultimodalModel)
    return model


def sealed(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The configuration of a model without the files that its parts were made from.

    What a part read from a folder (sizes, the mean of pixels) is written out, so that the model is made again from
    the checkpoint alone; and the folder's path, which is nobody else's concern, is left out.

    Args:
        config: `class_path` and `init_args` of the model.
        model: Made from it.
    """
    made = json.loads(json.dumps(dict(config)))
    _seal_parts(made.get("init_args", {}), model)
    return made  # type: ignore[no-any-return]


def _seal_parts(arguments: dict[str, Any], module: nn.Module) -> None:
    """Rewrites the configurations of a module's parts among its arguments, and of their own parts."""
    for name, part in module.named_children():
        own = arguments.get(name)
        listed = list(zip(own, part, strict=True)) if isinstance(own, list) and isinstance(part, nn.ModuleList) else []
        for item, made in listed or [(own, part)]:
            tell = getattr(made, "sealed", None)
            if isinstance(item, dict) and callable(tell):
                item["init_args"] = given = item.get("init_args", {})
                given |= {key: value for key, value in tell().items() if value is not None}
                for key in ("weights", "folder", "pretrained"):
                    given.pop(key, None)
                _seal_parts(given, made)


def check_vocabulary(model: "MultimodalModel", size: int, *, texts: int | None = None) -> None:
    """Every part that reads or writes tokens must have room for the tokenizer's ids.

    Args:
        model: Its record and text encoders and its decoder are looked at.
        size: Number of ids of the tokenizer.
        texts: Number of ids that whole texts are made of; None for `size`.

    Raises:
        ValueError: One hasn't.
    """
    from mm.decoder.sentences import SentenceDecoder
    from mm.encoders.base import TextTower
    from mm.encoders.record import RecordEncoder

    words = size if texts is None else texts
    if isinstance(model.text, TextTower) and model.text.vocab_size < words:
        raise ValueError(f"texts have {words} ids, text has room for {model.text.vocab_size}: give both one vocabulary")
    parts = {"record": model.record, "decoder": model.decoder}
    rooms = {
        name: part.word.num_embeddings if isinstance(part, RecordEncoder) else part.vocab_size
        for name, part in parts.items()
        if isinstance(part, RecordEncoder | SentenceDecoder)
    }
    small = [f"{name} has room for {room}" for name, room in rooms.items() if room < size]
    if small:
        raise ValueError(f"the tokenizer has {size} ids, {' and '.join(small)}: give both the same vocab_size")


def _make(parser: ArgumentParser, parsed: Namespace) -> nn.Module:
    try:
        model = parser.instantiate(parsed).model
    except (ArgumentError, *_WRONG) as error:
        said = one_line(str(error)) or type(error).__name__
        raise ValueError(f"model configuration: no network can be made of it: {said[:300]}") from error
    assert isinstance(model, nn.Module)
    return model


def _tame(value: Any, *, largest: int | None, key: str = "") -> None:
    """Turns `pretrained`, `weights` and `folder` off; refuses names that lead to the network, and absurd numbers."""
    if isinstance(value, Namespace | dict):
        members = vars(value) if isinstance(value, Namespace) else value
        for name, item in members.items():
            if name in ("pretrained", "weights", "folder"):
                value[name] = False if isinstance(item, bool) else None
            else:
                _tame(item, largest=largest, key=str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            _tame(item, largest=largest, key=key)
    elif key == "name" and isinstance(value, str) and ":" in value:
        raise ValueError(f"model configuration: name {value[:80]!r} would fetch a model; only plain names are accepted")
    elif key == "token_grid" and isinstance(value, int) and largest is not None and value > _FINEST:
        raise ValueError(f"model configuration: token_grid must be at most {_FINEST} along an axis, got {value}")
    elif isinstance(value, int) and largest is not None and abs(value) > (_LONGEST if key in _LENGTHS else largest):
        raise ValueError(f"model configuration: {key} is {value}, and no weight is as large")


def _compare(model: nn.Module, weights: Shapes) -> None:
    state = model.state_dict()
    own = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing, foreign = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    if missing or foreign:
        raise ValueError(
            f"weights do not fit the model: {len(missing)} are missing and {len(foreign)} have no place, such as"
            f" {(missing + foreign)[0]!r}"
        )
    for name, shape in own.items():
        if shape != weights[name]:
            raise ValueError(f"weights do not fit the model: {name} is {weights[name]}, the model's is {shape}")
    constants = sum(buffer.numel() for name, buffer in model.named_buffers() if name not in state)
    if constants > _MOST_CONSTANTS:
        raise ValueError(f"model configuration: its tables would have {constants:,} elements")


@contextlib.contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stops a model that goes on making parts: without memory a depth of millions would still take hours."""
    made = 0

    def another(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:  # noqa: ARG001  # torch's own
        nonlocal made
        made += 1
        if made > count:
            raise ValueError(f"more than {count:,} parameters, far more than there are weights")

    handle = register_module_parameter_registration_hook(another)
    try:
        yield
    finally:
        handle.remove()
