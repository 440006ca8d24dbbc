"""What a data spec says of an index: which column is what, and how the rows split."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """A column of the index, and the value that means yes where the column is a flag."""

    column: str
    equals: str | None = None


@dataclass(frozen=True)
class ImageColumn:
    """Where an image comes from.

    Attributes:
        column: Path of a PNG or JPEG.
        colour: Read red, green and blue, for photographs. Else it is read in grey and its contrast is stretched to
            what its pixels span, as radiographs are.
    """

    column: str
    colour: bool = False


@dataclass(frozen=True)
class TextColumn:
    """Where a text comes from.

    Attributes:
        column: Holds a text, or a list of texts that each describe the sample (captions).
        then: Columns whose texts follow, after a blank; what is empty is left out.
        words: The text that stands for each value, such as `{"3": three}`; a value without one is refused.
    """

    column: str
    then: tuple[str, ...] = ()
    words: dict[str, str] | None = None


@dataclass(frozen=True)
class AudioColumn:
    """Where a sound comes from.

    Attributes:
        column: Path of a file that soundfile reads.
        rate: Hz that every file has; another is refused, for a wrong rate is heard as another pitch.
        site: The model's listening site that the sound is taken for, one of `mm.ontology.SOUND_SITES`.
    """

    column: str
    rate: int
    site: str = "left_upper"


@dataclass(frozen=True)
class SplitColumn:
    """A column that says which split a row belongs to, and the values that mean each.

    Attributes:
        column: Of the index.
        train: Values that mean train.
        val: Values that mean val.
        test: Values that mean test.
        rest: Where every other value goes; None refuses it.
    """

    column: str
    train: tuple[str, ...] = ("train",)
    val: tuple[str, ...] = ("val",)
    test: tuple[str, ...] = ("test",)
    rest: Literal["train", "val", "test"] | None = None


@dataclass(frozen=True)
class IndexFiles:
    """One index a split.

    Attributes:
        train: Index of the rows to train on.
        test: Index of the rows to test on; None where it is carved.
        val: Index of the rows to validate on; None where it is carved.
    """

    train: str
    test: str | None = None
    val: str | None = None


@dataclass(frozen=True)
class Carve:
    """A split taken from train: all rows of a group go to the same side.

    Attributes:
        share: Part of the groups that is taken, 0 to 1.
        group: Column that must not straddle the two, such as the image or the patient.
    """

    share: float
    group: Column
