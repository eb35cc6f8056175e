"""The adapter's stage in several processes: one result, one voice."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file

from sda_core.artifacts import ITEMS, Workspace, write_json
from sda_core.data.images import coverage_path
from sda_core.image_store import ImageRow, shard_path, write_shard

CHILD = Path(__file__).with_name("train_adapter_process.py")
NUM_ITEMS = 10


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """What the stages before leave behind, for ten items of which two cannot be told apart."""
    root = tmp_path_factory.mktemp("shop")
    workspace = Workspace(root)
    ids = np.arange(1, NUM_ITEMS + 1, dtype=np.int32)
    shown = [min(number, NUM_ITEMS - 1) for number in ids.tolist()]
    columns: dict[str, Any] = {
        "item_id": ids,
        "raw_item_id": [f"i{number:02d}" for number in ids],
        "title": [f"tea pot {'very ' * (number % 4)}{number}" for number in shown],
        "brand": ["Ωmega"] * NUM_ITEMS,
        "price": [""] * NUM_ITEMS,
        "categories": [["pots"]] * NUM_ITEMS,
        "features": [[]] * NUM_ITEMS,
        "description": [""] * NUM_ITEMS,
        "image_references": [[]] * NUM_ITEMS,
        "has_metadata": [True] * NUM_ITEMS,
    }
    ITEMS.write(pl.DataFrame(columns, schema=dict(ITEMS.columns)), workspace.items)
    rows = []
    for number, seed in zip(ids.tolist(), shown, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append(ImageRow(number, f"i{number:02d}", "ok", buffer.getvalue(), 28, 28))
    write_shard(shard_path(workspace.images, 0), rows, [""] * NUM_ITEMS)
    write_json(coverage_path(workspace.images), {"ok": NUM_ITEMS})
    params = YAML(typ="safe", pure=True).load(repository / "params.yaml")
    params["runtime"] = {"device": "cpu", "num_threads": 1, "num_trainings": 2}
    params["backbone"] = YAML(typ="safe", pure=True).load(repository / "conf" / "backbone" / "tiny.yaml")
    params["train_adapter"]["training"] |= {
        "num_steps": 3, "batch_size": 8, "micro_batch_size": 2, "warmup_steps": 1, "checkpoint_every": 1, "log_every": 1,
        "learning_rate": 2e-4,  # what the tolerances below are in proportion to
    }  # fmt: skip
    params["train_adapter"]["loss"] |= {"false_negatives": "share"}
    YAML(typ="safe", pure=True).dump(params, root / "params.yaml")
    return root


def said(root: Path, count: int) -> list[list[str]]:
    return [(root / f"said-{index}").read_text(encoding="utf-8").splitlines() for index in range(count)]


def test_two_processes_write_what_one_writes(run_processes: Any, shop: Path, tmp_path: Path) -> None:
    """The two meet at another address of the loopback range."""
    found = {}
    for count in (1, 2):
        root = tmp_path / str(count)
        shutil.copytree(shop, root)
        assert run_processes(CHILD, count, root, "sda", address="127.0.0.2") == [0] * count, said(root, count)
        folder = Workspace(root).adapter("sda")
        curve = pl.read_csv(folder / "loss.tsv", separator="\t")
        found[count] = load_file(folder / "adapter_model.safetensors"), curve
        assert not (root / ".resume" / "train_adapter" / "sda").exists()
        main, *others = said(root, count)
        assert [line for line in main if "train-adapter: variant sda" in line]
        assert others == [[]] * (count - 1)
    (alone, curve), (shared, shared_curve) = found.values()
    assert alone.keys() == shared.keys()
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=0, atol=5e-6)
    assert len(curve) == 3
    assert {"teacher_entropy", "retrieval", "uniformity_image"} <= set(curve.columns)
    np.testing.assert_allclose(shared_curve.to_numpy(), curve.to_numpy(), rtol=1e-3, atol=1e-5)


def test_they_fail_together_with_one_line(run_processes: Any, shop: Path, tmp_path: Path) -> None:
    root = tmp_path / "shop"
    shutil.copytree(shop, root)
    assert run_processes(CHILD, 2, root, "nobody") == [1, 1]
    main, other = said(root, 2)
    assert [line for line in main if line.startswith("sda train-adapter: error: --variant: unknown trained variant 'nobody'")]
    assert other == []
    (root / "params.yaml").write_text("train_adapter: 3\n")
    assert run_processes(CHILD, 2, root, "sda") == [1, 1]
    assert "params.yaml" in said(root, 2)[0][0]
    assert said(root, 2)[1] == []
