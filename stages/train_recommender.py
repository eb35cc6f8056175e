"""Phase two: an ordinary recommender over frozen item vectors."""

from __future__ import annotations

from pathlib import Path

from stages._stage import ParamsFile, Recommender, Root, Variant, run_as_script, stage


def train_recommender(variant: Variant, recommender: Recommender, root: Root = Path(), params: ParamsFile = None) -> None:
    """Train one recommender on one variant's item vectors; it never sees the test split."""
    import shutil

    import polars as pl

    from sda_core import recommenders
    from sda_core.artifacts import INTERACTIONS, replace_directory, write_tsv
    from sda_core.fingerprint import fingerprint
    from sda_core.runtime import prepare_torch

    with stage("train-recommender", root, params) as run:
        section = run.params.train_recommender.of(recommender)
        device = prepare_torch(run.params.runtime)
        interactions = INTERACTIONS.read(run.workspace.interactions)
        test = interactions.filter(pl.col("split") == "test")
        vectors_path = run.workspace.embeddings(variant)
        vectors = recommenders.read_item_vectors(vectors_path, section)
        reference = run.workspace.recommender("id", recommender) if section.aligns_to_ids and vectors is not None else None
        data = recommenders.training_data(
            interactions.filter(pl.col("split").is_in(["train", "valid"])),
            num_users=interactions["user_id"].n_unique(),
            num_items=interactions["item_id"].n_unique(),
            leaked_test_items=test["item_id"].to_numpy() if section.counts_test else None,
            item_table=None if reference is None else recommenders.read_item_table(reference),
        )
        model = recommenders.build(section, data.num_users, data.num_items, vectors)
        scratch = run.workspace.resume("train_recommender", variant, recommender)
        inputs = fingerprint(section, run.workspace.interactions, vectors_path, reference)
        records = model.fit(data, checkpoint=scratch / "checkpoint.safetensors", fingerprint=inputs, device=device)
        with replace_directory(run.workspace.recommender(variant, recommender)) as folder:
            model.save(folder)
            write_tsv(folder / "history.tsv", records)
        shutil.rmtree(scratch, ignore_errors=True)
        best = max((record.valid_ndcg_10 or 0.0 for record in records), default=0.0)
        run.counts = {"variant": variant, "recommender": recommender, "epochs": len(records), "best valid ndcg@10": best}


if __name__ == "__main__":
    run_as_script(train_recommender)
