"""Weights of somebody else's, from a local file: read without running anything of it, and fitted name by name."""

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_NESTED: Final = ("state_dict", "model_state_dict", "model")
"""Where training programs keep the weights among other things."""

_BROKEN: Final = (
    pickle.UnpicklingError, struct.error, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError,
    AttributeError, ArithmeticError, AssertionError, MemoryError,
)  # fmt: skip
"""What torch.load raises at files that are none of its own, or hold what only running code could make."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU.

    Args:
        path: A safetensors file, or one of torch.save that holds tensors and nothing that would have to be run.

    Raises:
        ValueError: No such file, no weights in it, or objects that only running code could make.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"weights {str(path)!r}: no such file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"weights {str(path)!r}: no safetensors file: {error}") from error
    except _BROKEN as error:
        raise ValueError(
            f"weights {str(path)!r} can't be read as tensors alone ({type(error).__name__}); allowed are safetensors"
            " and torch.save of a state dict, and nothing that would be run when opened"
        ) from error
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return _state(content, str(path))


def _state(content: Any, path: str) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"weights {path!r} must hold a state dict, got {type(content).__name__}")
    wrong = [str(name) for name, item in content.items() if not (isinstance(name, str) and isinstance(item, Tensor))]
    if wrong:
        raise ValueError(f"weights {path!r} must hold tensors by name, but {wrong[0][:80]!r} is none")
    if all(name.startswith("module.") for name in content):  # of a model trained on several GPUs
        return {name.removeprefix("module."): item for name, item in content.items()}
    return dict(content)


def fill(network: nn.Module, weights: Mapping[str, Tensor], *, path: str) -> None:
    """Copies weights into a network; every name and shape must fit.

    Raises:
        ValueError: They don't.
    """
    own = network.state_dict()
    missing, foreign = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    # Counters of batches came to batch normalisation late, and nothing is computed from them.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or foreign:
        raise ValueError(
            f"weights {path!r} do not fit the network: {len(missing)} are missing and {len(foreign)} have no place,"
            f" such as {(missing + foreign)[0]!r}"
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"weights {path!r} do not fit the network: {name} is {tuple(tensor.shape)}, the network's is"
                f" {tuple(own[name].shape)}"
            )
    network.load_state_dict(dict(weights), strict=False)
