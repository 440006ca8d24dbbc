"""JSON lines as people hand them in: an object a line, empty lines passed over, errors by line."""

import json
from collections.abc import Iterator
from typing import Any


def json_lines(text: str, *, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and content of each line.

    Args:
        text: The file's.
        where: What an error calls the file.

    Raises:
        ValueError: A line is no JSON object.
    """
    # Not splitlines: a JSON string may hold a U+2028 as it is.
    for line, part in enumerate(text.split("\n"), start=1):
        if not part.strip():
            continue
        try:
            content = json.loads(part)
        except json.JSONDecodeError as error:
            # The message of the decoder quotes nothing of the line, which may hold a patient's data.
            raise ValueError(f"{where} line {line}: not JSON ({error.msg})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{where} line {line}: must be a JSON object, got {type(content).__name__}")
        yield line, content
