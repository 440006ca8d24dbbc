"""A pipeline from its YAML: parsed by jsonargparse against the constructors, with imports denied but for a few."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jsonargparse import ArgumentError, ArgumentParser, Namespace

import mm
import mm.pipeline.generate
import mm.pipeline.load
import mm.pipeline.write  # the three imports make the short names known
from mm.errors import one_line, read_yaml
from mm.pipeline.generate import GenerateReport
from mm.pipeline.stage import Pipeline, Stage, Writer
from mm.trust import check_class, restrict_imports

KEYS: Final = ("stages", "writers")


@dataclass(frozen=True)
class Built:
    """A pipeline ready to run.

    Attributes:
        pipeline: Its stages and writers.
        generate: The one stage that holds the checkpoint.
        digest: SHA-256 over classes and options, without the checkpoint's path: its own hash tells it better.
    """

    pipeline: Pipeline
    generate: GenerateReport
    digest: str


def build_pipeline(name: str | Path, *, trust: Sequence[str] = (), checkpoint: str | None = None) -> Built:
    """Reads a shipped pipeline or a YAML file.

    Args:
        name: `report`, `report_ct`, `report_xray`, or a path.
        trust: Packages, besides our own, whose classes the file may name.
        checkpoint: Takes the place of the one that the file names.

    Raises:
        ValueError: No such pipeline, no YAML, an unknown key, class or option, or an order that can't work; the
            message says what is accepted.
    """
    path = mm.shipped(name)
    content = _read(path)
    entries = {key: [_Entry.of(item, path, key) for item in content[key]] for key in KEYS}
    bases: dict[str, type] = {"stages": Stage, "writers": Writer}
    for key, items in entries.items():
        for number, entry in enumerate(items, start=1):
            entry.check(f"{path.name}: {key[:-1]} {number}", bases[key], trust)
    restrict_imports(trust)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--stages", type=list[Stage])
    parser.add_argument("--writers", type=list[Writer])
    try:
        parsed = parser.parse_object({key: content[key] for key in KEYS})
        made = parser.instantiate(parsed)
        pipeline = Pipeline(tuple(made.stages), tuple(made.writers))
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{path.name}: {one_line(str(error))}") from error
    writing = [stage for stage in pipeline.stages if isinstance(stage, GenerateReport)]
    if len(writing) != 1:
        raise ValueError(f"{path.name}: exactly one GenerateReport is accepted, got {len(writing)}")
    if checkpoint is not None:
        writing[0].checkpoint = checkpoint
    return Built(pipeline, writing[0], _digest(parsed))


@dataclass(frozen=True)
class _Entry:
    """One class of the YAML and its options."""

    class_path: str
    options: dict[str, Any]

    @classmethod
    def of(cls, item: Any, path: Path, key: str) -> "_Entry":
        if isinstance(item, str):
            return cls(item, {})
        shape = isinstance(item, dict) and isinstance(item.get("class_path"), str)
        if not shape or set(item) - {"class_path", "init_args"} or not isinstance(item.get("init_args", {}), dict):
            raise ValueError(f"{path.name}: {key} takes class names, or class_path with init_args; got {item!r}")
        return cls(item["class_path"], item.get("init_args", {}))

    def check(self, where: str, base: type, trust: Sequence[str]) -> None:
        """Says in the user's words what jsonargparse would say in its own."""
        known = {made.__name__: made for made in _subclasses(base) if made.__module__.startswith("mm.")}
        check_class(self.class_path, known, trust, where=where)
        if self.class_path not in known:
            return
        accepted = list(inspect.signature(known[self.class_path]).parameters)
        for option in self.options:
            if option not in accepted:
                told = ", ".join(accepted) or "none"
                raise ValueError(f"{where} ({self.class_path}): unknown option {option!r}; accepted: {told}")


def _subclasses(base: type) -> list[type]:
    """The concrete classes under a base, short names' only source."""
    found: list[type] = []
    children: list[type] = base.__subclasses__()
    for child in children:
        found += [child, *_subclasses(child)]
    return [made for made in found if not inspect.isabstract(made)]


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in KEYS):
        raise ValueError(f"{path.name}: a pipeline has two lists, {' and '.join(KEYS)}; this file has not")
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{path.name}: unknown key {key!r}; accepted: {', '.join(KEYS)}")
    return content


def _digest(parsed: Namespace) -> str:
    content = parsed.as_dict()
    for stage in content["stages"]:
        stage.get("init_args", {}).pop("checkpoint", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
