"""Fetch and check the images of the kept items, and store them in parquet shards."""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, run_as_script, stage


def fetch_images(root: Root = Path(), params: ParamsFile = None) -> None:
    """Fetch the image of every kept item; each item gets a status, and the statuses are counted."""
    from sda_core.artifacts import ITEMS
    from sda_core.fetch.images import fetch_images as fetch
    from sda_core.fetch.images import to_try_again
    from sda_core.local_files import IMAGES, user_folder, watches

    with stage("fetch-images", root, params, check=watches(root, IMAGES)) as run:
        items = ITEMS.read(run.workspace.items)
        local = user_folder(run.params.dataset.local_folder, root, "params.yaml: dataset.local_folder")
        images = user_folder(run.params.dataset.image_folder, root, "params.yaml: dataset.image_folder")
        coverage = fetch(items, run.workspace.raw, local, images, run.params.fetch_images, run.workspace.images)
        run.counts.update({**coverage, **to_try_again(coverage)})


if __name__ == "__main__":
    run_as_script(fetch_images)
