"""What a user is told of a mistake: one line that says where, what, and what would be accepted."""

import csv
import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import yaml

from mm.dicom.errors import RefusedError

USER_ERRORS: Final = (ValueError, OSError, ImportError, RefusedError, yaml.YAMLError, csv.Error)
"""What a verb ends with where its input, its configuration or its machine is at fault; all else is our own bug."""
LONGEST: Final = 600


def tell(error: Exception) -> str:
    """One of `USER_ERRORS` in one line.

    What stands in a file is never quoted, for it may be a patient's: of YAML and CSV only the place is told.
    """
    if isinstance(error, PermissionError):
        return f"no right to write or read {error.filename or 'a file'}; choose another folder or change its mode"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, yaml.YAMLError):
        return f"a file is not YAML{_line(error)}"
    if isinstance(error, csv.Error):
        return "a file is not CSV; write it as UTF-8 text with one header and as many cells in every row"
    return " ".join(from_worker(str(error)).split())


def from_worker(message: str) -> str:
    """What an error said in a loader's worker, whose message is a whole traceback; any other message as it is."""
    found = re.match(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback", message)
    if found is None:
        return message
    # The last one: those before it are what it came from.
    return re.split(rf"\n(?:[\w.]+\.)?{found[1]}: ", message)[-1]


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ValueError: It is no YAML; the message names file and line.
        OSError: It can't be read.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name}{_line(error)}: not YAML") from error


def one_line(message: str, *, classes: Iterable[type] = ()) -> str:
    """The gist of a parser's error: where, what, and what would be accepted.

    Args:
        message: Of jsonargparse, which dumps every type it tried.
        classes: Beside those in the message, whose arguments a mistyped name may have meant.
    """
    message = from_worker(message)
    named = list(re.finditer(r"Problem with given class_path '([\w.]+)'", message))
    denied = re.search(r"Importing '([\w.]+)'", message)
    if denied:
        given = named[-1][1] if named else denied[1]
        package = denied[1].split(".")[0]
        told = f"class {given!r}: {package} is not among the packages a YAML may import"
        return f"{told}; if you trust it: --trust {package}"
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    noise = ("Parser key", "Does not validate", "Subtypes:", "Errors:", "Given value", "Problem with given class_path")
    gist = [line for line in lines if not line.startswith(noise) and line != "Expected a <class 'NoneType'>"]
    near = _near(message, classes)
    if not gist or lines[0] == gist[0] or len(lines) == 1:
        return (" ".join(lines) + near)[:LONGEST]
    keys = re.findall(r'Parser key "([\w.]+)"', message[named[-1].end() if named else 0 :])
    where = ".".join([*([named[-1][1].rpartition(".")[2]] if named else []), *keys[-1:]])
    return ((f"{where}: " if where else "") + "; ".join(gist) + near)[:LONGEST]


def _near(message: str, classes: Iterable[type]) -> str:
    """Names like the one that was mistyped."""
    typed = re.search(
        r"(?:Option '|unrecognized arguments: --(?:trainer|data)\.|does not accept option ')([\w.]+)", message
    )
    if typed is None:
        return ""
    known = list(classes)
    for path in re.findall(r"Problem with given class_path '([\w.]+)'", message):
        module, _, name = path.rpartition(".")
        if module in sys.modules:
            known.append(getattr(sys.modules[module], name))
    names = {name for item in known for base in item.__mro__ for name in inspect.signature(base).parameters}
    wrong = next((part for part in reversed(typed[1].split(".")) if part not in names), typed[1])
    close = difflib.get_close_matches(wrong, sorted(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}" if mark is not None else ""
