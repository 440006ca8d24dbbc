"""Broken files without end, each from its number: small good files of every transfer syntax, changed at random."""

import io
import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
from raw import BIG, CANARY, DEFLATED, DX, EXPLICIT, FRAMES, IMPLICIT, deflated, of_syntax, try_folder

SYNTAXES = (IMPLICIT, EXPLICIT, DEFLATED, BIG, *FRAMES)
LARGEST_SAMPLE = 10_000
TOO_LONG = 2.0
WORDS = (
    b"nan", b"inf", b"-inf", b"-1", b"0", b"1e999", b"1e-999", b"99999999999", b"-0", b"0x10", b"\\", b"\0", b"1\\",
    b" ", b"\xff", b"..", b"../", b"\x1b$B", b"65535", b"2147483648", b"1.2.840.10008.5.1.4.1.1.2.1",
)  # fmt: skip
NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    15,
    16,
    31,
    32,
    255,
    0x7FFF,
    0x8000,
    0xFFFE,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFE,
    0xFFFFFFFF,
)
VRS = (
    b"SQ", b"UN", b"OB", b"OW", b"UL", b"US", b"DS", b"IS", b"UI", b"PN", b"LO", b"AT", b"FD", b"OF", b"UT", b"XX",
    b"\0\0",
)  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A good file: what goes before the data set, its parts, and a good neighbour in the same series."""

    head: bytes
    parts: tuple[bytes, ...]
    packed: bool = False
    neighbour: bytes = b""


@cache
def seeds() -> tuple[Seed, ...]:
    """Ours of every transfer syntax, as a CT slice and as a radiograph; and what pydicom's wheel carries."""
    made = []
    for syntax in SYNTAXES:
        for radiograph in (False, True):
            file, neighbour = of_syntax(syntax), of_syntax(syntax, 2)
            if radiograph:
                file.but({0x00080016: ("UI", DX.encode()), 0x00080060: ("CS", b"DX"), 0x00185101: ("CS", b"PA")})
            made.append(Seed(file.head(), tuple(file.pieces()), syntax == DEFLATED, neighbour.bytes()))
    folder = Path(pydicom.__file__).parent / "data" / "test_files"  # not by pydicom's function, which downloads
    samples = sorted(path for path in folder.rglob("*.dcm") if path.is_file())
    small = (path.read_bytes() for path in samples if path.stat().st_size <= LARGEST_SAMPLE)
    return (*made, *(Seed(b"", (content,)) for content in small))


def broken(number: int) -> tuple[bytes, bytes]:
    """A broken file and its good neighbour (or nothing)."""
    rng = np.random.default_rng(number)
    kinds = seeds()
    ours = 2 * len(SYNTAXES)
    seed = kinds[rng.integers(ours) if rng.random() < 0.8 else rng.integers(ours, len(kinds))]
    parts = list(seed.parts)
    for _ in range(rng.integers(0, 3)):
        place = int(rng.integers(len(parts)))
        _change_part(parts, place, rng)
    inside = rng.random() < 0.8
    data = b"".join(parts)
    if inside and (not seed.packed or len(parts) > 1):
        data = _mutated(data, rng)
    whole = seed.head + (deflated(data) if seed.packed else data)
    if not inside:
        whole = _mutated(whole, rng)
    return whole, seed.neighbour if rng.random() < 0.8 else b""


def _change_part(parts: list[bytes], place: int, rng: np.random.Generator) -> None:
    """One element lost, doubled, moved, renamed, or with another value or length."""
    part = parts[place]
    match int(rng.integers(7)):
        case 0:
            parts[place] = b""
        case 1:
            parts.insert(int(rng.integers(len(parts))), part)
        case 2:
            other = int(rng.integers(len(parts)))
            parts[place], parts[other] = parts[other], part
        case 3:
            parts[place] = part[:4] + VRS[rng.integers(len(VRS))] + part[6:]
        case 4:
            word = WORDS[rng.integers(len(WORDS))]
            room = len(part) - 8
            if room > 0:
                parts[place] = (
                    part[:8] + (word * room)[:room] if rng.random() < 0.3 else part[:8] + word[:room].ljust(room)
                )
        case 5:
            value = NUMBERS[rng.integers(len(NUMBERS))]
            parts[place] = part[:6] + value.to_bytes(4, "little" if rng.random() < 0.7 else "big")[:2] + part[8:]
        case _:
            value = NUMBERS[rng.integers(len(NUMBERS))]
            parts[place] = part[:8] + value.to_bytes(4, "little")[: max(0, len(part) - 8)] + part[12:]


def _mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A few changes of bytes, wherever they fall."""
    out = bytearray(data)
    for _ in range(1 + rng.integers(4)):
        if not out:
            break
        at = int(rng.integers(len(out)))
        value = NUMBERS[rng.integers(len(NUMBERS))]
        match int(rng.integers(9)):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at] = int(rng.integers(256))
            case 2:
                out[at : at + 2] = (value & 0xFFFF).to_bytes(2, "little")
            case 3:
                out[at : at + 4] = value.to_bytes(4, "little" if rng.random() < 0.5 else "big")
            case 4:
                del out[at : at + 1 + int(rng.integers(64))]
            case 5:
                out[at:at] = out[at : at + 1 + int(rng.integers(256))]
            case 6:
                out[at:at] = rng.bytes(1 + int(rng.integers(32)))
            case 7:
                del out[at:]
            case _:
                word = WORDS[rng.integers(len(WORDS))]
                out[at : at + len(word)] = word
    return bytes(out)


@dataclass
class Tally:
    """What came of many files."""

    reasons: Counter[str] = field(default_factory=Counter)
    uncaught: list[tuple[int, str]] = field(default_factory=list)
    slow: list[tuple[int, float]] = field(default_factory=list)
    leaks: list[int] = field(default_factory=list)
    longest: float = 0.0


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def try_numbers(numbers: range, *, before: Callable[[int], None] = lambda _: None) -> Tally:
    """Scans and reads each file; whatever is raised beside a `DicomError`, takes long, or is said aloud is counted."""
    tally, root, listener = Tally(), logging.getLogger(), _Listener()
    level = root.level
    root.addHandler(listener)
    root.setLevel(logging.DEBUG)
    try:
        with tempfile.TemporaryDirectory() as name:
            for number in numbers:
                before(number)
                seconds = _try_one(number, Path(name), tally, listener)
                if seconds > TOO_LONG:  # the machine may have been busy elsewhere
                    seconds = min(seconds, _try_one(number, Path(name), Tally(), listener))
                tally.longest = max(tally.longest, seconds)
                if seconds > TOO_LONG:
                    tally.slow.append((number, seconds))
    finally:
        root.removeHandler(listener)
        root.setLevel(level)
    return tally


def _try_one(number: int, folder: Path, tally: Tally, listener: _Listener) -> float:
    content, neighbour = broken(number)
    (folder / "a.dcm").write_bytes(content)
    (folder / "b.dcm").unlink(missing_ok=True)
    if neighbour:
        (folder / "b.dcm").write_bytes(neighbour)
    said = io.StringIO()
    listener.told.clear()
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned, redirect_stdout(said), redirect_stderr(said):
        warnings.simplefilter("always")
        try:
            tally.reasons.update(try_folder(folder))
        except Exception as error:  # noqa: BLE001  # what is looked for
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = "" if place is None else f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
            tally.uncaught.append((number, f"{type(error).__name__} {where}"))
    seconds = time.perf_counter() - start
    if CANARY in "".join([said.getvalue(), *listener.told, *(str(item.message) for item in warned)]):
        tally.leaks.append(number)
    return seconds
