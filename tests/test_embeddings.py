"""Item vectors: encoding with resume, fusion, and the parquet file."""

from __future__ import annotations

import importlib.util
import inspect
import io
import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA

from sda_core import adapters
from sda_core.artifacts import EMBEDDINGS
from sda_core.backbones import build
from sda_core.embeddings.blocks import EmbeddedItems
from sda_core.embeddings.encoding import embed, embed_items
from sda_core.embeddings.fusion import fuse
from sda_core.embeddings.table import embedding_metadata, write_embeddings, write_ids_only
from sda_core.errors import ConfigError, DataError
from sda_core.item_vectors import read_vectors
from sda_core.items import ItemSource
from sda_core.params import ExportParams, TinyQwen25VL, load_params
from sda_core.processes import processes
from sda_core.seed import derive
from tests.tolerances import up_to_rounding

MissingImage = Literal["placeholder", "text_only"]
Engine = Literal["local", "ray"]
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "kind": "tiny_qwen2_5_vl",
    "seed": 0,
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "vision_hidden_size": 16,
    "vision_depth": 2,
    "min_pixels": 784,
    "max_pixels": 6272,
    "max_text_tokens": 160,
    "pooling": "mean",
}


class NoisePictures:
    """A picture store: every item but each fifth has one, of its own size and noise."""

    def get(self, item_id: int) -> bytes | None:
        if item_id % 5 == 0:
            return None
        random = np.random.default_rng(item_id)
        height, width = random.integers(1, 120, 2)
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    def status(self, item_id: int) -> str:
        return "missing_url" if item_id % 5 == 0 else "ok"


class NoPictures(NoisePictures):
    def status(self, item_id: int) -> str:
        return "missing_url"


def export_params(**changes) -> ExportParams:
    values = {"engine": "local", "num_workers": 2, "batch_size": 4, "shard_rows": 8, "merge": True, "compile": False}
    values |= {"fusion": "late_concat_pca", "fused_dim": 8, "normalize": True}
    values |= {"image_weight": 1.0, "text_weight": 1.0, "balance": "none", "axis_scaling": "none", "with_base": False}
    return ExportParams(**(values | changes))


def shop(num_items: int, missing_image: MissingImage = "placeholder", order: np.ndarray | None = None) -> ItemSource:
    texts = [f"Item {place} " + "very " * (place * 7 % 13) + "good" for place in range(1, num_items + 1)]
    texts[2] = ""
    texts = texts if order is None else [texts[place] for place in order]
    return ItemSource(np.arange(1, num_items + 1), texts, "The picture shows a product.", "hash", NoisePictures(), missing_image)


def nothing(_modality: str):
    return nullcontext()


def encoded(source: ItemSource, backbone, resume: Path, fingerprint: str = "f", context=nothing, **changes) -> EmbeddedItems:
    result = embed_items(backbone, backbone.model, source, export_params(**changes), resume, fingerprint, CPU, context)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def backbone():
    return build(TinyQwen25VL(**TINY), CPU)


@pytest.fixture(scope="module")
def embedded(backbone, tmp_path_factory):
    return encoded(shop(30), backbone, tmp_path_factory.mktemp("resume"))


def assert_close(a: EmbeddedItems, b: EmbeddedItems) -> None:
    np.testing.assert_allclose(a.image_ID, b.image_ID, **up_to_rounding(b.image_ID))
    np.testing.assert_allclose(a.text_ID, b.text_ID, **up_to_rounding(b.text_ID))
    assert np.array_equal(a.item_ids, b.item_ids)


def assert_equal(a: EmbeddedItems, b: EmbeddedItems) -> None:
    assert a.image_ID.tobytes() == b.image_ID.tobytes()
    assert a.text_ID.tobytes() == b.text_ID.tobytes()
    assert np.array_equal(a.has_image, b.has_image)


