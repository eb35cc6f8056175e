"""Missing modalities on a tiny shop: who loses what, what stays, what the tables say, and what a second run does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import adaptation
from experiments import missing_modalities as missing
from experiments.corruption import draw, remove
from experiments.study import Interval, read_positions
from experiments.workspaces import own_params
from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, ITEMS, Workspace, read_json
from sda_core.cli.scripts import Names, Numbers
from sda_core.embeddings.controls import read_table
from sda_core.errors import ConfigError
from sda_core.evaluation.metrics import per_user
from sda_core.image_store import ImageStore
from sda_core.item_source import item_source
from sda_core.params import Params, load_params
from tests.experiments.projects import new_project
from tests.experiments.test_adaptation import SMALL

VECTORS = Names(("sda", "mismatched", "sda+filled"))
SHARE = "both-0.6"


def run(root: Path, *more: str, vectors: Names = VECTORS, minutes: float | None = None) -> str:
    changes = [*SMALL, "train_adapter.training.num_steps=1", *more]
    shares, only = Names(("0", "0.6")), Names(("sasrec",))
    missing.main("small", "both", shares, only, vectors, changes, root, Numbers((1,)), minutes)
    return (results(root) / "table.md").read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells of each table."""
    parts = ([line for line in part.splitlines() if line.startswith("| ")][1:] for part in text.split("### ")[1:])
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in lines] for lines in parts]


def folder(project: Path) -> Path:
    return project / "experiments" / "runs" / "missing_modalities" / "small"


