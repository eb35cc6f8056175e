"""The grid of oracle vectors over shops of a few dozen items: what a cell is, what is trained, what the table says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import oracles
from experiments.study import read_positions
from sda_core.artifacts import INTERACTIONS, TRUTH, Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.errors import ConfigError
from sda_core.evaluation.metrics import per_user
from sda_core.params import DemoDataset, load_params

SMALL = [
    "dataset.num_users=120",
    "dataset.num_items=80",
    "train_recommender.vbpr.max_epochs=2",
    "train_recommender.vbpr.eval_every=1",
]


def run(root: Path, *more: str) -> None:
    oracles.main(
        "small",
        Names(("vbpr",)),
        Names(("oracle", "random")),
        root,
        Names(("0.2", "1.0")),
        Names(("0.5",)),
        Numbers((1, 2)),
        [*SMALL, *more],
    )


def test_a_grid(shop: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    run(shop.root)
    out = capsys.readouterr().out
    folder = shop.root / "experiments" / "runs" / "oracles" / "small"
    assert sorted(path.name for path in folder.iterdir()) == ["shared-0.2-complete-0.5", "shared-1-complete-0.5"]
    first = next(line for line in out.splitlines() if line.startswith("| 0.2 | 0.5 | "))  # the table of all users
    for name, shared in (("shared-0.2-complete-0.5", 0.2), ("shared-1-complete-0.5", 1.0)):
        dataset = load_params(folder / name / "params.yaml").dataset
        assert isinstance(dataset, DemoDataset)
        assert dataset.image_share == dataset.text_share == pytest.approx((1.0 - shared) / 2.0)
        assert dataset.text_completeness == 0.5
        assert len(TRUTH.read(Workspace(folder / name).truth))
    positions = folder / "shared-0.2-complete-0.5" / "positions" / "vbpr"
    mean = {}
    for variant in ("id", "random", "oracle"):
        frames = read_positions(positions / variant, [1, 2])
        mean[variant] = np.mean([per_user("ndcg", frame["position"].to_numpy(), 10) for frame in frames])
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[3] == f"{mean['id']:.4f}"
    assert cells[4].startswith(f"{mean['oracle']:.4f}, {mean['oracle'] - mean['id']:+.4f} [")
    assert cells[5].startswith(f"{mean['random']:.4f}, {mean['random'] - mean['id']:+.4f} [")
    results = shop.root / "experiments" / "results" / "oracles-small"
    assert (results / "plot.png").stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    run(shop.root)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before  # resumed: nothing is made again
    one, other = (INTERACTIONS.read(Workspace(path).interactions) for path in sorted(folder.iterdir()))
    assert not one.equals(other)
    with pytest.raises(ConfigError, match="was made with other params; use another name"):
        run(shop.root, "dataset.content_strength=1.5")


def test_mistakes_are_one_line(shop: Workspace) -> None:
    with pytest.raises(ConfigError, match="--variants: expected some of id, random, oracle"):
        oracles.main("m", Names(("pop",)), Names(("zero_shot",)), shop.root)
    with pytest.raises(ConfigError, match="--shared: should be numbers from 0 to 1"):
        oracles.main("m", Names(("pop",)), Names(("oracle",)), shop.root, Names(("half",)))
    with pytest.raises(ConfigError, match=r"dataset\.text_completeness: should be less than or equal to 1"):
        oracles.main("m", Names(("pop",)), Names(("oracle",)), shop.root, None, Names(("1.5",)))


def test_draws_of_one_shop(shop: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(*seeds: int) -> None:
        numbers = Numbers(seeds)
        oracles.main(
            "draws", Names(("vbpr",)), Names(("oracle",)), shop.root, seeds=Numbers((1, 2)), changes=SMALL, shop_seeds=numbers
        )

    drawn(11, 12, 13)
    out = capsys.readouterr().out
    folder = shop.root / "experiments" / "runs" / "oracles" / "draws"
    names = [f"shared-default-complete-default-seed-{seed}" for seed in (11, 12, 13)]
    assert sorted(path.name for path in folder.iterdir()) == names
    means, users = [], 0
    for name in names:
        own, ids = (
            np.array([per_user("ndcg", f["position"].to_numpy(), 10) for f in read_positions(folder / name / p, [1, 2])])
            for p in ("positions/vbpr/oracle", "positions/vbpr/id")
        )
        means.append(float((own - ids).mean()))
        users += own.shape[1]
    assert len(set(means)) == 3  # other draws, other shops
    expected = stats.t.interval(0.95, 2, loc=np.mean(means), scale=stats.sem(means))
    last = next(line for line in out.splitlines() if "| all 3 |" in line)
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[3] == str(users)
    assert cells[5].endswith(f"{np.mean(means):+.4f} [{expected[0]:+.4f}, {expected[1]:+.4f}]")
    assert (shop.root / "experiments" / "results" / "oracles-draws" / "plot.png").stat().st_size > 5000
    with pytest.raises(ConfigError, match="--shop-seeds: an interval over draws needs two different seeds or more"):
        drawn(11, 11)


def test_a_draw_without_users_of_a_group_keeps_the_mean_of_the_others(shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(shop.root / "params.yaml")
    shops = {oracles.Cell(None, None, seed): (Workspace(shop.root / str(seed)), params) for seed in (1, 2, 3)}
    gains = {"id": {1: 0.1, 2: 0.2, 3: 0.3}, "oracle": {1: 0.2, 2: 0.4, 3: 0.6}}

    def of_group(workspace: Workspace, params: object, variant: str, *rest: object) -> np.ndarray:
        users = 0 if workspace.root.name == "2" else 4
        return np.full((2, users), gains[variant][int(workspace.root.name)])

    monkeypatch.setattr(oracles, "_gains", of_group)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in oracles.table(shops, ["id", "oracle"], "vbpr", [1, 2], "cold").splitlines()
        if line.startswith("| 0")
    ]
    assert [row[2:5] for row in rows] == [["1", "4", "0.1000"], ["3", "4", "0.3000"], ["all 2", "8", "0.2000"]]
    assert rows[2][5].startswith("0.4000, +0.2000 [")
    monkeypatch.setattr(oracles, "_gains", lambda *_: np.empty((2, 0)))
    assert "| all " not in oracles.table(shops, ["id", "oracle"], "vbpr", [1, 2], "cold")
