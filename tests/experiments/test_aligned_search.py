"""Search with linear heads: which items are held out, what is learned from which pairs, what is kept, and the user's mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import adaptation, aligned_heads, aligned_search, cross_modal_search
from experiments.cross_modal_search import of_seeds
from experiments.nearest_items import Run
from sda_core.cli.scripts import Names, Numbers
from sda_core.embeddings.controls import Vectors
from sda_core.errors import ConfigError, SDAError, TrainingError
from sda_core.unit_rows import unit_rows
from tests.experiments.projects import new_project
from tests.experiments.test_adaptation import SMALL

NUM_ITEMS = 600


def vectors(widths: tuple[int, int], seed: int = 0, num_missing: int = 0) -> Vectors:
    """Embeddings of two modalities that share 12 directions, each rotated in its own way."""
    draws = np.random.default_rng(seed)
    shared = draws.normal(size=(NUM_ITEMS, 12))
    image_ID, text_ID = (
        (shared @ draws.normal(size=(12, width)) + 0.3 * draws.normal(size=(NUM_ITEMS, width)) + 5).astype(np.float32)
        for width in widths
    )
    has_image, has_text = np.ones((2, NUM_ITEMS), dtype=bool)
    has_image[:num_missing] = has_text[num_missing : 2 * num_missing] = False
    return Vectors(image_ID, text_ID, image_ID, has_image, has_text)


def draw(own: Vectors, titles: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    return cross_modal_search.draw(own.has_image & own.has_text, 0.25, 2, "an image and a text", titles)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A run of the study of adaptation on a tiny shop, without adapters."""
    with new_project(tmp_path_factory, repository) as root:
        adaptation.main("small", Names(("nearest",)), Names(("id",)), SMALL, root, Numbers((1,)))
    return root / "experiments" / "runs" / "adaptation" / "small"


def search(project: Path, folder: Path, **options: object) -> str:
    settings = {"losses_": Names(("sda", "mismatched")), "num_steps": 3, "seeds": Numbers((1, 2))} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        aligned_search.main("small", [f"small={project}"], "zero_shot", **settings)
    return (folder / "experiments" / "results" / "aligned_search-small" / "table.md").read_text(encoding="utf-8")


def test_only_items_with_both_modalities_are_held_out() -> None:
    own = vectors((20, 30), num_missing=100)
    known, held_out = draw(own)
    assert (len(known), len(held_out)) == (300, 100)
    assert sorted([*known, *held_out]) == list(range(200, NUM_ITEMS))
    again = draw(own)
    np.testing.assert_array_equal(held_out, again[1])


def test_items_of_a_title_are_held_out_together() -> None:
    own = vectors((20, 30), num_missing=100)
    titles = [f"title {item % 37}" for item in range(NUM_ITEMS)]
    known, held_out = draw(own, titles)
    assert sorted([*known, *held_out]) == list(range(200, NUM_ITEMS))
    assert {titles[row] for row in known}.isdisjoint(titles[row] for row in held_out)
    assert 100 <= len(held_out) <= 100 + 11  # a title has at most eleven items
    with pytest.raises(TrainingError, match="--share: it holds out 400 of 400 items"):
        draw(own, ["the same"] * NUM_ITEMS)


@pytest.mark.parametrize("width", [40, aligned_heads.WIDTH])
def test_embeddings_in_one_space_keep_their_cosines(width: int) -> None:
    own = vectors((width, width))
    known, held_out = draw(own)
    image_ID, text_ID = aligned_search.prepared(own, known)
    units = [unit_rows(each.astype(np.float64)) for each in (own.image_ID, own.text_ID)]
    expected = [each - each[known].mean(0) for each in units]
    np.testing.assert_allclose((image_ID @ text_ID.T)[held_out], (expected[0] @ expected[1].T)[held_out], atol=1e-5)


def test_held_out_items_do_not_shape_the_space() -> None:
    own = vectors((20, 30))
    known, held_out = draw(own)
    before = aligned_search.prepared(own, known)
    own.image_ID[held_out] = np.random.default_rng(1).normal(size=(len(held_out), 20))
    after = aligned_search.prepared(own, known)
    np.testing.assert_array_equal(before[0][known], after[0][known])
    assert (before[0][held_out] != after[0][held_out]).any()


@pytest.mark.parametrize("widths", [(20, 30), (24, 24)], ids=["two-spaces", "one-width"])
def test_true_pairs_are_found_on_held_out_items_and_wrong_ones_are_not(
    widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    own = vectors(widths)
    monkeypatch.setattr(adaptation, "table_of", lambda *arguments: own)
    run = Run.read(f"small={project}")
    recall = {
        kind: of_seeds(
            [aligned_search.place(run, "zero_shot", kind, 200, 0.25, False, 1)], "text to image", "without the mean", "R@10"
        ).mean()
        for kind in ("zero_shot", "sda", "mismatched")
    }
    assert recall["sda"] > 0.5
    assert recall["zero_shot"] < 0.25
    assert recall["mismatched"] < 0.25


def test_tables_and_what_is_kept(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = search(project, tmp_path)
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| text to image")]
    assert [row[1].strip() for row in rows] == ["zero_shot", "sda", "mismatched"] * 2
    monkeypatch.setattr(aligned_search, "place", lambda *arguments: pytest.fail("trained again"))
    assert search(project, tmp_path) == text
    monkeypatch.undo()
    by_title = search(project, tmp_path, by_title=True)
    assert by_title != text
    with pytest.raises(ConfigError, match=r"--name: the results in .* were made with other share"):
        search(project, tmp_path, share=0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"losses_": Names(("clip",))}, ConfigError, "--losses: expected some of sda, soft, infonce, mismatched"),
        ({"share": 0.0}, TrainingError, r"--share: it holds out 0 of \d+ items with an image and a text"),
        ({"share": 1.0}, TrainingError, r"--share: it holds out (\d+) of \1 items with an image and a text"),
    ],
)
def test_mistakes_are_one_line(project: Path, tmp_path: Path, options: dict, error: type[SDAError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        search(project, tmp_path, **options)
    assert "\n" not in str(caught.value)