def results(project: Path) -> Path:
    return project / "experiments" / "results" / "missing_modalities-small-both"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A project folder with conf/ alone, in which the experiment was stopped before its first training, and run again."""
    with new_project(tmp_path_factory, repository) as root:
        before = tables(run(root, minutes=0.0))
        assert before[0] == [[share, *["missing"] * 8] for share in ("0", "0.6")]
        assert before[-1] == [[share, "missing", "missing"] for share in ("0", "0.6")]
        assert not (folder(root) / "0" / "shop" / "data").exists()
        assert not (results(root) / "plot.png").exists()
        run(root)
    return root


@pytest.mark.parametrize("overlapping", [False, True])
def test_smaller_sets_are_in_larger_ones(overlapping: bool) -> None:
    complete = np.random.default_rng(0).permutation(np.arange(10, 110))
    sets = [draw(complete, share, share, 3, overlapping=overlapping) for share in (0.0, 0.1, 0.25, 0.5)]
    assert [[len(of) for of in pair] for pair in sets] == [[0, 0], [10, 10], [25, 25], [50, 50]]
    for smaller, larger in pairwise(sets):
        assert all(set(one) <= set(other) for one, other in zip(smaller, larger, strict=True))
    common = set(sets[-1][0]) & set(sets[-1][1])
    assert (len(common) > 10) == overlapping  # independent halves of 100 have about 25 in common
    assert set(np.concatenate(sets[-1])) <= set(complete)
    np.testing.assert_array_equal(draw(np.sort(complete), 0.25, 0.25, 3, overlapping=overlapping), sets[2])
    assert not np.array_equal(draw(complete, 0.25, 0.25, 4, overlapping=overlapping), sets[2])
    np.testing.assert_array_equal(draw(complete, 0.25, 0.0, 3, overlapping=overlapping)[0], sets[2][0])


def test_sets_that_do_not_fit() -> None:
    for share in (0.7, -0.1, 1.5):
        with pytest.raises(ConfigError, match=r"--shares: .* of the items cannot lose their text and another .* their image"):
            draw(np.arange(1, 11), share, share, 1)
    assert [len(of) for of in draw(np.arange(1, 12), 0.5, 0.5, 1)] == [6, 5]  # disjoint, although 5.5 is rounded up
    assert [len(of) for of in draw(np.arange(1, 11), 0.7, 0.7, 1, overlapping=True)] == [7, 7]


def test_texts_and_images_are_removed_and_nothing_else(with_images: Workspace, tmp_path: Path) -> None:
    target, params = Workspace(tmp_path), load_params(with_images.root / "params.yaml").items
    before = item_source(with_images, params)
    without_text, without_image = draw(before.item_ids[before.has_text & before.has_image], 0.3, 0.4, 1)
    for _ in range(2):  # a second time, over the first
        remove(with_images, target, without_text, without_image)
    after = item_source(target, params)
    ids = before.item_ids
    np.testing.assert_array_equal(after.has_text, before.has_text & ~np.isin(ids, without_text))
    np.testing.assert_array_equal(after.has_image, before.has_image & ~np.isin(ids, without_image))
    kept = np.flatnonzero(after.has_text)
    assert after.texts(kept) == before.texts(kept)
    for item in ids[after.has_image].tolist():
        assert ImageStore(target.images).get(item) == ImageStore(with_images.images).get(item)
    for name in ("interactions", "users"):
        assert getattr(target, name).read_bytes() == getattr(with_images, name).read_bytes()
    old, new = (read_json(workspace.image_coverage, "counts") for workspace in (with_images, target))
    assert new["num_ok"] == int(after.has_image.sum())
    assert new["share_ok"] == pytest.approx(after.has_image.mean())
    assert sum(value for key, value in new.items() if key.startswith("num_")) == sum(
        value for key, value in old.items() if key.startswith("num_")
    )


def test_the_data_of_a_share(project: Path) -> None:
    whole, shop = (Workspace(folder(project) / name / "shop") for name in ("0", SHARE))
    params = load_params(shop.root / "params.yaml")
    assert (params.items.missing_image, params.items.missing_text) == ("text_only", "image_only")
    assert params.train_adapter.training.learning_rate == 1e-3  # of adaptation=strong
    assert shop.interactions.read_bytes() == whole.interactions.read_bytes()
    full, source = (item_source(workspace, params.items) for workspace in (whole, shop))
    complete = int((full.has_text & full.has_image).sum())
    lost_text, lost_image = full.has_text & ~source.has_text, full.has_image & ~source.has_image
    assert [lost_text.sum(), lost_image.sum()] == [round(0.3 * complete)] * 2
    assert not (lost_text & lost_image).any()
    assert shop.truth.read_bytes() == whole.truth.read_bytes()
    frame = EMBEDDINGS.read(Workspace(folder(project) / SHARE / "seed-1").embeddings("sda")).sort("item_id")
    np.testing.assert_array_equal(frame["text_embedding"].is_not_null().to_numpy(), source.has_text)
    np.testing.assert_array_equal(frame["image_embedding"].is_not_null().to_numpy(), source.has_image)


def test_an_item_without_a_text_is_its_image(project: Path) -> None:
    """In the fused geometry with all components: the angles of such items are those of their centred image vectors."""
    workspace = Workspace(folder(project) / SHARE / "seed-1")
    params = load_params(workspace.root / "params.yaml")
    section = params.export_embeddings.model_copy(update={"fused_dim": 4096, "normalize": False})
    own = read_table(workspace.embeddings("sda"))
    fused_IF = adaptation.fuse(
        own.image_ID, own.text_ID, own.has_image, adaptation.seen_items(workspace), section, has_text=own.has_text
    )
    rows = np.flatnonzero(~own.has_text)
    seen = np.unique(adaptation.seen_items(workspace)) - 1
    centred = own.image_ID[rows] - own.image_ID[seen][own.has_image[seen]].mean(0)
    np.testing.assert_allclose(fused_IF[rows] @ fused_IF[rows].T, centred @ centred.T, atol=1e-4)


def test_the_tables(project: Path) -> None:
    text = (results(project) / "table.md").read_text(encoding="utf-8")
    items, aligned, levels, differences, verdicts = tables(text)
    assert "| missing" not in text
    level = {name: folder(project) / name for name in ("0", SHARE)}
    shop = Workspace(level[SHARE] / "shop")
    source = item_source(shop, load_params(shop.root / "params.yaml").items)
    test = INTERACTIONS.read(shop.interactions).filter(pl.col("split") == "test").sort("user_id")
    at = test["item_id"].to_numpy() - 1
    of_items = [~source.has_text, ~source.has_image, source.has_text & source.has_image]
    masks = [np.ones(len(at), dtype=bool), *(of[at] for of in of_items)]
    assert items[1][1] == str(ITEMS.count(shop.items))
    assert items[1][2:5] == [str(int(of.sum())) for of in of_items]
    assert items[1][5:] == [str(int(mask.sum())) for mask in masks]

    def ndcg(share: str, vector: str) -> np.ndarray:
        place = level["0" if vector in missing.SHARED else share]
        frames = read_positions(adaptation.positions(place, "sasrec", vector), [1])
        assert frames[0]["target_item_id"].to_list() == test["item_id"].to_list()
        return per_user("ndcg", frames[0]["position"].to_numpy(), 10)

    kinds = ["id", "oracle", "zero_shot", "sda", "mismatched", "sda+filled"]
    assert [row[:2] for row in levels] == [[share, kind] for share in ("0", "0.6") for kind in kinds]
    assert [row[2:] for row in levels[6:]] == [[f"{ndcg(SHARE, kind)[mask].mean():.4f}" for mask in masks] for kind in kinds]
    assert not (level[SHARE] / "positions" / "sasrec" / "oracle").exists()  # trained once, without missing modalities
    found = {row[1]: row for row in differences if row[0] == "0.6"}
    adapted = ("sda - zero_shot", "mismatched - zero_shot", "sda+filled - zero_shot", "sda+filled - sda")
    assert [*found] == ["oracle - id", *adapted]
    gain = ndcg(SHARE, "sda") - ndcg(SHARE, "zero_shot")
    assert [float(cell.split()[0]) for cell in found["sda - zero_shot"][2:6]] == pytest.approx(
        [gain[mask].mean() for mask in masks], abs=6e-5
    )
    more = [gain[mask].mean() - gain[masks[3]].mean() for mask in masks[1:3]]
    assert [float(cell.split()[0]) for cell in found["sda - zero_shot"][6:]] == pytest.approx(more, abs=6e-5)
    assert found["oracle - id"][6:] == ["", ""]
    assert len(aligned[0]) == 4  # share, zero_shot, sda, mismatched
    assert [row[0] for row in verdicts] == ["0", "0.6"]
    assert (results(project) / "plot.png").stat().st_size > 5000


def test_filled_vectors(project: Path) -> None:
    workspace = Workspace(folder(project) / SHARE / "seed-1")
    params = load_params(workspace.root / "params.yaml").export_embeddings
    own = read_table(workspace.embeddings("sda"))
    section = params.model_copy(update={"fusion": "concat", "normalize": False})
    made = adaptation.filled(workspace, section, "sda")
    width, both = own.image_ID.shape[1], own.has_image & own.has_text
    mean = own.image_ID[both].mean(0), own.text_ID[both].mean(0)
    lost = ~own.has_text & own.has_image
    np.testing.assert_allclose(made[lost, width:] - mean[1], own.image_ID[lost] - mean[0], atol=1e-4)
    lost = ~own.has_image & own.has_text
    np.testing.assert_allclose(made[lost, :width] - mean[0], own.text_ID[lost] - mean[1], atol=1e-4)
    np.testing.assert_array_equal(made[both], np.concatenate([own.image_ID, own.text_ID], axis=1)[both])


def test_a_stopped_run_resumes(project: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    text = (results(project) / "table.md").read_text(encoding="utf-8")
    kept = {path: path.stat().st_mtime_ns for path in folder(project).rglob("*.parquet")}
    stopped = adaptation.positions(folder(project) / SHARE, "sasrec", "sda") / "1.parquet"
    before = stopped.read_bytes()
    stopped.unlink()
    assert "| 0.6 | sda | missing | missing | missing | missing |" in run(project, minutes=0.0)
    assert not stopped.exists()
    assert run(project) == text
    assert stopped.read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in kept if path != stopped} == {
        path: time for path, time in kept.items() if path != stopped
    }
    with pytest.raises(ConfigError, match="was made with other params; use another name"):
        run(project, "items.noun=mug")


def test_data_that_were_half_made_are_made_again(
    project: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    params = load_params(folder(project) / "0" / "shop" / "params.yaml")
    whole = missing.Level(0.0, folder(project) / "0", params)
    level = missing.Level(0.6, tmp_path, params, whole)
    own_params(folder(project) / "0" / "shop" / "params.yaml", level.shop.root, [])
    loss = missing.Loss("both", 1, overlapping=False)

    def stop(*arguments: object) -> None:
        remove(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(missing, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            missing.make_data(level, loss)
    assert not (level.shop.root / "data").exists()
    missing.make_data(level, loss)
    made = Workspace(folder(project) / SHARE / "shop")
    assert level.shop.items.read_bytes() == made.items.read_bytes()
    assert level.shop.image_coverage.read_bytes() == made.image_coverage.read_bytes()
    assert not (tmp_path / "unfinished").exists()


def measured(params: Params, num_users: int, **gain: tuple[float, float]) -> missing.Measured:
    """Two seeds; a kind's gain over zero_shot on targets without a text, and on complete ones."""
    lacks = np.arange(num_users) % 2 == 0
    noise = np.random.default_rng(0).normal(scale=0.01, size=(2, num_users))
    noise = np.where(lacks, noise - noise[:, lacks].mean(), noise - noise[:, ~lacks].mean())
    ndcg = {kind: 0.2 + np.where(lacks, *values) + noise * (kind != "zero_shot") for kind, values in gain.items()}
    masks = np.ones(num_users, dtype=bool), lacks, np.zeros(num_users, dtype=bool), ~lacks
    groups: dict[str, np.ndarray] = dict(zip(missing.GROUPS, masks, strict=True))
    return missing.Measured(missing.Level(0.3, Path(), params), ndcg, groups)


