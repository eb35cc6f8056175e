"""What goes out to another library and comes back: the files, the settings, the evaluation of given scores, the verdict."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import polars as pl
import pytest
import torch

from experiments import agreement, agreement_sides
from experiments.study import gains, keep_positions, positions_path
from sda_core import ranking, recommenders
from sda_core.artifacts import INTERACTIONS, ITEMS, POSITIONS, USERS, Workspace, write_json
from sda_core.embeddings.table import write_embeddings
from sda_core.errors import ConfigError, DataError
from sda_core.evaluation import hit, ndcg, score_positions
from sda_core.exchange import Format
from sda_core.exchange.export import export
from sda_core.exchange.recbole import token
from sda_core.exchange.shop import Shop
from sda_core.params import Params, SASRecParams, VBPRParams, load_params
from sda_core.recommenders.features import standardise

WIDTH = 12


@pytest.fixture(scope="module")
def exported(shop: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop with random vectors, as `sda export --format recbole` writes it."""
    raw = ITEMS.read(shop.items).sort("item_id")["raw_item_id"].to_list()
    fused = np.random.default_rng(1).normal(size=(len(raw), WIDTH)).astype(np.float32)
    shop.embeddings("zero_shot").parent.mkdir(exist_ok=True)
    ids = np.arange(1, len(raw) + 1)
    write_embeddings(shop.embeddings("zero_shot"), ids, raw, None, None, fused, {"fusion": "none"}, ids > 0)
    return write_export(shop, tmp_path_factory.mktemp("out") / "shop")


def write_export(shop: Workspace, folder: Path) -> Path:
    export(Shop.read(shop, "zero_shot"), Format.RECBOLE, folder)
    return folder


@pytest.fixture
def params(shop: Workspace) -> Params:
    return load_params(shop.root / "params.yaml")


# ------------------------------------------------------------------------------------------------------------- going out
def test_the_other_side_reads_our_split_and_our_vectors(shop: Workspace, exported: Path) -> None:
    found = agreement_sides.read_export(exported)
    users, items = (
        dict(USERS.read(shop.users).select("user_id", "raw_user_id").iter_rows()),
        dict(ITEMS.read(shop.items).select("item_id", "raw_item_id").iter_rows()),
    )
    for split, rows in found.rows.items():
        ours = (
            INTERACTIONS.read(shop.interactions)
            .filter(pl.col("split") == split)
            .sort("user_id", "timestamp", maintain_order=True)
        )
        expected = [(users[user], items[item]) for user, item in ours.select("user_id", "item_id").iter_rows()]
        assert [(unquote(user), unquote(item)) for user, item in rows] == expected
    assert [unquote(item) for item in found.items] == [items[item] for item in sorted(items)]
    assert len(found.users) == len(users)
    vectors = Shop.read(shop, "zero_shot").vectors["embedding"]
    assert found.vectors is not None
    np.testing.assert_array_equal(found.vectors, vectors)
    padded = np.concatenate([np.zeros((1, WIDTH), dtype=np.float32), vectors])
    np.testing.assert_allclose(agreement_sides.standardised(found.vectors), standardise(padded)[1:], rtol=1e-6, atol=1e-7)


def test_settings_in_their_words(params: Params) -> None:
    rows = agreement.sections(params, "vbpr", num_users=100, num_targets=400)
    ours = rows["ours"]
    assert isinstance(ours, VBPRParams)
    theirs = agreement.their_settings(ours)
    # The loss that Cornac minimises, for a batch of B triples with squared lengths u (user), i (item), b (bias), e (projection).
    B, u, i, b, e = ours.batch_size, 3.0, 5.0, 7.0, 11.0
    sum_of_theirs = (theirs["lambda_w"] * (u + i) + theirs["lambda_b"] * b + theirs["lambda_e"] * e) / 2
    mean_of_ours = ours.embedding_regularization * (u + i + b) / B + ours.content_regularization * e
    assert sum_of_theirs == pytest.approx(B * mean_of_ours)
    assert ours.content_item_regularization == 0.0  # Cornac has no such penalty
    assert ours.content_bias_regularization == ours.content_regularization  # and one weight for both of these
    assert rows["default"] == params.train_recommender.vbpr

    rows = agreement.sections(params, "sasrec", num_users=100, num_targets=400)
    ours, control = rows["ours"], rows["control"]
    assert isinstance(ours, SASRecParams)
    assert isinstance(control, SASRecParams)
    theirs = agreement.their_settings(ours)
    assert (ours.loss, control.loss) == ("softmax", "bce")
    assert ours.batch_size * 400 / 100 == theirs["train_batch_size"]  # as many targets a step
    assert theirs["inner_size"] == ours.hidden_size
    assert control == ours.model_copy(update={"loss": "bce", "num_negatives": 1})


