"""`sda verify`: silent on a sound run, and each thing damaged once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from dvc.repo import Repo
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from sda_core.artifacts import INTERACTIONS, ITEMS, SEED_POSITIONS, USERS, Table, Workspace
from sda_core.cli.app import app
from sda_core.image_store import read_shard, read_shard_index, shard_path, write_shard
from sda_core.index import build_index
from sda_core.item_vectors import read_vectors
from sda_core.params import Params, load_params
from sda_core.verification import Finding, verify
from tests.pipeline.conftest import SMALL
from tests.small_run import finished_run

LOCKED = """
stages:
  all:
    cmd: "true"
    outs: [data/raw, data/filtered, data/images, adapters/sda, embeddings/sda.parquet, indexes, models, evaluation, report]
"""
OVERRIDES = [
    *SMALL,
    "recommenders=[pop,vbpr]",
    "dataset.num_users=60",
    "dataset.num_items=30",
    "train_adapter.training.num_steps=2",
    "train_adapter.training.log_every=1",
    "train_recommender.vbpr.max_epochs=2",
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A finished run of every stage, with a lock file that DVC wrote."""
    root = finished_run(tmp_path_factory.mktemp("run"), repository, OVERRIDES, ("id", "zero_shot", "sda"))
    (root / "dvc.yaml").write_text(LOCKED)
    with Repo.init(str(root), no_scm=True) as repo:
        repo.commit(force=True)
    shutil.rmtree(root / ".dvc")
    return root


@pytest.fixture
def workspace(sound: Path, tmp_path: Path) -> Workspace:
    """A copy to be damaged."""
    return Workspace(Path(shutil.copytree(sound, tmp_path / "run")))


@pytest.fixture(scope="module")
def params(sound: Path) -> Params:
    return load_params(sound / "params.yaml")


def findings(workspace: Workspace, params: Params) -> dict[str, Finding]:
    return {found.path: found for found in verify(workspace, params)}


def sda_verify(root: Path) -> Result:
    return CliRunner().invoke(app, ["verify", "--root", str(root)])


def test_a_sound_run(sound: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sound.rglob("*")}
    done = sda_verify(sound)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == "43 ok, 0 absent, 0 skipped, 0 problem"
    assert "dvc.lock                               9 outputs match dvc.lock" in done.output
    assert {path: path.stat().st_mtime_ns for path in sound.rglob("*")} == before


def test_nothing_was_run(sound: Path, tmp_path: Path) -> None:
    shutil.copy(sound / "params.yaml", tmp_path)
    done = sda_verify(tmp_path)
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == "0 ok, 43 absent, 0 skipped, 0 problem"


def test_a_part_was_run(workspace: Workspace, params: Params) -> None:
    for folder in ("adapters", "indexes", "models", "metrics", "report"):
        shutil.rmtree(workspace.root / folder)
    for path in (workspace.items, workspace.comparisons):
        path.unlink()
    (workspace.root / "dvc.lock").unlink()
    found = findings(workspace, params)
    assert not [finding for finding in found.values() if finding.status == "problem"]
    assert found["data/filtered/items.parquet"].status == "absent"
    assert found["data/filtered/users.parquet"].status == "ok"
    assert found["embeddings/sda.parquet"] == Finding(
        "skipped", "embeddings/sda.parquet", "not checked: data/filtered/items.parquet is absent"
    )


