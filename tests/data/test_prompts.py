"""The words that stand for an item."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_core.data.prompts import image_prompt, prompt_hash, text_pairs, text_prompt
from sda_core.errors import ConfigError
from sda_core.params import ItemsParams

ROW = {
    "title": "Red Shatter Crackle Nail Polish",
    "brand": "OPI",
    "price": "$8.99",
    "categories": ["Beauty", "Makeup", "Nails", "Makeup"],
    "features": ["E55", "0.5 oz"],
    "description": "A top coat.",
}


def items_params(**changes: object) -> ItemsParams:
    values = {
        "noun": "beauty product",
        "text_opening": "The {noun} has the following attributes:",
        "fields": ("title", "brand", "price", "categories", "features", "description"),
        "max_value_chars": 100,
        "image_prompt": "The picture shows a {noun}.",
        "missing_image": "placeholder",
        "missing_text": "placeholder",
    }
    return ItemsParams.model_validate(values | changes)


def test_whole_prompt() -> None:
    assert text_prompt(ROW, items_params()) == (
        "The beauty product has the following attributes: title: Red Shatter Crackle Nail Polish; brand: OPI; price: $8.99; "
        "categories: Beauty, Makeup, Nails; features: E55, 0.5 oz; description: A top coat."
    )
    assert image_prompt(items_params()) == "The picture shows a beauty product."


def test_fields_come_in_the_order_of_the_params() -> None:
    prompt = text_prompt(ROW, items_params(fields=("price", "title")))
    assert prompt.endswith("attributes: price: $8.99; title: Red Shatter Crackle Nail Polish.")


def test_values_are_cut() -> None:
    prompt = text_prompt(ROW | {"title": "x" * 500}, items_params(fields=("title",), max_value_chars=7))
    assert prompt.endswith("title: xxxxxxx.")
    assert text_prompt(ROW | {"title": "ab cd ef"}, items_params(fields=("title",), max_value_chars=3)).endswith("title: ab.")


@pytest.mark.parametrize(
    "value", ["", None, "   ", "---", "null", ".a-box-inner{background-color:#fff}", [], [""], "var a = b.getTime()"]
)
def test_empty_and_junk_values_are_left_out(value: object) -> None:
    prompt = text_prompt({"title": value, "brand": "OPI"}, items_params(fields=("title", "brand")))
    assert prompt == "The beauty product has the following attributes: brand: OPI."
    # and nothing at all still gives a sentence
    assert text_prompt({"title": value}, items_params()) == "The beauty product has the following attributes: unknown."
    assert text_pairs({"title": value}, items_params()) == []


def test_a_tables_row_and_its_columns_slices_will_do() -> None:
    frame = pl.DataFrame([ROW])
    expected = text_prompt(ROW, items_params())
    assert text_prompt(next(frame.iter_rows(named=True)), items_params()) == expected
    assert text_prompt(ROW | {"categories": pl.Series(ROW["categories"])}, items_params()) == expected


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*ROW]), st.none() | st.text(max_size=200) | st.lists(st.text(max_size=30), max_size=4)),
    st.integers(1, 50),
)
def test_one_line_never_empty_and_bounded(row: dict[str, object], max_value_chars: int) -> None:
    prompt = text_prompt(row, items_params(max_value_chars=max_value_chars))
    assert prompt.startswith("The beauty product has the following attributes: ")
    assert "\n" not in prompt
    assert len(prompt) <= 50 + len(ROW) * (max_value_chars + len("description: ; "))


def test_braces_do_no_harm_and_unknown_placeholders_are_told() -> None:
    assert "{0.__class__}" in text_prompt({"title": "x {0.__class__} y"}, items_params())
    assert image_prompt(items_params(noun="{noun}")) == "The picture shows a {noun}."
    with pytest.raises(ConfigError, match=r"items.text_opening.*\{nuon\}"):
        text_prompt(ROW, items_params(text_opening="The {nuon}:"))
    with pytest.raises(ConfigError, match=r"items.image_prompt.*\{\}"):
        image_prompt(items_params(image_prompt="A {}"))


def test_the_hash_follows_what_shapes_the_prompts() -> None:
    base = prompt_hash(items_params())
    assert base == prompt_hash(items_params(missing_image="text_only"))
    assert base == prompt_hash(items_params(missing_text="image_only"))
    changes = [
        {"noun": "film"},
        {"text_opening": "A {noun}:"},
        {"fields": ("title",)},
        {"fields": ("brand", "title", "price", "categories", "features", "description")},
        {"max_value_chars": 99},
        {"image_prompt": "See the {noun}."},
    ]
    hashes = {base, *(prompt_hash(items_params(**change)) for change in changes)}
    assert len(hashes) == len(changes) + 1
    assert all(len(digest) == 64 for digest in hashes)
