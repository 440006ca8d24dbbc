"""The import direction of DESIGN 2, read from the source: a room may import only what stands before it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mm"
# Each room and the rooms of ours that it may import; "mm" is the package itself, not what lies in it.
_BASE = {"mm.ontology", "mm.batch", "mm.answer_words"}
_NETWORKS = _BASE | {"mm.attention", "mm.transformer"}
_FINDINGS = {
    "mm.findings", "mm.finding_maps", "mm.finding_small", "mm.finding_loss", "mm.history", "mm.instances",
    "mm.calibration",
}  # fmt: skip
_PARTS = _NETWORKS | _FINDINGS | {"mm.answers", "mm.canonical", "mm.encoders", "mm.fusion", "mm.decoder"}
_MODEL = _PARTS | {"mm.encoded", "mm.reading", "mm.widths", "mm.model"}
_TELL = {"mm.trust", "mm.errors", "mm.files"}
ALLOWED = {
    "ontology": set(),
    "batch": {"mm.ontology"},
    "masks": set(),
    "paged_masks": {"mm.masks"},
    "attention": {"mm.masks", "mm.paged_masks"},
    "answer_words": set(),
    "answers": _BASE,
    "canonical": _BASE | {"mm.answers"},
    "trust": set(),
    "files": set(),
    "errors": {"mm.dicom.errors"},
    "transformer": {"mm.attention", "mm.batch"},
    "calibration": set(),
    "finding_maps": _NETWORKS,
    "finding_small": _NETWORKS | {"mm.finding_maps"},
    "finding_loss": _NETWORKS | {"mm.finding_maps"},
    "instances": _NETWORKS | {"mm.finding_maps", "mm.findings"},
    "history": _NETWORKS | {"mm.finding_maps", "mm.encoders.temporal"},
    "findings": _NETWORKS | _FINDINGS,
    "encoders": _NETWORKS | {"mm.encoders", "mm.files"},
    "fusion": _NETWORKS | {"mm.fusion"},
    "decoder": _NETWORKS | {"mm.decoder", "mm.files"},
    "exchange": {"mm.batch", "mm.decoder", "mm.data", "mm.files"},
    "encoded": _PARTS - {"mm.answers", "mm.canonical", "mm.decoder"},
    "reading": _BASE | {"mm.decoder"},
    "widths": _PARTS,
    "model": _MODEL - {"mm.model"},
    "dicom": _BASE | {"mm.dicom", "mm.files"},
    "phantom": _BASE | {"mm.phantom", "mm.dicom", "mm.data.record", "mm.report.text"},
    "report": _BASE | {"mm.report", "mm.dicom"},
    "data": _BASE | _TELL | {"mm.data", "mm.dicom", "mm.phantom", "mm.report.text", "mm"},
    "training": _MODEL
    | _TELL
    | {"mm.training", "mm.data", "mm.dicom.resample", "mm.phantom.table", "mm.report.schema", "mm"},
    # The last two know the model by what it takes and gives; only a checkpoint makes one.
    "evaluation": _BASE
    | _TELL
    | {
        "mm.evaluation",
        "mm.data",
        "mm.dicom",
        "mm.phantom",
        "mm.report",
        "mm.training.checkpoint",
        "mm.decoder.generate",
        "mm.decoder.onednn",
        "mm",
    },
    "pipeline": _BASE
    | _TELL
    | {"mm.pipeline", "mm.data", "mm.dicom", "mm.report", "mm.training.checkpoint", "mm.decoder.generate", "mm"},
}
ABOVE = {"cli", "__init__", "__main__"}
WITHOUT_NETWORKS = ("ontology", "dicom", "phantom", "report", "trust", "errors", "files")


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


def allows(rule: str, item: str) -> bool:
    if rule == "mm":
        return item in ("mm", "mm.__version__", "mm.load", "mm.shipped")
    return item == rule or item.startswith(f"{rule}.")


def test_every_room_has_a_rule():
    assert {room(file) for file in FILES} == set(ALLOWED) | ABOVE


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_what_stands_before_it(file: Path):
    name = room(file)
    ours = [item for item in imports(file) if item == "mm" or item.startswith("mm.")]
    if name in ALLOWED:
        wrong = [item for item in ours if not any(allows(ok, item) for ok in ALLOWED[name])]
        assert not wrong, f"{name} imports {wrong}"
    if name not in ABOVE:
        assert not any(item.startswith("mm.cli") for item in ours)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_xformers_and_networks_stay_in_their_rooms(file: Path):
    every = imports(file)
    if room(file) not in ("masks", "paged_masks", "attention"):
        assert not any(item.split(".")[0] == "xformers" for item in every)
    if room(file) in WITHOUT_NETWORKS:
        assert not any(item.startswith("torch.nn.") and not item.startswith("torch.nn.functional") for item in every)
        assert "torch.nn" not in every
