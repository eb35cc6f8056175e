"""`sda recommend` and `sda neighbors`: what they print, and what they cannot do, in one line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.cli.catalogue import Catalogue
from sda_core.cli.neighbors import neighbors
from sda_core.cli.recommend import recommend
from sda_core.embeddings.table import write_embeddings
from sda_core.errors import ConfigError
from sda_core.recommenders import build, load, read_item_vectors, training_data

NUM_USERS, NUM_ITEMS = 4, 9
RAW = [f"sku-{item}" for item in range(1, NUM_ITEMS)] + ["2"]  # the last one is called as the number of another


@pytest.fixture
def params(repository: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(repository / "params.yaml")


@pytest.fixture
def workspace(tmp_path: Path, repository: Path) -> Workspace:
    """Items, vectors, and recommenders with the weights they began with."""
    from sda_core.params import load_params

    workspace, section = Workspace(tmp_path), load_params(repository / "params.yaml").train_recommender
    items = [(item, raw, f"Title of {raw}", "", "", [], [], "", [], True) for item, raw in enumerate(RAW, 1)]
    ITEMS.write(pl.DataFrame(items, schema=dict(ITEMS.columns), orient="row"), workspace.items)
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 6)).astype(np.float32)
    ids = np.arange(1, NUM_ITEMS + 1)
    write_embeddings(workspace.embeddings("sda"), ids, RAW, vectors, vectors, vectors, {}, ids > 0)
    shutil.copyfile(repository / "params.yaml", tmp_path / "params.yaml")
    for name in ("pop", "nearest", "sasrec", "bert4rec", "vbpr", "bpr", "slmrec"):
        params = section.of(name)
        model = build(params, NUM_USERS, NUM_ITEMS, read_item_vectors(workspace.embeddings("sda"), params), seed=5)
        if name == "pop":
            model.counts_I[1:] = torch.arange(NUM_ITEMS)  # the last item is the most popular
        if name == "nearest":
            random = np.random.default_rng(1)
            histories = [random.permutation(np.arange(1, NUM_ITEMS + 1))[:6] for _ in range(NUM_USERS)]
            rows = [
                (user, int(item), place, 1.0, "train")
                for user, some in enumerate(histories, 1)
                for place, item in enumerate(some)
            ]
            data = training_data(pl.DataFrame(rows, schema=dict(INTERACTIONS.columns), orient="row"), NUM_USERS, NUM_ITEMS)
            model.fit(data, checkpoint=tmp_path / "unused", fingerprint="", device=torch.device("cpu"))
        model.save(workspace.model("sda", name, 0 if name in ("pop", "nearest") else 1))
    return workspace


def shown(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[tuple[float, str]]]:
    """The history's ids, and score and id of what is recommended."""
    lines = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert all(title == f"Title of {raw}" for _, raw, title in lines)
    history = [raw for first, raw, _ in lines if first == "history"]
    return history, [(float(first), raw) for first, raw, _ in lines if first != "history"]


@pytest.mark.parametrize("recommender", ["sasrec", "bert4rec", "nearest"])
def test_the_best_unseen_items_by_the_model(workspace: Workspace, capsys: pytest.CaptureFixture[str], recommender: str) -> None:
    recommend(["sku-3", "sku-5", "sku-1"], "sda", recommender, 4, workspace.root)
    history, found = shown(capsys)
    assert history == ["sku-3", "sku-5", "sku-1"]
    folder = workspace.model("sda", recommender, 0 if recommender == "nearest" else 1)
    from sda_core.recommenders import saved_params

    model = load(folder, read_item_vectors(workspace.embeddings("sda"), saved_params(folder)), torch.device("cpu"))
    scores = model.score(torch.zeros(1, dtype=torch.int64), torch.tensor([[3, 5, 1]]))[0]
    scores[[3, 5, 1]] = -torch.inf
    best = scores.argsort(descending=True)[:4].tolist()
    assert [raw for _, raw in found] == [RAW[item - 1] for item in best]
    assert [score for score, _ in found] == pytest.approx(scores[best].tolist(), abs=1e-4)
    recommend(["sku-1", "sku-5", "sku-3"], "sda", recommender, 4, workspace.root)
    assert (shown(capsys)[1] != found) == (recommender != "nearest")  # the order of a history counts in a sequential one


