"""What stands at the beginning of a GGUF file: its metadata and where its tensors lie, with no trust in any count.

The format is llama.cpp's: docs/gguf.md of ggml, versions 2 and 3, little-endian. Every length is compared with the
bytes that are left before anything of that length is made, and no tensor may lie outside of the file or in another.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

LARGEST_HEADER: Final = 2**26
"""Bytes; the largest vocabularies take a quarter."""
MOST_ENTRIES: Final = 2**16
"""Of metadata, and of tensors."""
LARGEST_SIDE: Final = 2**31
NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of `struct` by type of value."""
TEXT: Final = 8
LIST: Final = 9


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        shape: As numpy has it, the rows of a matrix first.
        kind: Of `gguf.GGMLQuantizationType`.
        start: First byte in the file.
        size: Bytes.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key (lists of numbers as arrays), and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Reads the beginning of a file.

    Args:
        path: The file.
        sizes: Elements and bytes of a block, of every kind of tensor: `gguf.GGML_QUANT_SIZES`.

    Raises:
        ValueError: It is no GGUF file, is cut short or contradicts itself.
        OSError: It can't be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, min(size, LARGEST_HEADER))
        if size < 4 or reader.take(4) != b"GGUF":
            raise ValueError("not a GGUF file")
        version = reader.number("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF versions 2 and 3, little-endian, are read, got {version}")
        num_tensors, num_entries = reader.number("Q"), reader.number("Q")
        if max(num_tensors, num_entries) > MOST_ENTRIES:
            raise ValueError(f"at most {MOST_ENTRIES} tensors and entries of metadata are read")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = reader.text()
            if key in metadata:
                raise ValueError(f"{key[:60]!r} stands there twice")
            metadata[key] = reader.value()
        listed = [(reader.text(), *reader.tensor()) for _ in range(num_tensors)]
        end = reader.position
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment % 8:
        raise ValueError("general.alignment must be a multiple of 8")
    start = -(-end // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in listed:
        if name in tensors:
            raise ValueError(f"tensor {name[:60]!r} stands there twice")
        if kind not in sizes:
            raise ValueError(f"tensor {name[:60]!r} is of an unknown type: {kind}")
        block, wide = sizes[kind]
        if shape[-1] % block:
            raise ValueError(f"tensor {name[:60]!r}: rows of {shape[-1]} are no multiple of {block}")
        tensors[name] = GgufTensor(shape, kind, start + offset, math.prod(shape) // block * wide)
    _check_places(tensors, size)
    return GgufHeader(metadata, tensors)


def read_bytes(path: Path, tensor: GgufTensor) -> NDArray[np.uint8]:
    """The bytes of a tensor, its rows apart.

    Raises:
        ValueError: The file was cut short since its header was read.
    """
    found = np.fromfile(path, dtype=np.uint8, count=tensor.size, offset=tensor.start)
    if len(found) != tensor.size:
        raise ValueError("the file is cut short")
    return found.reshape(*tensor.shape[:-1], -1)


def _check_places(tensors: Mapping[str, GgufTensor], size: int) -> None:
    """That all tensors lie in the file and no two in one place: nobody can ask for more than the file is long."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise ValueError(f"tensor {name[:60]!r} lies in another")
        end = tensor.start + tensor.size
        if end > size:
            raise ValueError(f"tensor {name[:60]!r} ends at byte {end}, the file has {size}: it is cut short")


class _Reader:
    """Takes values from a file, one after the other, and never more than is left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.position = file, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise ValueError(f"the header is cut short, or longer than {LARGEST_HEADER} bytes")
        self.position += count
        found = self.file.read(count)
        if len(found) != count:
            raise ValueError("the header is cut short")
        return found

    def number(self, kind: str) -> Any:
        kind = f"<{kind}"
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        found = self.take(self.number("Q"))
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("a text is not UTF-8") from error

    def value(self) -> Any:
        kind = self.number("I")
        if kind == TEXT:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != LIST:
            raise ValueError(f"unknown type of metadata: {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            dtype = np.dtype(f"<{NUMBERS[inner]}")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)
        if inner != TEXT:
            raise ValueError(f"lists of numbers and texts are read, got one of type {inner}")
        return [self.text() for _ in range(count)]

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, kind and offset."""
        axes = self.number("I")
        if not 1 <= axes <= 4:
            raise ValueError(f"a tensor must have 1..4 axes, got {axes}")
        sides = [self.number("Q") for _ in range(axes)]
        if not all(1 <= side < LARGEST_SIDE for side in sides):
            raise ValueError("a tensor has a side of no or of too many elements")
        return tuple(reversed(sides)), self.number("I"), self.number("Q")