def test_a_number_of_epochs_from_a_curve(params: Params, tmp_path: Path) -> None:
    (tmp_path / "0.tsv").write_text(
        "epoch\tloss\tvalid_ndcg_10\tis_best\n1\t.7\t\tFalse\n2\t.6\t.1\tTrue\n3\t.5\t\tFalse\n4\t.4\t.3\tTrue\n5\t.3\t\tFalse\n",
        encoding="utf-8",
    )
    fixed = agreement.fixed_epochs(params.train_recommender.vbpr, tmp_path / "0.tsv")
    assert isinstance(fixed, VBPRParams)
    assert (fixed.max_epochs, fixed.eval_every) == (4, 4)


# ----------------------------------------------------------------------------------------------------------- coming back
def trained(shop: Workspace, params: Params) -> tuple[np.ndarray, pl.DataFrame]:
    """Scores ``(U + 1, I + 1)`` of a model of ours for the test targets, and their positions by the model itself."""
    interactions = INTERACTIONS.read(shop.interactions)
    num_users, num_items = interactions["user_id"].n_unique(), len(ITEMS.read(shop.items))
    model = recommenders.build(params.train_recommender.sasrec, num_users, num_items, None, seed=1)
    data = recommenders.evaluation_data(interactions, num_items=num_items)
    with torch.no_grad():
        model.item_table().mul_(50.0).round_()  # as if trained, and with ties
    users = np.arange(num_users + 1)
    history = torch.from_numpy(data.histories.last(users, 50)).long()
    placed = ranking.place_targets(model, data, None, 64, torch.device("cpu"))
    return model.score(torch.from_numpy(users), history).numpy(), score_positions(placed, params.evaluate.ties)


def tokens(shop: Workspace) -> tuple[list[str], list[str]]:
    users, items = USERS.read(shop.users).sort("user_id"), ITEMS.read(shop.items).sort("item_id")
    return [token(raw) for raw in users["raw_user_id"]], [token(raw) for raw in items["raw_item_id"]]


def test_given_scores_are_placed_as_the_model_that_gave_them(shop: Workspace, params: Params, tmp_path: Path) -> None:
    """Rows and columns in another order, and a history with the best scores of all, change nothing; wrong items do."""
    score_UI, expected = trained(shop, params)
    users, items = tokens(shop)
    random = np.random.default_rng(0)
    rows, columns = random.permutation(len(users)), random.permutation(len(items))
    given = score_UI[1:, 1:][rows][:, columns]
    known = INTERACTIONS.read(shop.interactions).filter(pl.col("split") != "test")
    place_of_user, place_of_item = (np.argsort(order) for order in (rows, columns))
    raised = given.copy()
    raised[place_of_user[known["user_id"].to_numpy() - 1], place_of_item[known["item_id"].to_numpy() - 1]] = 1e9
    names = [users[row] for row in rows], [items[column] for column in columns]
    for scores in (given, raised):
        np.save(tmp_path / "scores.npy", scores)
        found = agreement.place_scores(shop, params, "sasrec", tmp_path / "scores.npy", *names)
        # A batch's shape may change the last bit of a score, and with it a tie: the counts may differ where scores are equal.
        for column in ("user_id", "target_item_id", "candidates"):
            assert found[column].equals(expected[column])
        assert (found["position"] - expected["position"]).abs().max() <= 1
    assert found.schema == dict(POSITIONS.columns)
    wrong = agreement.place_scores(shop, params, "sasrec", tmp_path / "scores.npy", names[0], names[1][::-1])
    assert not wrong["position"].equals(found["position"])


