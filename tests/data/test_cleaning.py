"""Texts, prices and image references as shops store them."""

from __future__ import annotations

import itertools
import re

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.data import cleaning
from sda_core.data.cleaning import (
    MAX_TEXT_CHARS,
    clean_label,
    clean_name,
    clean_price,
    clean_text,
    clean_texts,
)

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.text("<>&;#={}. abc$12-/\\", max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" Maggiano&#39;s  Gift\n\tCard ", "Maggiano's Gift Card"),
        ("Noodles &amp; Company", "Noodles & Company"),
        ("12 Month Warranty &gt;&gt;&gt; THT", "12 Month Warranty >>> THT"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("size <b>large</b>", "size large"),
        ("5 < 6 and I <3 it", "5 < 6 and I <3 it"),
        ("caf\u00e9 \u65e5\u672c", "caf\u00e9 \u65e5\u672c"),
        ("by\n    \n    Apple", "Apple"),
        ("by the sea", "by the sea"),
        ('<span class="a-size-medium a-color-secondary">', ""),
        ("<span class=", ""),
        ("&lt;span class=&quot;a&quot;&gt;Real&lt;/span&gt;", ""),
        ("</span></span></span>", ""),
        ('<img src="x.png" alt="AMAZON FASHION"/>', ""),
        ("var aPageStart = (new Date()).getTime();", ""),
        (".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{background-color:#fffbf3}", ""),
        ("function foo(a) { return a; }", ""),
        ("Dress {Color: Red}", "Dress {Color: Red}"),
        ("---", ""),
        ("N/A", ""),
        ("null", ""),
        ("1984", "1984"),
        ("a\x00b\x07c\ud800d\u202ee", "a b c d e"),
        ("", ""),
        (None, ""),
        (12, "12"),
        (1984.0, "1984"),
        (2.5, "2.5"),
        (-0.0, "0"),
        (10**30, str(10**30)),
        (1e20, "1e+20"),
        (True, ""),
        (float("nan"), ""),
        (float("inf"), ""),
        (10**70, ""),
        (["x"], "x"),
        ([None, "", "<span class=", "x", "y"], "x"),
        ([["x"]], "x"),
        ({"value": "x"}, "x"),
        ({"@type": "Brand", "name": "x"}, "x"),
        ({"name": {"value": 7}}, "7"),
        ({"a": "x"}, ""),
        ([[[[[["x"]]]]]], ""),
    ],
)
def test_names(raw: object, clean: str) -> None:
    assert clean_name(raw) == clean
    assert clean_label(raw) == clean
    assert clean_label(raw) == clean  # from memory, the second time


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ('<span class="a-size-base">\n                No expiration, no fees.\n            </span>', "No expiration, no fees."),
        (["One.", "", None, "Two."], "One. Two."),
        ("<p>One</p><script>var x = '</p>';</script><style>.a{b:c}</style>Two", "One Two"),
        ("<SCRIPT>var x</SCRIPT>One", "One"),
        ("One<StYle>.a{b:c}</StYle> two", "One two"),
        ("cut off <div class='a-section a-spacing-none", "cut off"),
        ("<!-- note -->text", "text"),
        ({"a": "b"}, ""),
        (None, ""),
    ],
)
def test_running_text_keeps_its_words(raw: object, clean: str) -> None:
    assert clean_text(raw) == clean


def test_lists_of_texts() -> None:
    assert clean_texts(["a1", ["b2", "c3"], "", 4, "</span>", True, {"x": 1}, {"value": 5.0}]) == ["a1", "b2", "c3", "4", "5"]
    assert clean_texts("one") == ["one"]
    assert clean_texts(500) == ["500"]
    assert clean_texts(None) == []


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("$12.99", "$12.99"),
        ("$10.00 - $1,050.00", "$10.00 - $1,050.00"),
        ("from 12.99", "from 12.99"),
        ("EUR 5", "EUR 5"),
        (17.95, "17.95"),
        (69, "69.00"),
        (0, ""),
        (-1.5, ""),
        (float("nan"), ""),
        (float("inf"), ""),
        (10**400, ""),
        (True, ""),
        (None, ""),
        ("", ""),
        ("\u2014", ""),
        ("Too low to display", ""),
        ("bag 12", ""),
        ('\n\t\t   \n\r\n  <div class="a-section a-spacing-none"', ""),
        (".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{color:#111}", ""),
    ],
)
def test_prices(raw: object, clean: str) -> None:
    assert clean_price(raw) == clean


PIECES = [
    "",
    "b",
    "Ab1 ",
    " ",
    "  ",
    "&",
    "&amp;",
    "<",
    "<b>",
    ">",
    "{",
    "}",
    ";",
    ".a{b:c}",
    "\t",
    "\n",
    "\u00a0",
    "\u00e9",
    "null",
    "NA",
]
PIECES += [
    "getTime(",
    "P.when(",
    "var a =",
    "by\n",
    "-",
    "'",
    '"',
    "_",
    "\u200b",
    "\x00",
    "\x1c",
    "\u2028",
    "x" * (MAX_TEXT_CHARS - 3),
]


@pytest.mark.parametrize("start", ["", "abc", "-"])
def test_the_short_way_for_plain_texts_changes_nothing(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [start + "".join(pieces) for pieces in itertools.product(PIECES, PIECES, ["", "defghij"])]
    found = [(clean_name(text), clean_text(text)) for text in texts]
    assert start != "abc" or any(map(cleaning._is_plain, texts))
    monkeypatch.setattr(cleaning, "_is_plain", lambda text: False)
    assert found == [(clean_name(text), clean_text(text)) for text in texts]


def test_the_short_way_for_prices_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = ["", "$", "$1", "$1.25", "$1,000.00", "-", " - ", " -  ", " ", "\n", "\u0661", ".", "$" + "1" * 40, "x"]
    texts = ["".join(three) for three in itertools.product(pieces, repeat=3)]
    found = [clean_price(text) for text in texts]
    assert "$1.25 - $1,000.00" in found
    monkeypatch.setattr(cleaning, "_DOLLARS", re.compile("(?!)"))
    assert found == [clean_price(text) for text in texts]


@settings(max_examples=50, deadline=None)
@given(ANYTHING)
def test_any_value_gives_clean_text_that_a_table_can_hold(value: object) -> None:
    texts = [clean_name(value), clean_label(value), clean_text(value), clean_price(value), *clean_texts(value)]
    for text in texts:
        assert text == " ".join(text.split())
        assert len(text) <= MAX_TEXT_CHARS
        assert not any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in text)
    assert pl.Series(texts).to_list() == texts


@pytest.mark.parametrize(
    "text", ["<a " + "=" * 10**6, "<script" * 10**5, "{a:" * 10**5, "&amp;" * 10**5, "function(" * 10**5, "<!--" * 10**5]
)
def test_hostile_texts_take_no_long_time(text: str) -> None:
    assert len(clean_text(text)) <= MAX_TEXT_CHARS
