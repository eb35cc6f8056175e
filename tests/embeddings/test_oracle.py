"""Oracle vectors: what each kind knows, the item-specific part, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import polars as pl
import pytest
import typer
from ruamel.yaml import YAML
from sklearn.linear_model import LogisticRegression

from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, TRUTH, Workspace
from sda_core.data.demo import ATTRIBUTES, truth_of, world
from sda_core.embeddings.oracle import NOISE_LENGTH, NOISE_WIDTH, oracle_vectors
from sda_core.embeddings.table import read_metadata, write_embeddings
from sda_core.errors import ArtifactError, DataError
from sda_core.item_vectors import read_vectors
from sda_core.params import Oracle
from stages.control_embeddings import control_embeddings
from tests.sections import SHIPPED, changed, short_ladder

SHOP = changed(SHIPPED.dataset, num_users=20, num_items=400)
KNOWS = {
    "oracle": set(ATTRIBUTES),
    "oracle_shared": {"category", "colour"},
    "oracle_image": {"pattern", "shape"},
    "oracle_text": {"brand", "style"},
    "oracle_named": {"category", "colour", "brand", "style"},
}


@pytest.fixture(scope="module")
def truth() -> pl.DataFrame:
    return truth_of(SHOP)


@pytest.fixture(scope="module")
def items(truth: pl.DataFrame) -> list[str]:
    """Source ids in another order than the table's."""
    return truth["raw_item_id"].unique().sort(descending=True).to_list()


def attribute_part(vectors_IW: np.ndarray) -> np.ndarray:
    return vectors_IW[:, :-NOISE_WIDTH]


def test_every_kind_has_a_case() -> None:
    assert set(KNOWS) == set(get_args(Oracle))


@pytest.mark.parametrize("kind", KNOWS)
def test_cosines_of_the_attribute_parts_count_the_shared_values(kind: Oracle, truth: pl.DataFrame, items: list[str]) -> None:
    """Oracle: counted item by item in plain Python, joined by id."""
    fused = oracle_vectors(kind, truth, items, 1)[2]
    values: dict[str, dict[str, str]] = {}
    for row in truth.iter_rows(named=True):
        if row["attribute"] in KNOWS[kind] and (row["is_named"] or kind != "oracle_named"):
            values.setdefault(row["raw_item_id"], {})[row["attribute"]] = row["value"]
    part = (attribute_part(fused) > 0).astype(int)
    shared = part @ part.T
    for one, two in np.random.default_rng(0).integers(len(items), size=(300, 2)):
        first, second = values.get(items[one], {}), values.get(items[two], {})
        assert shared[one, two] == sum(second.get(name) == value for name, value in first.items())
    np.testing.assert_allclose(np.linalg.norm(fused, axis=1), 1.0, rtol=1e-5)


def test_items_of_equal_attributes_differ_by_their_own_part_alone(truth: pl.DataFrame, items: list[str]) -> None:
    twins = truth.with_columns(value=pl.col("value").first().over("attribute"))
    for kind in get_args(Oracle):
        image, text, fused = oracle_vectors(kind, twins, items, 1)
        assert image.shape == text.shape == fused.shape
        if kind == "oracle_named":
            continue  # its blocks depend on what the text names
        part = attribute_part(fused)
        np.testing.assert_allclose(part, np.tile(part[0], (len(part), 1)), atol=1e-6)
        cosines = fused @ fused.T - np.eye(len(fused))
        share = NOISE_LENGTH**2 / (1.0 + NOISE_LENGTH**2)  # of a vector's squared length
        assert np.abs(cosines).max() < 1.0 - share / 3
        assert cosines[~np.eye(len(cosines), dtype=bool)].mean() == pytest.approx(1.0 - share, abs=0.01)


def test_the_item_part_says_nothing_about_attributes(truth: pl.DataFrame, items: list[str]) -> None:
    labels = truth.filter(pl.col("attribute") == "colour").sort("raw_item_id", descending=True)["value"].to_numpy()
    half = len(items) // 2
    for vectors in oracle_vectors("oracle", truth, items, 1):
        reader = LogisticRegression(max_iter=500).fit(vectors[:half, -NOISE_WIDTH:], labels[:half])
        assert reader.score(vectors[half:, -NOISE_WIDTH:], labels[half:]) < 0.1 + 4 * np.sqrt(0.1 * 0.9 / half)


