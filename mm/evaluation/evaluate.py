"""`mm evaluate`: an evaluation from its YAML, run, and written as results.json, results.md and a plot."""

import importlib
import importlib.util
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.progress import track

import mm
from mm.errors import one_line, read_yaml
from mm.evaluation.items import Against, Items, compare, read_items
from mm.evaluation.plots import Confusion, plot_bars, plot_confusion
from mm.training.checkpoint import Loaded, find, read_seal
from mm.trust import check_class, restrict_imports

Item = TypeVar("Item")
EXTRA: Final = ("matplotlib", "sacrebleu", "sklearn")
"""Packages of the extra `evaluate`; looked for before an hour's work, not behind it."""
NOTICE: Final = "Research software, not a medical device. Scores on these data promise nothing on others."
_MODULES: Final = ("on_classes", "on_questions", "on_reports", "on_retrieval", "on_texts")
"""Importing them makes the short names of the evaluations known."""


@dataclass(frozen=True)
class Results:
    """What an evaluation found.

    Attributes:
        title: One line.
        facts: What it was measured on: checkpoint, data, seeds, digests.
        scores: Every number, for results.json.
        tables: Markdown tables by heading.
        bars: (label, value, low, high) for the plot, ours and the baselines.
        axis: What the bars show.
        items: Scores of single items, for a later run to be compared with.
        confusion: Of classes; drawn as confusion.png.
    """

    title: str
    facts: dict[str, str]
    scores: dict[str, Any]
    tables: dict[str, str]
    bars: list[tuple[str, float, float, float]] = field(default_factory=list)
    axis: str = ""
    items: Items = field(default_factory=Items)
    confusion: Confusion | None = None

    def compared(self, other: Against) -> "Results":
        """With the p of every measure's difference from an earlier run.

        Raises:
            ValueError: See `mm.evaluation.items.compare`.
        """
        found = compare(self.items, other.items)
        rows = [(name, f"{row['ours']:.4f}", f"{row['theirs']:.4f}", f"{row['p']:.4f}") for name, row in found.items()]
        heading = f"Against {other.who}, paired randomisation"
        tables = {**self.tables, heading: table(("measure", "ours", "theirs", "p"), rows)}
        return replace(self, scores={**self.scores, "against": {"who": other.who, **found}}, tables=tables)

    def markdown(self) -> str:
        """The page."""
        lines = [f"# {self.title}", "", f"> {NOTICE}", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        for heading, table in self.tables.items():
            lines += ["", f"## {heading}", "", table]
        return "\n".join(lines) + "\n"


class Evaluation(ABC):
    """One evaluation; its constructor is the schema of its YAML.

    Attributes:
        checkpoint: What is scored: a checkpoint folder, or the name of a shipped one; None: baselines alone.
    """

    checkpoint: str | None

    @cached_property
    def loaded(self) -> Loaded:
        """The checkpoint, opened when first asked for."""
        assert self.checkpoint is not None
        return mm.load(self.checkpoint)

    def check(self) -> None:
        """What can be known to be wrong before the work begins.

        Raises:
            ValueError: No such checkpoint, or it lacks what the evaluation needs.
        """
        if self.checkpoint is not None:
            read_seal(find(self.checkpoint))

    @abstractmethod
    def run(self) -> Results:
        """Scores the checkpoint and the baselines."""


def run_evaluation(
    name: str | Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    trust: Sequence[str] = (),
    against: Path | None = None,
) -> str:
    """Runs a shipped evaluation or a YAML file.

    Args:
        name: `eval_report`, `eval_retrieval`, `eval_vqa`, ... or a path.
        out: Folder for results.json, results.md and results.png; made if it isn't there.
        overrides: `key=value` for arguments of the evaluation.
        trust: Packages, besides our own, whose classes the file may name.
        against: results.json of an earlier run of the same items, to compare with by paired randomisation.

    Returns:
        The page as Markdown.

    Raises:
        ValueError: An unknown file, class, option or value, or no such checkpoint.
        ImportError: A package of the extra `evaluate` isn't installed.
    """
    path = mm.shipped(name)
    evaluation = build(path, overrides=overrides, trust=trust)
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"to evaluate needs {', '.join(missing)}: pip install 'mm-report[evaluate]'")
    other = None if against is None else read_items(against)
    evaluation.check()  # what is wrong is told before there is a folder
    out.mkdir(parents=True, exist_ok=True)
    results = evaluation.run()
    write_results(results, out)  # an hour's work is kept even if the two runs don't compare
    if other is not None:
        results = results.compared(other)
        write_results(results, out)
    return results.markdown()


def write_results(results: Results, out: Path) -> None:
    """Writes results.json, results.md and the pictures."""
    content = {"facts": results.facts, "scores": results.scores}
    if results.items.ids:
        content["items"] = results.items.content()
    text = json.dumps(without_nan(content), indent=1, ensure_ascii=False, allow_nan=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    (out / "results.md").write_text(results.markdown(), encoding="utf-8")
    if results.bars:
        plot_bars(results.bars, out / "results.png", title=results.title, axis=results.axis)
    if results.confusion is not None:
        plot_confusion(results.confusion, out / "confusion.png", title=results.title)


def build(path: Path, *, overrides: Sequence[str] = (), trust: Sequence[str] = ()) -> Evaluation:
    """Makes an evaluation from its YAML; nothing of it runs yet.

    Args:
        path: The file.
        overrides: As in `run_evaluation`.
        trust: As in `run_evaluation`.

    Raises:
        ValueError: An unknown key, class, option or value; the message says what is accepted.
    """
    for module in _MODULES:
        importlib.import_module(f"mm.evaluation.{module}")
    content = read_yaml(path)
    if not isinstance(content, dict) or set(content) != {"evaluation"}:
        raise ValueError(f"{path.name}: an evaluation has one key, 'evaluation', with class_path and init_args")
    entry = content["evaluation"]
    entry = {"class_path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        raise ValueError(f"{path.name}: evaluation takes class_path and init_args")
    class_path = entry["class_path"]
    known = {made.__name__ for made in Evaluation.__subclasses__() if made.__module__.startswith("mm.")}
    check_class(class_path, known, trust, where=path.name)
    arguments = dict(entry.get("init_args") or {})
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r}: KEY=VALUE is accepted")
        try:
            arguments[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: the value is not YAML") from error
    restrict_imports(trust)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--evaluation", type=Evaluation)
    try:
        parsed = parser.parse_object({"evaluation": {"class_path": class_path, "init_args": arguments}})
        made = parser.instantiate(parsed).evaluation
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{path.name}: {one_line(str(error))}") from error
    assert isinstance(made, Evaluation)
    return made


def without_nan(value: Any) -> Any:
    """The same with null for what isn't defined (a recall without positives): JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tracked(items: Sequence[Item], *, what: str) -> Iterable[Item]:
    """The items one after the other, with a bar where standard error is a terminal."""
    console = Console(stderr=True)
    return track(items, description=what, console=console, disable=not console.is_terminal)


def batches(size: int, batch_size: int) -> list[range]:
    """The numbers 0 to size - 1 in batches."""
    return [range(start, min(start + batch_size, size)) for start in range(0, size, batch_size)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
