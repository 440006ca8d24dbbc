"""Objects line by line; separators inside a string are none."""

import pytest

from mm.data.json_lines import json_lines


def test_a_line_separator_within_a_string_ends_no_line() -> None:
    text = '{"a": "one\u2028two\x85"}\r\n\n{"a": 3}\n'
    assert list(json_lines(text, where="x")) == [(1, {"a": "one\u2028two\x85"}), (3, {"a": 3})]


@pytest.mark.parametrize(
    ("text", "words"), [("{}\n{", "x line 2: not JSON"), ("[]", "x line 1: must be a JSON object, got list")]
)
def test_an_error_names_the_line_and_quotes_nothing(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(json_lines(text, where="x"))
