"""What was tested on: the texts of a split, and a hash that two results share when they are of the same items."""

import hashlib
from collections.abc import Sequence

from torch.utils.data import Dataset

from mm.batch import Sample
from mm.data.index import index_digest
from mm.data.readers import TableDataset
from mm.data.spec import PhantomSpec, Spec, Split
from mm.phantom.table import table_digest


def split_facts(spec: Spec, split: Split, ids: Sequence[str]) -> dict[str, str]:
    """The split, how many items of it, and hashes: of their ids in order, and of what they were read from."""
    facts = {"split": f"{split} of {spec.name}, {len(ids)} items, sha256 of their ids {ids_digest(ids)}"}
    if isinstance(spec, PhantomSpec):
        return {**facts, "phantom table": table_digest()[:16]}
    if spec.held_out is not None:
        assert spec.group is not None
        facts["held out"] = f"{spec.group.column} {spec.held_out}"
    return {**facts, "index": f"sha256 {index_digest(spec)[:16]}"}


def ids_digest(ids: Sequence[str]) -> str:
    """The first 16 hexadecimal digits of a hash of ids in their order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def size_of(samples: Dataset[Sample]) -> int:
    """Number of samples."""
    return len(samples)  # type: ignore[arg-type]  # every dataset of ours is sized


def captions_of(samples: Dataset[Sample], index: int, sample: Sample) -> tuple[str, ...]:
    """All texts of a sample: every caption, where the index has several."""
    return samples.texts(index) if isinstance(samples, TableDataset) else (sample.text,)


def check_captions(spec: Spec, *, what: str) -> None:
    """Whether a data set has texts that are no answers to questions.

    Raises:
        ValueError: It has questions.
    """
    if not isinstance(spec, PhantomSpec) and spec.prompt is not None:
        raise ValueError(f"data spec {spec.name} has questions and answers, and no texts of their own for {what}; "
                         "eval_vqa scores it")  # fmt: skip
