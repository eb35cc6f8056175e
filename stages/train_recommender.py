"""Phase two: an ordinary recommender over frozen item vectors, or all of them, several at once."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from sda_core import log
from sda_core.artifacts import EMBEDDINGS, INTERACTIONS, Workspace, read_json, replace_directory, write_json, write_tsv
from sda_core.cli.stage import OneOrAllRecommenders, ParamsFile, Root, StageRun, Variant, run_as_script, stage
from sda_core.errors import ArtifactError, TrainingError
from sda_core.fingerprint import fingerprint
from sda_core.params import Params, RuntimeParams
from sda_core.sources import sources_of
from sda_core.traits import aligns_to_ids, counts_test

_log = logging.getLogger(__name__)

MADE_OF = "made_of.json"
_LONGEST_FIRST = ("bert4rec", "sasrec", "slmrec", "vbpr", "bpr", "pop")


def train_recommender(
    variant: Variant, recommender: OneOrAllRecommenders = None, root: Root = Path(), params: ParamsFile = None
) -> None:
    """Train recommenders on one variant's item vectors; they never see the test split.

    Without --recommender it trains those of params.recommenders, each in a process of its own, runtime.num_trainings at a
    time, and keeps those that were made of the very inputs, settings and code there are now.
    """
    with stage("train-recommender", root, params) as run:
        if recommender is not None:
            _train_one(run, variant, recommender)
        else:
            _train_all(run, variant, params)


def _train_all(run: StageRun, variant: str, params_file: Path | None) -> None:
    """Bring ``models/<variant>`` up to date: exactly the recommenders of ``params.recommenders``."""
    wanted = run.params.recommenders
    for folder in run.workspace.recommender(variant, "").glob("*"):
        if folder.is_dir() and folder.name not in wanted:
            shutil.rmtree(folder)
    kept = [name for name in wanted if _is_up_to_date(run, variant, name)]
    missing = sorted(set(wanted) - set(kept), key=_LONGEST_FIRST.index)
    runtime = run.params.runtime
    command = [sys.executable, "-m", "stages.train_recommender", "--root", str(run.workspace.root), "--variant", variant]
    command += [] if params_file is None else ["--params", str(params_file)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(_threads_each(runtime)),
        "PYTHONIOENCODING": "utf-8:backslashreplace",  # what this process reads below
        log.NO_PROGRESS: "1",
    }

    # Processes, because one training of this size does not fill two cores: it is many small operations.
    with ThreadPoolExecutor(runtime.num_trainings) as pool:
        ended = pool.map(lambda name: _run_one([*command, "--recommender", name], environment), missing)
        done = list(log.track(ended, len(missing), f"train {variant}", "recommenders"))
    failed = {name: said for name, said in zip(missing, done, strict=True) if said is not None}
    if failed:
        reasons = list(dict.fromkeys(said for said in failed.values() if said))
        for reason in reasons[1:]:
            _log.error("%s", reason)
        problem = f"the training of {', '.join(failed)} failed"
        if reasons:
            raise TrainingError(f"variant {variant}", f"{problem}: {reasons[0]}")
        raise TrainingError(f"variant {variant}", problem, "see the lines above")
    run.counts = {"variant": variant, "trained": len(missing), "kept": len(kept)}


def _run_one(command: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Train one recommender in a process of its own, whose log is passed on line by line.

    Returns:
        None where it ended well, else the error that it ended with, empty where it said none.
    """
    begin, said = "sda train-recommender: error: ", ""
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, encoding="utf-8", errors="replace") as process:  # noqa: S603 (own module)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(begin):
                said = line.removeprefix(begin).strip()
            else:
                with suppress(OSError):  # a closed stderr stops nothing
                    sys.stderr.write(line)
    return None if process.returncode == 0 else said


def _threads_each(runtime: RuntimeParams) -> int:
    """Threads of one of several trainings that share the machine."""
    if runtime.num_threads:
        return runtime.num_threads
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // runtime.num_trainings)


def _inputs(params: Params, workspace: Workspace, variant: str, recommender: str) -> str:
    """Hash of all that a trained recommender follows from."""
    section = params.train_recommender.of(recommender)
    code = sources_of("stages.train_recommender", f"sda_core.recommenders.{section.kind}")
    reference = workspace.recommender("id", recommender) if aligns_to_ids(section) and variant != "id" else None
    vectors = workspace.embeddings(variant)
    for path in (workspace.interactions, vectors, reference):
        if path is not None and not path.exists():
            raise ArtifactError(str(path), "does not exist", "run `dvc repro` for the stages before")
    return fingerprint(section, *code, workspace.interactions, vectors, reference)


def _is_up_to_date(run: StageRun, variant: str, recommender: str) -> bool:
    path = run.workspace.recommender(variant, recommender) / MADE_OF
    return path.is_file() and read_json(path, "inputs of a training") == {
        "sha256": _inputs(run.params, run.workspace, variant, recommender)
    }


def _train_one(run: StageRun, variant: str, recommender: str) -> None:
    import polars as pl

    from sda_core import recommenders
    from sda_core.runtime import prepare_torch

    section = run.params.train_recommender.of(recommender)
    inputs = _inputs(run.params, run.workspace, variant, recommender)
    device = prepare_torch(run.params.runtime)
    interactions = INTERACTIONS.read(run.workspace.interactions)
    test = interactions.filter(pl.col("split") == "test")
    vectors = recommenders.read_item_vectors(run.workspace.embeddings(variant), section)
    aligns = aligns_to_ids(section) and vectors is not None
    data = recommenders.training_data(
        interactions.filter(pl.col("split").is_in(["train", "valid"])),
        num_users=interactions["user_id"].n_unique(),
        num_items=EMBEDDINGS.count(run.workspace.embeddings(variant)),  # the whole catalogue, items nobody has met included
        leaked_test_items=test["item_id"].to_numpy() if counts_test(section) else None,
        item_table=recommenders.read_item_table(run.workspace.recommender("id", recommender)) if aligns else None,
    )
    model = recommenders.build(section, data.num_users, data.num_items, vectors)
    scratch = run.workspace.resume("train_recommender", variant, recommender)
    records = model.fit(data, checkpoint=scratch / "checkpoint.safetensors", fingerprint=inputs, device=device)
    with replace_directory(run.workspace.recommender(variant, recommender)) as folder:
        model.save(folder)
        write_tsv(folder / "history.tsv", records)
        write_json(folder / MADE_OF, {"sha256": inputs})
    shutil.rmtree(scratch, ignore_errors=True)
    best = max((record.valid_ndcg_10 or 0.0 for record in records), default=0.0)
    run.counts = {"variant": variant, "recommender": recommender, "epochs": len(records), "best valid ndcg@10": best}


if __name__ == "__main__":
    run_as_script(train_recommender)