def test_popularity_leaves_out_what_was_seen(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    recommend(["sku-8"], "sda", "pop", 3, workspace.root)
    assert shown(capsys)[1] == [(8.0, "2"), (6.0, "sku-7"), (5.0, "sku-6")]
    recommend([f"sku-{item}" for item in range(1, 8)], "sda", "pop", 100, workspace.root)
    assert [raw for _, raw in shown(capsys)[1]] == ["2", "sku-8"]  # no more are left


@pytest.mark.parametrize("recommender", ["pop", "nearest", "sasrec", "bert4rec"])
def test_a_history_of_all_items_leaves_nothing(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], recommender: str
) -> None:
    with pytest.raises(typer.Exit) as ended:
        recommend([*RAW, RAW[0]], "sda", recommender, 3, workspace.root)
    assert ended.value.exit_code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "sda recommend: error: ITEM: the history has all 9 items, so none is left to recommend; leave some out\n"
    )
    recommend([*RAW[1:], RAW[1]], "sda", recommender, 3, workspace.root)  # all but one, as long a history
    assert [raw for _, raw in shown(capsys)[1]] == [RAW[0]]


def test_an_id_comes_before_a_number(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    recommend(["2", "sku-3"], "sda", "pop", 1, workspace.root)
    assert shown(capsys)[0] == ["2", "sku-3"]


@pytest.mark.parametrize(
    ("items", "recommender", "expected"),
    [
        (["sku-1"], "vbpr", "vbpr learns a vector for each user of the training and has none"),
        (["sku-1"], "bpr", "use sasrec, bert4rec or nearest, which read histories, or pop"),
        (["sku-1"], "slmrec", "slmrec learns a vector for each user"),
        (["sku-1", "sku-77"], "sasrec", "ITEM: 'sku-77' is not among the 9 items; ids look like sku-1"),
        (["0"], "sasrec", "ITEM: '0' is not among the 9 items"),
        (["10"], "sasrec", "ITEM: '10' is not among the 9 items"),
        (["sku-1"], "gru4rec", "--recommender: 'gru4rec' is not among the recommenders of params.yaml (pop, "),
    ],
)
def test_a_mistake_is_one_line(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], items: list[str], recommender: str, expected: str
) -> None:
    with pytest.raises(typer.Exit):
        recommend(items, "sda", recommender, 3, workspace.root)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("sda recommend: error: ")
    assert expected in captured.err


