import hashlib
from pathlib import Path

import pytest

from mm.files import discard_folder, file_digest, folder_in_place, replace_folder


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("fresh", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    replace_folder(tmp_path / "fresh", tmp_path / "place", work=tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["place"]
    assert (tmp_path / "place" / "content").read_text() == "fresh"
    discard_folder(tmp_path / "place", work=tmp_path)
    discard_folder(tmp_path / "place", work=tmp_path)  # there is none, and none is left
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "place"
    with folder_in_place(place) as fresh:
        (fresh / "content").write_text("first")
        assert not place.exists()

    def cut_short():
        with folder_in_place(place) as fresh:
            (fresh / "content").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        cut_short()
    assert (place / "content").read_text() == "first"
    assert [item.name for item in place.parent.iterdir()] == ["place"]


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
