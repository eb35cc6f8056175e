"""Linear heads on frozen embeddings: what they start from, what they learn, what is kept, and what the tables say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import adaptation, aligned_heads
from experiments.nearest_items import Run
from experiments.study import Panels, interval_cell
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.embeddings.controls import read_table
from sda_core.embeddings.fusion import seen_items
from sda_core.errors import ConfigError
from sda_core.params import Params, load_params
from sda_core.unit_rows import unit_rows
from tests.experiments.projects import new_project
from tests.experiments.test_adaptation import SMALL

NUM_ITEMS = 300


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A run of the study of adaptation on a tiny shop, without adapters."""
    with new_project(tmp_path_factory, repository) as root:
        adaptation.main("small", Names(("nearest",)), Names(("id",)), SMALL, root, Numbers((1,)))
    return root / "experiments" / "runs" / "adaptation" / "small"


@pytest.fixture
def run(project: Path) -> Run:
    return Run.read(f"small={project}")


@pytest.fixture
def tables(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    runs = [f"small={project}"]
    aligned_heads.main("small", runs, "zero_shot", Names(("sda", "mismatched")), Numbers((2, 4)), seeds=Numbers((1, 2)))
    return (tmp_path / "experiments" / "results" / "aligned_heads-small" / "table.md").read_text(encoding="utf-8")


def pairs(seed: int, width: int = aligned_heads.WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of two modalities that share 16 directions, rotated differently."""
    draws = np.random.default_rng(seed)
    shared = draws.normal(size=(NUM_ITEMS, 16))
    images, texts = (shared @ draws.normal(size=(16, width)) + draws.normal(size=(NUM_ITEMS, width)) for _ in range(2))
    return unit_rows(images.astype(np.float32)), unit_rows(texts.astype(np.float32))


@pytest.mark.parametrize("part", ["image", "text"])
def test_before_training_the_embeddings_are_the_frozen_ones(run: Run, part: str) -> None:
    """Cosines against NumPy: centred unit embeddings, unit length again, and axes of more even variance."""
    frozen = aligned_heads.Frozen.read(run, "zero_shot")
    own = read_table(frozen.workspace.embeddings("zero_shot"))
    given, has = (own.image_ID, own.has_image) if part == "image" else (own.text_ID, own.has_text)
    unit = given[has] / np.linalg.norm(given[has], axis=1, keepdims=True)
    unit = unit - unit.mean(axis=0)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    seen = np.isin(np.flatnonzero(has) + 1, seen_items(frozen.workspace))
    # an item of training without this modality counts as the mean, with a variance of 0
    num_fitted = len(np.unique(seen_items(frozen.workspace)))
    centred = unit - unit[seen].mean(axis=0)
    variance, axes = np.linalg.eigh(centred[seen].T.astype(np.float64) @ centred[seen] / num_fitted)
    variance, axes = variance[::-1], axes[:, ::-1]
    kept = frozen.params.export_embeddings.fused_dim
    wanted = centred @ axes[:, :kept] / np.sqrt(np.maximum(variance[:kept], 0) + variance[:kept].mean())
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    made = frozen.vectors(part, frozen.image_ID, frozen.text_ID)[1:]
    np.testing.assert_array_equal(made.any(axis=1), has)
    np.testing.assert_allclose(made[has] @ made[has].T, wanted @ wanted.T, atol=2e-3)


def test_mixed_has_the_frozen_texts(run: Run) -> None:
    frozen = aligned_heads.Frozen.read(run, "zero_shot")
    other = np.random.default_rng(0).normal(size=frozen.text_ID.shape).astype(np.float32)
    mixed = frozen.vectors("mixed", frozen.image_ID, other)
    np.testing.assert_array_equal(mixed, frozen.vectors("fused", frozen.image_ID, frozen.text_ID))
    assert not np.array_equal(mixed, frozen.vectors("fused", frozen.image_ID, other))


@pytest.mark.parametrize("missing", ["text", "image"])
def test_a_share_loses_a_modality_and_is_filled_in_from_the_other(run: Run, missing: str) -> None:
    whole, frozen = aligned_heads.Frozen.read(run, "zero_shot"), aligned_heads.Frozen.read(run, "zero_shot", missing, 0.5)
    both = whole.has_image & whole.has_text
    assert frozen.has_lost.sum() == round(0.5 * both.sum())
    assert not (frozen.has_lost & ~both).any()
    has, other = (frozen.has_text, frozen.has_image) if missing == "text" else (frozen.has_image, frozen.has_text)
    lost_ID, other_ID = (frozen.text_ID, frozen.image_ID) if missing == "text" else (frozen.image_ID, frozen.text_ID)
    assert not has[frozen.has_lost].any()
    assert other[frozen.has_lost].all()
    assert not lost_ID[frozen.has_lost].any()
    assert (frozen.parts, whole.parts) == ((*aligned_heads.PARTS, "filled"), aligned_heads.PARTS)
    # in a space that both share (here: the same vectors), filling in gives what was lost
    shared = np.random.default_rng(0).normal(size=other_ID.shape).astype(np.float32)
    seen = [shared.copy(), shared.copy()]
    seen[missing == "text"][frozen.has_lost] = 0.0
    complete = frozen.vectors("fused", shared, shared)[1:]
    filled = frozen.vectors("filled", *seen)[1:]
    assert filled.any(axis=1)[frozen.has_lost].all()
    assert not np.allclose(filled, complete)  # the axes of the frozen flags differ
    same = aligned_heads.Frozen(frozen.workspace, frozen.params, shared, shared, both | True, both | True, None, both & False, "")
    expected = same.vectors("fused", shared, shared)[1:][both]
    np.testing.assert_allclose(filled[both] @ filled[both].T, expected @ expected.T, atol=0.15)


def test_groups_by_what_the_target_has_lost(run: Run) -> None:
    frozen = aligned_heads.Frozen.read(run, "zero_shot", "image", 0.5)
    every, lost, others = aligned_heads.groups_of(run, frozen).values()
    assert every.all()
    np.testing.assert_array_equal(lost, ~others)
    assert 0 < lost.sum() < len(lost)


def test_tables_of_missing_modalities(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [f"small={project}"], "zero_shot", Names(("sda", "mismatched")), Numbers((2,)), "text", 0.5, Numbers((1,))
    aligned_heads.main("small", *given)
    table = (tmp_path / "experiments" / "results" / "aligned_heads-small" / "table.md").read_text(encoding="utf-8")
    assert "| sda, 2 steps - frozen | id+filled - id+fused |" in table
    assert "| sda, 2 steps - mismatched, 2 steps | id+filled |" in table
    assert "without text (" in table
    assert (tmp_path / "experiments/runs/aligned_heads/small/zero_shot/small/text-0.5/sda-2/id+filled/1.parquet").exists()


def test_mismatched_pairs_are_all_wrong_and_depend_on_the_seed() -> None:
    rows = np.flatnonzero(np.arange(50) % 3)
    one = aligned_heads.exchanged(rows, 1)
    assert sorted(one) == rows.tolist()
    assert (one != rows).all()
    np.testing.assert_array_equal(one, aligned_heads.exchanged(rows, 1))
    assert (one != aligned_heads.exchanged(rows, 2)).any()


@pytest.mark.parametrize(("loss", "learns"), [("sda", True), ("soft", True), ("infonce", True), ("mismatched", False)])
def test_true_pairs_are_learned_and_wrong_ones_are_not(
    run: Run, loss: str, learns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, texts = pairs(0)
    every = np.ones(NUM_ITEMS, dtype=bool)
    params = load_params(run.folder / "seed-1" / "params.yaml")
    frozen = aligned_heads.Frozen(run.shop, params, images, texts, every, every, None, ~every, "")
    found: dict[int, float] = {}

    def note(*given: Any, next_to_ids: bool) -> None:
        step, heads = given[4], given[6]
        with torch.no_grad():
            made = [head(torch.from_numpy(rows)).numpy() for head, rows in zip(heads, (images, texts), strict=True)]
        found[step] = aligned_heads.mutual_retrieval_at_1(*(unit_rows(rows - rows.mean(axis=0)) for rows in made))
        assert next_to_ids == (step in (0, 60))

    monkeypatch.setattr(aligned_heads, "measure", note)
    aligned_heads.train(run, frozen, tmp_path, loss, (30, 60), 1)
    assert list(found) == [0, 30, 60]
    assert found[0] < 0.02
    assert (found[60] > 0.5) == learns, found


def test_tables(tables: str) -> None:
    assert "### small, image and text of an item" in tables
    assert "| embeddings | fused | mixed | image | text | id+fused | id+mixed |" in tables
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| sda, 4 steps |")]
    assert len(rows[1]) == 7
    assert any(line.startswith("| sda, 4 steps - mismatched, 4 steps | id+mixed |") for line in tables.splitlines())
    halfway = [line for line in tables.splitlines() if line.startswith("| sda, 2 steps - frozen |")]
    assert [line.split(" | ")[1] for line in halfway] == ["fused", "mixed", "image", "text"]


def test_the_plot_shows_the_numbers_of_the_table(
    project: Path, tables: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line is the difference of a loss to the frozen embeddings after the last step, in the column of all users."""
    shown: list[Panels] = []
    monkeypatch.setattr(aligned_heads, "plot_intervals", lambda path, panels, *_, **__: shown.append(panels))
    runs = [f"small={project}"]
    aligned_heads.main("small", runs, "zero_shot", Names(("sda", "mismatched")), Numbers((2, 4)), seeds=Numbers((1, 2)))
    assert list(shown[0]) == [f"small, {kind}" for kind in ("fused", "mixed", "image", "text", "id+fused", "id+mixed")]
    for title, lines in shown[0].items():
        assert list(lines) == ["sda", "mismatched"]
        for loss, line in lines.items():
            start = f"| {loss}, 4 steps - frozen | {title.partition(', ')[2]} | {interval_cell(line)} |"
            assert any(row.startswith(start) for row in tables.splitlines()), start


def test_finished_trainings_are_kept(project: Path, tables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(aligned_heads, "train", refuse)
    runs = [f"small={project}"]
    aligned_heads.main("small", runs, "zero_shot", Names(("sda", "mismatched")), Numbers((2, 4)), seeds=Numbers((1, 2)))
    for losses, steps in ((("infonce",), (2, 4)), (("sda",), (2,)), (("sda",), (2, 4, 6))):
        with pytest.raises(AssertionError, match="trained again"):  # after 2 steps nothing was ranked next to co-purchases
            aligned_heads.main("small", runs, "zero_shot", Names(losses), Numbers(steps), seeds=Numbers((1, 2)))


@pytest.mark.parametrize(("losses", "steps", "where"), [("nonsense", (1,), "--losses"), ("sda", (4, 2), "--num-steps")])
def test_user_mistakes(project: Path, losses: str, steps: tuple[int, ...], where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        aligned_heads.main("small", [f"small={project}"], "zero_shot", Names((losses,)), Numbers(steps), seeds=Numbers((1,)))


def test_sections_do_not_depend_on_the_losses_of_the_run(run: Run, repository: Path) -> None:
    usual = load_params(repository / "params.yaml")
    of_run: Params = load_params(Workspace(run.folder / "seed-1").root / "params.yaml")
    other = of_run.model_dump()
    other["train_adapter"]["loss"] |= {"teacher_source": "base", "teacher_targets": 4.0, "center": "none"}
    for params in (usual, of_run, Params.model_validate(other)):
        assert aligned_heads.section_of(params, "sda") == usual.train_adapter.loss
        assert aligned_heads.section_of(params, "mismatched") == usual.train_adapter.loss
        assert aligned_heads.section_of(params, "infonce") == usual.train_adapter.infonce
        soft = aligned_heads.section_of(params, "soft")
        assert (soft.teacher_source, soft.teacher_targets) == ("base", 4.0)


def test_results_of_other_embeddings_are_not_reused(
    project: Path, tables: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(aligned_heads, "sha256_file", lambda path: f"other {path.name}")
    with pytest.raises(ConfigError, match=r"--name: the results in .* were made with other embeddings and interactions; use"):
        aligned_heads.main("small", [f"small={project}"], "zero_shot", Names(("sda",)), Numbers((2, 4)), seeds=Numbers((1, 2)))


@pytest.mark.parametrize(
    ("missing", "share", "message"),
    [
        (None, 0.3, "--share: has no effect without --missing; add --missing text or --missing image"),
        ("text", 0.0, r"--share: takes one modality from 0 of (\d+) items with both, and leaves \1 to train on"),
        ("image", 1.0, r"--share: takes one modality from (\d+) of \1 items with both, and leaves 0 to train on"),
    ],
)
def test_shares_that_leave_nothing(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: Any, share: float, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        aligned_heads.main("m", [f"small={project}"], "zero_shot", Names(("sda",)), Numbers((2,)), missing, share, Numbers((1,)))
