"""References to images in every form that a shop may write, in all three editions."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sda_core.data import image_references as module
from sda_core.data.amazon import LineCount, read_metadata
from sda_core.data.cleaning import MAX_ENTRIES
from sda_core.data.image_references import image_reference, image_references, image_values
from sda_core.dropped_values import IMAGE_REASONS
from sda_core.fetch.archives import plain_path

A, B, C = "https://shop.example/a.jpg", "https://shop.example/b.jpg", "https://shop.example/c.jpg"


@pytest.mark.parametrize(
    ("raw", "reference"),
    [
        ("https://images-na.ssl-images-amazon.com/images/I/41fby%2BUjOJL._SX38_SY50_CR,0,0,38,50_.jpg",) * 2,
        ("http://h.example/a?b=1&amp;c=2", "http://h.example/a?b=1&c=2"),
        ("http://h.example/a?b=1&copy=2&reg=3", "http://h.example/a?b=1&copy=2&reg=3"),
        ("http://h.example/a?b=1&#38;c=2&#x26;d=3", "http://h.example/a?b=1&c=2&d=3"),
        ("HTTPS://Shop.Example/A.JPG",) * 2,
        ("//cdn.shop.example/a.jpg",) * 2,
        ("www.shop.example/a.jpg", "//www.shop.example/a.jpg"),
        ("https://shop.example/red mug.jpg", "https://shop.example/red%20mug.jpg"),
        ("//shop.example/red mug (2).jpg", "//shop.example/red%20mug%20(2).jpg"),
        ("https://b\u00fccher.example/\u00e4.jpg",) * 2,
        ("https://shop.example\\images\\a.jpg", "https://shop.example/images/a.jpg"),
        ("https:\\\\shop.example\\a.jpg", "https://shop.example/a.jpg"),
        ("https://cdn.example?id=5",) * 2,
        ("https://user:word@h.example:8080/a.jpg",) * 2,
        (f"  {A}\n", A),
        ("images/ML00000001.jpg",) * 2,
        ("images\\sub\\a.jpg", "images/sub/a.jpg"),
        (".\\images\\a.jpg", "./images/a.jpg"),
        ("images/red mug.jpg",) * 2,
        ("images/\u00e9.jpg",) * 2,
        ("images/a..b.jpg",) * 2,
    ],
)
def test_usable_references(raw: str, reference: str) -> None:
    assert image_reference(raw) == reference
    if "//" in reference:
        assert httpx.URL(reference if "://" in reference else f"https:{reference}").host
    else:
        assert plain_path(reference) is not None


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("http://g-ecx.images-amazon.com/images/G/01/x-site/icons/no-img-sm._CB192198896_.gif", "no_image_icon"),
        ("/etc/passwd", "local_path"),
        ("../secret.jpg", "local_path"),
        ("images/../../secret.jpg", "local_path"),
        ("images\\..\\..\\secret.jpg", "local_path"),
        ("~/secret.jpg", "local_path"),
        ("C:\\secret.jpg", "local_path"),
        ("c:/secret.jpg", "local_path"),
        ("\\\\server\\share\\a.jpg", "local_path"),
        ("\\a.jpg", "local_path"),
        ("file:///etc/passwd", "local_path"),
        ("FILE:a.jpg", "local_path"),
        ("javascript:alert(1)", "scheme"),
        ("ftp://h.example/a.jpg", "scheme"),
        ("s3://bucket/a.jpg", "scheme"),
        ("blob:https://h.example/1", "scheme"),
        ("images/12:30.jpg", "scheme"),
        ("data:image/png;base64,iVBORw0KGgo=", "data_uri"),
        ("DATA:image/png;base64," + "A" * 9000, "data_uri"),
        ("http://", "address"),
        ("http:///a.jpg", "address"),
        ("https:a.jpg", "address"),
        ("https://shop.example", "address"),
        ("https://shop.example/", "address"),
        ("https://two words.example/a.jpg", "address"),
        ("///a.jpg", "address"),
        ("nan", "blank"),
        ("None", "blank"),
        ("null", "blank"),
        ("N/A", "blank"),
        ("-", "blank"),
        ("a\x00b.jpg", "characters"),
        ("https://h.example/a\u202e.jpg", "characters"),
        ("http://" + "a" * 3000 + "/b", "too_long"),
        (5, "kind"),
        (True, "kind"),
        (1.5, "kind"),
        ({"a": 1}, "kind"),
    ],
)
def test_rejected_references_have_a_reason(raw: Any, reason: str) -> None:
    assert image_reference(raw) is None
    assert image_references([raw, A]) == ([A], 1, Counter({reason: 1}))
    assert reason in IMAGE_REASONS


def test_nothing_given_is_neither_used_nor_rejected() -> None:
    assert image_references([None, "", "  ", "\n"]) == ([], 0, Counter())


FORMS: dict[str, tuple[Any, list[str]]] = {
    "a list of addresses": ([A, B], [A, B]),
    "one address": (A, [A]),
    "a JSON list in a string": (json.dumps([A, B]), [A, B]),
    "a Python list in a string": (repr([A, B]), [A, B]),
    "JSON objects in a string": (json.dumps([{"variant": "PT01", "large": B}, {"variant": "MAIN", "large": A}]), [A, B]),
    "a JSON object in a string": (json.dumps({"url": A}), [A]),
    "several addresses, commas": (f"{A}, {B},{C}", [A, B, C]),
    "several addresses, bars": (f"{A}|{B} | {C}", [A, B, C]),
    "several addresses, spaces": (f"{A} {B}\n{C}", [A, B, C]),
    "several addresses without schemes, commas": (
        "//h.example/a.jpg, //h.example/b.jpg",
        ["//h.example/a.jpg", "//h.example/b.jpg"],
    ),
    "several addresses without schemes, spaces": (
        "//h.example/a.jpg //h.example/b.jpg",
        ["//h.example/a.jpg", "//h.example/b.jpg"],
    ),
    "several addresses without schemes": ("//h.example/a.jpg;//h.example/b.jpg", ["//h.example/a.jpg", "//h.example/b.jpg"]),
    "objects with url": ([{"url": A}, {"url": B}], [A, B]),
    "objects with src, link, href": ([{"src": A}, {"link": B}, {"href": C}], [A, B, C]),
    "keys in other case": ([{"URL": A}, {"hiRes": B}, {"image_url": C}], [A, B, C]),
    "url beside the sizes": ([{"thumb": C, "url": B, "hi_res": A}], [A, B, C]),
    "main first, published keys": ([{"variant": "PT01", "large": B}, {"variant": "main", "large": A}], [A, B]),
    "main first": ([{"variant": "PT01", "url": B}, {"variant": "main", "url": A}], [A, B]),
    "one object": ({"variant": "MAIN", "large": A, "thumb": B}, [A, B]),
    "an object of lists": ({"variant": ["PT01", "MAIN"], "hi_res": [None, A], "large": [C, B], "thumb": [None, None]}, [A, B, C]),
    "an object of lists of url": ({"url": [A, B]}, [A, B]),
    "an object in an object": ([{"large": {"url": A}}], [A]),
    "a list in a list": ([[A, B], C], [A, B, C]),
    "objects and addresses": ([B, {"variant": "MAIN", "large": A}], [A, B]),
    "without a scheme": ([{"large": "//cdn.shop.example/a.jpg"}], ["//cdn.shop.example/a.jpg"]),
    "a space": ([{"large": "https://shop.example/red mug.jpg"}], ["https://shop.example/red%20mug.jpg"]),
    "a Windows path": ([{"large": "images\\a.jpg"}], ["images/a.jpg"]),
    "a relative path": ("images/a.jpg", ["images/a.jpg"]),
    "a name in brackets": ("[1].jpg", ["[1].jpg"]),
    "repeated": ([A, A, B, A], [A, B]),
    "null": (None, []),
    "empty": ([], []),
    "empty columns": ({"hi_res": [], "large": [], "thumb": [], "variant": []}, []),
    "sizes that are null": ([{"variant": "MAIN", "hi_res": None, "large": None, "thumb": None}], []),
}


@pytest.mark.parametrize("edition", [2014, 2018, 2023])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_edition(form: str, edition: int, tmp_path: Path) -> None:
    value, expected = FORMS[form]
    key, item = {2014: ("imUrl", "asin"), 2018: ("imageURL", "asin"), 2023: ("images", "parent_asin")}[edition]
    (tmp_path / "m").write_text(
        (repr if edition == 2014 else json.dumps)({item: "B1", "title": "Red mug", key: value}) + "\n", encoding="utf-8"
    )
    lines = LineCount()
    frame = read_metadata(tmp_path / "m", edition, max_bad_line_share=0.0, lines=lines)
    assert frame["image_references"].to_list() == [expected]
    assert lines.values.num_dropped("image_references") == 0
    assert lines.values.used["image_references"] == (4 if form == "repeated" else len(expected))


def test_what_holds_no_address_is_counted(tmp_path: Path) -> None:
    records = [
        {"parent_asin": "B1", "images": [{"caption": "x"}, {"large": 5}, {"large": "data:image/png;base64,AA"}, "/x.jpg", A]},
        {"parent_asin": "B2", "images": 7},
        {"parent_asin": "B3", "images": '[{"large": "ftp://h.example/a"}]'},
    ]
    (tmp_path / "m").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = LineCount()
    frame = read_metadata(tmp_path / "m", 2023, max_bad_line_share=0.0, lines=lines)
    assert frame["image_references"].to_list() == [[A], [], []]
    assert {reason: count for (_, reason), count in lines.values.dropped.items()} == {
        "kind": 3, "data_uri": 1, "local_path": 1, "scheme": 1,
    }  # fmt: skip


PLAIN_AND_ODD = ["http://h/a", "https://h.example/b.jpg", "http://h/a&amp;b", "http://h/a http://h/b", "http://h/a\nhttp://h/b"]
PLAIN_AND_ODD += ["http://h", "http://h/", "http:///a", "http://h/icons/no-img-sm.gif", "images/a.jpg", "/etc/passwd", "../a"]
PLAIN_AND_ODD += [" http://h/a", "http://h/\u00e9", "http://h/" + "a" * 2040, "HTTP://h/c", "ftp://h/a", "http://h\\x/"]
PLAIN_AND_ODD += ["http://h?a", "http://h?/a", "http://h#/a", "http://h/\x1b[2J", ""]
ANY_REFERENCES = [*PLAIN_AND_ODD, None, 0, 5, True, [], ["http://h/a"], {"a": 1}]


def test_references_together_are_those_taken_one_by_one() -> None:
    for values in ([], *itertools.product(ANY_REFERENCES), *itertools.product(ANY_REFERENCES, repeat=2)):
        single = [reference for value in values if (reference := image_reference(value)) is not None]
        references, num_used, rejected = image_references(list(values))
        assert references == list(dict.fromkeys(single)), values
        assert num_used == len(single)
        assert num_used + rejected.total() == sum(value is not None and value != "" for value in values)


def test_so_many_references_and_no_more() -> None:
    values = [f"http://h/{number}" for number in range(500)]
    assert image_references(values) == (values[:MAX_ENTRIES], MAX_ENTRIES, Counter(surplus=400))
    assert image_references([*values, " http://h/0"]) == (values[:MAX_ENTRIES], MAX_ENTRIES, Counter(surplus=401))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(PLAIN_AND_ODD) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["variant", "hi_res", "large", "thumb", "url", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(ANYTHING)
@example([{"hi_res": False}])
@example([{"variant": "MAIN", "large": 0, "thumb": []}])
def test_any_value_adds_up(value: Any) -> None:
    values = image_values(value)
    references, num_used, rejected = image_references(values)
    given_values = [each for each in values if each is not None and not (isinstance(each, str) and not each.strip())]
    assert num_used + rejected.total() == len(given_values)
    assert len(references) <= num_used
    assert set(rejected) <= set(IMAGE_REASONS)
    assert all(reference.isprintable() for reference in references)
    # ... and the short way for the published forms changes nothing
    images = sorted(module._images(value, 0), key=lambda image: not image[0])
    slowly = [reference for _, found in images for reference in found]
    assert image_references(slowly) == (references, num_used, rejected)
