"""What the frozen encoders say of each study, computed once and kept on disk in shards."""

import hashlib
import json
import logging
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mm
from mm.batch import BySource, Tokens
from mm.data.datamodule import MultimodalData
from mm.data.index import index_digest
from mm.data.spec import PhantomSpec, Spec, Split, describe
from mm.encoded import Encoded
from mm.findings import Evidence
from mm.history import History
from mm.model import MultimodalModel
from mm.phantom.table import table_digest
from mm.training.precision import slow_in_bfloat16

log = logging.getLogger(__name__)

SHARD = 256
"""Studies a file; a run that was stopped goes on with the first file that is missing."""
FROZEN = ("volume", "image", "audio", "record", "findings")
"""Parts of the model whose weights decide what is in the cache."""


class Cache:
    """Encoder output of the studies of one split, in memory, by their number.

    Args:
        tensors: By path into `Encoded`, such as `tokens.volume.values`; the first axis is the study.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        """Number of studies."""
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    def select(self, index: Int[Tensor, " B"], device: torch.device | str) -> Encoded:
        """What the encoders said of some studies, in float32, without embeddings."""
        rows = {name: tensor[index.cpu()].to(device) for name, tensor in self.tensors.items()}
        return unflatten({name: row.float() if row.is_floating_point() else row for name, row in rows.items()})


def flatten(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dataclasses, by path."""
    if isinstance(value, Tensor):
        return {prefix.removesuffix("."): value}
    if not is_dataclass(value):
        return {}
    found: dict[str, Tensor] = {}
    for item in fields(value):
        found |= flatten(getattr(value, item.name), f"{prefix}{item.name}.")
    return found


def unflatten(tensors: dict[str, Tensor]) -> Encoded:
    """An `Encoded` without maps and embeddings from the tensors of `flatten`."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): item for name, item in tensors.items() if name.startswith(prefix)}

    tokens = {s: Tokens(**part(f"tokens.{s}.")) for s in ("volume", "image", "audio", "record") if part(f"tokens.{s}.")}
    evidence = {s: Evidence(**part(f"evidence.{s}.")) for s in tokens if part(f"evidence.{s}.")}
    return Encoded(
        size=len(next(iter(tensors.values()))),
        tokens=BySource(**tokens),
        evidence=BySource(**evidence),
        history=History(**part("history.")) if part("history.") else None,
    )


def build(model: MultimodalModel, data: MultimodalData, split: Split, root: Path) -> Cache:
    """Opens the cache of a split, computing what is missing of it.

    Args:
        model: Its encoders and head are run in evaluation mode.
        data: Which studies.
        split: Which part.
        root: Folder of all caches.
    """
    folder = root / key(model, data, split)
    folder.mkdir(parents=True, exist_ok=True)
    size = len(data.dataset(split))  # type: ignore[arg-type]  # every dataset of ours is sized
    done = sum((folder / f"{start:06d}.safetensors").is_file() for start in range(0, size, SHARD))
    if done * SHARD < size:
        _fill(model, data, split, folder=folder, start=done * SHARD, size=size)
    shards = [load_file(folder / f"{start:06d}.safetensors") for start in range(0, size, SHARD)]
    return Cache(_join(shards))


def key(model: MultimodalModel, data: MultimodalData, split: Split) -> str:
    """Hash of everything that the cached numbers depend on: weights, code, settings, data, vocabulary.

    Of a table's files only the index is read: whoever exchanges a picture under its old name must clear the cache.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] in FROZEN:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    settings = {
        "parts": _settings(model),
        "version": mm.__version__,
        "spec": describe(data.spec),
        "content": _content(data.spec),
        "split": split,
        "studies": data.studies[split],
        "inputs": list(data.inputs),
        "max_words": data.max_words,
        "words": data.tokenizer.encode("the patient has fever and a cough for three weeks 患者发热"),
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _settings(model: nn.Module) -> dict[str, str]:
    """What our own modules were made with beside weights: sizes of images, their mean, grids of tokens, windows."""
    return {
        f"{name}.{key}": repr(value)
        for name, part in model.named_modules()
        if name.split(".")[0] in FROZEN and type(part).__module__.split(".")[0] == "mm"
        for key, value in sorted(vars(part).items())
        if isinstance(value, int | float | str | tuple) and not key.startswith("_") and key != "training"
    }


def _content(spec: Spec) -> str:
    """What lies behind a spec's words: the rows of its index, or how its patients are drawn."""
    return table_digest() if isinstance(spec, PhantomSpec) else index_digest(spec)


@torch.no_grad()
def _fill(model: MultimodalModel, data: MultimodalData, split: Split, *, folder: Path, start: int, size: int) -> None:
    """Runs the encoders over the studies from `start` on and writes them shard by shard."""
    from rich.progress import track

    log.info("encoding studies %d to %d of split %s into %s", start, size, split, folder)
    device = next(model.parameters()).device
    was_training = {name: part.training for name, part in model.named_children()}
    model.eval()
    rows: list[dict[str, Tensor]] = []
    gathered = 0
    loader = data.loader(split, start=start, everything=True)
    assert size > start
    for _, batch in track(loader, description=f"encoding {split}", transient=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=not slow_in_bfloat16(device.type)):
            encoded = model.encode(batch.to(device)).without_maps()
        rows.append({name: _kept(name, item) for name, item in flatten(encoded).items() if "embeddings" not in name})
        gathered += batch.size
        while gathered >= SHARD or (start + gathered == size and gathered):
            whole = _join(rows)
            take = min(SHARD, gathered)
            target = folder / f"{start:06d}.safetensors"
            scratch = target.with_suffix(".new")
            save_file({name: item[:take].contiguous() for name, item in whole.items()}, scratch)
            scratch.replace(target)
            start, gathered = start + take, gathered - take
            rows = [{name: item[take:] for name, item in whole.items()}] if gathered else []
    for name, part in model.named_children():
        part.train(was_training[name])


def _kept(name: str, tensor: Tensor) -> Tensor:
    # Vectors in bf16. Logits stay as they are: some are -1e4 and compared with it.
    wide = tensor.is_floating_point() and not name.endswith("values")
    narrow = tensor.is_floating_point() and name.endswith("values")
    return tensor.to("cpu", torch.bfloat16 if narrow else torch.float32 if wide else tensor.dtype)


def _join(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Along the first axis; the second is padded to the longest, and a missing modality is zeros (so masked)."""
    examples = {name: item for row in rows for name, item in row.items()}
    sizes = [len(next(iter(row.values()))) for row in rows]
    joined: dict[str, Tensor] = {}
    for name, example in examples.items():
        parts = [
            row[name] if name in row else example.new_zeros(size, *example.shape[1:])
            for row, size in zip(rows, sizes, strict=True)
        ]
        longest = max(part.shape[1] if part.ndim > 1 else 0 for part in parts)
        joined[name] = torch.cat([_pad(part, longest) for part in parts])
    return joined


def _pad(part: Tensor, longest: int) -> Tensor:
    if part.ndim < 2 or part.shape[1] == longest:
        return part
    return nn.functional.pad(part, [0] * (2 * (part.ndim - 2)) + [0, longest - part.shape[1]])
