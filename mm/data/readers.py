"""Opens one split of a data spec as a torch `Dataset` of `Sample`."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np
import PIL.Image
import soundfile
import torch
import torchaudio
from jaxtyping import Float
from torch.utils.data import Dataset

from mm.batch import Modality, Question, Sample
from mm.data.columns import AudioColumn
from mm.data.index import Row, cell, inside, is_flagged, rows_by_split, targets, value
from mm.data.spec import PhantomSpec, Spec, Split, TableSpec
from mm.dicom.resample import IMAGE_GRID, fit_colours, fit_image
from mm.dicom.volume import Image
from mm.ontology import SOUND_RATE, SOUND_SITES

INPUTS: tuple[Modality, ...] = ("volume", "image", "audio", "record")
MAX_RATIO: Final = 1024
KEPT_SAMPLES: Final = 1 << 24
"""Samples of sounds (64 MB, 35 minutes) that a data set keeps decoded."""
MOST_NAMED: Final = 5
"""Missing files that an error names."""


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
            every_other=part.every_other,
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
        yield from samples.texts(index) if isinstance(samples, TableDataset) else (sample.text,)
        if sample.record is not None:
            yield sample.record.words


class TableDataset(Dataset[Sample]):
    """Rows of an index; one row is one sample, its files are read when asked for; the first sounds are kept."""

    def __init__(
        self, spec: TableSpec, split: Split, *, inputs: tuple[Modality, ...] = INPUTS, studies: int | None = None
    ) -> None:
        self.spec, self.split, self.inputs = spec, split, inputs
        self.rows = rows_by_split(spec)[split][:studies]
        if not self.rows:
            raise ValueError(f"data spec {spec.name}: no row of the index belongs to split {split!r}")
        for row in self.rows:  # what is wrong with a text is told before training, not in its third hour
            targets(row, spec)
            for column in filter(None, (spec.prompt, spec.closed, spec.region)):
                value(row, column.column)
        check_files(self.rows, spec, inputs)
        self._kept: dict[int, Float[np.ndarray, " _"]] = {}
        self._room = KEPT_SAMPLES

    def __len__(self) -> int:
        """Number of rows in this split."""
        return len(self.rows)

    def texts(self, index: int) -> tuple[str, ...]:
        """All texts of row `index`: every caption, or the one answer."""
        return targets(self.rows[index], self.spec)

    def __getitem__(self, index: int) -> Sample:
        """Row `index` with its image on the model's image grid and its sound at the model's rate.

        Of several captions the first; in the training split one drawn from torch's random state, which differs by
        worker and epoch.
        """
        row, spec = self.rows[index], self.spec
        offered = self.texts(index)
        drawn = int(torch.randint(len(offered), ())) if self.split == "train" and len(offered) > 1 else 0
        questions: tuple[Question, ...] = ()
        if spec.prompt is not None:
            region = value(row, spec.region.column) if spec.region is not None and self.split == "train" else ""
            asked, closed = value(row, spec.prompt.column), is_flagged(row, spec.closed)
            questions = (Question(asked, offered[drawn], closed, region),)
        image = None
        audio: tuple[Float[np.ndarray, " _"] | None, ...] = ()
        try:
            if "image" in self.inputs and (name := image_name(row, spec)) is not None:
                assert spec.image is not None
                image = read_picture(inside(spec.root, name), colour=spec.image.colour)
            if "audio" in self.inputs and spec.audio is not None:
                sound = self._sound(index, spec.audio)
                audio = tuple(sound if site == spec.audio.site else None for site in SOUND_SITES)
        except ValueError as error:
            raise ValueError(
                f"data spec {spec.name}, row {row['__row__'] + 1}: {error}; replace the file or take the row out of the"
                " index (mm data check finds all such)"
            ) from error
        return Sample(
            study=f"{spec.name}-{row['__row__']}",
            image=image,
            audio=audio,
            language=spec.language,
            text="" if questions else offered[drawn],
            questions=questions,
        )

    def _sound(self, index: int, asked: AudioColumn) -> Float[np.ndarray, " _"]:
        if index in self._kept:
            return self._kept[index]
        sound = read_sound(self._sound_path(index, asked), rate=asked.rate)
        if len(sound) <= self._room:
            self._kept[index] = sound
            self._room -= len(sound)
        return sound

    def _sound_path(self, index: int, asked: AudioColumn) -> Path:
        return inside(self.spec.root, value(self.rows[index], asked.column))

    def seconds(self) -> list[float] | None:
        """How long each row's sound is by its header, 0 where there is none to read; None of a data set without."""
        if "audio" not in self.inputs or self.spec.audio is None:
            return None
        return [sound_seconds(self._sound_path(index, self.spec.audio)) for index in range(len(self))]


