"""A trained model's positions: kept once, under both protocols, of one model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import study
from sda_core.artifacts import POSITIONS, Workspace
from sda_core.embeddings.table import write_embeddings
from sda_core.errors import ArtifactError
from sda_core.params import load_params
from sda_core.report.experiments import experiments


def test_positions_are_of_one_model_and_kept(shop: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(shop.root / "params.yaml")
    section = params.train_recommender.sasrec
    seeds: list[int] = []
    build = study.recommenders.build

    def counted(*given: object, seed: int) -> object:
        seeds.append(seed)
        return build(*given, seed=seed)  # pyright: ignore

    monkeypatch.setattr(study.recommenders, "build", counted)
    for _ in range(2):
        study.keep_positions(shop, params, section, 3, tmp_path / "m", protocols=("fullrank", "uni100"))
    assert seeds == [3]
    (full,), (sampled,) = study.read_positions(tmp_path / "m", [3]), study.read_positions(tmp_path / "m", [3], "uni100")
    # the sampled candidates are some of all: another model would place some target further behind among fewer
    assert (sampled["num_better"] <= full["num_better"]).all()
    assert (sampled["candidates"] <= full["candidates"]).all()
    assert study.epochs(tmp_path / "m", [3]) == "1 of 1"
    assert not list((tmp_path / "m").glob(".*"))


def test_gains_and_interval(tmp_path: Path, shop: Workspace) -> None:
    counts = {name: [0, 0] for name in ("candidates", "num_better", "num_tied")}
    for seed, positions in ((1, [1.0, 11.0]), (2, [3.0, 10.0])):
        frame = pl.DataFrame({"user_id": [2, 1], "target_item_id": [1, 1], "position": positions[::-1], **counts})
        POSITIONS.write(frame.cast(dict(POSITIONS.columns)).sort("user_id", descending=True), tmp_path / f"{seed}.parquet")
    frames = study.read_positions(tmp_path, [1, 2])
    np.testing.assert_array_equal(study.gains("hit", frames), [[1, 0], [1, 1]])
    np.testing.assert_allclose(study.gains("ndcg", frames, np.array([True, False])), [[1], [0.5]])
    low, high = study.interval(np.full((2, 30), 0.25), load_params(shop.root / "params.yaml").evaluate, "x")
    assert (low, high) == (0.25, 0.25)
    assert study.epochs(tmp_path, [1, 2]) == ""


def test_a_table_is_printed_and_written_for_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "### Title\n\n| a |\n|---|\n| 1 |\n"
    results = Path("experiments") / "results"
    for arguments, folder in (
        (("sweep", "t"), results / "sweep-t"),
        (("protocol", "protocol", tmp_path / "other"), tmp_path / "other" / results / "protocol"),
        (("probe", "", "runs/seed-{seed}"), results / "probe"),
    ):
        assert study.write_results(text, *arguments) == folder
        assert (folder / "table.md").read_text() == text
    assert capsys.readouterr().out == 3 * (text + "\n")
    (shown,) = (found for found in experiments(tmp_path / "experiments") if found.name == "sweep-t")
    assert shown.tables[0].caption == "Title"


def test_retrieval_at_1_of_items_with_an_image(tmp_path: Path) -> None:
    image = np.eye(4, dtype=np.float32)
    text = image[[0, 1, 3, 2]] + 0.1 * image  # the last two are each other's
    ids, has_image = np.arange(1, 5), np.array([True, True, True, False])
    path = tmp_path / "vectors.parquet"
    write_embeddings(path, ids, list("abcd"), image, text, image, {}, np.ones(4, dtype=bool))
    assert study.retrieval_at_1(path) == 0.5
    write_embeddings(path, ids, list("abcd"), image + 9.0 * image[0], text - 7.0, image, {}, np.ones(4, dtype=bool))
    assert study.retrieval_at_1(path) == 0.5  # the mean of a modality does not count
    write_embeddings(path, ids, list("abcd"), image, text, image, {}, has_image)  # and now the third has no rival
    assert study.retrieval_at_1(path) == 1.0
    assert study.retrieval_at_1(path, limit=1) == 1.0
    write_embeddings(path, ids, list("abcd"), None, None, image, {}, has_image)  # of a joint pass
    with pytest.raises(ArtifactError, match="has no image_embedding and no text_embedding, which retrieval@1 compares") as caught:
        study.retrieval_at_1(path)
    assert "\n" not in str(caught.value)


def test_a_page_shows_whole_experiments_and_names_those_it_has_no_room_for(tmp_path: Path) -> None:
    for number in range(43):
        folder = tmp_path / "results" / f"sweep-{number:02d}"
        folder.mkdir(parents=True)
        (folder / "table.md").write_text("| a |\n|---|\n| 1 |\n")
        (folder / "plot.png").write_bytes(b"no image, but bytes")
    *shown, rest = experiments(tmp_path)
    assert [one.name for one in shown] == [f"sweep-{number:02d}" for number in range(40)]
    assert all(len(one.tables) == len(one.plots) == 1 for one in shown)
    assert rest.name == "3 more"
    assert rest.remarks == ("not shown: sweep-40, sweep-41, sweep-42",)


def test_a_plot_shows_each_name_with_its_interval(tmp_path: Path) -> None:
    rows = {"first": (0.1, 0.05, 0.2), "second": (-0.1, -0.1, -0.1)}
    study.plot_intervals(tmp_path / "plot.svg", {f"panel {n}": rows for n in range(4)}, "NDCG", zero=True)
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    for text, count in (("first", 2), ("second", 2), ("NDCG", 4), ("panel 3", 1)):  # names at the left of each row of panels
        assert drawn.count(f"<!-- {text} -->") == count, text
    study.plot_intervals(tmp_path / "plot.png", {"one": rows, "other": {"third": (0.0, 0.0, 0.0)}}, "NDCG")
    assert (tmp_path / "plot.png").stat().st_size > 3000


def test_the_interval_is_what_the_cell_says() -> None:
    params = load_params(Path(__file__).resolve().parents[2] / "params.yaml").evaluate
    gain_SU = np.random.default_rng(0).normal(size=(2, 50))
    mean, low, high = study.mean_and_interval(gain_SU, params, "x")
    assert low < mean < high
    assert mean == pytest.approx(gain_SU.mean())
    assert study.difference(gain_SU, params, "x") == f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def test_rank_correlation_against_scipy() -> None:
    from scipy.stats import permutation_test, spearmanr

    random = np.random.default_rng(1)
    one, other = random.integers(0, 6, size=9).astype(float), random.normal(size=9)  # with ties
    other += 0.4 * one
    rho, p = study.rank_correlation(list(one), list(other))
    assert rho == pytest.approx(spearmanr(one, other).statistic)
    expected = permutation_test((one,), lambda x: spearmanr(x, other).statistic, permutation_type="pairings", n_resamples=4000)
    assert p == pytest.approx(expected.pvalue, abs=0.03)
    assert study.rank_correlation([1, 2, 3, 4], [8, 6, 4, 2])[0] == pytest.approx(-1.0)
    assert np.isnan(study.rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])).all()
