"""The import direction of DESIGN 2, read from the source: a room may import only what stands before it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mm"
# Each room and the rooms of ours that it may import.
_BASE = {"mm.ontology", "mm.batch"}
_NETWORKS = _BASE | {"mm.attention", "mm.transformer"}
ALLOWED = {
    "ontology": set(),
    "batch": {"mm.ontology"},
    "attention": set(),
    "transformer": {"mm.attention", "mm.batch"},
    "encoders": _NETWORKS | {"mm.encoders"},
    "fusion": _NETWORKS | {"mm.fusion"},
    "decoder": _NETWORKS | {"mm.decoder"},
    "dicom": _BASE | {"mm.dicom"},
    "phantom": _BASE | {"mm.phantom", "mm.dicom", "mm.data.record", "mm.report.text"},
    "report": _BASE | {"mm.report", "mm.dicom"},
    "data": _BASE | {"mm.data", "mm.dicom", "mm.phantom", "mm.report.text", "mm"},
}
WITHOUT_NETWORKS = ("ontology", "dicom", "phantom", "report")


def room(file: Path) -> str:
    parts = file.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_what_stands_before_it(file: Path):
    name = room(file)
    ours = [item for item in imports(file) if item == "mm" or item.startswith("mm.")]
    if name in ALLOWED:
        wrong = [item for item in ours if not any(item == ok or item.startswith(f"{ok}.") for ok in ALLOWED[name])]
        assert not wrong, f"{name} imports {wrong}"
    if name not in {"cli", "__init__", "__main__"}:
        assert not any(item.startswith("mm.cli") for item in ours)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_xformers_and_networks_stay_in_their_rooms(file: Path):
    every = imports(file)
    if file != PACKAGE / "attention.py":
        assert not any(item.split(".")[0] == "xformers" for item in every)
    if room(file) in WITHOUT_NETWORKS:
        assert not any(item.startswith("torch.nn.") and not item.startswith("torch.nn.functional") for item in every)
        assert "torch.nn" not in every
