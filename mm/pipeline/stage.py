"""Stages, writers and the pipeline they make; the order is checked before a file is opened."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mm.dicom.scan import Study
from mm.pipeline.case import Case
from mm.report.schema import INPUTS, Report


class Stage(ABC):
    """One step. A subclass is named in YAML by its class; its constructor is the schema of its options.

    Class attributes:
        requires: Some earlier stage must provide one of these; empty where nothing is needed.
        provides: What later stages may count on being looked for.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def process(self, cases: Sequence[Case]) -> list[Case]:
        """New cases, one for each given, in the same order. What goes wrong is raised."""

    def accepts(self, study: Study) -> bool:  # noqa: ARG002
        """True where a study has what this stage makes reports from; one such stage makes a study eligible."""
        return False

    def describe(self) -> str:
        """What `accepts` looks for, in the user's words; empty where it never accepts."""
        return ""


class Writer(ABC):
    """Writes one file of a report's folder."""

    @abstractmethod
    def write(self, report: Report, folder: Path) -> Path:
        """Writes into an existing folder.

        Returns:
            The file.
        """


@dataclass(frozen=True)
class Pipeline:
    """Stages in order, and the writers of what they make.

    Raises:
        ValueError: A stage needs what no earlier one provides, nothing makes a report, or nothing writes one.
    """

    stages: tuple[Stage, ...]
    writers: tuple[Writer, ...]

    def __post_init__(self) -> None:
        provided: set[str] = set()
        for number, stage in enumerate(self.stages):
            if stage.requires and not stage.requires & provided:
                needs = " or ".join(f"'{name}'" for name in sorted(stage.requires, key=_place))
                raise ValueError(
                    f"stage {number + 1} ({type(stage).__name__}) needs {needs}; no earlier stage provides one"
                )
            provided |= stage.provides
        if "report" not in provided:
            raise ValueError("no stage provides 'report'; GenerateReport does")
        if not self.writers:
            raise ValueError("writers must name at least one: JsonWriter, MarkdownWriter, HtmlWriter")

    def accepts(self, study: Study) -> bool:
        """True where a report can be made of a study."""
        return any(stage.accepts(study) for stage in self.stages)

    def wanted(self) -> str:
        """What an eligible study has, in the user's words."""
        return " or ".join(filter(None, (stage.describe() for stage in self.stages)))


def _place(name: str) -> tuple[int, str]:
    """The house's own names in their order, a user's own behind them."""
    return (INPUTS.index(name) if name in INPUTS else len(INPUTS), name)
