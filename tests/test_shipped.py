import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mm

ROOT = Path(mm.__file__).parent.parent


def test_a_path_comes_first(tmp_path: Path):
    own = tmp_path / "report.yaml"
    own.write_text("stages: []")
    assert mm.shipped(own) == own


@pytest.mark.parametrize("name", ["report", "report.yaml", "train_tiny", "phantom"])
def test_a_name_is_found(name: str):
    assert mm.shipped(name).stem == name.removesuffix(".yaml")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'nope'.*shipped: .*report.*train_tiny"):
        mm.shipped("nope")


def test_names_are_unique_over_both_folders():
    names = [file.stem for kind in ("pipelines", "data_specs") for file in (ROOT / kind).glob("*.yaml")]
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_a_wheel_holds_the_yaml_and_the_checkpoint(tmp_path: Path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mm/_shipped/pipelines/report.yaml" in names
    assert "mm/_shipped/data_specs/phantom.yaml" in names
    assert any(name.startswith("mm/checkpoints/default/") for name in names)