def check_files(rows: Sequence[Row], spec: TableSpec, inputs: tuple[Modality, ...]) -> None:
    """Whether the files of some rows are there; they are not opened.

    Raises:
        ValueError: One isn't, or its path leads out of the root.
    """
    absent: dict[str, int] = {}
    for row in rows:
        names = [image_name(row, spec) if "image" in inputs else None]
        if "audio" in inputs and spec.audio is not None:
            names.append(value(row, spec.audio.column))
        for name in names:
            if name is not None and not inside(spec.root, name).is_file():
                absent.setdefault(name, row["__row__"] + 1)
    if absent:
        shown = ", ".join(f"{name!r} (row {number})" for name, number in list(absent.items())[:MOST_NAMED])
        rest = f" and {len(absent) - MOST_NAMED} more" if len(absent) > MOST_NAMED else ""
        raise ValueError(
            f"data spec {spec.name}: missing below {spec.root}: {shown}{rest}; put the files there, give another root,"
            " or take the rows out of the index"
        )


def image_name(row: Row, spec: TableSpec) -> str | None:
    """Path of a row's image as the index has it, or None for a data set without images."""
    if spec.image is None:
        return None
    content = cell(row, spec.image.column)
    while isinstance(content, list | tuple) and content:
        content = content[0]
    return "" if content is None else str(content)


def read_picture(path: Path, *, colour: bool = False) -> Float[np.ndarray, "Y X"] | Float[np.ndarray, "3 Y X"]:
    """A PNG or JPEG on the model's image grid, 0 to 1.

    Args:
        path: Of the file.
        colour: Red, green and blue as they are stored; else grey, its contrast stretched as a radiograph's is.

    Raises:
        ValueError: The file is missing or no picture.
    """
    if colour:
        return fit_colours(decode_picture(path, colour=True), IMAGE_GRID)
    return fit_image(Image(decode_picture(path), None, ""), IMAGE_GRID)


def decode_picture(
    path: Path, *, colour: bool = False
) -> Float[np.ndarray, "rows columns"] | Float[np.ndarray, "3 rows columns"]:
    """A PNG or JPEG as it is stored, in grey or in red, green and blue.

    Raises:
        ValueError: The file is missing or no picture.
    """
    try:
        with PIL.Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB" if colour else "L"), dtype=np.float32)
            return np.moveaxis(pixels, -1, 0) if colour else pixels
    except FileNotFoundError as error:
        raise ValueError(f"image {path.name!r} is missing") from error
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"image {path.name!r} is broken, or no PNG or JPEG ({type(error).__name__})") from error


def sound_seconds(path: Path) -> float:
    """How long a sound is by its header; 0 of a file that has none, which reading it will tell."""
    try:
        return float(soundfile.info(path).duration)
    except (OSError, soundfile.LibsndfileError):
        return 0.0


def read_sound(path: Path, *, rate: int) -> Float[np.ndarray, " T"]:
    """A sound in mono at the model's rate.

    Args:
        path: Of a file that soundfile reads.
        rate: Hz that the file must have.

    Raises:
        ValueError: The file is missing, empty, no sound, or of another rate.
    """
    try:
        stored, given = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise ValueError(f"sound {path.name!r} is missing, broken or no sound ({type(error).__name__})") from error
    if given != rate:
        raise ValueError(f"sound {path.name!r} has {given} Hz, but the data spec says audio.rate {rate}")
    if len(stored) == 0 or not np.isfinite(stored).all():
        raise ValueError(f"sound {path.name!r} is empty or holds what is no number")
    mono: Float[np.ndarray, " T"] = stored.mean(axis=1, dtype=np.float32)
    if rate != SOUND_RATE:
        # 44101 Hz has no divisor in common with 8000 Hz; a ratio of small numbers is off by 1 in 2000 at most.
        ratio = Fraction(SOUND_RATE, rate).limit_denominator(MAX_RATIO)
        mono = torchaudio.functional.resample(torch.from_numpy(mono), ratio.denominator, ratio.numerator).numpy()
    return mono
