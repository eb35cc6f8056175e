"""A run of the pipeline's own stages in a temporary folder, in this process and without DVC."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dvc.utils.hydra import compose_and_dump

from stages.build_index import build_index
from stages.download import download
from stages.evaluate import evaluate
from stages.export_embeddings import export_embeddings
from stages.fetch_images import fetch_images
from stages.filter import filter_
from stages.report import report
from stages.train_adapter import train_adapter
from stages.train_recommender import train_recommender


def adapted_run(root: Path, repository: Path, overrides: Sequence[str]) -> Path:
    """The params that Hydra composes, the data, and the adapter of ``sda``."""
    compose_and_dump(root / "params.yaml", str(repository / "conf"), None, "config", "", list(overrides))
    download(root=root)
    filter_(root=root)
    fetch_images(root=root)
    train_adapter("sda", root=root)
    return root


def finished_run(root: Path, repository: Path, overrides: Sequence[str], variants: Sequence[str]) -> Path:
    """Every stage, with the recommenders ``pop`` and ``vbpr`` on each variant."""
    adapted_run(root, repository, overrides)
    for variant in variants:
        export_embeddings(variant, root=root)
        if variant != "id":
            build_index(variant, root=root)
        for recommender in ("pop", "vbpr"):
            train_recommender(variant, recommender, root=root)
            evaluate(variant, recommender, root=root)
    report(root=root)
    return root