def rewrite(table: Table, path: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    table.write(change(table.read(path)), path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(path: Path, name: str) -> None:
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


def damage_pages(path: Path) -> None:
    """Damage all of a parquet file but its footer."""
    data = bytearray(path.read_bytes())
    for place in range(4, len(data) - 8 - int.from_bytes(data[-8:-4], "little")):
        data[place] ^= 0xFF
    path.write_bytes(data)


def edit_weights(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_vectors(path: Path, change: Callable[[np.ndarray], None]) -> None:
    table = pq.read_table(path)
    vectors = np.stack(table["embedding"].to_numpy()).astype(np.float32)
    change(vectors)
    column = pl.Series("embedding", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1])).to_arrow()
    place = table.schema.get_field_index("embedding")
    pq.write_table(table.set_column(place, table.schema.field(place), column.cast(table.schema.field(place).type)), path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def raw_byte(at: Workspace) -> None:
    path = max((file for file in at.raw.iterdir() if file.suffix == ".gz"), key=os.path.getsize)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def broken_image(at: Workspace) -> None:
    path = shard_path(at.images, 0)
    rows, keys = read_shard(path), read_shard_index(path).keys
    place = next(n for n, row in enumerate(rows) if row.image is not None)
    rows[place] = type(rows[place])(**{**vars(rows[place]), "image": b"no image"})
    write_shard(path, rows, keys)


def index_of_other_vectors(at: Workspace) -> None:
    vectors = read_vectors(at.embeddings("zero_shot"))
    assert vectors is not None
    build_index(-vectors[1:], None, load_params(at.root / "params.yaml").build_index, at.index("sda"))


def index_of_one_changed_vector(at: Workspace) -> None:
    vectors = read_vectors(at.embeddings("sda"))
    assert vectors is not None
    vectors[4] *= 1.001
    build_index(vectors[1:], None, load_params(at.root / "params.yaml").build_index, at.index("sda"))


def index_without_an_item(at: Workspace) -> None:
    vectors = read_vectors(at.embeddings("sda"))
    assert vectors is not None
    vectors[4] = 0.0
    build_index(vectors[1:], None, load_params(at.root / "params.yaml").build_index, at.index("sda"))


def second_test_row(table: pl.DataFrame) -> pl.DataFrame:
    first_test = table["split"].index_of("test")
    assert first_test is not None
    return table.with_columns(split=pl.when(pl.int_range(pl.len()) == first_test - 1).then(pl.lit("test")).otherwise("split"))


DAMAGES: list[tuple[str, Callable[[Workspace], object], str]] = [
    ("data/raw", raw_byte, "sha256 is"),
    ("data/filtered/interactions.parquet", lambda at: cut(at.interactions), "not a readable parquet"),
    ("data/filtered/interactions.parquet", lambda at: rewrite(INTERACTIONS, at.interactions, second_test_row), "2 test items"),
    (
        "data/filtered/interactions.parquet",
        lambda at: rewrite(INTERACTIONS, at.interactions, lambda t: t.filter(pl.col("user_id") != 2)),
        "user_id should take every value",
    ),
    (
        "data/filtered/interactions.parquet",
        lambda at: rewrite(INTERACTIONS, at.interactions, lambda t: t.reverse()),
        "not sorted",
    ),
    (
        "data/filtered/items.parquet",
        lambda at: rewrite(ITEMS, at.items, lambda t: t.with_columns(raw_item_id=pl.col("raw_item_id").first())),
        "raw_item_id occurs twice",
    ),
    ("data/filtered/users.parquet", lambda at: rewrite(USERS, at.users, lambda t: t[:-1]), "the interactions go up to"),
    ("data/filtered/statistics.json", lambda at: edit_json(at.statistics, num_train=1), "num_train is 1"),
    ("data/images", broken_image, "cannot be opened"),
    ("data/images", lambda at: edit_json(at.image_coverage, num_ok=3), "num_ok is 3"),
    (
        "data/images",
        lambda at: edit_json(at.image_coverage, num_unsupported_heic=3),
        "by format, the shards have",
    ),
    ("adapters/sda", lambda at: cut(at.adapter("sda") / "adapter_model.safetensors"), "not a readable safetensors"),
    ("adapters/sda", lambda at: edit_json(at.adapter("sda") / "adapter_config.json", r=16), "r of sda is 16"),
    ("adapters/sda", lambda at: without(at.adapter("sda") / "adapter_config.json", "modalities"), "has no modalities"),
    ("adapters/sda", lambda at: edit_json(at.adapter("sda") / "adapter_config.json", modalities=5), "should be a list of names"),
    ("adapters/sda", lambda at: edit_json(at.adapter("sda") / "adapter_config.json", target_modules=["q"]), "be a pattern"),
    ("adapters/sda", lambda at: edit_json(at.adapter("sda") / "adapter_config.json", target_modules="("), "be a pattern"),
    (
        "adapters/sda",
        lambda at: (at.adapter("sda") / "loss.tsv").write_bytes(b"step\tloss\n1\t2\t3\t4\n"),
        "cannot be read as a table",
    ),
    ("data/filtered/interactions.parquet", lambda at: damage_pages(at.interactions), "not a readable parquet"),
    (
        "adapters/sda",
        lambda at: edit_weights(at.adapter("sda") / "adapter_model.safetensors", lambda w: w[min(w)].fill_(float("nan"))),
        "not finite",
    ),
    (
        "adapters/sda",
        lambda at: edit_weights(at.adapter("sda") / "adapter_model.safetensors", lambda w: w.pop(min(w))),
        "is expected",
    ),
    ("embeddings/sda.parquet", lambda at: edit_vectors(at.embeddings("sda"), lambda v: v[3].fill(np.nan)), "not finite"),
    (
        "embeddings/sda.parquet",
        lambda at: edit_vectors(at.embeddings("sda"), lambda v: np.multiply(v, 1.5, out=v)),
        "not of unit length",
    ),
    (
        "embeddings/sda.parquet",
        lambda at: edit_vectors(at.embeddings("sda"), lambda v: v[3].fill(0.0)),
        "1 of its vectors are zero, but 0 items have nothing to embed",
    ),
    ("embeddings/sda.parquet", lambda at: shutil.copy(at.embeddings("zero_shot"), at.embeddings("sda")), "adapter_hash is ''"),
    ("embeddings/id.parquet", lambda at: shutil.copy(at.embeddings("sda"), at.embeddings("id")), "should have no vectors"),
    ("indexes/sda", lambda at: cut(at.index("sda") / "items.faiss"), "not a readable FAISS index"),
    ("indexes/sda", index_of_other_vectors, "are their own nearest neighbour"),
    ("indexes/sda", index_without_an_item, "vectors of width"),
    ("indexes/sda", index_of_one_changed_vector, "was not built from the current item vectors"),
    ("models/sda/vbpr/1", lambda at: cut(at.model("sda", "vbpr", 1) / "model.safetensors"), "model.safetensors"),
    (
        "models/sda/vbpr/1",
        lambda at: shutil.copytree(at.model("zero_shot", "vbpr", 1), at.model("sda", "vbpr", 1), dirs_exist_ok=True),
        "other item vectors",
    ),
    (
        "evaluation/sda/vbpr.parquet",
        lambda at: rewrite(SEED_POSITIONS, at.positions("sda", "vbpr"), lambda t: t.with_columns(position=pl.lit(0.0))),
        "outside 1..candidates",
    ),
    (
        "evaluation/sda/vbpr.parquet",
        lambda at: rewrite(SEED_POSITIONS, at.positions("sda", "vbpr"), lambda t: t.with_columns(num_better=pl.lit(2, pl.Int32))),
        "do not follow from num_better",
    ),
    (
        "evaluation/sda/vbpr.parquet",
        lambda at: rewrite(SEED_POSITIONS, at.positions("sda", "vbpr"), lambda t: t[1:]),
        "not the test rows",
    ),
    ("models/sda/vbpr/history.tsv", lambda at: cut(at.recommender("sda", "vbpr") / "history.tsv"), "not the mean"),
    ("models/sda/vbpr/2", lambda at: edit_json(at.model("sda", "vbpr", 2) / "model.json", seed=1), "another seed than"),
    (
        "evaluation/sda/vbpr.parquet",
        lambda at: rewrite(SEED_POSITIONS, at.positions("sda", "vbpr"), lambda t: t.filter(pl.col("seed") != 2)),
        "is of the seeds [1]",
    ),
    ("metrics/sda/vbpr.json", lambda at: edit_json(at.metrics("sda", "vbpr"), **{"hit@10": 0.123}), "hit@10 is 0.123"),
    ("comparisons.json", lambda at: edit_json(at.comparisons, further=1), "has further"),
    ("report/index.html", lambda at: cut(at.report), "not a complete page"),
]


@pytest.mark.parametrize(("path", "damage", "words"), DAMAGES, ids=[f"{path}-{words}" for path, _, words in DAMAGES])
def test_a_damage_is_told_where_it_is(
    workspace: Workspace, params: Params, path: str, damage: Callable[[Workspace], object], words: str
) -> None:
    damage(workspace)
    found = next(finding for finding in verify(workspace, params) if finding.path == path)  # later ones are not waited for
    assert found.status == "problem", found
    assert words in found.text
    assert len(found.text.splitlines()) == 1


def test_what_depends_on_something_broken_is_skipped(workspace: Workspace, params: Params) -> None:
    cut(workspace.items)
    (workspace.root / "dvc.lock").unlink()
    found = findings(workspace, params)
    assert [finding.path for finding in found.values() if finding.status == "problem"] == ["data/filtered/items.parquet"]
    assert found["embeddings/sda.parquet"].text == "not checked: data/filtered/items.parquet is broken"


def test_a_byte_that_dvc_locked(workspace: Workspace) -> None:
    (workspace.adapter("sda") / "README.md").write_text("another card")
    done = sda_verify(workspace.root)
    assert done.exit_code == 1
    problems = [line.split()[1] for line in done.output.splitlines() if line.startswith("problem")]
    assert problems == ["embeddings/sda.parquet", "adapters/sda"]  # the vectors' adapter_hash, and the lock


def test_other_params_than_it_was_made_with(workspace: Workspace) -> None:
    path = workspace.root / "params.yaml"
    path.write_text(path.read_text().replace("fusion: late_concat_pca", "fusion: mean").replace("max_epochs: 2", "max_epochs: 3"))
    found = findings(workspace, load_params(path))
    assert "fusion is 'late_concat_pca'" in found["embeddings/sda.parquet"].text
    assert "other settings" in found["models/id/vbpr/1"].text
