"""Code that experiments share: item vectors for a recommender, changed sections, and a folder that is no project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import cross_modal_search, families, oracles, sweep, train_seeds, workspaces
from experiments.recommender_settings import changed
from sda_core.cli.scripts import Names
from sda_core.errors import ConfigError
from sda_core.params import load_params


def test_the_row_of_the_padding_is_zero_and_the_others_are_those_of_the_items() -> None:
    vectors_IF = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    made = workspaces.padded(vectors_IF)
    assert made.dtype == np.float32
    assert not made[0].any()
    np.testing.assert_array_equal(made[1:], vectors_IF)


def test_a_changed_section_names_the_option_or_the_param(repository: Path) -> None:
    params = load_params(repository / "params.yaml")
    section = params.train_recommender.sasrec
    assert workspaces.changed_section(section, {"max_epochs": 3}) == section.model_copy(update={"max_epochs": 3})
    with pytest.raises(ConfigError, match=r"^params\.yaml: train_recommender\.sasrec\.max_epochs: Input should be greater"):
        workspaces.changed_section(section, {"max_epochs": -1})
    with pytest.raises(ConfigError, match=r"^params\.yaml: train_recommender\.sasrec: id_dropout needs representation"):
        workspaces.changed_section(section, {"representation": "content", "id_dropout": 0.25})
    with pytest.raises(ConfigError, match=r"^--try: id_dropout needs .* \(got 'representation=content,id_dropout=0\.25'\)$"):
        changed(section, "representation=content,id_dropout=0.25")
    assert changed(params.export_embeddings, "fused_dim=4").fused_dim == 4


def test_a_folder_that_is_no_project_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = (
        rf"expected a project folder, with params\.yaml \(got {tmp_path}, which has none\); run inside the project, or name its"
    )
    with pytest.raises(ConfigError, match=f"^--root: {told} folder with --root$"):
        cross_modal_search.main("n")
    with pytest.raises(ConfigError, match=f"^--root: {told}"):
        oracles.main("n", Names(("sasrec",)))
    with pytest.raises(ConfigError, match=f"^--source: {told} folder with --source$"):
        sweep.main("n", Names(("1",)), param="train_adapter.moda.r")
    with pytest.raises(ConfigError, match=f"^--source: {told}"):
        train_seeds.main("n")
    with pytest.raises(ConfigError, match=f"^--source: {told}"):
        families.main("n")
    assert not list(tmp_path.iterdir())
