"""Geometries of the loss on a tiny backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import loss_geometry
from experiments.study import mutual_retrieval_at_1
from experiments.workspaces import untrained
from sda_core import adapters, backbones
from sda_core.artifacts import Workspace
from sda_core.cli.scripts import Names, Numbers
from sda_core.errors import ConfigError
from sda_core.item_source import item_source
from sda_core.modalities import MODALITIES
from sda_core.params import LossParams, load_params


def test_every_geometry_is_a_valid_loss_section(repository: Path) -> None:
    section = load_params(repository / "params.yaml").train_adapter.loss
    for changes in loss_geometry.GEOMETRIES.values():
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The least populated class in y:UserWarning")  # a tiny shop has rare attributes
def test_a_finished_cell_is_kept(on_tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(on_tiny)
    options = {"geometries": Names(("cosine", "mismatched")), "seeds": Numbers((1,)), "num_steps": Numbers((1, 2))}
    loss_geometry.main("try", **options)
    first = capsys.readouterr().out
    assert first.count("| cosine |") == 2
    assert first.count("| mismatched |") == 2
    assert first.count("| none |") == 1
    files = {path: path.read_bytes() for path in (on_tiny / "experiments" / "runs").rglob("*.json")}
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
