"""Writers: one file of a report's folder each."""

from pathlib import Path

from mm.pipeline.stage import Writer
from mm.report.html import to_html
from mm.report.json import to_json
from mm.report.markdown import to_markdown
from mm.report.schema import Report


class JsonWriter(Writer):
    """report.json: every fact, for programs."""

    def write(self, report: Report, folder: Path) -> Path:
        """Writes report.json."""
        return _write(folder / "report.json", to_json(report))


class MarkdownWriter(Writer):
    """report.md: the text and the findings, for a terminal or a note."""

    def write(self, report: Report, folder: Path) -> Path:
        """Writes report.md."""
        return _write(folder / "report.md", to_markdown(report))


class HtmlWriter(Writer):
    """report.html: one file that holds everything a reader needs, key images included."""

    def write(self, report: Report, folder: Path) -> Path:
        """Writes report.html."""
        return _write(folder / "report.html", to_html(report))


def _write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())  # not write_text: a newline stays one byte on every system
    return path
