"""Search from text to image and back, on a tiny backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import cross_modal_search as search
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.errors import ConfigError, TrainingError
from sda_core.item_source import item_source
from sda_core.params import load_params


def test_places_against_a_loop_over_the_queries() -> None:
    random = np.random.default_rng(0)
    vectors = {name: random.normal(size=(23, 5)) + 2.0 for name in ("image", "text")}
    found = search.places(vectors, np.arange(1, 24))
    for geometry in search.GEOMETRIES:
        shifted = {
            name: value - (value.mean(axis=0) if geometry == "without the mean" else 0.0) for name, value in vectors.items()
        }
        for direction in search.DIRECTIONS:
            asked, answers = (shifted[name] for name in direction.split(" to "))
            expected = []
            for row, query in enumerate(asked):
                cosines = [float(query @ one / np.linalg.norm(query) / np.linalg.norm(one)) for one in answers]
                expected.append(1 + sum(other > cosines[row] for place, other in enumerate(cosines) if place != row))
            got = found.filter(direction=direction, geometry=geometry).sort("item_id")["position"].to_list()
            assert got == expected


def test_ties_count_against_an_item() -> None:
    vectors = {"image": np.ones((4, 3)), "text": np.random.default_rng(1).normal(size=(4, 3))}
    found = search.places(vectors, np.arange(1, 5))
    assert found.filter(direction="text to image", geometry="as they are")["position"].to_list() == [4, 4, 4, 4]


def test_the_same_items_are_held_out_of_every_training(on_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(on_tiny / "params.yaml")
    batch_size = params.train_adapter.training.batch_size
    source = item_source(Workspace(on_tiny), params.items)
    known, held_out = search.draw(source.has_image, 0.25, batch_size, "an image")
    np.testing.assert_array_equal(np.sort([*known, *held_out]), np.flatnonzero(source.has_image))
    assert source.has_image[held_out].all()
    assert len(held_out) == round(0.25 * source.has_image.sum())
    shown, train = [], search.alignment.train_adapter

    def spy(encoder: object, model: object, given: object, *rest: object) -> object:
        shown.append(np.flatnonzero(given.shows_image))  # type: ignore[attr-defined]
        return train(encoder, model, given, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(search.alignment, "train_adapter", spy)
    variants = Names(("lora", "sda", "mismatched"))
    search.main("small", on_tiny, variants, Numbers((1, 2)), 2, 0.25)
    assert len(shown) == 6
    for rows in shown:
        assert not set(rows) & set(held_out)
        assert set(rows) | set(held_out) == set(np.flatnonzero(source.has_image))
    text = (on_tiny / "experiments" / "results" / "cross_modal_search-small" / "table.md").read_text()
    assert text.count("| text to image |") == text.count("| image to text |") == 2 * 4
    kept = pl.read_parquet(on_tiny / "experiments" / "cross_modal_search" / "small" / "zero_shot" / "0.parquet")
    assert kept["position"].is_between(1, len(held_out)).all()
    search.main("small", on_tiny, variants, Numbers((1, 2)), 2, 0.25)
    assert len(shown) == 6  # nothing is trained again


@pytest.mark.parametrize(
    ("share", "message"), [(0.0, "0 of 8 .* leaves 8"), (-0.5, "0 of 8 .* leaves 8"), (0.75, "6 of 8 .* leaves 2")]
)
@pytest.mark.parametrize("titles", [None, list("abcdefghij")])
def test_shares_that_leave_too_few_items(share: float, message: str, titles: list[str] | None) -> None:
    can_be_drawn = np.arange(10) < 8
    with pytest.raises(
        TrainingError, match=f"--share: it holds out {message} for training; hold out at least one, and leave .* 3"
    ):
        search.draw(can_be_drawn, share, 3, "an image", titles)


def test_mistakes(on_tiny: Path) -> None:
    search.main("settings", on_tiny, Names(()), Numbers((1,)))
    with pytest.raises(ConfigError, match=r"--name: the results in .* were made with other share; use another name"):
        search.main("settings", on_tiny, Names(()), Numbers((1,)), share=0.3)
    with pytest.raises(ConfigError, match=r"--name: .* was made with other params; use another name"):
        search.main("settings", on_tiny, Names(()), Numbers((1,)), num_steps=3)
    with pytest.raises(ConfigError, match=r"--set: no such param .train_adapter\.speed."):
        search.main("set", on_tiny, Names(()), changes=["train_adapter.speed=1"])
    with pytest.raises(TrainingError, match="--share"):
        search.main("all", on_tiny, share=1.0)
    with pytest.raises(ConfigError, match="--variants"):
        search.main("unknown", on_tiny, Names(("sad",)))
