import csv
from pathlib import Path

import pytest
import torch
import yaml

from mm.dicom.errors import DicomError
from mm.errors import USER_ERRORS, one_line, read_yaml, tell


def made(text: str) -> yaml.YAMLError:
    with pytest.raises(yaml.YAMLError) as error:
        yaml.safe_load(text)
    return error.value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/out"), "no right to write or read /out; choose another folder or"),
        (OSError(28, "No space left on device", "/out/x"), "/out/x: No space left on device"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("a\n   b"), "a b"),
        (DicomError("missing_slice", "between slice 3 and 4"), "missing_slice: a slice is missing (between slice 3"),
        (csv.Error("DOE^JANE"), "a file is not CSV"),
        (made("a: 1\nname: {DOE^JANE"), "a file is not YAML line 2"),
    ],
)
def test_an_error_is_one_line(error: Exception, said: str) -> None:
    assert isinstance(error, USER_ERRORS)
    assert tell(error).startswith(said)
    assert "\n" not in tell(error)
    assert "JANE" not in tell(error)


def fails(_: list[int]) -> None:
    try:
        raise OSError(5, "broken")
    except OSError as error:
        raise ValueError("image 'a.png' is broken:\nreplace it") from error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks
def test_an_error_of_a_loaders_worker_is_its_own_words() -> None:
    with pytest.raises(ValueError, match="Traceback") as error:
        next(iter(torch.utils.data.DataLoader([1, 2], num_workers=1, collate_fn=fails)))  # type: ignore[arg-type]
    assert tell(error.value) == one_line(str(error.value)) == "image 'a.png' is broken: replace it"


def test_a_file_that_is_no_yaml_is_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    for content, said in ((b"a: 1\nb: [", r"own\.yaml line 2: not YAML"), (b"\xff\xfe\x00", r"own\.yaml.*: not YAML")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_yaml(file)
    file.write_text("a: [1, 2]")
    assert read_yaml(file) == {"a": [1, 2]}


def test_a_dump_becomes_its_gist() -> None:
    dump = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: many
"""
    assert one_line(dump) == "model: Expected a <class 'int'>"
    assert len(one_line("x " * 5000)) <= 600
