import sys
from pathlib import Path

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from mm import trust
from mm.data.spec import load_spec
from mm.trust import check_class, restrict_imports


class Base:
    """What the option takes."""


@pytest.fixture
def parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArgumentParser:
    (tmp_path / "my_own_package.py").write_text("from test_trust import Base\nclass Mine(Base):\n    'Mine.'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "test_trust", sys.modules[__name__])
    monkeypatch.setattr(trust, "_named", {})
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--it", type=Base)
    return made


def test_what_the_user_trusts_stays_trusted(parser: ArgumentParser) -> None:
    words = ["--it", "my_own_package.Mine"]
    restrict_imports()
    with pytest.raises(ArgumentError, match="not allowed"):
        parser.parse_args(words)
    assert "my_own_package" not in sys.modules
    restrict_imports(["my_own_package"])
    load_spec("phantom")  # parses too, and trusts nothing of its own
    restrict_imports(["another_package"])
    assert parser.parse_args(words).it.class_path == "my_own_package.Mine"


def test_a_path_is_no_package() -> None:
    with pytest.raises(ValueError, match="takes the import name of a package"):
        restrict_imports(["../evil"])


@pytest.mark.parametrize("named", ["Known", "torch.nn.Linear", "mine.part.Stage"])
def test_what_is_known_or_trusted_may_be_named(named: str) -> None:
    check_class(named, {"Known"}, ["mine.other"], where="a.yaml: stage 1")


def test_what_is_neither_is_told_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"a\.yaml: stage 1: unknown class 'Knwon'; accepted: Known, Other"):
        check_class("Knwon", {"Other", "Known"}, ["mine"], where="a.yaml: stage 1")
    with pytest.raises(ValueError, match=r"a\.yaml names the class 'os\.system'; only classes of mm.*--trust"):
        check_class("os.system", {"Known"}, ["mine"], where="a.yaml")