# ---------------------------------------------------------------------------------------------- encoding
def test_each_row_is_its_item(backbone, embedded):
    source = shop(30)
    assert embedded.item_ids.tolist() == list(range(1, 31))
    assert embedded.image_ID.shape == embedded.text_ID.shape == (30, backbone.dim)
    assert embedded.image_ID.dtype == embedded.text_ID.dtype == np.float32
    batch = source.batch(np.array([17]))
    with torch.inference_mode():
        text = backbone.encode(backbone.model, backbone.text_inputs(batch.texts)).numpy()[0]
        image = backbone.encode(backbone.model, backbone.image_inputs(batch.images, source.image_prompt)).numpy()[0]
    np.testing.assert_allclose(embedded.text_ID[17], text, **up_to_rounding(text))
    np.testing.assert_allclose(embedded.image_ID[17], image, **up_to_rounding(image))
    distances = np.linalg.norm(embedded.text_ID[:, None] - embedded.text_ID[None], axis=2) + 9 * np.eye(30)
    assert distances.min() > 1e-3, "a mix-up of rows would show"


@pytest.mark.parametrize(
    "changes", [{"batch_size": 1}, {"batch_size": 30, "shard_rows": 100}, {"batch_size": 7, "shard_rows": 5}, {"shard_rows": 1}]
)
def test_batch_and_block_sizes_do_not_matter(backbone, embedded, tmp_path, changes):
    assert_close(encoded(shop(30), backbone, tmp_path, **changes), embedded)


def test_order_does_not_matter(backbone, embedded, tmp_path):
    order = np.random.default_rng(1).permutation(30)
    shuffled = encoded(shop(30, order=order), backbone, tmp_path)
    np.testing.assert_allclose(shuffled.text_ID, embedded.text_ID[order], **up_to_rounding(embedded.text_ID))


def test_twice_is_byte_equal(backbone, embedded, tmp_path):
    assert_equal(encoded(shop(30), backbone, tmp_path), embedded)


def test_placeholder_counts_as_a_picture(backbone, embedded):
    assert embedded.has_image.all()
    assert np.ptp(embedded.image_ID[4::5], axis=0).max() < 1e-5, "all items without a picture show the same one"
    assert np.abs(embedded.image_ID[4]).sum() > 0


def test_text_only_leaves_rows_out(backbone, embedded, tmp_path):
    result = encoded(shop(30, missing_image="text_only"), backbone, tmp_path, shard_rows=5)
    absent = np.arange(1, 31) % 5 == 0
    assert np.array_equal(result.has_image, ~absent)
    assert not result.image_ID[absent].any()
    np.testing.assert_allclose(result.image_ID[~absent], embedded.image_ID[~absent], **up_to_rounding(embedded.image_ID))
    np.testing.assert_allclose(result.text_ID, embedded.text_ID, **up_to_rounding(embedded.text_ID))


def test_no_picture_at_all(backbone, tmp_path):
    source = ItemSource(np.arange(1, 4), ["a", "b", "c"], "p", "h", NoPictures(), "text_only")
    result = encoded(source, backbone, tmp_path)
    assert not result.has_image.any()
    fused = fuse(result.image_ID, result.text_ID, result.has_image, np.array([1, 2, 3]), export_params(fusion="concat"))
    np.testing.assert_allclose(np.linalg.norm(fused, axis=1), 1, atol=1e-6)
    with pytest.raises(DataError, match="no item has a picture"):
        fuse(result.image_ID, result.text_ID, result.has_image, np.array([1]), export_params(fusion="image"))


def test_modality_is_set_around_its_passes(backbone, tmp_path):
    active: list[str] = []
    seen: list[tuple[str, bool]] = []

    @contextmanager
    def context(modality: str):
        active.append(modality)
        yield
        active.pop()

    def spy(_module, _arguments, named):
        seen.append((active[-1], "pixel_values" in named))

    hook = backbone.model.model.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        encoded(shop(10), backbone, tmp_path, context=context)
    finally:
        hook.remove()
    assert active == []
    assert {("image", True), ("text", False)} == set(seen)


@pytest.fixture
def adapted():
    """A backbone with an adapter that was trained: its weights are random."""
    fresh = build(TinyQwen25VL(**TINY), CPU)
    shipped = load_params(ROOT / "params.yaml").train_adapter.moda
    params = shipped.model_copy(update={"r": 4, "lora_alpha": 8.0, "num_experts": 2, "modality_dim": 8})
    pattern, num_layers = fresh.adapter_pattern("language"), fresh.num_adapter_layers("language")
    model = adapters.build(fresh.model, params, ["image", "text"], pattern, num_layers, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(derive(0, name)))
    return fresh, model


