"""`mm evaluate`: an evaluation from its YAML, run, and written as results.json, results.md and a plot."""

import importlib.util
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.progress import track

import mm
from mm.errors import one_line, read_yaml
from mm.training.checkpoint import find, read_seal
from mm.trust import TRUSTED, restrict_imports

Item = TypeVar("Item")
EXTRA: Final = ("matplotlib", "sacrebleu", "sklearn")
"""Packages of the extra `evaluate`; looked for before an hour's work, not behind it."""
NOTICE: Final = "Research software, not a medical device. Scores on procedural patients say nothing of real ones."


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
    """

    title: str
    facts: dict[str, str]
    scores: dict[str, Any]
    tables: dict[str, str]
    bars: list[tuple[str, float, float, float]] = field(default_factory=list)
    axis: str = ""

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
        checkpoint: What is scored: a checkpoint folder, or the name of a shipped one.
    """

    checkpoint: str

    @abstractmethod
    def run(self) -> Results:
        """Scores the checkpoint and the baselines."""


def run_evaluation(name: str | Path, out: Path, *, overrides: Sequence[str] = (), trust: Sequence[str] = ()) -> str:
    """Runs a shipped evaluation or a YAML file.

    Args:
        name: `eval_report`, `eval_retrieval`, `eval_vqa` or a path.
        out: Folder for results.json, results.md and results.png; made if it isn't there.
        overrides: `key=value` for arguments of the evaluation.
        trust: Packages, besides our own, whose classes the file may name.

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
    read_seal(find(evaluation.checkpoint))  # a wrong one is told before there is a folder
    out.mkdir(parents=True, exist_ok=True)
    results = evaluation.run()
    content = without_nan({"facts": results.facts, "scores": results.scores})
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    page = results.markdown()
    (out / "results.md").write_text(page, encoding="utf-8")
    if results.bars:
        _plot(results, out / "results.png")
    return page


def build(path: Path, *, overrides: Sequence[str] = (), trust: Sequence[str] = ()) -> Evaluation:
    """Makes an evaluation from its YAML; nothing of it runs yet.

    Args:
        path: The file.
        overrides: As in `run_evaluation`.
        trust: As in `run_evaluation`.

    Raises:
        ValueError: An unknown key, class, option or value; the message says what is accepted.
    """
    import mm.evaluation.on_questions
    import mm.evaluation.on_reports
    import mm.evaluation.on_retrieval  # noqa: F401  # the three imports make the short names known

    content = read_yaml(path)
    if not isinstance(content, dict) or set(content) != {"evaluation"}:
        raise ValueError(f"{path.name}: an evaluation has one key, 'evaluation', with class_path and init_args")
    entry = content["evaluation"]
    entry = {"class_path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        raise ValueError(f"{path.name}: evaluation takes class_path and init_args")
    class_path = entry["class_path"]
    known = sorted(made.__name__ for made in Evaluation.__subclasses__() if made.__module__.startswith("mm."))
    package = class_path.split(".")[0]
    if "." not in class_path and class_path not in known:
        raise ValueError(f"{path.name}: unknown class {class_path!r}; accepted: {', '.join(known)}")
    if "." in class_path and package not in {*TRUSTED, *(item.split(".")[0] for item in trust)}:
        raise ValueError(f"{path.name}: class {class_path!r} is outside the allowlist; name its package with --trust")
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


def _plot(results: Results, file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'mm-report[evaluate]'") from error
    figure = Figure(figsize=(7, 0.42 * len(results.bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, (label, value, low, high) in enumerate(results.bars):
        rival = label.startswith(("baseline", "control"))
        axes.barh(place, value, color="#9db4c0" if rival else "#1f6f8b", height=0.65)
        if low < high:
            axes.plot([low, high], [place, place], color="#222", linewidth=1.2)
        axes.text(max(value, high) + 0.01, place, f"{value:.3f}", va="center", fontsize=8)
    axes.set_yticks(range(len(results.bars)), [bar[0] for bar in results.bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.set_xlabel(results.axis)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(results.title, fontsize=10, loc="left")
    figure.savefig(file, dpi=130)
