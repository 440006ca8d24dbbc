"""Opens one split of a data spec as a torch `Dataset` of `Sample`."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float
from torch.utils.data import Dataset

from mm.batch import Modality, Question, Sample
from mm.data.json_lines import json_lines
from mm.data.spec import SPLITS, Column, PhantomSpec, Spec, Split, TableSpec
from mm.dicom.resample import IMAGE_GRID, fit_image
from mm.dicom.volume import Image

INPUTS: tuple[Modality, ...] = ("volume", "image", "audio", "record")


def open_split(
    spec: Spec, split: Split, *, inputs: tuple[Modality, ...] = INPUTS, studies: int | None = None
) -> Dataset[Sample]:
    """One split of a data set.

    Args:
        spec: From `mm.data.spec.load_spec`.
        split: Which part.
        inputs: Inputs to make; texts and labels speak of what these can show and nothing else.
        studies: Only the first so many; more than the spec names is allowed for procedural patients.

    Raises:
        ValueError: The index is missing or a row of it lacks a column.
    """
    if isinstance(spec, PhantomSpec):
        from mm.phantom.dataset import PhantomDataset

        part = getattr(spec, split)
        return PhantomDataset(
            studies=part.studies if studies is None else studies,
            seed=part.seed,
            split=split,
            priors=spec.priors,
            inputs=inputs,
        )
    return TableDataset(spec, split, inputs=inputs, studies=studies)


def open_words(
    spec: Spec, split: Split, *, inputs: tuple[Modality, ...] = INPUTS, studies: int | None = None
) -> Dataset[Sample]:
    """The same studies as `open_split` with the same arguments, in words only: nothing is rendered or read.

    Args:
        spec: From `mm.data.spec.load_spec`.
        split: Which part.
        inputs: Inputs that the words may speak of; none of them is made.
        studies: Only the first so many.
    """
    if isinstance(spec, PhantomSpec):
        from mm.data.wording import PhantomWords
        from mm.phantom.dataset import PhantomDataset

        rendered = open_split(spec, split, inputs=inputs, studies=studies)
        assert isinstance(rendered, PhantomDataset)
        return PhantomWords(rendered)
    return TableDataset(spec, split, inputs=(), studies=studies)


def texts(spec: Spec, *, studies: int | None = None) -> Iterator[str]:
    """Every text of the training split that a vocabulary should know, placeholders kept.

    Args:
        spec: From `mm.data.spec.load_spec`.
        studies: Only the first so many.
    """
    samples = open_words(spec, "train", studies=studies)
    if isinstance(spec, PhantomSpec):
        from mm.data.wording import PhantomWords

        assert isinstance(samples, PhantomWords)
        samples = PhantomWords(samples.rendered, record="with")
    for index in range(len(samples)):  # type: ignore[arg-type]  # every dataset of ours is sized
        sample = samples[index]
        yield from (sentence.text for sentence in sample.report)
        yield from (text for item in sample.questions for text in (item.question, item.answer))
        yield sample.text
        if sample.record is not None:
            yield sample.record.words


class TableDataset(Dataset[Sample]):
    """Rows of a JSON-lines index; one row is one sample, images are read when asked for."""

    def __init__(
        self, spec: TableSpec, split: Split, *, inputs: tuple[Modality, ...] = INPUTS, studies: int | None = None
    ) -> None:
        self.spec = spec
        self.inputs = inputs
        rows = read_index(Path(spec.root) / spec.index)
        self.rows = [row for row in rows if split_of(row, spec) == split][:studies]
        if not self.rows:
            raise ValueError(f"data spec {spec.name}: no row of {spec.index} belongs to split {split!r}")

    def __len__(self) -> int:
        """Number of rows in this split."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Row `index` with its image on the model's image grid."""
        number, row = self.rows[index]["__row__"], self.rows[index]
        spec = self.spec
        target = value(row, spec.target)
        questions: tuple[Question, ...] = ()
        if spec.prompt is not None:
            closed = spec.closed is not None and value(row, spec.closed) == spec.closed.equals
            questions = (Question(value(row, spec.prompt), target, closed),)
        image = None
        if spec.image is not None and "image" in self.inputs:
            image = read_picture(Path(spec.root) / value(row, spec.image))
        return Sample(
            study=f"{spec.name}-{number}",
            image=image,
            language=spec.language,
            text="" if questions else target,
            questions=questions,
        )


def read_index(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, each with its number under `__row__`.

    Raises:
        ValueError: The file is missing, or a line is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"index {str(path)!r} does not exist")
    lines = json_lines(path.read_text(encoding="utf-8-sig"), where=path.name)
    return [{**row, "__row__": line - 1} for line, row in lines]


def value(row: dict[str, Any], column: Column) -> str:
    """A column of a row, as text.

    Raises:
        ValueError: The row doesn't have it; the message lists the columns.
    """
    if column.column not in row:
        known = ", ".join(sorted(key for key in row if key != "__row__"))
        raise ValueError(f"row {row['__row__'] + 1} has no column {column.column!r}; it has {known}")
    return str(row[column.column])


def split_of(row: dict[str, Any], spec: TableSpec) -> str:
    """The split a row belongs to; validation may be carved from train by a hash of the row's group."""
    split = value(row, spec.split)
    if split not in SPLITS:
        raise ValueError(f"data spec {spec.name}: split must be one of {', '.join(SPLITS)}; got {split!r}")
    if split == "train" and spec.val is not None:
        group = hashlib.sha256(value(row, spec.val.group).encode()).digest()
        if int.from_bytes(group[:4], "big") < spec.val.share * 2**32:
            return "val"
    return split


def read_picture(path: Path) -> Float[np.ndarray, "Y X"]:
    """A PNG or JPEG in grey on the model's image grid.

    Raises:
        ValueError: The file is missing or no picture.
    """
    try:
        with PIL.Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"), dtype=np.float32)
    except (OSError, PIL.UnidentifiedImageError) as error:
        raise ValueError(f"image {path.name!r} can't be read: {type(error).__name__}") from error
    return fit_image(Image(pixels, None, ""), IMAGE_GRID)
