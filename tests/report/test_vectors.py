"""Geometry, conflicting items, maps, gates and experiments: against numbers known beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sda_core.artifacts import write_json
from sda_core.embeddings.fusion import fuse
from sda_core.errors import ArtifactError
from sda_core.params import ExportParams, load_params
from sda_core.report.experiments import experiments
from sda_core.report.gates import gate_map
from sda_core.report.modality_drop import modality_drop, unit_rows
from sda_core.report.model import Table
from sda_core.report.vectors import conflicting, geometry, project, sampled, uniformity

ROOT = Path(__file__).resolve().parents[2]


def test_geometry_of_vectors_whose_geometry_is_known() -> None:
    basis = np.eye(4, dtype=np.float32)
    same = geometry("a", 3 * basis, 5 * basis)  # lengths do not count
    assert (same.alignment, same.own_text_first, same.num_items) == (0.0, 1.0, 4)
    assert same.uniformity_image == pytest.approx(-4.0)  # all at right angles: |x - y|^2 = 2
    turned = geometry("a", basis, np.roll(basis, 1, axis=0))
    assert turned.alignment == pytest.approx(2.0)
    assert turned.own_text_first == 0.0
    assert uniformity(np.ones((5, 3))) == pytest.approx(0.0)


def test_uniformity_is_the_formula() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 6))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(20) for j in range(20) if i != j]
    assert uniformity(rows) == pytest.approx(np.log(np.mean(pairs)))


def test_planted_conflicts_are_found() -> None:
    random = np.random.default_rng(1)
    image, text = random.normal(size=(2, 40, 16)).astype(np.float32)
    image[7] = image[3]
    text[7] = -text[3]
    text[20] = text[11]
    image[20] = -image[11]
    pairs = conflicting(np.arange(101, 141), image, text, 1)
    assert [(pair.alike_in, {pair.first, pair.second}) for pair in pairs] == [("image", {104, 108}), ("text", {112, 121})]
    assert pairs[0].image_cosine > 0.9 > -0.7 > pairs[0].text_cosine
    more = conflicting(np.arange(101, 141), image, text, 5)
    ids = [item for pair in more for item in (pair.first, pair.second)]
    assert len(ids) == len(set(ids)) == 20


def test_the_map_keeps_groups_and_goes_on_from_a_start() -> None:
    random = np.random.default_rng(2)
    centres = random.normal(size=(3, 12))
    vectors = (np.repeat(centres, 20, axis=0) + 0.05 * random.normal(size=(60, 12))).astype(np.float32)
    first = project(vectors)
    np.testing.assert_array_equal(first, project(vectors))
    distances = np.linalg.norm(first[:, None] - first[None], axis=2)
    group = np.arange(60) // 20
    nearest = (distances + 1e9 * np.eye(60)).argmin(axis=1)
    assert (group[nearest] == group).all()
    again = project(vectors, first)
    scale = first.max() - first.min()
    assert np.abs(again - again.mean(0) - first + first.mean(0)).mean() < 0.2 * scale
    assert project(vectors[:3]).shape == (3, 2)


def test_samples_are_spread_and_bounded() -> None:
    assert sampled(5, 10).tolist() == [1, 2, 3, 4, 5]
    assert sampled(1000, 3).tolist() == [1, 500, 1000]


def adapter(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    write_json(folder / "adapter_config.json", {"modalities": ["image", "text"], "gate": "modality"})
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_gate_mass_is_the_softmax_averaged_over_a_block(tmp_path: Path) -> None:
    embedding, gate = np.eye(2, dtype=np.float32), np.log(np.array([[8.0, 1.0], [2.0, 1.0]], dtype=np.float32))
    tensors = {}
    for block, name in ((0, "q_proj"), (0, "k_proj"), (10, "q_proj")):
        layer = f"base_model.model.layers.{block}.self_attn.{name}"
        tensors |= {f"{layer}.moda_embedding": embedding, f"{layer}.moda_gate": gate if name == "q_proj" else 0 * gate}
    found = gate_map("sda", adapter(tmp_path, tensors))
    assert found is not None
    assert (found.blocks, found.num_layers, found.modalities) == ((0, 10), 3, ("image", "text"))
    np.testing.assert_allclose(found.mass[1], [[0.8, 0.2], [0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(found.mass[0], [[0.65, 0.35], [0.5, 0.5]], rtol=1e-6)
    assert found.largest_difference == pytest.approx(0.3)


def test_an_adapter_without_a_learned_gate_has_no_map(tmp_path: Path) -> None:
    assert gate_map("lora", adapter(tmp_path, {"base_model.model.layers.0.q.moda_A": np.zeros((1, 2), np.float32)})) is None
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ArtifactError, match="not a readable safetensors"):
        gate_map("lora", tmp_path)


def test_experiments_are_shown_as_they_lie_there(tmp_path: Path) -> None:
    assert experiments(tmp_path / "nowhere") == ()
    for name, content in {
        "a/table.tsv": "variant\tndcg\n" + "sda\t0.5\n" * 41,
        "a/plot.png": "png",
        "broken.csv": 'a,b\n1,2,3\n"',
        "positions/x.tsv": "a\n1\n",
        "gradients/demo/plot.png": "png",
        "script.py": "print()",
        "large.svg": "x" * 400_001,
        "results/sweep-t/table.md": "### By `t`, <b>2</b> seeds\n\n| v | n |\n|---|---|\n| 1 | 2 |\n",
        "results/sweep-t/plot.png": "png2",
        "results/empty/table.md": "no table | here\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "results" / "empty" / "more.md").write_bytes(b"\xff\xfe")
    found = {experiment.name: experiment for experiment in experiments(tmp_path)}
    assert list(found) == ["a/plot.png", "a/table.tsv", "broken.csv", "large.svg", "empty", "sweep-t"]
    (table,) = found["a/table.tsv"].tables
    assert table.columns == ("variant", "ndcg")
    assert len(table.rows) == 40
    assert table.remark == "1 more rows"
    assert found["broken.csv"].remarks[0].startswith("cannot be read")
    assert found["large.svg"].remarks[0].startswith("too large")
    assert [plot.data for plot in found["a/plot.png"].plots] == [b"png"]
    assert found["sweep-t"].tables == (Table("By t, <b>2</b> seeds", ("v", "n"), (("1", "2"),), ""),)
    assert [plot.data for plot in found["sweep-t"].plots] == [b"png2"]
    assert found["empty"].remarks == ("more.md cannot be read as a table (UnicodeDecodeError)", "table.md holds no table")


def test_pipe_tables_of_a_markdown_file(tmp_path: Path) -> None:
    (tmp_path / "t.md").write_text(
        "# First #\n| a \\| b | c |\n| :-- | --: |\n| 1 |\n| 1 | 2 | 3 |\n||x|\ntext\n| no | rule |\n| x | y |\n"
        "| d | e |\n|---|\n\n| f |\n|---|\n"  # a rule of another width is none; the last table has no rows
        "## Wide\n" + "| w " * 14 + "|\n" + "|---" * 14 + "|\n" + ("| 0 " * 14 + "|\n") * 50 + "| last |"
    )
    (found,) = experiments(tmp_path)
    first, second, wide = found.tables
    assert first == Table("First", ("a | b", "c"), (("1", ""), ("1", "2"), ("", "x")), "")
    assert second == Table("", ("f",), (), "")
    assert (wide.caption, len(wide.columns), len(wide.rows), wide.remark) == ("Wide", 12, 40, "11 more rows, 2 more columns")
    (tmp_path / "t.md").write_text("| a |\n|---|\n\n" * 13)
    (found,) = experiments(tmp_path)
    assert (len(found.tables), found.remarks) == (12, ("1 more tables",))


# ------------------------------------------------------------------------------------------ one modality missing
def export(fusion: str = "late_concat_pca", fused_dim: int = 6, normalize: bool = True) -> ExportParams:
    section = load_params(ROOT / "params.yaml").export_embeddings
    return section.model_copy(update={"fusion": fusion, "fused_dim": fused_dim, "normalize": normalize})


def kinds_in(which: str, num_items: int = 60) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images and texts, of which one tells the category and both tell the item; and the categories."""
    random = np.random.default_rng(3)
    kind = np.arange(num_items) % 4
    says = np.eye(4)[kind] * 3 + 0.3 * random.normal(size=(num_items, 4))
    other = random.normal(size=(num_items, 4))
    image, text = (says, other) if which == "image" else (other, says)
    return image.astype(np.float32), text.astype(np.float32), [f"kind {n}" for n in kind]