def test_ties_and_metrics_by_hand(shop: Workspace, params: Params, tmp_path: Path) -> None:
    """The target scores 1; two items that are no history score more, three as much: place 6 against it, 3 in its favour."""
    interactions = INTERACTIONS.read(shop.interactions)
    users, items = tokens(shop)
    scores = np.zeros((len(users), len(items)), dtype=np.float32)
    for user, item in interactions.filter(pl.col("split") == "test").select("user_id", "item_id").iter_rows():
        own = set(interactions.filter(pl.col("user_id") == user)["item_id"].to_list())
        others = [other for other in range(len(items)) if other + 1 not in own]
        scores[user - 1, others[:2]], scores[user - 1, others[2:5]], scores[user - 1, item - 1] = 2.0, 1.0, 1.0
        for mine in own - {item}:
            scores[user - 1, mine - 1] = 3.0
    np.save(tmp_path / "scores.npy", scores)
    for ties, place in (("pessimistic", 6.0), ("mean", 4.5), ("optimistic", 3.0)):
        asked = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"ties": ties})})
        found = agreement.place_scores(shop, asked, "vbpr", tmp_path / "scores.npy", users, items)["position"]
        assert found.unique().to_list() == [place]
        assert hit(found.to_numpy(), 10) == 1.0
        assert ndcg(found.to_numpy(), 10) == pytest.approx(1 / np.log2(place + 1))


def test_scores_of_another_shop_are_refused(shop: Workspace, params: Params, tmp_path: Path) -> None:
    users, items = tokens(shop)
    path = tmp_path / "scores.npy"

    def place(scores: np.ndarray, users: list[str], items: list[str]) -> None:
        np.save(path, scores)
        agreement.place_scores(shop, params, "vbpr", path, users, items)

    scores = np.zeros((len(users), len(items)), dtype=np.float32)
    with pytest.raises(DataError, match="has no scores of 1 items of the shop, such as number"):
        place(scores[:, :-1], users, items[:-1])
    with pytest.raises(DataError, match="has no scores of 1 users of the shop"):
        place(scores[1:], users[1:], items)
    with pytest.raises(DataError, match="has scores of 1 items that the shop does not have, such as 'nobody'"):
        place(scores, users, [*items[:-1], "nobody"])
    with pytest.raises(DataError, match="should have"):
        place(scores[:, :-1], users, items)


def test_the_first_users(shop: Workspace, exported: Path, tmp_path: Path) -> None:
    cut = agreement.first_users(shop, 30, "zero_shot", tmp_path / "project")
    found = agreement_sides.read_export(write_export(cut, tmp_path / "shop"))
    assert len(found.users) == len(USERS.read(cut.users)) == 30
    assert len(found.items) == len(ITEMS.read(shop.items))
    assert {split: len(rows) for split, rows in found.rows.items()} == {
        split: INTERACTIONS.read(shop.interactions).filter(pl.col("user_id") <= 30, pl.col("split") == split).height
        for split in agreement_sides.SPLITS
    }


def test_changes_have_names() -> None:
    assert agreement.change_of("vbpr", "") == {}
    assert agreement.change_of("vbpr", "bias") == {"changes": ["bias"]}
    assert agreement.change_of("vbpr", "start+bias") == {"changes": ["start", "bias"], "initial_std": 0.1}
    assert agreement.change_of("sasrec", "scaled+dropped") == {"changes": ["scaled", "dropped"]}
    with pytest.raises(ConfigError, match="expected some of scaled, dropped, unnormed, ends"):
        agreement.change_of("sasrec", "bias")


# --------------------------------------------------------------------------------------------------------------- verdict
def of_seeds(*means: float) -> np.ndarray:
    return np.repeat(np.array(means)[:, None], 4, axis=1)


