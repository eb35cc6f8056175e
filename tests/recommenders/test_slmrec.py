"""SLMRec: its graph, its equations, its modalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sda_core.errors import DataError
from sda_core.params import RuntimeParams
from sda_core.recommenders import build, load, training_data
from sda_core.recommenders.features import standardise
from sda_core.recommenders.slmrec import SLMRec, graph, graph_product
from sda_core.runtime import prepare_torch

CPU = torch.device("cpu")
HISTORIES = [[1, 2, 3, 4, 5], [2, 2, 5, 1, 4], [5, 1, 2]]  # training: 1 2 3; 2 2 5; 5


def _modalities(num_items: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: np.concatenate([np.zeros((1, width)), random.normal(size=(num_items, width))]).astype(np.float32)
        for name, width in (("image", 3), ("text", 4))
    }


def _model(params, task: str, item_vectors, data=None, **changes) -> SLMRec:
    model = build(params.model_copy(update={"task": task, **changes}), 3, 5, item_vectors, seed=5)
    assert isinstance(model, SLMRec)
    if data is not None:
        model._graph = graph(data)
    return model


def test_the_graph_has_the_training_pairs_and_nothing_else(make_table):
    """No edge of validation or test, a repeated pair once, LightGCN's weights."""
    dense = graph(training_data(make_table(HISTORIES))).to_dense()
    pairs = {(1, 1), (1, 2), (1, 3), (2, 2), (2, 5), (3, 5)}
    user_degree, item_degree = {1: 3, 2: 2, 3: 1}, {1: 1, 2: 2, 3: 1, 5: 2}
    expected = torch.zeros(4 + 6, 4 + 6)
    for user, item in pairs:
        expected[user, 4 + item] = expected[4 + item, user] = (user_degree[user] * item_degree[item]) ** -0.5
    torch.testing.assert_close(dense, expected)


def test_scores_are_the_equation(make_table, recommender_cases, tmp_path):
    data = training_data(make_table(HISTORIES))
    model = _model(recommender_cases["slmrec"][0], "fac", _modalities(), max_epochs=2)
    model.fit(data, checkpoint=tmp_path / "c", fingerprint="f", device=CPU)
    adjacency = graph(data).to_dense()
    weights = model.state_dict()
    items = [weights["item_inputs.weight"]]
    items += [torch.from_numpy(standardise(v)) @ weights[f"projections.{n}.weight"].T for n, v in _modalities().items()]
    channels = []
    for item_ID in items:
        layer = torch.cat([weights["user_inputs.weight"], item_ID])
        layers = [layer, adjacency @ layer, adjacency @ adjacency @ layer]
        channels.append(sum(layers) / 3)
    everything = torch.cat(channels, dim=1)
    users = everything[:4] @ weights["fuse_users.weight"].T + weights["fuse_users.bias"]
    found = users @ (everything[4:] @ weights["fuse_items.weight"].T + weights["fuse_items.bias"]).T
    scores = model.score(torch.arange(4), torch.zeros((4, 0), dtype=torch.int64))
    torch.testing.assert_close(scores[:, 1:], found[:, 1:], rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved", _modalities(), CPU)
    assert torch.equal(again.score(torch.arange(4), torch.zeros((4, 0), dtype=torch.int64)), scores)


@pytest.mark.parametrize(("task", "has_vectors", "is_zero"), [
    ("fd", True, False), ("fm", True, False), ("fd+fm", True, False), ("fac", True, False),
    ("fd", False, False), ("fm", False, True), ("fd+fm", False, False), ("fac", False, True),
])  # fmt: skip
def test_tasks_reach_the_tables_and_need_what_they_say(task, has_vectors, is_zero, make_table, recommender_cases):
    """Without vectors there is one channel: nothing to mask, nothing to hold the ids against."""
    data = training_data(make_table(HISTORIES))
    model = _model(recommender_cases["slmrec"][0], task, _modalities() if has_vectors else None, data)
    torch.manual_seed(0)
    model.train()
    loss = model.task(model.spread(model.inputs(), 0.0), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3, 5]))
    assert (loss.item() == 0.0) == is_zero
    if not is_zero:
        loss.backward()
        assert model.item_inputs.weight.grad is not None
        reached = [model.item_inputs.weight.grad, *(p.weight.grad for p in model.projections.values())]
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in reached)


def test_masking_takes_two_different_channels(make_table, recommender_cases):
    """With dropout out of play, a view differs from the other in two channels, and from the whole in one."""
    data = training_data(make_table(HISTORIES))
    model = _model(recommender_cases["slmrec"][0], "fm", _modalities(), data)
    seen = []
    spread = model.spread

    def watched(inputs, dropout):
        assert dropout == 0.0
        seen.append([bool((items == 0).all()) for _, items in inputs])
        return spread(inputs, dropout)

    model.spread = watched
    for seed in range(20):
        torch.manual_seed(seed)
        model.task([], torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert all(sum(view) == 1 for view in seen)
    assert all(one != two for one, two in zip(seen[::2], seen[1::2], strict=True))
    assert {view.index(True) for view in seen} == {0, 1, 2}


def test_modalities_of_different_items_are_refused(recommender_cases):
    vectors = _modalities()
    with pytest.raises(DataError, match=r"one row per item in every modality \(got image \(6, 3\), text \(5, 4\)\)"):
        build(recommender_cases["slmrec"][0], 3, 5, {**vectors, "text": vectors["text"][:-1]}, seed=5)


def test_other_recommenders_take_modalities_side_by_side(recommender_cases):
    model = build(recommender_cases["vbpr"][0], 3, 5, _modalities(), seed=5)
    assert model.vector_width == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_bits_twice_on_a_gpu(make_table, recommender_cases, tmp_path):
    """Torch's product of one sparse matrix is not, in its deterministic mode either."""
    device = prepare_torch(RuntimeParams(device="cuda", num_threads=0, num_trainings=1))
    random = np.random.default_rng(0)
    data = training_data(make_table([random.integers(1, 301, 40).tolist() for _ in range(2000)]))
    fitted = []
    for name in ("first", "second"):
        torch.manual_seed(0)
        params = recommender_cases["slmrec"][0].model_copy(
            update={"task": "fac", "max_epochs": 3, "hidden_size": 32, "batch_size": 8192}
        )
        model = build(params, 2000, 300, _modalities(300), seed=5)
        model.fit(data, checkpoint=tmp_path / name, fingerprint="f", device=device)
        fitted.append({key: value.cpu() for key, value in model.state_dict().items()})
    assert all(torch.equal(value, fitted[1][key]) for key, value in fitted[0].items())
    on_cpu, on_gpu = (graph_product(graph(data).to(where), torch.ones(2302, 3, device=where)).cpu() for where in ("cpu", device))
    torch.testing.assert_close(on_gpu, on_cpu)