@pytest.mark.parametrize("which", ["image", "text"])
def test_the_modality_that_tells_the_category_is_missed(which: str) -> None:
    image, text, categories = kinds_in(which)
    everywhere = np.ones(60, dtype=bool)
    found = modality_drop("sda", image, text, everywhere, everywhere, everywhere, everywhere, categories, export(fused_dim=8))
    assert found is not None
    kept, lost = (found.without_text, found.without_image) if which == "image" else (found.without_image, found.without_text)
    assert kept.same_category == 1.0
    assert lost.same_category < 0.5
    assert found.chance == pytest.approx(14 / 59)
    assert found.whole.itself == 1.0
    assert (found.num_items, found.num_asked) == (60, 60)


@pytest.mark.parametrize("normalize", [True, False])
def test_modality_drop_is_what_it_says(normalize: bool) -> None:
    """Against the same question asked item by item, in the vectors that the export makes."""
    image, text, categories = kinds_in("text", 40)
    has_image, fitted = np.arange(40) % 5 != 0, np.arange(40) % 3 != 0
    categories[7], with_image = "", np.arange(40) != 12  # the vector of item 12's image is that of a stand-in
    params = export(normalize=normalize)
    found = modality_drop("sda", image, text, has_image, with_image, np.ones_like(has_image), fitted, categories, params)
    assert found is not None
    fit_ids = np.flatnonzero(fitted) + 1
    whole = unit_rows(fuse(image, text, has_image, fit_ids, params))
    texts = unit_rows(text) if normalize else text.astype(np.float64)
    images = unit_rows(image) if normalize else image.astype(np.float64)
    means = images[has_image & fitted].mean(0), texts[fitted].mean(0)
    joined = np.concatenate([np.where(has_image[:, None], images, means[0]), texts], axis=1)
    centre = joined[fitted].mean(0)
    axes = np.linalg.svd(joined[fitted] - centre)[2][:6].T
    basis = unit_rows((joined - centre) @ axes)
    np.testing.assert_allclose(basis @ basis.T, whole @ whole.T, atol=1e-5)  # these are the export's vectors, up to signs
    asked = [item for item in range(40) if has_image[item] and item not in (7, 12)]
    counted = np.zeros((3, 2))
    for item in asked:
        halves = (images[item], texts[item]), (images[item], means[1]), (means[0], texts[item])
        for place, half in enumerate(halves):
            cosines = basis @ unit_rows(((np.concatenate(half) - centre) @ axes)[None])[0]
            others = np.delete(np.arange(40), item)
            nearest = others[cosines[others].argmax()]
            counted[place] += [categories[nearest] == categories[item], cosines[nearest] <= cosines[item] + 1e-9]
    shares = counted / len(asked)
    told = [[part.same_category, part.itself] for part in (found.whole, found.without_text, found.without_image)]
    np.testing.assert_allclose(told, shares)
    assert found.num_asked == len(asked)
    alike = [np.mean([categories[j] == categories[i] for j in range(40) if j != i]) for i in asked]
    assert found.chance == pytest.approx(np.mean(alike))


def test_modality_drop_has_nothing_to_say_of_nothing() -> None:
    image, text, categories = kinds_in("image", 8)
    yes, no = np.ones(8, dtype=bool), np.zeros(8, dtype=bool)
    assert modality_drop("v", image, text, no, yes, yes, yes, categories, export()) is None
    assert modality_drop("v", image, text, yes, yes, yes, no, categories, export()) is None
    assert modality_drop("v", image, text, yes, yes, no, yes, categories, export()) is None
    assert modality_drop("v", image, text, yes, yes, yes, yes, [""] * 8, export()) is None
    assert modality_drop("v", image[:1], text[:1], yes[:1], yes[:1], yes[:1], yes[:1], categories[:1], export()) is None
    found = modality_drop("v", image, text, yes, yes, yes, yes, categories, export("image"))
    assert found is not None
    assert found.without_text == found.whole  # the words were not in it
    assert (found.without_image.same_category, found.without_image.itself) == (0.0, 0.0)  # nothing is left to search with
    found = modality_drop("v", image, text, yes, yes, yes, yes, categories, export().model_copy(update={"text_weight": 0.0}))
    assert found is not None
    assert found.without_image.itself == 0.0