@pytest.mark.parametrize(
    ("ours", "theirs", "bounds", "verdict"),
    [
        ((0.050, 0.052, 0.054), (0.049, 0.050, 0.051), (-0.001, 0.005), "yes: within the range over seeds"),
        ((0.0520, 0.0521, 0.0522), (0.0500, 0.0500, 0.0500), (-0.001, 0.0045), "yes: the interval contains 0"),
        ((0.0520, 0.0521, 0.0522), (0.0500, 0.0500, 0.0500), (-0.001, 0.0055), "open: the interval is wide"),
        ((0.0600, 0.0600, 0.0600), (0.0500, 0.0500, 0.0500), (0.008, 0.012), "no"),
        ((0.0400, 0.0400, 0.0400), (0.0500, 0.0500, 0.0500), (-0.012, -0.008), "no"),
    ],
)
def test_the_verdict(ours: tuple[float, ...], theirs: tuple[float, ...], bounds: tuple[float, float], verdict: str) -> None:
    assert agreement.agree(of_seeds(*ours), of_seeds(*theirs), *bounds) == verdict
    assert agreement.verdict_of("ours", verdict) == verdict
    assert (agreement.verdict_of("control", verdict) == verdict) == (verdict == "no")


def test_the_tables(shop: Workspace, params: Params, tmp_path: Path) -> None:
    for row, seconds in (("ours", 2.0), ("theirs", 20.0), ("default", 3.0)):
        for seed in (1, 2):
            folder = tmp_path / "sasrec" / row
            keep_positions(shop, params, params.train_recommender.sasrec, seed, folder)
            own = {"hit": 0.5, "ndcg": 0.25, "ndcg_with_history": 0.125}
            write_json(folder / f"{seed}.json", {"seconds": seconds, "metrics": own})
    made = agreement.table(tmp_path, ["sasrec"], [1, 2], params.evaluate).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in made if line.startswith("| sasrec")]
    assert [line[1] for line in cells] == ["recbole", "ours", "default"]
    assert cells[1][4:6] == ["+0.0000 [+0.0000, +0.0000]", "yes: within the range over seeds"]
    assert [line[6] for line in cells] == ["20", "2", "3"]
    lines = agreement.same_lists(tmp_path, ["sasrec"], [1, 2]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| sasrec")]
    ours = gains("ndcg", [POSITIONS.read(positions_path(tmp_path / "sasrec" / "theirs", 1))]).mean()
    assert cells[0][3:6] == [f"{ours:.6f}", "0.250000", f"{abs(ours - 0.25):.1e}"]
    assert cells[0][-1] == "0.125000"


# ------------------------------------------------------------------------------------------------------ the libraries
SIDES: dict[str, dict[str, Any]] = {
    "cornac": {"k": 4, "k2": 4, "n_epochs": 2, "batch_size": 64, "learning_rate": 0.01},
    "recbole": {
        "hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 1, "loss_type": "CE", "hidden_act": "relu",
        "train_batch_size": 64, "max_epochs": 2, "eval_every": 1, "patience": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(("side", "model"), [("cornac", "vbpr"), ("recbole", "sasrec")])
def test_a_library_trains_on_the_export_and_measures_the_same(
    side: str, model: str, shop: Workspace, params: Params, exported: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec(side) is None:
        pytest.skip(f"{side} is not installed here (it has an environment of its own: python -m experiments agreement --help)")
    request = json.dumps({"side": side, "seed": 1, "settings": SIDES[side]})
    command = [sys.executable, str(agreement.SIDES_FILE), str(exported), str(tmp_path), request]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    placed = agreement.place_scores(shop, params, model, tmp_path / "scores.npy", result["users"], result["items"])
    assert result["metrics"]["hit"] == pytest.approx(hit(placed["position"].to_numpy(), 10), abs=1e-9)
    assert result["metrics"]["ndcg"] == pytest.approx(ndcg(placed["position"].to_numpy(), 10), abs=1e-9)
