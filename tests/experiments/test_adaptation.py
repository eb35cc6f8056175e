"""The study of adaptation on a tiny shop: what each kind of vectors is, what is trained and kept, what the tables say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import adaptation
from experiments.study import read_positions
from experiments.workspaces import VARIANTS
from sda_core.artifacts import INTERACTIONS, ITEMS, Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.embeddings.controls import read_table
from sda_core.embeddings.fusion import fuse, seen_items
from sda_core.embeddings.oracle import NOISE_LENGTH
from sda_core.errors import ConfigError, DataError
from sda_core.evaluation.metrics import per_user
from sda_core.item_source import item_source
from sda_core.params import load_params
from sda_core.seed import generator
from tests.experiments.projects import new_project

SMALL = [
    "dataset.num_users=260",
    "dataset.num_items=200",
    "dataset.image_side=16",
    "backbone=tiny",
    "backbone.hidden_size=16",
    "backbone.num_heads=2",
    "backbone.vision_depth=1",
    "train_adapter.training.num_steps=2",
    "train_adapter.training.batch_size=8",
    "train_adapter.training.warmup_steps=0",
    "export_embeddings.fused_dim=8",
    "runtime.num_threads=1",
    "evaluate.bootstrap_samples=50",
    "train_recommender.sasrec.max_epochs=1",
    "train_recommender.sasrec.eval_every=1",
    "train_recommender.sasrec.hidden_size=8",
    "train_recommender.sasrec.num_negatives=4",
]
VECTORS = Names(
    (
        *("id", "random", "zero_shot", "text_only", "attributes", "text_attributes", "sda", "sda+base", "id+sda"),
        *("other_images", "mismatched"),
    )
)


def run(root: Path, *more: str, vectors: Names = VECTORS, train: bool = True) -> None:
    adaptation.main("small", Names(("sasrec",)), vectors, [*SMALL, *more], root, Numbers((1, 2)), train)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A project folder with conf/ alone, in which the study has run."""
    with new_project(tmp_path_factory, repository, processes=True) as root:
        run(root)
    return root


def folder(project: Path) -> Path:
    return project / "experiments" / "runs" / "adaptation" / "small"


def test_seeds_have_adapters_of_their_own_and_share_the_rest(project: Path) -> None:
    seeds = [Workspace(folder(project) / f"seed-{seed}") for seed in (1, 2)]
    settings = [load_params(workspace.root / "params.yaml") for workspace in seeds]
    assert [params.train_adapter.training.seed for params in settings] == [1, 2]
    assert [params.control_embeddings.seed for params in settings] == [1, 2]
    assert all(set(params.train_adapter.variants) == set(VARIANTS) for params in settings)
    base = [read_table(workspace.embeddings("zero_shot")).fused_IF for workspace in seeds]
    np.testing.assert_array_equal(base[0], base[1])
    adapted = [read_table(workspace.embeddings("sda")).fused_IF for workspace in seeds]
    assert not np.array_equal(adapted[0], adapted[1])
    assert not seeds[0].adapter("lora").exists()  # nobody asked for it
    drawn = [adaptation.matrix(workspace, params, "random") for workspace, params in zip(seeds, settings, strict=True)]
    assert not np.array_equal(np.array(drawn[0]), np.array(drawn[1]))


def test_the_tables(project: Path) -> None:
    text = (project / "experiments" / "results" / "adaptation-small" / "table.md").read_text(encoding="utf-8")
    mean, ndcg = {}, {}
    for vector in VECTORS:
        frames = read_positions(adaptation.positions(folder(project), "sasrec", vector), [1, 2])
        ndcg[vector] = np.array([per_user("ndcg", frame["position"].to_numpy(), 10) for frame in frames])
        mean[vector] = ndcg[vector].mean()
        assert f"| {vector} | {mean[vector]:.4f} | " in text
    assert f"| sda - zero_shot | {mean['sda'] - mean['zero_shot']:+.4f} [" in text
    by_seed = (ndcg["sda"] - ndcg["zero_shot"]).mean(1)
    assert f"| {by_seed.min():+.4f} .. {by_seed.max():+.4f} |" in text
    assert "| Can this recommender use vectors here? | id - random | " in text
    assert "lora" not in text
    assert "Retrieval@1" in text
    assert (project / "experiments" / "results" / "adaptation-small" / "plot.png").stat().st_size > 5000


