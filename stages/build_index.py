"""Build the FAISS index of one variant's item vectors."""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, Variant, run_as_script, stage


def build_index(variant: Variant, root: Root = Path(), params: ParamsFile = None) -> None:
    """Build the FAISS index of one variant and measure its recall against exact search."""
    from sda_core.artifacts import replace_directory
    from sda_core.errors import ConfigError
    from sda_core.index import build_index as build
    from sda_core.item_vectors import read_vectors

    with stage("build-index", root, params) as run:
        vectors = read_vectors(run.workspace.embeddings(variant))
        if vectors is None:
            raise ConfigError(
                "--variant", f"{variant!r} has no item vectors to index", "name a variant with vectors, e.g. zero_shot"
            )
        with replace_directory(run.workspace.index(variant)) as folder:
            made = build(vectors[1:], None, run.params.build_index, folder)
        run.counts = {"variant": variant, "factory": made["factory"], "items": made["ntotal"], "recall": made["recall"]}


if __name__ == "__main__":
    run_as_script(build_index)
