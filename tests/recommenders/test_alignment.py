"""The paper's alignment of projected vectors to the item table of the same recommender trained on ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sda_core.errors import ArtifactError, TrainingError
from sda_core.recommenders import build, losses, read_item_table, training_data
from sda_core.traits import aligns_to_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def id_table(fitted, tmp_path_factory) -> np.ndarray:
    """What the pipeline hands over: the table of the recommender that was trained on ids."""
    folder = tmp_path_factory.mktemp("id")
    fitted("sasrec-id")[0].save(folder)
    return read_item_table(folder)


def _distance(model, reference_ID: torch.Tensor) -> float:
    """The alignment loss over all items, each once."""
    items = torch.arange(1, len(reference_ID))
    with torch.no_grad():
        return losses.soft_target_contrast(reference_ID[items], model.items.projected(items), torch.ones(len(items)), 2.0).item()


@pytest.mark.parametrize("name", ["sasrec-content", "bert4rec-content"])
def test_alignment_pulls_the_projected_vectors_towards_the_table(name, id_table, checkerboard, recommender_cases, tmp_path):
    interactions, vectors = checkerboard
    # Products are not normalised, and those of a table after a few small steps are next to nothing: a long training's size.
    id_table = 20 * id_table
    reference = torch.from_numpy(id_table)
    found = {}
    for weight in (0.0, 5.0):
        params = recommender_cases[name][0].model_copy(update={"align_weight": weight, "max_epochs": 6, "dropout": 0.0})
        data = training_data(interactions, item_table=id_table if weight else None)
        model = build(params, data.num_users, data.num_items, vectors, seed=5)
        model.fit(data, checkpoint=tmp_path / f"{weight}", fingerprint="f", device=CPU)
        found[weight] = _distance(model, reference)
        assert not [key for key in model.state_dict() if "reference" in key]
    assert found[5.0] < found[0.0] - 0.01


@pytest.mark.parametrize("table", [None, np.zeros((25, 8), dtype=np.float32)], ids=["none", "of another width"])
def test_alignment_without_a_fitting_table_is_refused(table, checkerboard, recommender_cases, tmp_path):
    params = recommender_cases["sasrec-content"][0].model_copy(update={"align_weight": 0.1})
    model = build(params, 48, 24, checkerboard[1], seed=5)
    with pytest.raises(TrainingError, match=r"align_weight needs an item table of shape \(25, 16\)"):
        model.fit(training_data(checkerboard[0], item_table=table), checkpoint=tmp_path / "c", fingerprint="f", device=CPU)


def test_ids_alone_have_nothing_to_align(checkerboard, recommender_cases, tmp_path):
    params = recommender_cases["sasrec-content"][0].model_copy(update={"align_weight": 0.1, "max_epochs": 1})
    data = training_data(checkerboard[0])
    for section, vectors in ((params, None), (params.model_copy(update={"representation": "id"}), checkerboard[1])):
        model = build(section, 48, 24, vectors, seed=5)
        model.fit(data, checkpoint=tmp_path / "c", fingerprint="f", device=CPU)
        assert "items.ids.weight" in model.state_dict()
        assert not aligns_to_ids(params.model_copy(update={"representation": "id"}))


def test_a_model_without_an_item_table_says_so(fitted, tmp_path):
    fitted("sasrec-content")[0].save(tmp_path)
    with pytest.raises(ArtifactError, match="no learned item table"):
        read_item_table(tmp_path)