def test_ids_are_added_where_the_name_says_so(project: Path) -> None:
    """The three trainings differ: ids alone, vectors alone, both."""
    found = [read_positions(adaptation.positions(folder(project), "sasrec", name), [1])[0] for name in ("id", "sda", "id+sda")]
    assert not found[0].equals(found[1])
    assert not found[0].equals(found[2])
    assert not found[1].equals(found[2])


def test_a_run_resumes_and_tables_are_of_what_is_complete(
    project: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    before = {path: path.stat().st_mtime_ns for path in folder(project).rglob("*.parquet")}
    run(project, vectors=Names((*VECTORS, "lora")), train=False)
    assert {path: path.stat().st_mtime_ns for path in folder(project).rglob("*.parquet")} == before
    out = capsys.readouterr().out
    assert "sda - zero_shot" in out
    assert "lora" not in out
    with pytest.raises(ConfigError, match="was made with other params; use another name"):
        run(project, "items.noun=mug")


def test_targets_whose_text_other_items_have_are_a_group(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Workspace(folder(project) / "shop")
    params = load_params(shop.root / "params.yaml")
    source = item_source(shop, params.items)
    texts = source.texts(np.arange(len(source)))
    assert adaptation.shares_text(source).tolist() == [list(texts).count(text) > 1 for text in texts]
    assert "shared text" not in " ".join(adaptation.measure(shop, params, folder(project), "sasrec", ["id"], [1, 2]))

    even_I = np.arange(len(source)) % 2 == 0
    monkeypatch.setattr(adaptation, "shares_text", lambda _: even_I)
    monkeypatch.setattr(adaptation, "MIN_USERS", 1)
    found = adaptation.measure(shop, params, folder(project), "sasrec", ["id"], [1, 2])
    target = INTERACTIONS.read(shop.interactions).filter(pl.col("split") == "test")["item_id"].to_numpy()
    sizes = {name.split(" (")[0]: of["id"][0].shape for name, of in found.items()}
    assert sizes["shared text"] == (2, (target % 2 == 1).sum())  # item ids begin with 1
    assert sizes["unique text"] == (2, (target % 2 == 0).sum())


@pytest.mark.parametrize(
    ("vector", "weights"),
    [
        ("zero_shot", {}),
        ("sda", {}),
        ("text_only", {"image_weight": 0.0}),
        ("image_only", {"text_weight": 0.0}),
    ],
)
def test_even_vectors_are_those_of_the_export(project: Path, vector: str, weights: dict[str, float]) -> None:
    workspace = Workspace(folder(project) / "seed-1")
    params = load_params(workspace.root / "params.yaml")
    own = read_table(workspace.embeddings("sda" if vector == "sda" else "zero_shot"))
    section = params.export_embeddings.model_copy(update={"axis_scaling": "even", **weights})
    wanted = fuse(own.image_ID, own.text_ID, own.has_image, seen_items(workspace), section, has_text=own.has_text)
    made = adaptation.matrix(workspace, params, f"{vector}+even")
    assert made is not None
    np.testing.assert_array_equal(made[1:], wanted)
    assert not np.array_equal(made[1:], adaptation.matrix(workspace, params, vector)[1:])  # type: ignore[index]
    added = adaptation.matrix(workspace, params, f"id+{vector}+even")
    assert added is not None
    np.testing.assert_array_equal(added, made)


@pytest.mark.parametrize(("vector", "weight"), [("sda:text", "image_weight"), ("sda:image", "text_weight")])
@pytest.mark.parametrize("scaling", ["none", "even"])
def test_one_modality_of_an_adapted_variant(project: Path, vector: str, weight: str, scaling: str) -> None:
    workspace = Workspace(folder(project) / "seed-1")
    params = load_params(workspace.root / "params.yaml")
    own = read_table(workspace.embeddings("sda"))
    section = params.export_embeddings.model_copy(update={"axis_scaling": scaling, weight: 0.0})
    wanted = fuse(own.image_ID, own.text_ID, own.has_image, seen_items(workspace), section, has_text=own.has_text)
    made = adaptation.matrix(workspace, params, vector + ("+even" if scaling == "even" else ""))
    assert made is not None
    np.testing.assert_array_equal(made[1:], wanted)
    assert adaptation.source_of(f"id+{vector}+even") == "sda"


def test_other_images_are_those_of_other_items(project: Path) -> None:
    """Every item with an image has another item's, no image is lost, and texts stay where they are."""
    workspace = Workspace(folder(project) / "seed-1")
    params = load_params(workspace.root / "params.yaml")
    own, seen = read_table(workspace.embeddings("zero_shot")), seen_items(workspace)
    order = generator(1, "other_images").permutation(np.flatnonzero(own.has_image))
    partner = np.arange(len(own.has_image))
    partner[order] = np.roll(order, 1)
    assert (partner[own.has_image] != np.flatnonzero(own.has_image)).all()
    assert sorted(partner) == list(range(len(partner)))
    assert own.has_image[partner[own.has_image]].all()
    fused = fuse(own.image_ID[partner], own.text_ID, own.has_image, seen, params.export_embeddings, has_text=own.has_text)
    made = adaptation.matrix(workspace, params, "other_images")
    assert made is not None
    np.testing.assert_array_equal(made[1:], fused)
    assert not made[0].any()
    assert not np.array_equal(fused, own.fused_IF)


def test_the_mismatched_adapter_is_another_one_and_has_own_vectors(project: Path) -> None:
    own = Workspace(folder(project) / "seed-1")
    control = Workspace(folder(project) / "mismatched" / "seed-1")
    made = [read_table(workspace.embeddings("sda")).text_ID for workspace in (own, control)]
    assert not np.array_equal(made[0], made[1])
    spoilt, clean = (ITEMS.read(Workspace(root).items) for root in (control.root / "spoilt", control.root))
    assert spoilt["raw_item_id"].to_list() == clean["raw_item_id"].to_list()
    assert spoilt["title"].to_list() != clean["title"].to_list()
    text = (project / "experiments" / "results" / "adaptation-small" / "table.md").read_text(encoding="utf-8")
    assert "| mismatched - zero_shot | " in text
    assert "| zero_shot - other_images | " in text


def test_attributes_are_one_hot_with_an_own_part(project: Path) -> None:
    workspace = Workspace(folder(project) / "seed-1")
    params = load_params(workspace.root / "params.yaml")
    wide = params.model_copy(update={"export_embeddings": params.export_embeddings.model_copy(update={"fused_dim": 4096})})
    vectors_IF = adaptation.attribute_vectors(workspace, wide, with_text=False)
    items = ITEMS.read(workspace.items).sort("item_id")
    said = [
        {*map("c".__add__, row["categories"] or []), *map("f".__add__, row["features"] or [])}
        for row in items.iter_rows(named=True)
    ]
    # All components are kept and distances are those before: unit one-hot rows, and own parts of half their length.
    distance_II = ((vectors_IF[:, None] - vectors_IF[None]) ** 2).sum(2)
    pairs = [(a, b) for a in range(60) for b in range(a) if said[a] and said[b]]
    least = min(len(said[a] & said[b]) for a, b in pairs)
    same = [(a, b) for a, b in pairs if said[a] == said[b]]
    apart = [(a, b) for a, b in pairs if len(said[a] & said[b]) == least]
    assert same
    assert np.mean([distance_II[pair] for pair in same]) < 0.7 * np.mean([distance_II[pair] for pair in apart])
    assert min(distance_II[pair] for pair in same) > NOISE_LENGTH**2 / 2  # no two items are one
    assert vectors_IF.shape[0] == len(items)
    with_text_IF = adaptation.attribute_vectors(workspace, params, with_text=True)
    assert with_text_IF.shape == (len(items), 8)
    assert not np.allclose(with_text_IF, adaptation.attribute_vectors(workspace, params, with_text=False))


def test_base_is_joined_as_the_export_does_it(project: Path) -> None:
    workspace = Workspace(folder(project) / "seed-1")
    params = load_params(workspace.root / "params.yaml").export_embeddings
    own, base = read_table(workspace.embeddings("sda")), read_table(workspace.embeddings("zero_shot"))
    expected_IF = fuse(own.image_ID, own.text_ID, own.has_image, seen_items(workspace), params, (base.image_ID, base.text_ID))
    np.testing.assert_array_equal(adaptation.joined_with_base(workspace, params, "sda"), expected_IF)


def test_items_without_attributes(project: Path, tmp_path: Path) -> None:
    source = Workspace(folder(project) / "seed-1")
    params = load_params(source.root / "params.yaml")
    bare = Workspace(tmp_path)
    nothing = pl.lit([], dtype=pl.List(pl.String))
    ITEMS.write(ITEMS.read(source.items).with_columns(categories=nothing, features=nothing), bare.items)
    INTERACTIONS.write(INTERACTIONS.read(source.interactions), bare.interactions)
    with pytest.raises(DataError, match="has neither categories nor features; leave out attributes and text_attributes"):
        adaptation.attribute_vectors(bare, params, with_text=False)


def test_mistakes_are_one_line(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    (tmp_path / "conf").symlink_to(repository / "conf")
    with pytest.raises(ConfigError, match=r"--vectors: expected some of id, mismatched, zero_shot, .* \(got 'nosuch'\)"):
        adaptation.main("m", Names(("sasrec",)), Names(("nosuch",)), SMALL, tmp_path)
    with pytest.raises(ConfigError, match=r"--vectors: expected some of .* \(got 'id\+id'\)"):
        adaptation.main("m", Names(("sasrec",)), Names(("id+id",)), SMALL, tmp_path)
    with pytest.raises(ConfigError, match="--compose: "):
        adaptation.main("m", Names(("sasrec",)), Names(("id",)), ["dataset=nosuch"], tmp_path)
    made = tmp_path / "experiments" / "runs" / "adaptation" / "m" / "shop"
    for stage in ("raw", "images"):
        (made / "data" / stage).mkdir(parents=True)
    (made / "data" / "filtered").mkdir()
    (made / "data" / "filtered" / "statistics.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--vectors: vbpr has no representation id\+content, so it cannot use id"):
        adaptation.main("m", Names(("vbpr",)), Names(("id+sda",)), SMALL, tmp_path)
    with pytest.raises(ConfigError, match="--recommenders: slmrec takes image and text vectors separately"):
        adaptation.main("m", Names(("slmrec",)), Names(("sda",)), SMALL, tmp_path)


def test_the_section_follows_the_kind_of_vectors(repository: Path) -> None:
    section = load_params(repository / "params.yaml").train_recommender
    weighted = section.nearest.model_copy(update={"content_weight": 0.3})
    both = adaptation.with_representation(weighted, "id+zero_shot")
    assert (both.representation, both.content_weight, both.axis_scaling) == ("id+content", 0.3, "none")
    alone = adaptation.with_representation(weighted, "zero_shot+even")
    assert (alone.representation, alone.content_weight, alone.axis_scaling) == ("content", None, "none")
    assert adaptation.with_representation(section.vbpr, "zero_shot") is section.vbpr
    dropped = section.sasrec.model_copy(update={"representation": "id+content", "id_dropout": 0.25})
    with pytest.raises(ConfigError, match=r"params.yaml: train_recommender.sasrec: id_dropout needs representation id\+content"):
        adaptation.with_representation(dropped, "zero_shot")
