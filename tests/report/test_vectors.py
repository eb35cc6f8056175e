"""Geometry, conflicting items, maps, gates and experiments: against numbers known beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sda_core.artifacts import write_json
from sda_core.errors import ArtifactError
from sda_core.report.experiments import experiments
from sda_core.report.gates import gate_map
from sda_core.report.vectors import conflicting, geometry, project, sampled, uniformity


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
    write_json(folder / "adapter_config.json", {"modalities": ["image", "text"]})
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
    with pytest.raises(ArtifactError, match="no readable safetensors"):
        gate_map("lora", tmp_path)


def test_experiments_are_shown_as_they_lie_there(tmp_path: Path) -> None:
    assert experiments(tmp_path / "nowhere") == ()
    for name, content in {
        "a/table.tsv": "variant\tndcg\n" + "sda\t0.5\n" * 41,
        "a/plot.png": "png",
        "broken.csv": 'a,b\n1,2,3\n"',
        "positions/x.tsv": "a\n1\n",
        "script.py": "print()",
        "large.svg": "x" * 400_001,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = {experiment.name: experiment for experiment in experiments(tmp_path)}
    assert list(found) == ["a/plot.png", "a/table.tsv", "broken.csv", "large.svg"]
    assert found["a/table.tsv"].columns == ("variant", "ndcg")
    assert len(found["a/table.tsv"].rows) == 40
    assert found["a/table.tsv"].remark == "1 more rows"
    assert found["broken.csv"].remark.startswith("cannot be read")
    assert found["large.svg"].remark.startswith("too large")
    plot = found["a/plot.png"].plot
    assert plot is not None
    assert plot.data == b"png"
