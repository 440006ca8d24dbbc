"""Embeddings of what a data set holds, each modality alone, and what must be there for them."""

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from mm.batch import Batch, Modality, Sample
from mm.data.collate import collate
from mm.data.readers import open_split
from mm.data.spec import PhantomSpec, Spec, Split
from mm.evaluation.evaluate import batches, tracked
from mm.training.checkpoint import Loaded

SOURCES: Final[tuple[Modality, ...]] = ("volume", "image", "audio", "record")


def check_source(spec: Spec, source: Modality) -> None:
    """Whether a data set has such an input.

    Raises:
        ValueError: It hasn't.
    """
    if isinstance(spec, PhantomSpec):
        return
    there = {"image": spec.image is not None, "audio": spec.audio is not None}
    known = [name for name, given in there.items() if given]
    if source not in known:
        raise ValueError(f"source must be one that data spec {spec.name} has ({', '.join(known) or 'none'}); "
                         f"got {source!r}")  # fmt: skip


def check_embeds(loaded: Loaded, source: Modality) -> None:
    """Whether a checkpoint can compare such an input with texts.

    Raises:
        ValueError: It has no encoder of the input, or none of texts.
    """
    known = [name for name in SOURCES if getattr(loaded.model, name) is not None]
    if source not in known:
        raise ValueError(f"source must be one that checkpoint {loaded.identity} has an encoder for "
                         f"({', '.join(known)}); got {source!r}")  # fmt: skip
    if loaded.model.text is None:
        raise ValueError(f"checkpoint {loaded.identity} has no text encoder to compare with; train it with `text`")


def check_one(loaded: Loaded, spec: Spec, source: Modality, split: Split) -> None:
    """Embeds the first row of a table, so that what doesn't fit (colours, a broken file) is told at once.

    Raises:
        ValueError: It doesn't.
    """
    if not isinstance(spec, PhantomSpec):
        embed_input(loaded, [open_split(spec, split, inputs=(source,), studies=1)[0]], source)


def embed_input(loaded: Loaded, samples: Sequence[Sample], source: Modality) -> Float[Tensor, "B E"]:
    """Unit vectors of one input, made without any other modality in the batch.

    Raises:
        ValueError: The checkpoint has no encoder of it, or none of the samples has it.
    """
    kept = loaded.preprocessing
    batch = collate(samples, loaded.tokenizer, rows=(), max_words=kept.max_words, max_text=kept.max_text)
    alone = Batch(
        size=batch.size,
        volumes=batch.volumes if source == "volume" else None,
        image=batch.image if source == "image" else None,
        audio=batch.audio if source == "audio" else None,
        record=batch.record if source == "record" else None,
    )
    with torch.inference_mode():
        embedded = dict(loaded.model.encode(alone).embeddings.items())
    if source not in embedded:
        raise ValueError(f"source {source!r}: the checkpoint has no encoder of it, or the samples have none")
    return embedded[source].float().cpu()


def embed_texts(loaded: Loaded, texts: Sequence[str]) -> Float[Tensor, "T E"]:
    """Unit vectors of whole texts; none may be empty."""
    blank = [Sample(study="", text=text) for text in texts]
    padded = collate(blank, loaded.tokenizer, rows=(), max_text=loaded.preprocessing.max_text).text
    assert padded is not None, "a text is empty"
    with torch.inference_mode():
        return loaded.model.embed_text(padded).float().cpu()


def embed_all(
    loaded: Loaded, samples: Dataset[Sample], source: Modality, *, rows: Sequence[int], batch_size: int, what: str
) -> Float[Tensor, "N E"]:
    """Unit vectors of one input of some rows of a data set, a batch at a time."""
    parts = tracked(batches(len(rows), batch_size), what=what)
    return torch.cat([embed_input(loaded, [samples[rows[place]] for place in part], source) for part in parts])
