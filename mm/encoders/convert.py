"""Image weights of other programs to a safetensors file with timm's names, which `TimmEncoder` takes.

Two ways are known: a state dict of the same network under other names, whose tensors stand in the same order; and a
vision transformer of DINOv2's shape that transformers exported as ONNX, whose matrices have lost their names but not
the nodes that they are multiplied in.
"""

import re
from pathlib import Path
from typing import Any, Final

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from mm.encoders.weights import fill, read_weights
from mm.files import write_atomically

_LAYER: Final = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Parts of a layer of DINOv2, as transformers and as timm call them; query, key and value are one matrix in timm."""
_TOP: Final = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def convert_tower(source: Path, name: str, out: Path) -> int:
    """Writes the weights of `source` as timm's model `name` has them.

    Args:
        source: An .onnx file, or one that `mm.encoders.weights.read_weights` reads.
        name: Of a timm model.
        out: A .safetensors file.

    Returns:
        Number of tensors.

    Raises:
        ValueError: The source can't be read, or is another network.
        ImportError: An .onnx file without the package `onnx` (dependency group `weights`).
    """
    if ":" in name or not timm.is_model(name):
        raise ValueError(f"name must be one of timm's models (timm.list_models()), got {name!r}")
    if out.suffix != ".safetensors":
        raise ValueError(f"out must end in .safetensors, got {out.name!r}")
    if source.suffix == ".onnx":
        weights = from_onnx(source)
        side = round((weights["pos_embed"].shape[1] - 1) ** 0.5) * weights["patch_embed.proj.weight"].shape[-1]
        network = timm.create_model(name, num_classes=0, img_size=side)
    else:
        network = timm.create_model(name)
        weights = by_order(read_weights(source), network, what=source.name)
    fill(network, weights, path=str(source))
    write_atomically(out, save({key: tensor.contiguous() for key, tensor in weights.items()}, metadata={"timm": name}))
    return len(weights)


def by_order(weights: dict[str, Tensor], network: nn.Module, *, what: str) -> dict[str, Tensor]:
    """The same tensors under the network's names, paired by their order.

    Raises:
        ValueError: Their number, the last words of their names or their shapes differ.
    """
    own = network.state_dict()
    if len(weights) != len(own):
        raise ValueError(f"{what} has {len(weights)} tensors, the network {len(own)}: it is another network")
    for (theirs, tensor), (ours, wanted) in zip(weights.items(), own.items(), strict=True):
        alike = theirs.rpartition(".")[2] == ours.rpartition(".")[2] and tensor.shape == wanted.shape
        if not alike:
            raise ValueError(
                f"{what} is another network: {theirs} {tuple(tensor.shape)} stands where it has {ours}"
                f" {tuple(wanted.shape)}"
            )
    return dict(zip(own, weights.values(), strict=True))


def from_onnx(path: Path) -> dict[str, Tensor]:
    """A vision transformer of DINOv2's shape under timm's names; what stands behind its last norm is left out.

    Raises:
        ValueError: The file can't be read or has no such network in it.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError("to read .onnx files install onnx (dependency group `weights`)") from error
    try:
        graph: Any = onnx.load(str(path), load_external_data=False).graph
        arrays = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    except (DecodeError, ValueError, TypeError, LookupError, RuntimeError, OSError) as error:
        raise ValueError(f"{path.name} can't be read as ONNX: {type(error).__name__}") from error
    return _named(_matrices(graph, arrays), what=path.name)


def _matrices(graph: Any, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors by the name they had in transformers, without what isn't the backbone's."""
    found: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if name.startswith("backbone."):
            found[name.removeprefix("backbone.")] = array
        elif array.ndim == 3 and array.shape[0] == 1 and array.shape[1] > 1:
            found["places"] = array
        elif array.ndim == 3 and array.shape[:2] == (1, 1):
            found["place of the class token"] = array
    for node in graph.node:
        part = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if part and node.input[1] in arrays:  # x @ w: w is the transposed weight of a linear layer
            found[f"{part[1].replace('/', '.')}.weight"] = arrays[node.input[1]].T
    return found


def _named(found: dict[str, Tensor], *, what: str) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    try:
        for theirs, ours in _TOP.items():
            made[ours] = found[theirs]
        made["pos_embed"] = torch.cat([found["place of the class token"], found["places"]], dim=1)
        numbers = {int(name.split(".")[2]) for name in found if name.startswith("encoder.layer.")}
        for number in sorted(numbers):
            layer = f"encoder.layer.{number}"
            for last in ("weight", "bias"):
                parts = [found[f"{layer}.attention.attention.{x}.{last}"] for x in ("query", "key", "value")]
                made[f"blocks.{number}.attn.qkv.{last}"] = torch.cat(parts)
            for theirs, ours in _LAYER.items():
                for last in (".weight", ".bias") if not theirs.endswith("lambda1") else ("",):
                    made[f"blocks.{number}.{ours}{last}"] = found[f"{layer}.{theirs}{last}"]
    except KeyError as error:
        raise ValueError(f"{what} has no vision transformer of DINOv2's shape in it: no {error.args[0]!r}") from error
    return made
