"""A shop of a handful of items without images goes through every stage, or one line says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from dvc.utils.hydra import compose_and_dump

from stages.build_index import build_index
from stages.control_embeddings import control_embeddings
from stages.download import download
from stages.draw_negatives import draw_negatives
from stages.evaluate import evaluate
from stages.export_embeddings import export_embeddings
from stages.fetch_images import fetch_images
from stages.filter import filter_
from stages.report import report
from stages.train_adapter import train_adapter
from stages.train_recommender import train_recommender
from tests.pipeline.conftest import SMALL


@pytest.fixture
def shop(tmp_path: Path, repository: Path, num_items: int) -> Path:
    """Raw files of a shop whose metadata names no image; every user has interactions with all items, or 8."""
    history = min(num_items, 8)
    rows = [
        {"user_id": f"u{user}", "parent_asin": f"sku-{(user + place) % num_items}", "rating": 5.0, "timestamp": 10**12 + place}
        for user in range(max(num_items, 6))
        for place in range(history)
    ]
    empty = {"store": "", "price": None, "categories": [], "features": [], "description": [], "images": []}
    items = [{"parent_asin": f"sku-{item}", "title": f"Thing {item}", **empty} for item in range(num_items)]
    for name, lines in (("Movies", rows), ("meta_Movies", items)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = [
        *(each for each in SMALL if not each.startswith(("dataset.", "~", "variants", "train_recommender.variants"))),
        "dataset=movies", f"dataset.local_folder={tmp_path}", "dataset.reviews=[Movies.jsonl]",
        "dataset.metadata=[meta_Movies.jsonl]",
        "items.missing_image=text_only", "ladder=zero_shot", "recommenders=[pop,vbpr,bert4rec]",
        "filter.min_user_interactions=3", "filter.min_item_interactions=1", "train_recommender.bert4rec.max_epochs=1",
    ]  # fmt: skip
    compose_and_dump(tmp_path / "params.yaml", str(repository / "conf"), None, "config", "", settings)
    download(tmp_path)
    filter_(tmp_path)
    fetch_images(tmp_path)
    return tmp_path


@pytest.mark.parametrize("num_items", [3, 10, 25])
def test_without_images_and_adapters_it_ends_in_a_page(shop: Path, num_items: int) -> None:
    for variant in ("id", "zero_shot"):
        export_embeddings(variant, shop)
    build_index("zero_shot", shop)
    for control in ("random", "shuffled", "text_only"):
        control_embeddings(control, shop)
    draw_negatives(shop)
    for variant in ("id", "zero_shot"):
        for recommender in ("pop", "vbpr", "bert4rec"):
            train_recommender(variant, recommender, shop)
            evaluate(variant, recommender, shop)
    report(shop)
    assert (shop / "report" / "index.html").is_file()


@pytest.mark.parametrize("num_items", [3])
def test_what_such_a_shop_cannot_have_is_one_line(
    shop: Path, num_items: int, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_embeddings("id", shop)
    capsys.readouterr()
    with pytest.raises(typer.Exit):
        train_recommender("id", "sasrec", shop)
    assert (
        "no user has two training interactions, an item and the one after it; take a shop with longer" in capsys.readouterr().err
    )
    settings = ["backbone=tiny", "items.missing_image=text_only", "runtime.device=cpu"]
    compose_and_dump(shop / "params.yaml", str(repository / "conf"), None, "config", "", settings)
    with pytest.raises(typer.Exit):
        train_adapter("sda", shop)
    assert (
        "sda train-adapter: error: train_adapter: 0 of 3 items have an image; an adapter needs at least 2 items with image and "
        "text; give the items images (docs/data.md), or train no adapter: dvc exp run -S ladder=zero_shot\n"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("num_items", [3])
def test_a_shop_whose_users_bought_twice_has_no_target(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (shop / "Movies.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for place, line in enumerate(lines) if place % 3 < 2]
    (shop / "Movies.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    path = shop / "params.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("min_user_interactions: 3", "min_user_interactions: 2"), encoding="utf-8")
    download(shop)
    before = (shop / "data" / "filtered" / "statistics.json").read_bytes()
    with pytest.raises(typer.Exit):
        filter_(shop)
    assert "filter.split: leave_one_out leaves no test target, because no user has 3 interactions" in capsys.readouterr().err
    assert (shop / "data" / "filtered" / "statistics.json").read_bytes() == before
