"""A data spec: where a data set lies, which column is what, how it splits. A short YAML file."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from jsonargparse import ArgumentError, ArgumentParser

import mm
from mm.batch import Language
from mm.data.columns import AudioColumn, Carve, Column, ImageColumn, IndexFiles, SplitColumn, TextColumn
from mm.errors import one_line, read_yaml
from mm.ontology import SOUND_SITES
from mm.trust import restrict_imports

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Format = Literal["jsonl", "csv", "parquet", "files"]


@dataclass(frozen=True)
class PhantomSplit:
    """Procedural patients `seed`-0 ... `seed`-(studies-1).

    Attributes:
        studies: How many.
        seed: Of the patients.
        every_other: A finding that every other patient has, beside those who have it anyway; for a stage that learns
            a rare one.
    """

    studies: int
    seed: int
    every_other: str | None = None


@dataclass(frozen=True)
class PhantomSpec:
    """Procedural patients, rendered when asked for.

    Attributes:
        name: Of the data set.
        train: Patients to train on; paraphrases of the training split only.
        val: Patients to validate on, with held-out paraphrases kept out too.
        test: Patients to test on, held-out paraphrases included.
        priors: Earlier visits rendered for each patient, at most.
    """

    name: str
    train: PhantomSplit
    val: PhantomSplit
    test: PhantomSplit
    priors: int = 1


@dataclass(frozen=True)
class TableSpec:
    """An index with one row a sample, and files beside it.

    Attributes:
        name: Of the data set.
        root: Folder that all paths are relative to and stay in; `${VARIABLES}` are filled from the environment.
        index: The file of all rows, or one a split; of kind `files` the glob of the files, each one a row.
        format: Of the index; follows from `kind` and is not written.
        pattern: Of kind `files`: a regular expression for the whole path, whose named groups are the columns
            beside `path`.
        split: Column with the split; None where each split has its index or is carved.
        image: Column with the path of an image; of a list the first. `colour: true` for photographs.
        audio: Column with the path of a sound.
        prompt: Column with the question.
        target: Column with the answer, or the caption or captions where there is no question.
        closed: Flag column: the question is a closed one.
        region: Column with the part of the body that the image of a question shows; read of training rows alone.
        side: Column with "left" or "right", to check texts against.
        group: Column of what should not be in two splits, such as the patient; only checked.
        held_out: The value of `group` whose rows are the test split. What else `split` has there is trained on.
        exclude: Flag column: the row is neither trained nor validated on.
        drop_empty: Leave out rows without a target; else they are refused.
        val: How validation is carved from train; None where the index has a validation split.
        test: How the test split is carved from train; None where the index has one.
        language: Of prompts and targets.
    """

    name: str
    root: str
    index: str | IndexFiles
    target: TextColumn
    format: Format = "jsonl"
    pattern: str | None = None
    split: SplitColumn | None = None
    image: ImageColumn | None = None
    audio: AudioColumn | None = None
    prompt: Column | None = None
    closed: Column | None = None
    region: Column | None = None
    side: Column | None = None
    group: Column | None = None
    held_out: str | None = None
    exclude: Column | None = None
    drop_empty: bool = False
    val: Carve | None = None
    test: Carve | None = None
    language: Language = "en"


Spec: TypeAlias = PhantomSpec | TableSpec
COLUMNS = (AudioColumn, Carve, Column, ImageColumn, IndexFiles, SplitColumn, TextColumn)
KINDS: tuple[str, ...] = ("phantom", *get_args(Format))


def load_spec(name: str | Path, *, root: str | Path | None = None, held_out: str | None = None) -> Spec:
    """Reads a data spec.

    Args:
        name: A file, or the name of a shipped spec.
        root: Takes the place of the file's own `root`.
        held_out: Takes the place of the file's own `held_out`.

    Raises:
        ValueError: Unknown name, kind, key or type; an environment variable that isn't set; a missing folder.
    """
    path = mm.shipped(name)
    content = read_yaml(path)
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        got = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"data spec {path.name}: kind must be one of {', '.join(KINDS)}; got {got!r}")
    kind = content.pop("kind")
    if "format" in content:
        raise ValueError(f"data spec {path.name}: format is no key; kind says it ({kind})")
    fields = content if kind == "phantom" else {**content, "format": kind}
    spec = parse(PhantomSpec if kind == "phantom" else TableSpec, fields, where=path.name)
    if isinstance(spec, PhantomSpec):
        for given, what in ((root, "root"), (held_out, "held_out")):
            if given is not None:
                raise ValueError(f"data spec {path.name} is procedural and takes no {what}; got {str(given)!r}")
        return spec
    assert isinstance(spec, TableSpec)
    if held_out is not None:
        spec = replace(spec, held_out=held_out)
    _check(spec, where=path.name)
    return replace(spec, root=str(_folder(str(root) if root is not None else spec.root, where=path.name)))


def _check(spec: TableSpec, *, where: str) -> None:
    """What no type says.

    Raises:
        ValueError: No split, two sources of one, a share or rate out of range, a pattern where none belongs.
    """
    where = f"data spec {where}"
    tested = spec.test is not None or spec.held_out is not None
    if isinstance(spec.index, str) and spec.split is None and (spec.val is None or not tested):
        raise ValueError(f"{where}: no split; give split (a column), an index for each of train, val and test, or "
                         "carve both val and test")  # fmt: skip
    if isinstance(spec.index, IndexFiles) and (spec.split is not None or spec.format == "files"):
        raise ValueError(f"{where}: an index for each split takes neither a split column nor kind files")
    for name, carve in (("val", spec.val), ("test", spec.test)):
        if carve is not None and not 0.0 < carve.share < 1.0:
            raise ValueError(f"{where}: {name}.share must be above 0 and below 1, got {carve.share}")
        if carve is not None and isinstance(spec.index, IndexFiles) and getattr(spec.index, name) is not None:
            raise ValueError(f"{where}: {name} is both carved and in an index of its own; drop one")
    if spec.held_out is not None and (
        spec.group is None or isinstance(spec.index, IndexFiles) or spec.test is not None
    ):
        raise ValueError(f"{where}: held_out needs a group, one index for all splits and no carved test")
    if (spec.format == "files") != (spec.pattern is not None):
        raise ValueError(f"{where}: pattern belongs to kind files, and that needs one; got kind {spec.format}")
    try:
        re.compile(spec.pattern or "")
    except re.error as error:
        raise ValueError(f"{where}: pattern is no regular expression ({error})") from error
    if spec.audio is not None and spec.audio.rate < 1:
        raise ValueError(f"{where}: audio.rate must be at least 1 Hz, got {spec.audio.rate}")
    if spec.audio is not None and spec.audio.site not in SOUND_SITES:
        raise ValueError(f"{where}: audio.site must be one of {', '.join(SOUND_SITES)}; got {spec.audio.site!r}")


def parse(kind: type[PhantomSpec] | type[TableSpec], content: dict[str, Any], *, where: str) -> Spec:
    """Checks a mapping against a spec's fields.

    Raises:
        ValueError: A key is unknown or missing, or a value has another type.
    """
    restrict_imports()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "spec", fail_untyped=True)
    try:
        parsed = parser.parse_object({"spec": content})
    except (ArgumentError, ValueError) as error:  # the latter where an import is denied
        said = one_line(str(error), classes=(kind, *COLUMNS)).replace("Group 'spec' does not", "does not")
        raise ValueError(f"data spec {where}: {said}") from error
    made = parser.instantiate(parsed).spec
    assert isinstance(made, kind)
    return made


def describe(spec: Spec) -> dict[str, Any]:
    """The spec as plain data, for a model's card (without the machine's own paths)."""
    return {key: value for key, value in asdict(spec).items() if key != "root"}


def procedural(described: object) -> bool:
    """True where what `describe` returned is of procedural patients: a split of theirs is a number and a seed."""
    return isinstance(described, Mapping) and all(isinstance(described.get(split), Mapping) for split in SPLITS)


def _folder(root: str, *, where: str) -> Path:
    unset = [name for name in re.findall(r"\$\{(\w+)\}", root) if name not in os.environ]
    if unset:
        raise ValueError(f"data spec {where}: set {', '.join(unset)} in the environment, or give --data.root")
    path = Path(os.path.expandvars(root)).expanduser()
    if not path.is_dir():
        raise ValueError(f"data spec {where}: root {str(path)!r} is no folder; give --data.root")
    return path
