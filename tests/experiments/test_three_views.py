"""Three views of an item, on a tiny shop with a tiny backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from experiments import gradient_conflict, three_views
from sda_core import adapters, backbones, losses
from sda_core.alignment.inputs import MODALITIES
from sda_core.artifacts import ITEMS, Workspace
from sda_core.cli.scripts import Numbers
from sda_core.losses import cmsa_many
from sda_core.params import Params, load_params


def test_every_arm_is_measured_before_and_after(on_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"root": on_tiny, "seeds": Numbers((1,)), "num_held_out": 16}
    three_views.main("three", **asked)
    assert (on_tiny / "experiments" / "results" / "three_views-three" / "plot.png").stat().st_size > 5000
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| lora", "| moda"))]
    assert len(rows) == 8
    folder = on_tiny / "experiments" / "views" / "three"
    found = pl.concat([pl.read_parquet(path) for path in folder.glob("*/*.parquet")])
    assert len(found) == 4 * 2 * 3
    before = found.filter(pl.col("when") == "before")
    assert before.filter(pl.col("rung").str.starts_with("lora"))["cosine"].is_between(-1, 1).all()
    # before training both sets of views start alike; training on another set ends elsewhere
    starts = {rung: before.filter(rung=rung)["cosine"].to_list() for rung in ("moda, 2 views", "moda, 3 views")}
    assert starts["moda, 2 views"] == pytest.approx(starts["moda, 3 views"], abs=1e-5)
    panels = three_views.intervals(found)
    assert len(panels) == 2 * 3
    assert next(mean for mean, _, _ in panels["retrieval@1: image, words"].values()) == pytest.approx(
        before.filter(rung="lora, 2 views", one="image", other="words")["retrieval"][0]
    )
    after = {rung: found.filter(rung=rung, when="after")["cosine"].to_list() for rung in starts}
    assert after["moda, 2 views"] != pytest.approx(after["moda, 3 views"], abs=1e-6)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.parquet")}
    three_views.main("three", **asked)
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.parquet")}


def test_words_and_attributes_share_no_field(on_tiny: Path) -> None:
    params = load_params(on_tiny / "params.yaml")
    views = three_views.Views(Workspace(on_tiny), params, None)  # type: ignore[arg-type]
    titles = ITEMS.read(Workspace(on_tiny).items)["title"]
    row = int(titles.str.len_chars().arg_max() or 0)
    assert titles[row] in views.texts["words"][row]
    assert titles[row] not in views.texts["attributes"][row]
    assert "categories" in views.texts["attributes"][row]


def test_retrieval_at_1() -> None:
    rows = torch.eye(4)
    assert three_views.retrieval_at_1(rows, rows) == 1.0
    assert three_views.retrieval_at_1(rows, rows[[1, 0, 2, 3]]) == 0.5


@pytest.fixture
def adapted(on_tiny: Path, request: pytest.FixtureRequest) -> tuple[Params, backbones.Backbone, nn.Module]:
    """A tiny backbone with an adapter of some size; its teacher is the backbone."""
    params = load_params(on_tiny / "params.yaml")
    section = params.train_adapter
    section = section.model_copy(update={"loss": section.loss.model_copy(update={"teacher_source": "base"})})
    backbone = backbones.build(params.backbone, torch.device("cpu"))
    layers = backbone.adapter_pattern("language"), backbone.num_adapter_layers("language")
    model = adapters.build(backbone.model, section.moda, request.param, *layers, seed=1).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "moda_B" in name:
            nn.init.normal_(parameter, std=1.0)
    return params.model_copy(update={"train_adapter": section}), backbone, model


@pytest.mark.parametrize("adapted", [three_views.VIEWS], ids=["views"], indirect=True)
def test_the_base_teaches_views(on_tiny: Path, adapted: tuple[Params, backbones.Backbone, nn.Module]) -> None:
    params, backbone, model = adapted
    loss = params.train_adapter.loss
    views, rows = three_views.Views(Workspace(on_tiny), params, backbone), np.arange(5)
    with torch.no_grad():
        own = views.vectors(model, three_views.VIEWS, rows)
        with model.disable_adapter():  # type: ignore[operator]
            base = views.vectors(model, three_views.VIEWS, rows)
        loss = loss.model_copy(update={"center": "none"})
        value = views.criterion(model, three_views.VIEWS, rows, loss)(own)
        torch.testing.assert_close(value, cmsa_many(own, loss.temperature, taught_by=base))
        itself = views.criterion(model, three_views.VIEWS, rows, loss.model_copy(update={"teacher_source": "adapted"}))(own)
        centred = views.criterion(model, three_views.VIEWS, rows, loss.model_copy(update={"center": "batch"}))(own)
        apart, base_apart = ({view: x_BD - x_BD.mean(dim=0) for view, x_BD in of.items()} for of in (own, base))
        torch.testing.assert_close(centred, cmsa_many(apart, loss.temperature, taught_by=base_apart))
    assert abs(itself.item() - value.item()) > 1e-4


@pytest.mark.parametrize("adapted", [MODALITIES], ids=["modalities"], indirect=True)
def test_the_base_teaches_where_gradients_are_compared(
    on_tiny: Path, adapted: tuple[Params, backbones.Backbone, nn.Module]
) -> None:
    params, backbone, model = adapted
    source = three_views.item_source(Workspace(on_tiny), params.items)
    held_out = gradient_conflict.draw(source, 1, 1, 6)
    found = {}
    for teacher_source in ("adapted", "base"):
        changes = {"teacher_source": teacher_source, "center": "none"}
        criterion = losses.build(params.train_adapter.loss.model_copy(update=changes))
        (products,) = gradient_conflict.products(backbone, model, criterion, source, held_out)
        found[teacher_source] = products.cosine()
    assert not torch.allclose(found["adapted"], found["base"], atol=1e-4)
