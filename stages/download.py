"""Fetch the raw files of the dataset, or let the built-in shop write them."""

from __future__ import annotations

from pathlib import Path

from stages._stage import ParamsFile, Root, run_as_script, stage


def download(root: Root = Path(), params: ParamsFile = None) -> None:
    """Fetch the raw reviews and metadata into data/raw, whole and checked (or write the built-in shop)."""
    from sda_core.data.download import download as fetch

    with stage("download", root, params) as run:
        manifest = fetch(run.params.dataset, run.params.download, run.workspace.raw, root)
        run.counts = {entry["role"]: f"{entry['name']} {entry['bytes']} bytes" for entry in manifest["files"]}


if __name__ == "__main__":
    run_as_script(download)