def test_neighbors(workspace: Workspace, params: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from sda_core.index import build_index
    from sda_core.item_vectors import read_vectors
    from sda_core.params import IndexParams

    vectors = read_vectors(workspace.embeddings("sda"))
    assert vectors is not None
    section = IndexParams.model_validate(params["build_index"] | {"num_queries": 3, "recall_at": 2})
    workspace.index("sda").mkdir(parents=True)
    build_index(vectors[1:], None, section, workspace.index("sda"))
    neighbors("sku-4", "sda", 3, workspace.root)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "sku-4  Title of sku-4"
    unit = vectors[1:] / np.linalg.norm(vectors[1:], axis=1, keepdims=True)
    cosines = unit @ unit[3]
    cosines[3] = -np.inf
    best = np.argsort(-cosines)[:3]
    found = [line.split(maxsplit=1) for line in rest]
    assert [text for _, text in found] == [f"{RAW[item]}  Title of {RAW[item]}" for item in best]
    assert [float(score) for score, _ in found] == pytest.approx(cosines[best].tolist(), abs=1e-4)  # four decimals
    for k in (NUM_ITEMS - 2, NUM_ITEMS - 1, NUM_ITEMS, NUM_ITEMS + 1, 10**12, 10**30):
        neighbors("sku-4", "sda", k, workspace.root)
        shown_ids = [re.split(r" {2,}", line.strip())[1] for line in capsys.readouterr().out.splitlines()[1:]]
        assert shown_ids == [RAW[item] for item in np.argsort(-cosines)[: min(k, NUM_ITEMS - 1)]]


def test_an_index_of_other_vectors_and_an_item_without_a_vector_have_no_neighbors(
    workspace: Workspace, params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from sda_core.index import build_index
    from sda_core.params import IndexParams

    vectors = np.random.default_rng(0).normal(size=(len(RAW), 4)).astype(np.float32)
    vectors[3] = 0.0
    section = IndexParams.model_validate(params["build_index"] | {"num_queries": 3, "recall_at": 2})
    build_index(vectors, None, section, workspace.index("sda"))
    with pytest.raises(typer.Exit):
        neighbors("sku-1", "sda", 3, workspace.root)
    assert (
        capsys.readouterr().err.strip().endswith("was not built from the current item vectors; run `dvc repro` to make it again")
    )
    ids = np.arange(1, len(RAW) + 1)
    write_embeddings(workspace.embeddings("sda"), ids, RAW, vectors, vectors, vectors, {}, ids > 0)
    with pytest.raises(typer.Exit):
        neighbors("sku-4", "sda", 3, workspace.root)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == (
        "sda neighbors: error: item 'sku-4': has no vector in sda, so it has no neighbours; choose another item"
    )


NUMERIC = ["100", "110", "007", "-4", " 12", "Ab12", "ab12", "2.0", "٣"]  # in the rows of the numbers 1 to 9


@pytest.fixture(scope="module")
def numeric() -> Catalogue:
    """A shop whose ids are numbers, or look like some."""
    names = {number: (raw, f"Title of {raw}") for number, raw in enumerate(NUMERIC, 1)}
    return Catalogue(names, {raw: number for number, (raw, _) in names.items()})


@pytest.mark.parametrize("raw", NUMERIC)
def test_an_id_is_taken_character_by_character(numeric: Catalogue, raw: str) -> None:
    assert numeric.number(raw) == NUMERIC.index(raw) + 1


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("1", None), ("3", None), ("9", None), ("0", None), ("10", "'110', '100'"), ("7", "'007'"), ("07", "'007'"),
        ("0007", "'007'"),
        ("4", "'-4'"), ("-04", "'-4'"), ("12", "' 12'"), ("012", "' 12'"), (" 100", "'100'"), ("100 ", "'100'"),
        ("0100", "'100'"),
        ("AB12", "'Ab12', 'ab12'"), ("2", "'2.0'"), ("１００", "'100'"), ("", None), ("100\n", "'100'"), ("1e2", None),
    ],
)  # fmt: skip
def test_another_item_is_proposed_and_never_shown(numeric: Catalogue, typed: str, near: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        numeric.number(typed)
    text = str(caught.value)
    assert "is not among the 9 items; ids look like 100" in text
    assert (f"similar ids are {near}" in text) if near else True
    is_number = typed in [str(number) for number in range(1, 10)]
    assert ("add --by-number to name an item by its number" in text) == is_number


@given(st.text(max_size=6))
def test_only_what_is_an_id_is_one(typed: str) -> None:
    names = {number: (raw, "") for number, raw in enumerate(NUMERIC, 1)}
    catalogue = Catalogue(names, {raw: number for number, (raw, _) in names.items()})
    if typed in NUMERIC:
        assert catalogue.names[catalogue.number(typed)][0] == typed
    else:
        with pytest.raises(ConfigError):
            catalogue.number(typed)


def test_a_number_is_asked_for(numeric: Catalogue) -> None:
    assert [numeric.number(str(number), by_number=True) for number in (1, 3, 9)] == [1, 3, 9]


@pytest.mark.parametrize("typed", ["0", "10", "03", " 3", "3 ", "-3", "+3", "3.0", "٣", "", "100", "1_0"])
def test_what_is_no_number(numeric: Catalogue, typed: str) -> None:
    with pytest.raises(ConfigError, match="is not the number of an item; numbers run from 1 to 9"):
        numeric.number(typed, by_number=True)


def test_both_commands_have_one_rule(workspace: Workspace, params: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for command in (lambda item, **by: recommend([item], "sda", "pop", 1, workspace.root, **by), neighbors_of(workspace, params)):
        with pytest.raises(typer.Exit):
            command("5")
        assert "'5' is not among the 9 items" in capsys.readouterr().err
        command("5", by_number=True)
        assert "sku-5  Title of sku-5" in capsys.readouterr().out.splitlines()[0]


def neighbors_of(workspace: Workspace, params: dict[str, Any]) -> Callable[..., None]:
    from sda_core.index import build_index
    from sda_core.item_vectors import read_vectors
    from sda_core.params import IndexParams

    vectors = read_vectors(workspace.embeddings("sda"))
    assert vectors is not None
    build_index(vectors[1:], None, IndexParams.model_validate(params["build_index"]), workspace.index("sda"))
    return lambda item, **by: neighbors(item, "sda", 3, workspace.root, **by)


def test_an_empty_shop_has_no_near_ids() -> None:
    with pytest.raises(ConfigError, match="'3' is not among the 0 items"):
        Catalogue({}, {}).number("3")