@pytest.mark.parametrize(
    ("kind", "image", "text"),
    [
        ("oracle", {"category", "colour", "pattern", "shape"}, {"category", "colour", "brand", "style"}),
        ("oracle_shared", {"category", "colour"}, {"category", "colour"}),
        ("oracle_image", {"pattern", "shape"}, set()),
        ("oracle_text", set(), {"brand", "style"}),
        ("oracle_named", set(), {"category", "colour", "brand", "style"}),
    ],
)
def test_each_modality_knows_what_it_can_show(
    kind: Oracle, image: set[str], text: set[str], truth: pl.DataFrame, items: list[str]
) -> None:
    columns = [name for name, _ in truth.select("attribute", "value").unique().sort("attribute", "value").rows()]
    whole = truth.with_columns(is_named=pl.col("shown_by") != "image")
    for vectors, names in zip(oracle_vectors(kind, whole, items, 1), (image, text), strict=False):
        found = {name for name, used in zip(columns, (attribute_part(vectors) > 0).any(axis=0), strict=True) if used}
        assert found == names
        assert vectors.any() == bool(names)


def test_one_seed_one_matrix_and_the_same_item_part_in_every_kind(truth: pl.DataFrame, items: list[str]) -> None:
    first, again, other = (oracle_vectors("oracle", truth, items, seed)[2] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    shared = oracle_vectors("oracle_shared", truth, items, 1)[2]
    np.testing.assert_allclose(
        *(part / np.linalg.norm(part, axis=1, keepdims=True) for part in (first[:, -NOISE_WIDTH:], shared[:, -NOISE_WIDTH:])),
        atol=1e-6,
    )


def test_what_it_refuses_is_one_line(truth: pl.DataFrame) -> None:
    with pytest.raises(DataError, match="which only the built-in shop has; remove it from"):
        oracle_vectors("oracle", truth.clear(), ["a"], 1)
    with pytest.raises(ArtifactError, match="has no row for item nobody's"):
        oracle_vectors("oracle", truth, ["nobody's"], 1)


def test_the_truth_is_that_of_the_world(truth: pl.DataFrame) -> None:
    shop = world(SHOP)
    assert len(truth) == shop.num_items * len(ATTRIBUTES)
    told = {(row["raw_item_id"], row["attribute"]): row["value"] for row in truth.iter_rows(named=True)}
    assert all(told[asin, name] == shop.value(name, item) for item, asin in enumerate(shop.asins) for name in ATTRIBUTES)
    assert not truth.filter(pl.col("is_named") & (pl.col("shown_by") == "image")).height


def test_the_stage_joins_by_id_and_stops_without_a_truth(
    tmp_path: Path, repository: Path, truth: pl.DataFrame, items: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    params = short_ladder(YAML(typ="safe", pure=True).load(repository / "params.yaml"))
    params["control_embeddings"]["variants"] = ["oracle", "oracle_named"]
    YAML(typ="safe", pure=True).dump(params, tmp_path / "params.yaml")
    workspace = Workspace(tmp_path)
    TRUTH.write(truth, workspace.truth)
    rows = [(1, item, item, 5.0, "train") for item in range(1, len(items) + 1)]
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), workspace.interactions)
    vectors = np.random.default_rng(0).normal(size=(len(items), 3)).astype(np.float32)
    workspace.embeddings("zero_shot").parent.mkdir()
    ids = np.arange(1, len(items) + 1)
    write_embeddings(workspace.embeddings("zero_shot"), ids, items, vectors, vectors, vectors, {"backbone": "b"}, ids > 0)
    control_embeddings("oracle", workspace.root)
    path = workspace.embeddings("oracle")
    assert EMBEDDINGS.read(path)["raw_item_id"].to_list() == items
    made = read_vectors(path)
    assert made is not None
    np.testing.assert_array_equal(made[1:], oracle_vectors("oracle", truth, items, params["control_embeddings"]["seed"])[2])
    assert read_metadata(path)["control"] == "oracle"
    assert "backbone" not in read_metadata(path)
    TRUTH.write(truth_of(changed(SHIPPED.dataset)).clear(), workspace.truth)
    capsys.readouterr()
    with pytest.raises(typer.Exit):
        control_embeddings("oracle_named", workspace.root)
    said = capsys.readouterr().err
    assert "variant oracle_named: needs the true attributes of the items, which only the built-in shop has" in said
    assert said.count("\n") == 1
