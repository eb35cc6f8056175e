"""The fast reader of Python literals gives what ``ast.literal_eval`` gives, on every line."""

from __future__ import annotations

import ast
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sda_core.data.literals import MAX_LITERAL_CHARS, MAX_NESTING, _to_json, parse_literal

REFUSED = "refused"


def python_says(line: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.literal_eval(line)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return REFUSED


def we_say(line: str) -> object:
    try:
        return parse_literal(line)
    except ValueError:
        return REFUSED


def same(first: object, second: object) -> bool:
    """Equal, with types and order of keys."""
    return repr(first) == repr(second)


TEXTS = st.text(st.sampled_from("ab'\"\\\n\t\r\x00\x1fé\u2028\U0001f600&<,:[]{}#"), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=8,
)
PIECES = st.lists(
    st.sampled_from(
        [
            *"'\"\\{}[](),:# \t\r\x00\x0cé01-nau",
            "''",
            '"""',
            "b'",
            "r'",
            "\\'",
            "x41",
            "u0041",
            "ud83d",
            "N{DASH}",
            ".5",
            "1e5",
            "1_0",
            "//",
            "\\/",
            "/*",
            "true",
            "false",
            "null",
            "None",
            "True",
            "NaN",
            "-Infinity",
        ]
    ),
    max_size=14,
).map("".join)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_what_python_writes_is_read_back(value: object) -> None:
    assert same(we_say(repr(value)), python_says(repr(value)))


@settings(max_examples=50, deadline=None)
@given(PIECES)
@example("'\\ud83d\\ude00'")
@example("'a' 'b'")
@example("'''a'''")
@example('"""a"b"""')
@example("{'a': true}")
@example("[null, 'nullify']")
@example("{'a': 1, 'a': 2}")
@example("'\\d'")
@example("'\\x4'")
@example("r'\\n'")
@example("'tab\there'")
@example("'\\/'")
@example("[1,]")
@example("01")
@example("1e999")
@example("- -1")
@example("[-0, -0.0]")
@example("{'a': 9223372036854775807, 'b': -9223372036854775808}")
@example("{'a': 18446744073709551615, 'b': [18446744073709551616]}")
@example("-123456789012345678901234567890")
@example("[0.1000000000000000055511151231257827, 1e400, 2.5e-324]")
@example("'1234567890123456789012'")
@example("'\ud83d'")
@example("{'a': \"it's\", 'b': 'say \"x\"', 'c': 'both \\' and \"'}")
def test_odd_lines_are_read_as_python_reads_them(line: str) -> None:
    assert same(we_say(line), python_says(line))


@pytest.mark.parametrize(
    "line", ["{'a': ['b', \"it's\", 'say \"x\"', 1.5, -2, 'tail\\n\\xe9\\\\']}", "{'title': 'true to null, falsely'}"]
)
def test_the_fast_path_is_taken_where_it_should_be(line: str) -> None:
    text = _to_json(line)
    assert text is not None
    assert same(json.loads(text), ast.literal_eval(line))


@pytest.mark.parametrize("line", ["[true]", "{'a':null}", "['\\ud83d']", "['\\d']", "[" * 150 + "]" * 150, "'a\"", "\"a'"])
def test_the_fast_path_is_left_where_the_languages_differ(line: str) -> None:
    assert _to_json(line) is None


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        "[" * 5_000 + "]" * 5_000,
        "(" * (MAX_NESTING + 1) + ")" * (MAX_NESTING + 1),
        "-" * 500_000 + "1",
        "~ " * 100_000 + "1",
        "1" + "+1" * 100_000,
        "not " * 50_000 + "1",
        "a" + ".b" * 50_000,
        "[" + "'a'," * MAX_LITERAL_CHARS + "(",
        "{'a': __import__('os').getcwd()}",
        "{{}: 1}",
        "9" * 5_000,
        "[{(" * 5_000 + ")}]" * 5_000,
        "{'a':[" * 5_000 + "]}" * 5_000,
        "[(" * 60 + "'[[['" + ")]" * 60,
        "{'asin': '" + "'" * 1_000_001,
    ],
    ids=lambda line: line[:12],
)
def test_hostile_lines_are_refused_without_harm(line: str) -> None:
    with pytest.raises(ValueError):
        parse_literal(line)


@pytest.mark.real_data
def test_real_metadata_lines(real_data: Path) -> None:
    text = (real_data / "amazon_2014_raw_samples" / "musical_instruments_metadata_top100.json").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) == 100
    assert all(same(parse_literal(line), ast.literal_eval(line)) for line in lines)
    assert all(_to_json(line) is not None for line in lines)
