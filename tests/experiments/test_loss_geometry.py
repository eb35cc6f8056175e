"""Geometries of the loss on a tiny backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import loss_geometry, swatches
from experiments.study import mutual_retrieval_at_1
from experiments.workspaces import untrained
from sda_core import adapters, backbones, losses
from sda_core.alignment import check
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.errors import ConfigError
from sda_core.item_source import item_source
from sda_core.modalities import MODALITIES
from sda_core.params import LossParams, load_params


def test_every_geometry_is_a_valid_loss_section(repository: Path) -> None:
    section = load_params(repository / "params.yaml").train_adapter.loss
    for changes in (loss_geometry.GEOMETRIES | loss_geometry.LIMITS).values():
        LossParams.model_validate(section.model_dump() | changes)


def test_retrieval_counts_the_nearest_of_both_directions() -> None:
    image_ND = np.eye(3)
    assert mutual_retrieval_at_1(image_ND, image_ND) == 1.0
    assert mutual_retrieval_at_1(image_ND, np.roll(image_ND, 1, axis=0)) == 0.0
    text_ND = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.8, 0.6, 0.0]])
    assert mutual_retrieval_at_1(image_ND, text_ND) == pytest.approx(
        (1 + 2 / 3) / 2
    )  # the third image ties, the third text misses


def test_mismatched_items_have_the_text_of_another(on_tiny: Path) -> None:
    source = item_source(Workspace(on_tiny), load_params(on_tiny / "params.yaml").items)
    rows = np.arange(len(source))
    moved = loss_geometry.mismatched(source, seed=1)
    assert sorted(moved.texts(rows)) == sorted(source.texts(rows))
    unlike = [one != other for one, other in zip(moved.texts(rows), source.texts(rows), strict=True)]
    assert np.mean(unlike) > 0.9  # two items may have equal texts


def test_a_constant_makes_all_embeddings_alike(on_tiny: Path) -> None:
    params = load_params(on_tiny / "params.yaml")
    source = item_source(Workspace(on_tiny), params.items)
    device = torch.device("cpu")
    backbone = backbones.build(params.backbone, device)
    model = untrained(backbone, params.train_adapter.moda, MODALITIES, 1)
    shifted = loss_geometry.Shifted(backbone, 50.0, model, source, device)
    inputs = backbone.text_inputs(source.texts(np.arange(8)))
    with torch.no_grad(), adapters.modality(model, "text"):
        plain_BD, with_constant_BD = backbone.encode(model, inputs), shifted.encode(model, inputs)
    constant_BD = with_constant_BD - plain_BD
    assert torch.allclose(constant_BD, constant_BD[:1].expand_as(constant_BD), atol=1e-4)
    unit_BD = torch.nn.functional.normalize(with_constant_BD, dim=-1)
    assert float((unit_BD @ unit_BD.T).min()) > 0.99
    assert shifted.info == backbone.info  # everything else is the backbone's


def test_refused_is_what_check_stop_would_refuse(repository: Path) -> None:
    section = load_params(repository / "params.yaml").train_adapter
    training = section.training
    generator = torch.Generator().manual_seed(1)
    constant_D = 50 * torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)

    def refused(geometry: str) -> bool:
        loss = LossParams.model_validate(section.loss.model_dump() | (loss_geometry.GEOMETRIES | loss_geometry.LIMITS)[geometry])
        criterion = losses.build(loss)
        image_BD, text_BD = (torch.randn(training.batch_size, 8, generator=generator) + constant_D for _ in range(2))
        groups_B = torch.arange(training.batch_size)
        criterion.calibrate([(image_BD, text_BD, groups_B)])
        before = check.measure([check.Batch(image_BD, text_BD, groups_B, (image_BD, text_BD))], criterion)
        return loss_geometry._is_stopped(before, training, loss)

    assert {geometry for geometry in loss_geometry.GEOMETRIES if refused(geometry)} == {"cosine", "base", "keep"}
    assert {geometry for geometry in ("centred_12", "centred_24", "detached_12", "trained_2") if refused(geometry)} == {
        "centred_24",
        "detached_12",
        "trained_2",
    }


def test_swatches_show_what_they_are_said_to_show() -> None:
    source, truth = swatches.source(), swatches.attributes()
    rows = np.arange(len(source))
    assert len(rows) == swatches.LEVELS ** len(swatches.COLOURS)
    assert source.has_image.all()
    assert len({source.store.get(int(item_id)) for item_id in source.item_ids}) == len(rows)
    for row, (text, image) in enumerate(zip(source.texts(rows), source.images(rows), strict=True)):
        assert {*text} == {letters[truth[name][row]] for name, letters in swatches.LETTERS.items()}
        assert image is not None
        brightest_C = np.asarray(image).max(axis=(0, 1))
        assert brightest_C.tolist() == [truth[name][row] * 51 for name in swatches.COLOURS]
        sums_W = np.asarray(image).sum(axis=(0, 2), dtype=np.int64)
        if sums_W.max() > 0:  # a black one shows no stripes
            assert set(np.flatnonzero(sums_W < sums_W.max()) % swatches.MARKS) == {truth["stripe"][row]}
    assert truth.keys() == swatches.SHOWN_BY.keys()


def test_fused_probes_gain_from_the_base_what_the_adapted_embeddings_lost(repository: Path) -> None:
    items = loss_geometry.of_swatches()
    generator = np.random.default_rng(1)
    export = load_params(repository / "params.yaml").export_embeddings

    def known(*names: str) -> torch.Tensor:
        columns = [np.eye(truth.max() + 1)[truth] for truth in (items.attributes[name] for name in names)]
        vectors_ND = 0.1 * generator.normal(size=(len(items.rows), 28))
        known_ND = np.concatenate(columns, axis=1)
        vectors_ND[:, : known_ND.shape[1]] += known_ND
        return torch.tensor(vectors_ND, dtype=torch.float32)

    base = {"image": known("red", "green", "blue", "stripe"), "text": known("red", "green", "blue", "mark")}
    adapted = {"image": known("red", "green", "blue"), "text": known("red", "green", "blue", "mark")}
    before = loss_geometry.measure(base, base, items, export)
    after = loss_geometry.measure(adapted, base, items, export)
    assert before["own image"] == before["own text"] == before["probes image"] == 1.0
    assert after["own image"] < 0.3
    assert after["own text"] == 1.0
    assert after["probe fused stripe"] < 0.3
    assert after["probe with base stripe"] > 0.9
    assert after["own with base"] > after["own fused"] + 0.2


@pytest.mark.slow
def test_swatches_need_no_shop(on_tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(on_tiny)
    monkeypatch.setattr(loss_geometry, "item_source", None)
    options = {"geometries": Names(("cosine", "centred")), "seeds": Numbers((1,)), "num_steps": Numbers((1,))}
    loss_geometry.main("try-swatches", **options, shift=4.0, swatches=True)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny_qwen2_5_vl | c")][:2]
    assert [(row[1], row[-1]) for row in rows] == [("cosine", "1 of 1 |"), ("centred", "0 of 1 |")]  # what the check refuses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The least populated class in y:UserWarning")  # a tiny shop has rare attributes
def test_a_finished_cell_is_kept(on_tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(on_tiny)
    options = {"geometries": Names(("cosine", "mismatched")), "seeds": Numbers((1,)), "num_steps": Numbers((1, 2))}
    loss_geometry.main("try", **options)
    first = capsys.readouterr().out
    assert first.count("| cosine |") == 4  # of two tables
    assert first.count("| mismatched |") == 4
    assert first.count("| none |") == 2
    files = {path: path.read_bytes() for path in (on_tiny / "experiments" / "runs" / "loss_geometry-try").rglob("*.json")}
    assert len(files) == 5  # the backbone as it is, and two numbers of steps of two geometries

    def refuse(*_: object) -> None:
        raise AssertionError("a finished cell was trained again")

    monkeypatch.setattr(loss_geometry, "untrained", refuse)
    loss_geometry.main("try", **options)
    assert capsys.readouterr().out == first
    assert {path: path.read_bytes() for path in files} == files


def test_steps_have_to_ascend(on_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(on_tiny)
    with pytest.raises(ConfigError, match="ascending"):
        loss_geometry.main("try", num_steps=Numbers((3, 2)))
