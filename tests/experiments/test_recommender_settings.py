"""Candidates for a recommender's settings, in tiny shops: what is trained, what is kept, what the table says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import recommender_settings
from sda_core.artifacts import Workspace, read_json
from sda_core.cli.scripts import Names, Numbers
from sda_core.errors import ConfigError
from sda_core.params import load_params

TINY = ["dataset.num_users=100", "dataset.num_items=60", "dataset.image_side=16"]
QUICK = "max_epochs=2,eval_every=1"


def run(root: Path, *candidates: str) -> str:
    recommender_settings.main(
        "small",
        "vbpr",
        [QUICK, *candidates],
        Names(("oracle", "random")),
        Names(recommender_settings.SHOPS),
        root,
        Numbers((1, 2)),
    )
    return (root / "experiments" / "results" / "recommender_settings-small" / "table.md").read_text()


def test_candidates(shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    shops = {"one": TINY, "other": [*TINY, "dataset.seed=5"]}
    monkeypatch.setattr(recommender_settings, "SHOPS", shops)
    params = load_params(shop.root / "params.yaml").train_recommender.vbpr
    other = f"{QUICK},learning_rate=0.5,content_regularization=7"
    text = run(shop.root, other)
    folder = shop.root / "experiments" / "runs" / "recommender_settings"
    one = next(path for path in folder.iterdir() if path.name.startswith("one-"))
    # with the settings as they are and two candidates: ids are not trained again for what only content has a use for
    kept = {variant: list((one / "validation" / "vbpr" / variant).glob("*.json")) for variant in ("id", "oracle", "random")}
    assert {variant: len(files) for variant, files in kept.items()} == {"id": 6, "oracle": 6, "random": 6}
    assert not list(one.rglob("*.safetensors"))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {other} | one")]
    changed = recommender_settings.changed(params, other)
    assert (changed.learning_rate, changed.content_regularization, changed.max_epochs) == (0.5, 7.0, 2)
    ids = [read_json(path, "kept")["ndcg"] for path in kept["id"]]
    assert len({len(ndcg) for ndcg in ids}) == 1
    assert any(f"{np.mean([ids[i], ids[j]]):.4f}" == rows[0][2].split()[0] for i in range(6) for j in range(i))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    run(shop.root, other, f"{QUICK},learning_rate=0.5")  # the same ids as the candidate before
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    assert {path: time for path, time in after.items() if path in before} == before
    assert sum("/vbpr/" in str(path) for path in after.keys() - before.keys()) == 2 * 2 * 2  # shops, oracle and random, seeds


def test_mistakes_are_one_line(shop: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"--try: expected NAME=VALUE, with NAME one of .*learning_rate.* \(got 'rate=1'\)"):
        run(shop.root, "rate=1")
    with pytest.raises(ConfigError, match="--try: Input should be greater than 0"):
        run(shop.root, "learning_rate=-1")
    with pytest.raises(ConfigError, match="--shops: expected some of default, other-seed, shared"):
        recommender_settings.main("m", "vbpr", [], Names(("oracle",)), Names(("mine",)), shop.root)
