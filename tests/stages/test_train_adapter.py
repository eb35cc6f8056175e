"""The adapter's stage in several processes: one result, one voice."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import typer
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file

from sda_core import costs
from sda_core.alignment import training
from sda_core.alignment.check import Figures
from sda_core.alignment.inputs import chunks_of
from sda_core.artifacts import ITEMS, Workspace, write_json
from sda_core.cli.check_adapter import FIGURES, check_adapter
from sda_core.errors import ConfigError, StorageError
from sda_core.fetch.images import coverage_path
from sda_core.image_store import ImageRow, shard_path, write_shard
from sda_core.items import ItemSource
from sda_core.params import load_params
from sda_core.processes import Processes
from sda_core.steps import train_adapter as steps
from stages.train_adapter import train_adapter
from tests.tolerances import a_tenth_of_a_step

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
        "learning_rate": 2e-4,
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
        torch.testing.assert_close(shared[name], value, **a_tenth_of_a_step(2e-4))
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


def test_the_last_line_counts_the_steps_and_not_the_rows_of_the_curve(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "shop"
    shutil.copytree(shop, root)
    path, yaml = root / "params.yaml", YAML(typ="safe", pure=True)
    params = yaml.load(path)
    params["train_adapter"]["training"] |= {"num_steps": 7, "checkpoint_every": 2, "log_every": 5}
    yaml.dump(params, path)
    caplog.set_level("INFO", "stages")

    def counts() -> str:
        return next(text for text in reversed(caplog.messages) if text.startswith("train-adapter: variant sda"))

    train_adapter("sda", root)
    assert ", steps 7, last loss" in counts()
    assert "resumed" not in counts()
    assert len(pl.read_csv(Workspace(root).adapter("sda") / "loss.tsv", separator="\t")) == 3

    saved, save_run = [], training.save_run

    def fails_at_the_third(*arguments: Any) -> None:
        saved.append(arguments)
        if len(saved) == 3:
            raise StorageError("checkpoint", "cannot be written (No space left on device)", "free some space")
        save_run(*arguments)

    def fails() -> None:
        saved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(training, "save_run", fails_at_the_third)
            with pytest.raises(typer.Exit):
                train_adapter("sda", root)

    fails()
    train_adapter("sda", root)
    assert ", steps 7, last loss" in counts()
    assert "resumed after step 4, steps of this run 3" in counts()
    kept = costs.read(Workspace(root).costs)[-1]
    assert kept.counts["steps"] == 7
    assert kept.speed == pytest.approx((3 / kept.seconds, "steps"))
    fails()
    (tmp_path / "edited.py").write_text("another version of the code")
    monkeypatch.setattr(steps, "sources_of", lambda *_: [tmp_path / "edited.py"])
    train_adapter("sda", root)
    assert ", steps 7, last loss" in counts()
    assert "resumed" not in counts()


@pytest.mark.parametrize(
    ("num_items", "num_images", "num_texts", "batch_size", "expected"),
    [
        (25, 0, 25, 32, "train_adapter: 0 of 25 items have an image; an adapter needs at least 2 items with image and text; "
                        "give the items images (docs/data.md), or train no adapter: dvc exp run -S ladder=zero_shot"),
        (3, 1, 3, 2, "train_adapter: 1 of 3 items have an image"),
        (3, 3, 1, 2, "train_adapter: 1 of 3 items have image and text"),
        (25, 25, 25, 32, "train_adapter.training.batch_size: should be at most 25, the number of items with an image (got 32); "
                         "set it to 25 or less"),
        (40, 25, 40, 32, "set it to 25 or less, or set items.missing_image to placeholder, which gives every item an image"),
        (40, 40, 25, 32, "the number of items with image and text (got 32); set it to 25 or less, "
                         "or set items.missing_text to placeholder, which gives every item a text"),
    ],
)  # fmt: skip
def test_too_few_items_for_a_batch(num_items: int, num_images: int, num_texts: int, batch_size: int, expected: str) -> None:
    class SomeImages:
        def get(self, item_id: int) -> bytes | None:
            raise AssertionError

        def status(self, item_id: int) -> str:
            return "ok" if item_id <= num_images else "missing_url"

    has_text, ids = np.arange(num_items) < num_texts, np.arange(1, num_items + 1)
    source = ItemSource(ids, [""] * num_items, "", "", SomeImages(), "text_only", has_text, "image_only")
    text = str(training.too_few_items(source, batch_size))
    assert expected in text
    assert ("placeholder" in text) == (2 <= min(num_images, num_texts) < num_items)


@pytest.mark.parametrize(
    ("batch_size", "micro", "count", "expected"),
    [
        (8, 3, 2, "batch_size 8 in chunks of micro_batch_size 3 should give a multiple of 2 chunks, as many for each process of "
                  "this launch (got 3); set micro_batch_size to 2, or start another number of processes"),
        (8, 8, 2, "(got 1); set micro_batch_size to 7, or start"),
        (8, 100, 4, "(got 1); set micro_batch_size to 2, or start"),
        (3, 2, 4, "(got 2); raise batch_size to 4 or more, or start"),
        (3, None, 4, "batch_size should be at least 4, one item for each process of this launch (got 3); "
                     "raise batch_size, or start at most 3 processes"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_shared(batch_size: int, micro: int | None, count: int, expected: str, shop: Path) -> None:
    section = load_params(shop / "params.yaml").train_adapter.training
    section = section.model_copy(update={"batch_size": batch_size, "micro_batch_size": micro})
    with pytest.raises(ConfigError) as caught:
        chunks_of(section, Processes(0, count))
    assert expected in str(caught.value)
    proposed = re.search(r"set micro_batch_size to (\d+)", str(caught.value))
    if proposed:
        assert chunks_of(section.model_copy(update={"micro_batch_size": int(proposed[1])}), Processes(0, count))


# ------------------------------------------------------------------------------------------------ sda check-adapter
def changed_params(root: Path, **changes: Any) -> Path:
    params = YAML(typ="safe", pure=True).load(root / "params.yaml")
    params["train_adapter"]["loss"] |= changes.pop("loss", {})
    params["train_adapter"]["training"] |= changes
    path = root / "changed.yaml"
    YAML(typ="safe", pure=True).dump(params, path)
    return path


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_every_figure_is_explained() -> None:
    assert set(FIGURES) == {*Figures.__dataclass_fields__, "teacher_temperature"}


def test_it_prints_the_figures_of_the_training_and_writes_nothing(
    shop: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = changed_params(shop, loss={"teacher_targets": 3.0}, check="warn")
    before = files(shop)
    check_adapter("sda", shop, params)
    assert files(shop) == before
    printed = {line.split()[1].rstrip(":"): float(line.split()[0]) for line in capsys.readouterr().out.splitlines()}
    assert set(printed) == set(FIGURES)
    train_adapter("sda", shop, params)
    folder = Workspace(shop).adapter("sda")
    kept, details = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("check", "check_details"))
    for name, value in printed.items():
        found = details[name] if name in ("items", "teacher_temperature") else details["before"][name]
        assert value == pytest.approx(found, rel=1e-3), name
    assert kept["effective_targets_before"] == details["before"]["teacher_targets"]
    assert all(np.isfinite(value) for value in kept.values())


def test_a_teacher_with_nothing_to_teach_is_one_line(
    shop: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = changed_params(shop, loss={"temperature": 100.0}, check="stop")
    for command in (check_adapter, train_adapter):
        with pytest.raises(typer.Exit) as stopped:
            command("sda", shop, params)
        assert stopped.value.exit_code == 1
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("sda ")
        assert "params.yaml: train_adapter.loss: the teacher is nearly uniform (8 of 8 effective targets" in message
        assert "so training may make all vectors alike; set train_adapter.loss.teacher_targets to 2; or set" in message
    assert not (Workspace(shop).adapter("sda") / "unfinished").exists()
    train_adapter("sda", shop, changed_params(shop, loss={"temperature": 100.0}, check="warn", num_steps=1))
