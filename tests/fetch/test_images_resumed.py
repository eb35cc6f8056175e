"""The image stage in processes of its own: killed anywhere and run again, and what it says at its end."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from ruamel.yaml import YAML

from sda_core.artifacts import ITEMS, Workspace
from sda_core.errors import ArtifactError, DownloadError
from sda_core.fetch.images import fetch_images, to_try_again
from sda_core.image_store import ImageStore
from sda_core.params import load_params
from tests.sections import short_ladder

ROOT = Path(__file__).resolve().parents[2]
NUM_IMAGES = 11

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork")


def image_file(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_items(path: Path, urls: list[str]) -> None:
    empty: dict[str, Any] = {
        name: [[] if dtype == pl.List(pl.String) else ""] * len(urls) for name, dtype in ITEMS.columns.items()
    }
    columns = empty | {
        "item_id": range(1, len(urls) + 1),
        "raw_item_id": [url.rpartition("/")[2] for url in urls],
        "image_references": [[url] for url in urls],
        "has_metadata": [True] * len(urls),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(columns, schema=dict(ITEMS.columns)).write_parquet(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def urls(server: Any) -> list[str]:
    """Eleven images; the last two addresses lead to nothing and to rubbish."""
    good = [server.put(f"/{number}.png", image_file(number)) for number in range(NUM_IMAGES)]
    return [*good, server.url("/none.png"), server.put("/junk.png", b"junk")]


@pytest.fixture
def make_root(tmp_path: Path, urls: list[str]) -> Callable[..., Path]:
    """A project folder in which the stages before this one have run."""

    def make(name: str, **dataset: str) -> Path:
        root = tmp_path / name
        write_items(Workspace(root).items, urls)
        Workspace(root).raw.mkdir()
        (Workspace(root).raw / "manifest.json").write_text('{"files": []}')
        yaml = YAML()
        params = short_ladder(yaml.load(ROOT / "params.yaml"))
        params["dataset"] = {
            "source": "amazon",
            "edition": 2018,
            "category": "All",
            "reviews": ["x"],
            "metadata": ["y"],
            **dict.fromkeys(
                ("image_archive", "reviews_sha256", "metadata_sha256", "image_archive_sha256", "image_folder", "local_folder")
            ),
            **dataset,
        }
        params["fetch_images"] |= {"max_per_host": 2, "shard_rows": 3, "num_retries": 0, "backoff_seconds": 0.0}
        yaml.dump(params, root / "params.yaml")
        return root

    return make


def start_stage(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stages.fetch_images", "--root", str(root)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def fetch_here(root: Path) -> dict[str, int | float]:
    """As the stage, without the start of a process."""
    params, workspace = load_params(root / "params.yaml"), Workspace(root)
    folder = params.dataset.image_folder
    images = None if folder is None else root / folder
    return fetch_images(ITEMS.read(workspace.items), workspace.raw, None, images, params.fetch_images, workspace.images)


def test_stage_killed_at_requests_and_run_again(server: Any, make_root: Callable[..., Path]) -> None:
    undisturbed, root = make_root("undisturbed"), make_root("killed")
    fetch_here(undisturbed)
    running: list[subprocess.Popen[str]] = []
    until_kill = [0]

    def kill(handler: Any) -> None:
        with server.lock:
            until_kill[0] -= 1
            now = until_kill[0] == 0
        if now:
            running[-1].send_signal(signal.SIGKILL)
            running[-1].wait()
        handler.plain()

    for page in server.pages.values():
        page.always = kill
    server.requests.clear()
    for num_requests in (1, 5):
        with server.lock:
            until_kill[0] = num_requests
            running.append(start_stage(root))
        assert running[-1].communicate()[1] == ""
        assert running[-1].returncode == -signal.SIGKILL
        with pytest.raises(ArtifactError, match="not all fetched"):
            ImageStore(Workspace(root).images)
    last = start_stage(root)
    errors = last.communicate()[1]
    assert (last.returncode, "Traceback" in errors) == (0, False)
    assert contents(Workspace(root).images) == contents(Workspace(undisturbed).images)
    assert len(server.requests) <= NUM_IMAGES + 2 + 2 * (2 * 3 + 2), "each killed run loses what it had not written"
    server.requests.clear()
    fetch_here(root)
    assert server.requests == []


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_before_every_change_of_a_file(server: Any, urls: list[str], tmp_path: Path, earlier: bool) -> None:
    """A process that forks for every run: each child dies before its k-th change in the folder, another one goes on.

    With an earlier run's folder to begin with, shards of other bounds and other items must make way.
    """
    write_items(tmp_path / "items.parquet", urls[7:])
    write_items(tmp_path / "others.parquet", urls[5:10])
    (tmp_path / "manifest.json").write_text('{"files": []}')
    code = f"""
        import contextlib, importlib, itertools, os, shutil, signal, sys
        from pathlib import Path
        import polars as pl
        from sda_core.fetch.images import fetch_images
        from sda_core.fetch.http import new_client
        from sda_core.params import FetchImagesParams

        folder = Path({str(tmp_path)!r})
        out = folder / "images"
        new_client(1.0, 1)  # reads the certificates once for all children
        values = dict(num_workers=4, max_per_host=4, timeout_seconds=9.0, num_retries=0, backoff_seconds=0.0, max_bytes=99999,
                      max_pixels=99999, stored_pixels=1000, shard_rows=2)

        def fetch(items, **changes):
            fetch_images(pl.read_parquet(folder / items), folder, None, None, FetchImagesParams(**values | changes), out)

        def in_a_child(work):
            pid = os.fork()
            if pid == 0:
                work()
                os._exit(0)
            return os.waitpid(pid, 0)[1]

        def first():
            before = set(sys.modules)
            fetch("items.parquet")
            (folder / "modules").write_text(" ".join(sorted(set(sys.modules) - before)))

        def contents():
            return {{path.name: path.read_bytes() for path in out.iterdir()}}

        def dying(fatal):
            seen = itertools.count(1)

            def hook(event, arguments):
                writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                    if str(out) in str(arguments[0]) and next(seen) == fatal:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            fetch("items.parquet")

        def begin():
            shutil.rmtree(out, ignore_errors=True)
            if {earlier}:
                shutil.copytree(folder / "earlier", out)

        if {earlier}:
            assert in_a_child(lambda: fetch("others.parquet")) == 0
            out.rename(folder / "earlier")
        begin()
        assert in_a_child(first) == 0
        for name in (folder / "modules").read_text().split():  # so that not every child imports them again
            with contextlib.suppress(ImportError):  # some are made by others and have no file
                importlib.import_module(name)
        wanted = contents()
        for fatal in itertools.count(1):
            begin()
            start = contents() if out.is_dir() else None
            status = in_a_child(lambda: dying(fatal))
            if status == 0:
                break
            assert status == signal.SIGKILL, status
            if (out / "coverage.json").exists():
                assert contents() in (start, wanted), "half a folder looks whole"
            assert in_a_child(lambda: fetch("items.parquet")) == 0
            assert contents() == wanted, fatal
            assert not [path for path in folder.iterdir() if path.name.startswith(".")], "no lock is left"
        print(fatal - 1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    num_changes = 3 + (10 if earlier else 5)
    assert int(done.stdout) >= num_changes, "shards, coverage, lock, and what makes way"


def test_stage_says_what_failed_for_a_time(server: Any, make_root: Callable[..., Path]) -> None:
    root = make_root("root")
    server.pages["/2.png"].always = server.status(500)
    server.pages["/7.png"].always = server.drop(10)
    process = start_stage(root)
    line = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 0
    assert "fetch-images: num_items 13, num_ok 9" in line
    assert "temporary failures 2 (to retry only these: `dvc repro --single-item --force fetch_images`)" in line
    assert json.loads(Workspace(root).image_coverage.read_text())["num_http_error"] == 2
    server.pages["/2.png"].always = server.pages["/7.png"].always = None
    server.requests.clear()
    coverage = fetch_here(root)
    assert server.count() == {"/2.png": 1, "/7.png": 1}
    assert to_try_again(coverage) == {}


def test_with_a_folder_of_images(server: Any, make_root: Callable[..., Path]) -> None:
    """What is in the folder is taken from there, the rest is fetched."""
    root, other = make_root("root", image_folder="images"), make_root("other")
    with pytest.raises(DownloadError, match=r"params\.yaml: dataset\.image_folder: there is no folder .*images"):
        fetch_here(root)
    assert server.requests == []
    (root / "images").mkdir()
    (root / "images" / "3.png.png").write_bytes(image_file(100))
    fetch_here(root)
    assert (server.count()["/3.png"], len(server.requests)) == (0, NUM_IMAGES + 1)
    fetch_here(other)
    stores = [ImageStore(Workspace(place).images) for place in (root, other)]
    assert [item_id for item_id in range(1, 14) if stores[0].get(item_id) != stores[1].get(item_id)] == [4]
