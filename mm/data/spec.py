"""A data spec: where a data set lies, which column is what, how it splits. A short YAML file."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jsonargparse import ArgumentError, ArgumentParser

import mm
from mm.batch import Language
from mm.errors import one_line, read_yaml
from mm.trust import restrict_imports

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class PhantomSplit:
    """Procedural patients `seed`-0 ... `seed`-(studies-1)."""

    studies: int
    seed: int


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
class Column:
    """A column of the index, and the value that means yes where the column is a flag."""

    column: str
    equals: str | None = None


@dataclass(frozen=True)
class Carve:
    """A validation split taken from train: all rows of a group go to the same side.

    Attributes:
        share: Part of the groups that becomes validation, 0 to 1.
        group: Column that must not straddle the two, such as the image or the patient.
    """

    share: float
    group: Column


@dataclass(frozen=True)
class TableSpec:
    """A JSON-lines index with one row a sample, and files beside it.

    Attributes:
        name: Of the data set.
        root: Folder that all paths are relative to; `${VARIABLES}` are filled from the environment.
        index: The JSON-lines file.
        split: Column with "train", "val" or "test".
        image: Column with the path of an image.
        prompt: Column with the question.
        target: Column with the answer, or the caption where there is no question.
        closed: Flag column: the question is a closed one.
        val: How validation is carved from train; None where the index has a validation split.
        language: Of prompts and targets.
    """

    name: str
    root: str
    index: str
    split: Column
    target: Column
    image: Column | None = None
    prompt: Column | None = None
    closed: Column | None = None
    val: Carve | None = None
    language: Language = "en"


Spec: TypeAlias = PhantomSpec | TableSpec
KINDS: dict[str, type[PhantomSpec] | type[TableSpec]] = {"phantom": PhantomSpec, "jsonl": TableSpec}


def load_spec(name: str | Path, *, root: str | Path | None = None) -> Spec:
    """Reads a data spec.

    Args:
        name: A file, or the name of a shipped spec.
        root: Takes the place of the file's own `root`.

    Raises:
        ValueError: Unknown name, kind, key or type; an environment variable that isn't set; a missing folder.
    """
    path = mm.shipped(name)
    content = read_yaml(path)
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        got = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"data spec {path.name}: kind must be one of {', '.join(KINDS)}; got {got!r}")
    spec = parse(KINDS[content.pop("kind")], content, where=path.name)
    if isinstance(spec, PhantomSpec):
        if root is not None:
            raise ValueError(f"data spec {path.name} is procedural and takes no root; got {str(root)!r}")
        return spec
    return replace(spec, root=str(_folder(str(root) if root is not None else spec.root, where=path.name)))


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
        raise ValueError(f"data spec {where}: {one_line(str(error))}") from error
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
