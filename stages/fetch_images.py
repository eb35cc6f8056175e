"""Pictures of the kept items, checked and stored in parquet shards."""

from __future__ import annotations

from pathlib import Path

from stages._stage import ParamsFile, Root, run_as_script, stage


def fetch_images(root: Root = Path(), params: ParamsFile = None) -> None:
    """Fetch the picture of every kept item; each item gets a status, and the coverage is counted."""
    from sda_core.artifacts import ITEMS
    from sda_core.data.images import fetch_images as fetch

    with stage("fetch-images", root, params) as run:
        items = ITEMS.read(run.workspace.items)
        local = run.params.dataset.local_folder
        folder = None if local is None else root / local
        run.counts.update(fetch(items, run.workspace.raw, folder, run.params.fetch_images, run.workspace.images))


if __name__ == "__main__":
    run_as_script(fetch_images)
