"""The stage evaluate under protocols that sample, and through an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
from ruamel.yaml import YAML

from sda_core.artifacts import INTERACTIONS, ITEMS, NEGATIVES, SEED_POSITIONS, Workspace, read_json
from sda_core.evaluation import candidates_hash
from sda_core.params import load_params
from sda_core.verification import Finding, verify
from stages.draw_negatives import draw_negatives
from stages.evaluate import evaluate
from stages.export_embeddings import export_embeddings
from stages.train_recommender import train_recommender

NUM_USERS, NUM_ITEMS = 12, 120
RETRIEVAL = {"factory": "Flat", "nprobe": None, "ef_search": None, "depth": 120, "num_queries": 5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Workspace:
    """A shop of ids alone, with pop and BPR trained."""
    workspace = Workspace(tmp_path_factory.mktemp("shop"))
    write_params(workspace, YAML(typ="safe", pure=True).load(repository / "params.yaml"))
    rows = [
        (user, (11 * user + 7 * place) % NUM_ITEMS + 1, place, 5.0, {3: "valid", 4: "test"}.get(place, "train"))
        for user in range(1, NUM_USERS + 1)
        for place in range(5)
    ]
    INTERACTIONS.write(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), workspace.interactions)
    items = [(item, f"i{item}", "", "", "", [], [], "", [], True) for item in range(1, NUM_ITEMS + 1)]
    ITEMS.write(pl.DataFrame(items, schema=dict(ITEMS.columns), orient="row"), workspace.items)
    export_embeddings("id", workspace.root)
    for recommender in ("pop", "bpr"):
        train_recommender("id", recommender, workspace.root)
    return workspace


def write_params(workspace: Workspace, params: dict[str, Any], **evaluate_section: object) -> None:
    params["runtime"] |= {"device": "cpu", "num_threads": 1}
    params["evaluate"] |= {
        "bootstrap_samples": 0,
        "protocol": "fullrank",
        "retrieval": None,
        "negatives_seed": 7,
    } | evaluate_section
    params["train_recommender"]["bpr"]["max_epochs"] = 2
    params["variants"], params["recommenders"] = ["id"], ["pop", "bpr"]
    YAML(typ="safe", pure=True).dump(params, workspace.root / "params.yaml")


def set_evaluate(workspace: Workspace, **section: object) -> None:
    write_params(workspace, YAML(typ="safe", pure=True).load(workspace.root / "params.yaml"), **section)


def metrics(workspace: Workspace, recommender: str) -> dict[str, Any]:
    return read_json(workspace.metrics("id", recommender), "metrics")


def findings(workspace: Workspace) -> dict[str, Finding]:
    found = verify(workspace, load_params(workspace.root / "params.yaml"))
    return {each.path: each for each in found if each.path.startswith(("data/negatives", "evaluation", "metrics"))}


@pytest.mark.parametrize("protocol", ["uni100", "pop100"])
def test_all_recommenders_meet_the_stored_negatives(trained: Workspace, protocol: str) -> None:
    set_evaluate(trained, protocol=protocol)
    draw_negatives(trained.root)
    path = trained.negatives(protocol)
    sha256 = NEGATIVES.metadata(path)["sha256"]
    evaluate("id", root=trained.root)
    for recommender in ("pop", "bpr"):
        assert SEED_POSITIONS.metadata(trained.positions("id", recommender)) == {"negatives_sha256": sha256}
        assert metrics(trained, recommender)["negatives_sha256"] == sha256
        stored = (NEGATIVES.read(path)["candidates"].to_numpy() > 0).sum(axis=1)
        of_seeds = SEED_POSITIONS.read(trained.positions("id", recommender)).partition_by("seed")
        assert len(of_seeds) == (1 if recommender == "pop" else 3)
        assert all(table["candidates"].to_list() == (stored + 1).tolist() for table in of_seeds)
    found = findings(trained)
    assert {each.status for each in found.values()} == {"ok"}
    assert sha256[:12] in found[f"data/negatives/{protocol}.parquet"].text

    # A negative that its user has bought, once with the hash of the rows as they are now.
    frame, told = NEGATIVES.read(path), NEGATIVES.metadata(path)
    own = INTERACTIONS.read(trained.interactions).filter(pl.col("user_id") == 1)["item_id"][0]
    rows = frame["candidates"].to_list()
    rows[0][0] = own
    changed = frame.with_columns(pl.Series("candidates", rows, dtype=pl.Array(pl.Int32, 100)))
    NEGATIVES.write(changed, path, told | {"sha256": candidates_hash(changed["candidates"].to_numpy())})
    problem = "1 negatives are items that their users have interacted with"
    assert problem in findings(trained)[f"data/negatives/{protocol}.parquet"].text
    NEGATIVES.write(changed, path, told)
    assert "its negatives have sha256" in findings(trained)[f"data/negatives/{protocol}.parquet"].text
    with pytest.raises(typer.Exit):
        evaluate("id", root=trained.root)


def test_without_stored_negatives_there_is_no_evaluation(trained: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    set_evaluate(trained, protocol="uni100", negatives_seed=99)
    trained.negatives("uni100").unlink(missing_ok=True)
    with pytest.raises(typer.Exit):
        evaluate("id", root=trained.root)
    error = capsys.readouterr().err
    assert error.startswith("sda evaluate: error: ")
    assert "negatives table is missing" in error
    assert error.count("\n") == 1


def test_metrics_of_other_negatives_are_told(trained: Workspace) -> None:
    set_evaluate(trained, protocol="uni100")
    draw_negatives(trained.root)
    evaluate("id", root=trained.root)
    path = trained.positions("id", "bpr")
    SEED_POSITIONS.write(SEED_POSITIONS.read(path), path, {"negatives_sha256": "1" * 64})
    assert "names the negatives" in findings(trained)["metrics/id/bpr.json"].text
    assert findings(trained)["metrics/id/pop.json"].status == "ok"


def test_full_rank_tells_nothing_new_and_an_exact_index_gives_its_numbers(trained: Workspace) -> None:
    set_evaluate(trained)
    evaluate("id", root=trained.root)
    exact = {name: (trained.positions("id", name).read_bytes(), metrics(trained, name)) for name in ("pop", "bpr")}
    assert not any("sha256" in key or "retrieval" in key for _, numbers in exact.values() for key in numbers)
    assert {each.status for each in findings(trained).values()} == {"ok"}
    set_evaluate(trained, retrieval=RETRIEVAL)
    evaluate("id", root=trained.root)
    for name, (positions, numbers) in exact.items():
        assert trained.positions("id", name).read_bytes() == positions
        assert metrics(trained, name) == numbers | ({"retrieval_recall@10": 1.0} if name == "bpr" else {})
    assert {each.status for each in findings(trained).values()} == {"ok"}
    set_evaluate(trained)
    assert "has retrieval_recall@10" in findings(trained)["metrics/id/bpr.json"].text