def test_adapted_model_in_its_modality(embedded, adapted, tmp_path):
    fresh, model = adapted

    def run(name: str, context) -> EmbeddedItems:
        result = embed_items(fresh, model, shop(30), export_params(), tmp_path / name, "f", CPU, context)
        assert result is not None
        return result

    with model.disable_adapter():
        assert_close(run("disabled", lambda name: adapters.modality(model, name)), embedded)
    trained = run("trained", lambda name: adapters.modality(model, name))
    assert np.abs(trained.text_ID - embedded.text_ID).max() > 0.01
    assert np.abs(trained.image_ID - embedded.image_ID).max() > 0.01
    swapped = run("swapped", lambda name: adapters.modality(model, {"image": "text", "text": "image"}[name]))
    assert np.abs(swapped.text_ID - trained.text_ID).max() > 1e-3, "the gate looks at the modality"


@pytest.mark.parametrize("sizes", [(1, 8), (3, 30), (32, 7)])
def test_merged_equals_unmerged_whatever_the_batches(adapted, tmp_path, sizes):
    """Written and loaded, as the stage does it; the base weights come back to the bit."""
    fresh, model = adapted
    unmerged = embed_items(
        fresh, model, shop(30), export_params(), tmp_path / "a", "f", CPU, lambda name: adapters.modality(model, name)
    )
    adapters.save(model, tmp_path / "adapter")
    again = build(TinyQwen25VL(**TINY), CPU)
    before = {name: weight.clone() for name, weight in again.model.state_dict().items()}
    loaded, context = adapters.load(again.model, tmp_path / "adapter", merge=True)
    changes = {"batch_size": sizes[0], "shard_rows": sizes[1]}
    merged = embed_items(again, loaded, shop(30), export_params(**changes), tmp_path / "b", "f", CPU, context)
    assert unmerged is not None
    assert merged is not None
    assert_close(merged, unmerged)
    after = {name.replace(".base_layer", ""): weight for name, weight in again.model.state_dict().items() if "moda_" not in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_merging_happens_once_a_modality_and_only_for_what_is_left(adapted, tmp_path):
    fresh, model = adapted
    entered: list[str] = []

    def context(name: str):
        entered.append(name)
        return adapters.merged_modality(model, name)

    for expected in (["image", "text"], []):
        entered.clear()
        embed_items(fresh, model, shop(30), export_params(), tmp_path, "f", CPU, context)
        assert entered == expected
    (tmp_path / "text-00001.safetensors").unlink()
    embed_items(fresh, model, shop(30), export_params(), tmp_path, "f", CPU, context)
    assert entered == ["text"]


def test_half_precision(adapted, tmp_path):
    """bfloat16 weights give float32 vectors near the full ones, merged or not."""
    fresh, model = adapted
    full, half = (
        embed_items(fresh, model.to(dtype), shop(12), export_params(), tmp_path / str(dtype), "f", CPU, context)
        for dtype, context in (
            (torch.float32, lambda name: adapters.modality(model, name)),
            (torch.bfloat16, lambda name: adapters.merged_modality(model, name)),
        )
    )
    for exact, rounded in ((full.image_ID, half.image_ID), (full.text_ID, half.text_ID)):
        assert rounded.dtype == np.float32
        assert (np.sum(unit(exact) * unit(rounded), axis=1) > 0.99).all()
        assert np.abs(exact - rounded).max() > 1e-4, "it did run in half precision"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch.compile needs AVX2 or newer on x86")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_equals_eager(adapted, tmp_path, monkeypatch):
    """The texts only: the compiler works for seconds, and pictures go through the same layers."""
    # The compiler's cache does not tell instruction sets apart: what was compiled for another one can give NaN.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    fresh, model = adapted
    source = ItemSource(np.arange(1, 17), ["good " * place for place in range(16)], "p", "h", NoPictures(), "text_only")
    vectors: list[np.ndarray] = []
    counters = torch._dynamo.utils.counters
    counters.clear()  # of other tests
    for compiled in (False, True):
        params = export_params(compile=compiled, batch_size=8, shard_rows=16)
        resume = tmp_path / str(compiled)
        result = embed_items(fresh, model, source, params, resume, "f", CPU, lambda name: adapters.merged_modality(model, name))
        assert result is not None
        vectors.append(result.text_ID)
    np.testing.assert_allclose(vectors[1], vectors[0], **up_to_rounding(vectors[0]))
    assert counters["stats"]["unique_graphs"] > 0, "it was compiled"
    assert not counters["graph_break"]


def test_compiling_needs_a_compiler(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"export_embeddings\.compile: needs a C\+\+ compiler .*use false"):
        encoded(shop(8), backbone, tmp_path, compile=True)


def test_compiling_needs_vector_instructions(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ConfigError, match=r"export_embeddings\.compile: needs a CPU with AVX2 or newer .*use false"):
        encoded(shop(8), backbone, tmp_path, compile=True)


def test_model_is_put_into_evaluation_mode(backbone, embedded, tmp_path):
    backbone.model.train()
    assert_equal(encoded(shop(30), backbone, tmp_path), embedded)
    assert not backbone.model.training


def test_cut_texts_are_reported(backbone, tmp_path, caplog):
    source = ItemSource(np.arange(1, 4), ["a" * 500, "short", "b" * 160], "p", "h", NoisePictures(), "text_only")
    with caplog.at_level(logging.INFO, logger="sda_core"):
        encoded(source, backbone, tmp_path)
        assert "2 of 3 texts fill backbone.max_text_tokens" in caplog.text
        caplog.clear()
        encoded(source, backbone, tmp_path)  # resumed
        assert "2 of 3 texts fill backbone.max_text_tokens" in caplog.text


def test_vector_that_is_not_finite(tmp_path):
    broken: Any = build(TinyQwen25VL(**TINY), CPU)
    with torch.no_grad():
        broken.model.model.language_model.norm.weight[0] = float("inf")
    with pytest.raises(DataError, match=r"image vectors: should be finite .*item_id 1, 2, 3, 4, 5"):
        encoded(shop(8), broken, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing broken is kept for later"


def test_out_of_memory_is_one_line(backbone, tmp_path):
    def exhausted(*_arguments, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    hook = backbone.model.model.register_forward_pre_hook(exhausted)
    try:
        with pytest.raises(ConfigError, match=r"export_embeddings\.batch_size: 4 items do not fit .*lower it"):
            encoded(shop(8), backbone, tmp_path)
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------------ resume
def test_finished_blocks_are_not_computed_again(backbone, embedded, tmp_path):
    encoded(shop(30), backbone, tmp_path)
    passes: list[int] = []
    hook = backbone.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        assert_equal(encoded(shop(30), backbone, tmp_path), embedded)
        assert not passes
        (tmp_path / "text-00001.safetensors").unlink()
        damaged = tmp_path / "image-00002.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-50])
        assert_equal(encoded(shop(30), backbone, tmp_path), embedded)
        assert len(passes) == 4, "two blocks of two batches"
    finally:
        hook.remove()


@pytest.mark.parametrize("change", ["fingerprint", "texts", "missing_image", "batch_size"])
def test_blocks_of_other_inputs_are_not_taken(backbone, tmp_path, change):
    encoded(shop(16), backbone, tmp_path)
    passes: list[int] = []
    hook = backbone.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        match change:
            case "fingerprint":
                encoded(shop(16), backbone, tmp_path, fingerprint="other")
            case "texts":
                encoded(shop(16, order=np.arange(16)[::-1]), backbone, tmp_path)
            case "missing_image":
                encoded(shop(16, missing_image="text_only"), backbone, tmp_path)
            case _:
                encoded(shop(16), backbone, tmp_path, batch_size=8)
    finally:
        hook.remove()
    assert len(passes) >= 4


def export_to(resume: Path, out: Path, engine: Engine = "local") -> None:
    """What the export stage does, with real pieces."""
    torch.set_num_threads(1)
    params = export_params(engine=engine, batch_size=2, shard_rows=4)
    source = shop(160, "text_only")
    with processes() as team:
        result = embed(TinyQwen25VL(**TINY), None, source, params, resume, "f", CPU, team)
    if result is None:
        return
    fused = fuse(result.image_ID, result.text_ID, result.has_image, np.arange(1, 150), params)
    metadata = embedding_metadata(result.info, params, "prompt", "", result.text_ID.shape[1], fused.shape[1])
    raw_ids = [f"B{place:05d}" for place in result.item_ids]
    write_embeddings(out, result.item_ids, raw_ids, result.image_ID, result.text_ID, fused, metadata, result.has_image)


def export_script(resume: Path, out: Path, engine: Engine = "local") -> str:
    """A program of its own that runs :func:`export_to`, without this file's test libraries (they take seconds to import)."""
    parts = [inspect.getsource(part) for part in (NoisePictures, export_params, shop, export_to)]
    return "\n".join(
        [
            "from __future__ import annotations",
            "import io, numpy as np, torch",
            "from pathlib import Path",
            "from typing import Literal",
            "Engine = Literal['local', 'ray']",
            "MissingImage = Literal['placeholder', 'text_only']",
            "from PIL import Image",
            "from sda_core.backbones import build",
            "from sda_core.embeddings.encoding import embed",
            "from sda_core.embeddings.fusion import fuse",
            "from sda_core.processes import processes",
            "from sda_core.embeddings.table import embedding_metadata, write_embeddings",
            "from sda_core.items import ItemSource",
            "from sda_core.params import ExportParams, TinyQwen25VL",
            "CPU = torch.device('cpu')",
            f"TINY = {TINY!r}",
            *parts,
            f"if __name__ == '__main__':\n    export_to(Path({str(resume)!r}), Path({str(out)!r}), {engine!r})",
        ]
    )


def test_killed_export_resumes_to_the_same_bytes(tmp_path):
    resume, out = tmp_path / "resume", tmp_path / "killed.parquet"
    process = subprocess.Popen([sys.executable, "-c", export_script(resume, out)], env=environment())
    wait_for(lambda: len(list(resume.glob("*.safetensors"))) >= 43, process)  # of 80: in the middle of the texts
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    finished = sorted(resume.glob("*.safetensors"))
    assert 43 <= len(finished) < 80
    finished[5].unlink()  # as if it had been killed among the pictures, too
    num_threads = torch.get_num_threads()
    try:
        export_to(resume, out)
        export_to(tmp_path / "fresh", tmp_path / "undisturbed.parquet")
    finally:
        torch.set_num_threads(num_threads)
    assert len(list(resume.glob("*.safetensors"))) == 80
    assert out.read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()
    assert pq.read_metadata(out).num_rows == 160


def undisturbed(folder: Path) -> bytes:
    """The file that one process writes."""
    num_threads = torch.get_num_threads()
    try:
        export_to(folder / "fresh", folder / "undisturbed.parquet")
    finally:
        torch.set_num_threads(num_threads)
    return (folder / "undisturbed.parquet").read_bytes()


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"} | changes


def wait_for(condition, process: subprocess.Popen, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        assert process.poll() is None, "it should still be running"
        time.sleep(0.002)


@pytest.mark.parametrize("victim", [0, 1])
def test_two_processes_one_killed(tmp_path, victim):
    """The other says so in one line; the next launch takes what is finished and ends with the bytes of one process."""
    resume, out, script = tmp_path / "resume", tmp_path / "shared.parquet", tmp_path / "export.py"
    script.write_text(export_script(resume, out), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    pair = [
        subprocess.Popen(
            [sys.executable, str(script)], env=environment(RANK=str(index), **address), stderr=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    try:
        wait_for(lambda: len(list(resume.glob("*.safetensors"))) >= 10, pair[victim])
        pair[victim].send_signal(signal.SIGKILL)
        said = pair[1 - victim].communicate(timeout=120)[1].strip().splitlines()[-1]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert pair[1 - victim].returncode == 1
    assert f"process {1 - victim} of 2: another process of this launch is gone" in said
    assert "run the same command again" in said
    assert not out.exists()
    assert 10 <= len(list(resume.glob("*.safetensors"))) < 80
    if victim == 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
        subprocess.run(launch, env=environment(), check=True, capture_output=True, timeout=300)
        assert out.read_bytes() == undisturbed(tmp_path)


# --------------------------------------------------------------------------------------------------- ray
def test_ray_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"export_embeddings\.engine: is 'ray', and the module ray .*use 'local'"):
        export_to(tmp_path / "resume", tmp_path / "out.parquet", "ray")


def workers_of(mark: str) -> list[int]:
    """Ids of the Ray actors that carry a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # gone meanwhile
            continue
        if title.startswith(b"ray::") and b"_Worker" in title and mark.encode() in variables:
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="worker processes are found through /proc")
def test_ray_workers_one_killed(tmp_path):
    """Two worker processes; one is killed in the middle, and the rows are those of one process."""
    resume, out, script = tmp_path / "resume", tmp_path / "ray.parquet", tmp_path / "export.py"
    script.write_text(export_script(resume, out, "ray"), encoding="utf-8")
    variables = environment(SDA_TEST_MARK=str(tmp_path))
    variables.pop("RAY_ADDRESS", None)
    with (tmp_path / "log.txt").open("w") as log:
        driver = subprocess.Popen([sys.executable, str(script)], env=variables, stdout=log, stderr=log)
        try:
            wait_for(lambda: len(list(resume.glob("*.safetensors"))) >= 5, driver)
            workers = workers_of(str(tmp_path))
            assert len(workers) == 2
            os.kill(workers[0], signal.SIGKILL)
            assert driver.wait(timeout=300) == 0, (tmp_path / "log.txt").read_text()
        finally:
            driver.kill()
            driver.wait()
    undisturbed(tmp_path)
    shared, alone = pl.read_parquet(out), pl.read_parquet(tmp_path / "undisturbed.parquet")
    assert shared.select("item_id", "raw_item_id").equals(alone.select("item_id", "raw_item_id"))
    for column in ("image_embedding", "text_embedding", "embedding"):
        assert shared[column].is_null().equals(alone[column].is_null())
        expected = alone[column].drop_nulls().to_numpy()
        np.testing.assert_allclose(shared[column].drop_nulls().to_numpy(), expected, **up_to_rounding(expected))


# ------------------------------------------------------------------------------------------------ fusion
def unit(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def random_halves(num_items: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shared = random.normal(size=(num_items, 3)) @ random.normal(size=(3, 2 * dim))
    both = (shared + 0.3 * random.normal(size=(num_items, 2 * dim)) + 2).astype(np.float32)
    return both[:, :dim].copy(), both[:, dim:].copy()


@pytest.mark.parametrize("num_items", [12, 16, 17, 400])  # fewer rows than columns, as many, more
def test_components_equal_scikit_learn(num_items):
    image, text = random_halves(num_items, 8)
    fit_ids = np.arange(1, num_items + 1)[:: 1 if num_items < 100 else 2]
    fused = fuse(image, text, np.ones(num_items, dtype=bool), fit_ids, export_params(fused_dim=5, normalize=False))
    joined = np.hstack([image, text]).astype(np.float64)
    oracle: Any = PCA(n_components=5, svd_solver="full").fit(joined[fit_ids - 1])
    signs = np.sign(oracle.components_[np.arange(5), np.abs(oracle.components_).argmax(1)])
    np.testing.assert_allclose(fused, oracle.transform(joined) * signs, atol=1e-4)
    assert fused.dtype == np.float32


def test_components_are_exact_where_all_vectors_point_one_way():
    image, text = random_halves(300, 8)
    image += 1000.0  # a common direction a thousand times the differences, as language models give
    text += 1000.0
    fused = fuse(image, text, np.ones(300, dtype=bool), np.arange(1, 301), export_params(fused_dim=4, normalize=False))
    oracle = PCA(n_components=4, svd_solver="full").fit_transform(np.hstack([image, text]).astype(np.float64))
    np.testing.assert_allclose(np.abs(fused), np.abs(oracle), atol=1e-3)


def test_chunks_do_not_change_the_components(monkeypatch):
    image, text = random_halves(100, 8)
    arguments = (image, text, np.ones(100, dtype=bool), np.arange(1, 91), export_params())
    whole = fuse(*arguments)
    monkeypatch.setattr("sda_core.embeddings.fusion._CHUNK_ROWS", 7)
    np.testing.assert_allclose(fuse(*arguments), whole, atol=1e-5)


def test_fitted_on_training_items_only():
    image, text = random_halves(60, 8)
    fit_ids = np.arange(1, 41)
    before = fuse(image, text, np.ones(60, dtype=bool), fit_ids, export_params())
    image[50] *= -3
    text[50] += 7
    after = fuse(image, text, np.ones(60, dtype=bool), fit_ids, export_params())
    changed = np.abs(before - after).max(1) > 1e-7
    assert np.flatnonzero(changed).tolist() == [50]


def test_row_order_and_repeats_of_fit_ids_do_not_matter():
    image, text = random_halves(60, 8)
    arguments = (image, text, np.ones(60, dtype=bool))
    a = fuse(*arguments, np.arange(1, 41), export_params())
    b = fuse(*arguments, np.random.default_rng(0).permutation(np.repeat(np.arange(1, 41), 3)), export_params())
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(("fused_dim", "num_fit", "expected"), [(5, 40, 5), (99, 40, 16), (99, 6, 6)])
def test_width_is_capped(caplog, fused_dim, num_fit, expected):
    image, text = random_halves(60, 8)
    with caplog.at_level(logging.INFO, logger="sda_core"):
        fused = fuse(image, text, np.ones(60, dtype=bool), np.arange(1, num_fit + 1), export_params(fused_dim=fused_dim))
    assert fused.shape == (60, expected)
    assert ("components instead of" in caplog.text) == (expected < fused_dim)


def test_concat_mean_image_text():
    image, text = random_halves(10, 4)
    everywhere, fit_ids = np.ones(10, dtype=bool), np.arange(1, 11)

    def fused(fusion: str, normalize: bool) -> np.ndarray:
        return fuse(image, text, everywhere, fit_ids, export_params(fusion=fusion, normalize=normalize))

    np.testing.assert_allclose(fused("concat", True), np.hstack([unit(image), unit(text)]) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(fused("mean", True), unit(unit(image) + unit(text)), atol=1e-6)
    np.testing.assert_allclose(fused("image", True), unit(image), atol=1e-6)
    np.testing.assert_allclose(fused("text", True), unit(text), atol=1e-6)
    np.testing.assert_array_equal(fused("concat", False), np.hstack([image, text]))
    np.testing.assert_allclose(fused("mean", False), (image + text) / 2, atol=1e-6)
    np.testing.assert_array_equal(fused("image", False), image)
    np.testing.assert_array_equal(fused("text", False), text)


@settings(max_examples=50, deadline=None)
@given(
    num_items=st.integers(1, 30),
    dim=st.integers(1, 6),
    seed=st.integers(0, 1000),
    fusion=st.sampled_from(["late_concat_pca", "concat", "mean", "image", "text"]),
)
def test_arguments_stay_as_they_were_and_lengths_are_one(num_items, dim, seed, fusion):
    image, text = random_halves(num_items, dim, seed)
    has_image = np.random.default_rng(seed).random(num_items) < 0.7
    has_image[0] = True
    copies = image.copy(), text.copy(), has_image.copy()
    fused = fuse(image, text, has_image, np.array([1]), export_params(fusion=fusion))
    for now, before in zip((image, text, has_image), copies, strict=True):
        assert np.array_equal(now, before)
    assert np.isfinite(fused).all()
    lengths = np.linalg.norm(fused, axis=1)
    assert ((np.abs(lengths - 1) < 1e-5) | (lengths == 0)).all()


def test_row_without_picture_takes_the_mean_of_the_fitted():
    image, text = random_halves(10, 4)
    has_image = np.ones(10, dtype=bool)
    has_image[[2, 9]] = False
    image[~has_image] = 0
    fused = fuse(image, text, has_image, np.arange(1, 7), export_params(fusion="concat", normalize=False))
    np.testing.assert_allclose(fused[[2, 9], :4], np.repeat(image[[0, 1, 3, 4, 5]].mean(0)[None], 2, axis=0), atol=1e-6)
    np.testing.assert_array_equal(fused[has_image, :4], image[has_image])
    fused = fuse(image, text, has_image, np.array([3]), export_params(fusion="concat", normalize=False))
    np.testing.assert_allclose(fused[2, :4], image[has_image].mean(0), atol=1e-6)


def test_zero_vector_stays_zero():
    image, text = random_halves(5, 4)
    text[3] = 0
    assert not fuse(image, text, np.ones(5, dtype=bool), np.arange(1, 6), export_params(fusion="text"))[3].any()


@pytest.mark.parametrize("fit_ids", [[], [0], [11], [-1]])
def test_fit_ids_that_cannot_be(fit_ids):
    image, text = random_halves(10, 4)
    with pytest.raises(DataError, match="item fusion"):
        fuse(image, text, np.ones(10, dtype=bool), np.array(fit_ids, dtype=int), export_params())


def test_widths_that_have_no_mean():
    with pytest.raises(DataError, match="is 'mean', but the vectors of pictures are 4 wide and those of texts 6"):
        fuse(np.zeros((3, 4)), np.zeros((3, 6)), np.ones(3, dtype=bool), np.array([1]), export_params(fusion="mean"))


# -------------------------------------------------------------------------------------------------- file
def write_small(path: Path, num_items: int = 20, has_image: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    image, text = random_halves(num_items, 4)
    fused = np.hstack([image, text])
    has_image = np.ones(num_items, dtype=bool) if has_image is None else has_image
    raw_ids = [f"B{place:04d}" for place in range(num_items)]
    write_embeddings(path, np.arange(1, num_items + 1), raw_ids, image, text, fused, {"b": "2", "a": "é"}, has_image)
    return image, text, fused


def test_file_is_read_back(tmp_path):
    image, text, fused = write_small(tmp_path / "e.parquet")
    frame = EMBEDDINGS.read(tmp_path / "e.parquet")
    assert dict(frame.schema) == {
        "item_id": pl.Int32,
        "raw_item_id": pl.String,
        "image_embedding": pl.Array(pl.Float32, 4),
        "text_embedding": pl.Array(pl.Float32, 4),
        "embedding": pl.Array(pl.Float32, 8),
    }
    assert frame["raw_item_id"][3] == "B0003"
    for column, matrix in (("image_embedding", image), ("text_embedding", text), ("embedding", fused)):
        vectors = read_vectors(tmp_path / "e.parquet", column)
        assert vectors is not None
        np.testing.assert_array_equal(vectors[1:], matrix)
        assert not vectors[0].any()


def test_file_says_what_it_is(tmp_path, backbone):
    write_small(tmp_path / "e.parquet")
    schema = pq.read_schema(tmp_path / "e.parquet")
    assert schema.metadata == {b"a": "é".encode(), b"b": b"2"}
    assert schema.field("embedding").type == pa.list_(pa.float32(), 8)
    described = embedding_metadata(backbone.info, export_params(), "prompt", "adapter", 32, 8)
    for key in (
        "backbone_name",
        "backbone_revision",
        "backbone_dtype",
        "backbone_pooling",
        "adapter_hash",
        "prompt_hash",
        "fusion",
    ):
        assert described[key]
    assert (described["normalized"], described["modality_dim"], described["embedding_dim"]) == ("true", "32", "8")


def test_missing_picture_is_null(tmp_path):
    has_image = np.arange(20) != 7
    image, text, _ = write_small(tmp_path / "e.parquet", has_image=has_image)
    frame = pl.read_parquet(tmp_path / "e.parquet")
    assert frame["image_embedding"].is_null().to_list() == (~has_image).tolist()
    assert frame["text_embedding"].null_count() == frame["embedding"].null_count() == 0
    kept = frame.filter(pl.col("image_embedding").is_not_null())
    np.testing.assert_array_equal(kept["image_embedding"].to_numpy(), image[has_image])
    np.testing.assert_array_equal(frame["text_embedding"].to_numpy(), text)
    assert pq.read_table(tmp_path / "e.parquet")["image_embedding"].null_count == 1


def test_file_bytes_depend_on_the_content_only(tmp_path):
    write_small(tmp_path / "a.parquet")
    write_small(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    image, text = random_halves(20, 4)
    raw_ids = [f"B{place:04d}" for place in range(20)]
    strided = np.asfortranarray(image)
    write_embeddings(
        tmp_path / "c.parquet",
        np.arange(1, 21, dtype=np.int64),
        raw_ids,
        strided,
        text,
        np.hstack([image, text]),
        {"a": "é", "b": "2"},
        np.ones(20, bool),
    )
    assert (tmp_path / "c.parquet").read_bytes() == (tmp_path / "a.parquet").read_bytes()


def test_row_groups_are_small(tmp_path):
    image, text = random_halves(20_000, 2)
    ids = np.arange(1, 20_001)
    write_embeddings(tmp_path / "e.parquet", ids, [str(i) for i in ids], image, text, text, {}, np.ones(20_000, dtype=bool))
    groups = pq.read_metadata(tmp_path / "e.parquet")
    assert [groups.row_group(place).num_rows for place in range(groups.num_row_groups)] == [8192, 8192, 3616]


def test_ids_only(tmp_path):
    write_ids_only(tmp_path / "id.parquet", np.arange(1, 4), ["x", "y", "z"], {"variant": "id"})
    assert read_vectors(tmp_path / "id.parquet") is None
    assert EMBEDDINGS.read(tmp_path / "id.parquet").rows() == [(1, "x"), (2, "y"), (3, "z")]
    assert pq.read_schema(tmp_path / "id.parquet").metadata == {b"variant": b"id"}