def test_verdicts(repository: Path) -> None:
    params = load_params(repository / "params.yaml")
    base = {"zero_shot": (0.0, 0.0), "id": (0.0, 0.0), "oracle": (0.1, 0.1), "mismatched": (-0.1, -0.1)}

    def verdict(group: str = "without text", num_users: int = 200, **gain: tuple[float, float]) -> str:
        return measured(params, num_users, **(base | gain)).verdict(group)

    assert verdict(sda=(0.1, 0.0)) == "pays, clearly more than on complete targets"
    assert verdict(sda=(0.1, 0.0998)) == "pays"
    assert verdict(sda=(0.1, 0.2)) == "no"
    assert verdict(sda=(-0.1, -0.2)) == "no"
    assert verdict(sda=(0.1, 0.0), oracle=(0.0, -0.1)) == "not read: oracle is not clear of id"
    assert verdict(sda=(0.1, 0.0), mismatched=(0.05, 0.0)) == "no: mismatched gains too"
    assert verdict() == "missing"
    assert verdict("without image", sda=(0.1, 0.0)) == "few"
    assert verdict(num_users=40, sda=(0.1, 0.0)) == "few"
    one = measured(params, 200, zero_shot=(0.0, 0.0), id=(0.0, 0.0), oracle=(0.1, 0.1), sda=(0.1, 0.0))
    assert one.verdict("without text") == "open: mismatched is missing"
    gain: Interval | None = one.more_than_complete("sda", "without text")
    assert gain is not None
    assert gain[0] == pytest.approx(0.1)


def test_mistakes_are_one_line(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "conf").symlink_to(repository / "conf")

    def made(name: str = "m", **options: object) -> None:
        given = {"root": tmp_path, "composed": SMALL, "max_minutes": 0.0} | options
        missing.main(name, **given)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"--vectors: expected some of id, oracle, mismatched, .* \(got 'nosuch'\)"):
        made(vectors=Names(("nosuch",)))
    for wrong in ("half", "1.5", "-0.1"):
        with pytest.raises(ConfigError, match="--shares: should be numbers from 0 to 1"):
            made(shares=Names((wrong,)))
    with pytest.raises(ConfigError, match=r"--overlapping: needs two modalities \(got --modality text\)"):
        made(overlapping=True)
    with pytest.raises(ConfigError, match="--vectors: oracle needs the true attributes of the built-in shop; leave it out"):
        made("hm", vectors=Names(("oracle",)), composed=["dataset=hm", "dataset.local_folder=."])
    with pytest.raises(ConfigError, match="--recommenders: slmrec takes image and text vectors separately"):
        made(recommenders=Names(("slmrec",)))
