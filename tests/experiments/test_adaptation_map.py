"""The map of adaptation over tiny shops: in which order it is made, what is kept, what is shown of an unfinished one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import adaptation_map as maps
from experiments.oracles import Cell
from experiments.study import Interval, read_positions
from sda_core.artifacts import ITEMS, Workspace, read_json
from sda_core.cli.scripts import Names, Numbers
from sda_core.embeddings.controls import read_table
from sda_core.errors import ConfigError
from sda_core.evaluation.metrics import per_user
from sda_core.item_source import item_source
from sda_core.params import DemoDataset, load_params
from tests.experiments.projects import new_project
from tests.experiments.test_adaptation import SMALL

VECTORS = Names(("sda", "sda+base", "mismatched"))
TRAINED = ("id", "oracle", "zero_shot", "text_only", "sda", "sda+base")
GOOD, BAD = "shared-1-complete-0.5", "shared-0.2-complete-0.5"


def run(root: Path, *more: str, seeds: tuple[int, ...] = (1,), minutes: float | None = None) -> str:
    shares, complete = Names(("0.2", "1.0")), Names(("0.5",))
    changes = [*SMALL, "train_adapter.training.num_steps=1", *more]
    maps.main("small", Names(("sasrec",)), VECTORS, None, shares, complete, changes, root, Numbers(seeds), minutes)
    return (root / "experiments" / "results" / "adaptation_map-small" / "table.md").read_text(encoding="utf-8")


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of cells by the first word of a table's title."""
    found: dict[str, list[list[str]]] = {}
    for part in text.split("### ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")][1:]
        found[part.split()[0]] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A project folder with conf/ alone, in which the map of two cells was made; before that, nothing of it was shown."""
    with new_project(tmp_path_factory, repository) as root:
        before = tables(run(root, minutes=0.0))
        assert before["NDCG@10"] == [[share, "0.5", *["missing"] * 8] for share in ("0.2", "1")]
        assert before["Gain"][0] == ["0.2", "0.5", "zero_shot", "missing", "missing", ""]  # the control is in one cell alone
        assert before["Gain"][2] == ["1", "0.5", "zero_shot", "missing", "missing", "missing"]
        assert before["Room"] == [[share, "0.5", *["missing"] * 4] for share in ("0.2", "1")]
        assert before["Rank"][0] == ["cosine of two images", *["0 cells"] * 4]
        assert not (folder(root) / GOOD / "shop" / "data").exists()
        assert not (results(root) / "plot.png").exists()
        run(root)
    return root


def folder(project: Path) -> Path:
    return project / "experiments" / "runs" / "adaptation_map" / "small"


def results(project: Path) -> Path:
    return project / "experiments" / "results" / "adaptation_map-small"


def ndcg(project: Path, cell: str, vector: str) -> np.ndarray:
    frames = read_positions(folder(project) / cell / "positions" / "sasrec" / vector, [1])
    return np.array([per_user("ndcg", frame["position"].to_numpy(), 10) for frame in frames])


def test_cells_are_shops_with_images_of_their_own(project: Path) -> None:
    assert sorted(path.name for path in folder(project).iterdir()) == [BAD, GOOD]
    for name, shared in ((BAD, 0.2), (GOOD, 1.0)):
        params = load_params(folder(project) / name / "seed-1" / "params.yaml")
        assert isinstance(params.dataset, DemoDataset)
        assert params.dataset.image_share == params.dataset.text_share == pytest.approx((1.0 - shared) / 2.0)
        assert params.dataset.text_completeness == 0.5
        assert params.train_adapter.training.learning_rate == 1e-3  # of adaptation=strong
        assert params.train_adapter.training.seed == 1


def test_the_tables(project: Path) -> None:
    text = (results(project) / "table.md").read_text(encoding="utf-8")
    found = tables(text)
    for row, cell in zip(found["NDCG@10"], (BAD, GOOD), strict=True):
        mean = {vector: float(ndcg(project, cell, vector).mean()) for vector in TRAINED}
        assert row[2] == str(ndcg(project, cell, "id").shape[1])
        assert row[3] == f"{mean['id']:.4f}"
        assert row[4].startswith(f"{mean['oracle'] - mean['id']:+.4f} [")
        assert row[5:9] == [f"{mean[vector]:.4f}" for vector in ("zero_shot", "text_only", "sda", "sda+base")]
        assert "missing" not in row
    gain = (ndcg(project, GOOD, "mismatched") - ndcg(project, GOOD, "text_only")).mean()
    assert found["Gain"][3][5].startswith(f"{gain:+.4f} [")
    assert found["Gain"][1][5] == ""
    room = (ndcg(project, GOOD, "oracle") - ndcg(project, GOOD, "sda")).mean()
    assert found["Room"][1][2].startswith(f"{room:+.4f} [")
    assert [row[0] for row in found["Two"]] == [
        f"{vector} - {reference}" for vector in ("sda", "sda+base") for reference in ("zero_shot", "text_only")
    ]
    ends = [float(cell.split()[0]) for cell in found["Two"][0][1:]]
    assert ends[0] - ends[1] == pytest.approx(ends[2], abs=2e-4)
    assert "shared 1, completeness 0.5 | shared 0.2, completeness 0.5 | difference" in text
    assert all(cell.endswith(" cells") for row in found["Rank"] for cell in row[1:])  # two cells are too few
    assert (results(project) / "plot.png").stat().st_size > 5000


def test_cells_of_one_completeness_share_their_adapters(project: Path) -> None:
    lent, own = (Workspace(folder(project) / cell / "seed-1").adapter("sda") for cell in (BAD, GOOD))
    assert lent.is_symlink()
    assert not own.is_symlink()
    assert lent.resolve() == own.resolve()
    made = [read_table(Workspace(folder(project) / cell / "seed-1").embeddings("sda")) for cell in (BAD, GOOD)]
    named = [
        ITEMS.read(Workspace(folder(project) / cell / "shop").items).sort("item_id")["raw_item_id"].to_list()
        for cell in (BAD, GOOD)
    ]
    both = sorted({*named[0]} & {*named[1]})
    assert len(both) > len(named[0]) // 2
    rows = [[of.index(name) for name in both] for of in named]
    assert np.allclose(made[0].text_ID[rows[0]], made[1].text_ID[rows[1]], atol=1e-4)


def test_an_own_adapter_is_not_replaced_by_a_shared_one(tmp_path: Path) -> None:
    place, lender = (maps.Place(Cell(share, 0.5), tmp_path / str(share), None) for share in (0.2, 1.0))  # type: ignore[arg-type]
    Workspace(place.folder / "seed-1").adapter("sda").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps.adaptation, "run_data_stages", lambda _: None)
        patch.setattr(maps.adaptation, "workspace_of_seed", lambda _, folder, *__: Workspace(folder / "seed-1"))
        with pytest.raises(ConfigError, match="was trained with --own-adapters"):
            maps.borrow(place, lender, "sda", 1)
        maps.borrow(place, lender, "zero_shot", 1)


def test_the_figures_are_those_of_the_cell(project: Path) -> None:
    rows = tables((results(project) / "table.md").read_text(encoding="utf-8"))["Figures"]
    place = folder(project) / GOOD
    check = read_json(place / "seed-1" / "adapters" / "sda" / "check.json", "check")
    shop = Workspace(place / "shop")
    source = item_source(shop, load_params(shop.root / "params.yaml").items)
    texts = source.texts(np.arange(len(source)))
    valid = {
        vector: pl.read_csv(place / "positions" / "sasrec" / vector / "1.tsv", separator="\t")["valid_ndcg_10"].max()
        for vector in ("zero_shot", "text_only")
    }
    expected = [
        check["image_cosine_before"],
        check["text_cosine_before"],
        check["own_pair_gap_before"],
        check["effective_targets_before"],
        check["retrieval@1_before"],
        valid["text_only"] - valid["zero_shot"],  # type: ignore[operator]
        1.0 - source.has_image.mean(),
        sum(map(len, texts)) / len(texts),
    ]
    assert rows[1][4:] == [f"{value:.4g}" for value in expected]
    assert rows[0][4:] != rows[1][4:]


def test_the_control_learns_from_other_items_texts(project: Path) -> None:
    place = folder(project) / GOOD
    shown = ITEMS.read(Workspace(place / "mismatched" / "seed-1" / "spoilt").items).sort("item_id")["title"]
    own = ITEMS.read(Workspace(place / "shop").items).sort("item_id")["title"]
    assert sorted(shown) == sorted(own)
    assert (shown != own).mean() > 0.9  # titles may be equal
    made = [read_table(Workspace(place / part / "seed-1").embeddings("sda")).text_ID for part in ("mismatched", ".")]
    assert not np.array_equal(*made)
    assert not (folder(project) / BAD / "mismatched").exists()


def test_a_run_resumes_and_shows_what_is_complete(project: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    before = {path: path.stat().st_mtime_ns for path in folder(project).rglob("*.parquet")}
    first = run(project)
    assert {path: path.stat().st_mtime_ns for path in folder(project).rglob("*.parquet")} == before
    both = tables(run(project, seeds=(1, 2), minutes=0.0))
    assert all(row[2:] == ["missing"] * 8 for row in both["NDCG@10"])
    assert run(project, minutes=0.0) == first
    for vector in ("sda", "mismatched"):
        kept = folder(project) / GOOD / "positions" / "sasrec" / vector / "1.parquet"
        kept.rename(kept.with_suffix(".away"))
    text = tables(run(project, minutes=0.0))
    for vector in ("sda", "mismatched"):
        kept = folder(project) / GOOD / "positions" / "sasrec" / vector / "1.parquet"
        kept.with_suffix(".away").rename(kept)
    assert text["NDCG@10"][1][7] == "missing"
    assert text["NDCG@10"][1][8] != "missing"
    assert text["Gain"][2][3] == text["Gain"][2][5] == "missing"
    assert text["Two"][0][1] == text["Two"][0][3] == "missing"
    with pytest.raises(ConfigError, match="was made with other params; use another name"):
        run(project, "items.noun=mug")


def test_order_of_the_cells() -> None:
    grid = [Cell(share, text) for share in (0.2, 0.6, 1.0) for text in (0.2, 0.6, 1.0)]
    order = maps.in_order(grid)
    assert [(cell.shared, cell.completeness) for cell in order[:5]] == [
        (1.0, 0.2),
        (0.2, 1.0),
        (1.0, 1.0),
        (0.2, 0.2),
        (0.6, 0.6),
    ]
    assert sorted(order, key=grid.index) == grid
    assert maps.in_order(grid[:1]) == grid[:1]


def test_one_seed_of_all_cells_before_the_next_and_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    cells = [Cell(1.0, 0.2), Cell(0.2, 1.0)]
    places = [maps.Place(cell, tmp_path / cell.name, params, has_control=cell == cells[0]) for cell in cells]
    asked: list[tuple[str, str, int]] = []
    now = 0.0

    def note(place: maps.Place, vector: str, recommenders: object, seed: int) -> None:
        nonlocal now
        now += 60.0
        asked.append((place.cell.name, vector, seed))

    monkeypatch.setattr(maps, "train_vector", note)
    monkeypatch.setattr(maps.adaptation.time, "monotonic", lambda: now)
    kept = places[1].positions("sasrec", "id") / "1.parquet"
    kept.parent.mkdir(parents=True)
    kept.touch()
    maps.train(places, ["sasrec"], ["id", "sda"], (1, 2), 5.5)
    first, other = (cell.name for cell in cells)
    assert asked == [
        (first, "id", 1), (first, "sda", 1), (first, "mismatched", 1), (other, "sda", 1), (first, "id", 2), (first, "sda", 2)
    ]  # fmt: skip


def measured(
    cell: Cell, differences: Mapping[tuple[str, str], Interval], figures: Mapping[str, float] | None = None
) -> maps.Measured:
    place = maps.Place(cell, Path(), load_params(Path(__file__).parents[2] / "params.yaml"), has_control=False)
    return maps.Measured(place, {}, differences, 10, figures or {})


def test_when_adaptation_pays() -> None:
    clear, unclear = (0.02, 0.01, 0.03), (0.02, -0.01, 0.05)
    good = {("oracle", "id"): clear, ("sda", "zero_shot"): clear, ("sda", "text_only"): clear}
    cell = Cell(0.2, 0.2)
    assert measured(cell, good).verdict(["sda"]) == "sda"
    assert measured(cell, good).verdict(["sda", "lora"]) == "sda (lora missing)"
    assert measured(cell, {**good, ("sda", "text_only"): unclear}).verdict(["sda"]) == "none"
    assert measured(cell, {**good, ("oracle", "id"): unclear}).verdict(["sda"]) == "not read"
    assert measured(cell, {}).verdict(["sda"]) == "missing"


def test_a_figure_that_orders_the_cells(tmp_path: Path) -> None:
    name, pair = maps.CHARACTERS, ("sda", "zero_shot")
    clear, unclear = (0.02, 0.01, 0.03), (0.02, -0.01, 0.05)
    cells = [
        measured(
            Cell(share, 0.2),
            {("oracle", "id"): clear, pair: (0.001 * place, -1.0, 1.0)},
            {name: 100.0 - place, maps.WITHOUT_IMAGE: 0.05},
        )
        for place, share in enumerate((0.1, 0.2, 0.3, 0.4, 0.5))
    ]
    unread = measured(Cell(0.6, 0.2), {("oracle", "id"): unclear, pair: (-1.0, -1.0, 1.0)}, {name: 0.0})
    rows = {row[0]: row[1:] for row in tables(maps.foretold([*cells, unread], ["sda"], "sasrec"))["Rank"]}
    assert rows[name][0].startswith("-1.00 (p 0.0")
    assert rows[name][0].endswith(", 5 cells)")
    assert rows[name][1] == "0 cells"
    assert rows[maps.WITHOUT_IMAGE][0] == "all equal"
    rows = {row[0]: row[1:] for row in tables(maps.foretold([*cells[:4], unread], ["sda"], "sasrec"))["Rank"]}
    assert rows[name][0] == "4 cells"
    maps.plot(tmp_path / "plot.png", [*cells, unread], ["sda", "lora"], "sasrec")  # some are missing, one is in brackets
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_difference_of_independent_means_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        one, other = random.normal(1.0, 0.3), random.normal(0.5, 0.1)
        _, low, high = maps.minus((one, one - 1.96 * 0.3, one + 1.96 * 0.3), (other, other - 1.96 * 0.1, other + 1.96 * 0.1))
        hits += low <= 0.5 <= high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)
    mean, low, high = maps.minus((0.5, 0.2, 0.7), (0.1, 0.0, 0.5))
    assert (mean, low, high) == pytest.approx((0.4, 0.4 - math.hypot(0.3, 0.4), 0.4 + math.hypot(0.2, 0.1)))


def test_mistakes_are_one_line(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "conf").symlink_to(repository / "conf")

    def made(**options: object) -> None:
        given = {"root": tmp_path, "composed": SMALL, "max_minutes": 0.0} | options
        maps.main("m", **given)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"--vectors: expected some of lora, .* \(got 'oracle'\)"):
        made(vectors=Names(("oracle",)))
    with pytest.raises(ConfigError, match="--shared: should be numbers from 0 to 1"):
        made(shared=Names(("half",)))
    with pytest.raises(ConfigError, match=r"dataset\.text_completeness: should be less than or equal to 1"):
        made(completeness=Names(("1.5",)))
    with pytest.raises(ConfigError, match="--backbone: expected NAME=FILE"):
        made(backbone="nano")
    with pytest.raises(ConfigError, match=r"--compose: .*image_share"):
        made(composed=["dataset=hm"])
    with pytest.raises(ConfigError, match="--recommenders: slmrec takes image and text vectors separately"):
        made(recommenders=Names(("slmrec",)))


def test_another_backbone(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "conf").symlink_to(repository / "conf")
    file = repository / "conf" / "backbone" / "tiny.yaml"
    grid = {"shared": Names(("0.6",)), "completeness": Names(("0.6",))}
    maps.main("other", backbone=f"random={file}", root=tmp_path, max_minutes=0.0, **grid)  # type: ignore[arg-type]
    name = "shared-0.6-complete-0.6"
    params = load_params(tmp_path / "experiments" / "runs" / "adaptation_map" / "other" / name / "shop" / "params.yaml")
    assert "vision_depth" in params.backbone.model_dump()  # of the random backbone alone
    assert params.train_adapter.training.num_steps == 100
