"""JSON is bounded: in depth, in numbers, and in names that stand twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenizer.files.errors import FormatError, LimitError
from tokenizer.files.json_text import parse_json


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({str(n): n for n in range(10_000)}, None),
        ({str(n): n for n in range(10_001)}, LimitError),
        ({"a": [{"b": 1}] * 10_000}, LimitError),
        ({"a": (1 << 64) - 1, "b": -(1 << 64) + 1}, None),
        ({"a": 1 << 64}, FormatError),
        ({"a": [[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]}, None),
        ({"a": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}, LimitError),
    ],
)
def test_json_is_bounded(value, error):
    data, path = json.dumps(value).encode(), Path("some.json")
    if error is None:
        assert parse_json(data, path) == value
        return
    with pytest.raises(error, match=r"^some\.json: "):
        parse_json(data, path)
