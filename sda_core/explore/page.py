"""The page of ``sda explore``, a Streamlit script: the query on the left, the results of each variant side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import streamlit as st  # pyright: ignore[reportMissingImports]

from sda_core.errors import SDAError
from sda_core.explore.finished_run import VECTORS, FinishedRun, Found, Vectors

ASKS = ("Type a text", "Pick an item", "Build a history")
_MAX_LISTED = 200  # items in a drop-down; the field above filters a larger shop
_IMAGE_WIDTH = 72  # pixels
_BESIDE = (1, 4)  # widths of image and text


@st.cache_resource(show_spinner="Opening the run")
def opened(root: str) -> FinishedRun:
    """The run, shared by all users of the page."""
    return FinishedRun(Path(root))


def main(root: str) -> None:
    """Draw the page; Streamlit runs it again after every change."""
    st.set_page_config(page_title="SDA explore", layout="wide")
    st.title("Explore a finished run")
    try:
        run = opened(root)
        variants = run.variants()
        with st.sidebar:
            ask = st.radio("What do you want to do?", ASKS, key="ask")
            chosen = st.multiselect(
                "Variants, side by side", variants, default=_base_and_adapted(run, variants), key="variants",
                help="Whose vectors are compared: zero_shot is the model without an adapter.",
            )  # fmt: skip
            k = st.slider("How many items", 1, 30, 10, key="k")
        if not chosen:
            st.info("Choose a variant on the left.")
        elif ask == ASKS[0]:
            _text(run, chosen, k)
        elif ask == ASKS[1]:
            _item(run, chosen, k)
        else:
            _history(run, chosen, k)
    except SDAError as error:
        st.error(str(error))


def _base_and_adapted(run: FinishedRun, variants: list[str]) -> list[str]:
    """The variant without adapter and the last adapted variant, if both exist."""
    adapted = [name for name in variants if name in run.params.train_adapter.variants]
    found = [name for name in variants if name == "zero_shot"] + adapted[-1:]
    return found or variants[:2]


# ------------------------------------------------------------------------------------------------ three ways to ask
def _text(run: FinishedRun, variants: list[str], k: int) -> None:
    text = st.text_input(
        "Text", placeholder="striped blue shirt", key="text", help="It takes the place of the title in an item's prompt."
    )
    against: Vectors = st.radio("Compare with each item's", ("text", "image"), horizontal=True, key="against")
    if not text.strip():
        st.info("Type a text and press Enter. The nearest items of each variant appear here.")
        return
    with st.spinner("The model reads the text"):
        _side_by_side(run, variants, lambda variant: run.near_text(text, variant, against, k), "Cosine")


def _item(run: FinishedRun, variants: list[str], k: int) -> None:
    items = _listed(run)
    item = st.selectbox("Item", items, format_func=lambda number: run.items[number].label, key="item")
    which: Vectors = st.radio("Compare", VECTORS, horizontal=True, key="which", help="fused: what recommenders get")
    if item is not None:
        _card(run, item, "Chosen item")
        _side_by_side(run, variants, lambda variant: run.near_item(item, variant, which, k), "Cosine")


def _history(run: FinishedRun, variants: list[str], k: int) -> None:
    known = {variant: run.recommenders(variant) for variant in variants}
    names = list(dict.fromkeys(name for found in known.values() for name in found))
    if not names:
        st.error("No trained recommender of these variants scores a history alone; run `dvc repro` with sasrec or bert4rec.")
        return
    start = names.index("sasrec") if "sasrec" in names else 0
    recommender = st.selectbox("Recommender", names, index=start, key="recommender")
    history: list[int] = st.multiselect(
        "History, oldest first",
        [*dict.fromkeys([*st.session_state.get("history", []), *_listed(run)])],  # keep a chosen item when the list is filtered
        format_func=lambda number: run.items[number].label,
        key="history",
        placeholder="Choose items",
    )
    if not history:
        st.info("Choose one item or more.")
        return
    with st.container(horizontal=True):
        for item in history:
            _image(run, item, run.items[item].label)
    able = [variant for variant in variants if recommender in known[variant]]
    _side_by_side(run, able, lambda variant: run.recommend(history, variant, recommender, k), "Score")


def _listed(run: FinishedRun) -> list[int]:
    """The items of the drop-down: the first few hundred whose title or id contains the typed text."""
    wanted = st.text_input("Find an item by title or id", key="find").casefold()
    found = [number for number, item in run.items.items() if wanted in item.label.casefold()]
    if len(found) > _MAX_LISTED:
        st.text(f"The list has the first {_MAX_LISTED} of {len(found):,} items. Type part of a title or id to narrow it.")
    elif not found:
        st.text("No item has this in its title or id.")
    return found[:_MAX_LISTED]


# ------------------------------------------------------------------------------------------------------- the answers
def _side_by_side(run: FinishedRun, variants: list[str], answer: Callable[[str], Found], what: str) -> None:
    found: dict[str, Found | SDAError] = {}
    for variant in variants:
        try:
            found[variant] = answer(variant)
        except SDAError as error:
            found[variant] = error
    shown = {variant: pairs for variant, pairs in found.items() if pairs and not isinstance(pairs, SDAError)}
    lists = {variant: [item for item, _ in pairs] for variant, pairs in shown.items()}
    every, mark = ("both lists", " · in this list only") if len(lists) == 2 else ("every list", " · not in every list")
    if len(lists) > 1:
        shared = set.intersection(*(set(items) for items in lists.values()))
        most = max(map(len, lists.values()))
        st.text(f"{len(shared)} of {most} items are in {every}.")
    for column, (variant, pairs) in zip(st.columns(len(found)), found.items(), strict=True):
        with column:
            st.header(variant)
            if isinstance(pairs, SDAError):
                st.error(str(pairs))
                continue
            if not pairs:
                st.info("Nothing to show: this item has no such vector.")
            for item, value in pairs:
                is_shared = len(lists) < 2 or all(item in others for others in lists.values())
                _card(run, item, f"{what} {value:.4f}" + ("" if is_shared else mark))


def _card(run: FinishedRun, item_id: int, note: str) -> None:
    item = run.items[item_id]
    with st.container(border=True):
        image, text = st.columns(_BESIDE, vertical_alignment="center")
        with image:
            _image(run, item_id)
        with text:
            st.text(item.title or "(no title)")  # plain text: a title is not Markdown
            st.text(" · ".join(part for part in (note, item.raw_item_id, item.brand, item.price) if part))


def _image(run: FinishedRun, item_id: int, alt: str = "") -> None:
    """Show an item's image; ``alt`` is empty if the title is next to it."""
    image = run.image(item_id)
    if image is None:
        st.text("no image")
    else:
        st.image(image, width=_IMAGE_WIDTH, alt=alt)


main(sys.argv[1])
