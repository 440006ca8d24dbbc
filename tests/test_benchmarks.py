"""The benchmarks against peers run to their end; what their figures say is another matter."""

import ast
import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needs"),
    [("contrastive", "open_clip"), ("resnet3d", "monai"), ("ranks", "faiss"), ("training_overhead", "lightning")],
)
def test_equal_results_are_asserted_and_both_columns_measured(
    name: str, needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(needs)
    monkeypatch.syspath_prepend(str(ROOT))
    file = tmp_path / "found.json"
    result = importlib.import_module(name).main(["--tiny", "--rounds", "2", "--json", str(file)])
    assert json.loads(file.read_text()) == result
    printed = capsys.readouterr().out
    assert "as shipped" in printed
    assert "same flags" in printed or "in this process" in printed
    assert len(result["lines"]) >= 2


def test_a_ratio_is_that_of_the_rounds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import side_by_side

    clock = iter(range(10_000))
    monkeypatch.setattr(side_by_side.time, "process_time", lambda: next(clock) / 1000)
    found = side_by_side.compare("a line", lambda: None, lambda: [next(clock) for _ in range(3)], rounds=5)
    assert (found["ours_ms"], found["peer_ms"], found["ratio"]) == (1.0, 4.0, 4.0)
    assert found["quartiles"] == [4.0, 4.0]
    assert "a line" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: file.stem)
def test_what_a_script_takes_from_us_is_there(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "mm":
            names = {alias.name for alias in node.names} - set(dir(importlib.import_module(node.module)))
            folder = ROOT.parent / node.module.replace(".", "/")
            assert all((folder / f"{name}.py").is_file() for name in names), names


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.py")), ids=lambda file: file.stem)
def test_a_script_says_what_it_takes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert ("__main__" in text) == ("ArgumentParser(" in text)
