"""Train the recommenders of a variant: skip those that are up to date, and train the others in separate processes.

Only the training processes import torch.
"""

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
from sda_core.errors import ArtifactError, TrainingError
from sda_core.fingerprint import fingerprint
from sda_core.params import Params, RuntimeParams, TrainRecommenderParams
from sda_core.sources import sources_of
from sda_core.traits import aligns_to_ids, counts_test, seeds_of

_log = logging.getLogger(__name__)

MADE_OF = "made_of.json"
_LONGEST_FIRST = ("bert4rec", "sasrec", "slmrec", "vbpr", "bpr", "nearest", "pop")


def command(module: str, variant: str, root: Path, params_file: Path | None) -> list[str]:
    """The command line that starts trainings, without ``--recommender NAME,NAME``.

    Args:
        module: module of the stage, which calls :func:`train`.
        variant: the variant of item vectors.
        root: the project folder.
        params_file: the params file; None: that of the project folder.
    """
    given = [] if params_file is None else ["--params", str(params_file)]
    return [sys.executable, "-m", module, "--root", str(root), "--variant", variant, *given]


def train_all(
    workspace: Workspace,
    variant: str,
    names: Sequence[str],
    params: TrainRecommenderParams,
    runtime: RuntimeParams,
    command: Sequence[str],
) -> dict[str, object]:
    """Update ``models/<variant>`` to exactly these recommenders; those with changed inputs, settings or code are trained.

    Trainings run in parallel processes, because one training of this size consists of many small operations and does not
    fill two cores.  Each process trains several recommenders, because its start takes as long as a short training.

    Args:
        workspace: paths of the run.
        variant: the variant of item vectors.
        names: names of the recommenders.
        params: settings of all recommenders.
        runtime: number of parallel trainings, and the threads of each.
        command: the result of :func:`command`.

    Returns:
        The numbers of trained recommenders, and of skipped ones, which are unchanged.

    Raises:
        TrainingError: some of the trainings failed.
        ArtifactError: an input is missing.
    """
    for folder in workspace.recommender(variant, "").glob("*"):
        if folder.is_dir() and folder.name not in names:
            shutil.rmtree(folder)

    def missing() -> list[str]:
        made_of = {name: _inputs_by_seed(workspace, variant, name, params) for name in names}
        return [name for name, inputs in made_of.items() if not _is_complete(workspace, variant, name, inputs)]

    wanted = sorted(missing(), key=_LONGEST_FIRST.index)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(_threads_each(runtime)),
        "PYTHONIOENCODING": "utf-8:backslashreplace",  # the encoding in which this process reads the log below
        log.NO_PROGRESS: "1",
    }
    shares = _distribute(wanted, runtime.num_trainings)
    with ThreadPoolExecutor(max(1, len(shares))) as pool:
        ended = pool.map(lambda share: _run_one([*command, "--recommender", ",".join(share)], environment), shares)
        said = [line for lines in log.track(ended, len(shares), f"train {variant}", "processes") for line in lines]
    failed = missing()
    if failed:
        reasons = list(dict.fromkeys(said))
        for reason in reasons[1:]:
            _log.error("%s", reason)
        problem = f"the training of {', '.join(failed)} failed"
        if reasons:
            raise TrainingError(f"variant {variant}", f"{problem}: {reasons[0]}")
        raise TrainingError(f"variant {variant}", problem, "see the lines above")
    return {"variant": variant, "trained": len(wanted), "skipped": len(names) - len(wanted)}


def _distribute(names: Sequence[str], number: int) -> list[list[str]]:
    """Distribute recommenders over processes, longest first, back and forth, so that the longest is with the shortest."""
    shares: list[list[str]] = [[] for _ in range(number)]
    for index, name in enumerate(names):
        turn, place = divmod(index, number)
        shares[place if turn % 2 == 0 else number - 1 - place].append(name)
    return [share for share in shares if share]


def _run_one(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Run one process and forward its log line by line.

    Returns:
        The errors in its log.
    """
    begin, said = "sda train-recommender: error: ", list[str]()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, encoding="utf-8", errors="replace") as process:  # noqa: S603 (own module)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(begin):
                said.append(line.removeprefix(begin).strip())
            else:
                with suppress(OSError):  # a closed stderr must not stop the training
                    sys.stderr.write(line)
    return said


def _threads_each(runtime: RuntimeParams) -> int:
    """Number of threads of one of several parallel trainings."""
    if runtime.num_threads:
        return runtime.num_threads
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // runtime.num_trainings)


def _inputs(workspace: Workspace, variant: str, name: str, seed: int, params: TrainRecommenderParams) -> str:
    """Hash of everything on which a recommender trained with one seed depends."""
    section = params.of(name)
    code = sources_of("sda_core.steps.train_recommender", f"sda_core.recommenders.{section.kind}")
    reference = workspace.model("id", name, seed) if aligns_to_ids(section) and variant != "id" else None
    vectors = workspace.embeddings(variant)
    for path in (workspace.interactions, vectors, reference):
        if path is not None and not path.exists():
            raise ArtifactError(str(path), "does not exist", "run `dvc repro` for the stages before")
    return fingerprint(section, *code, str(seed), workspace.interactions, vectors, reference)


def _inputs_by_seed(workspace: Workspace, variant: str, name: str, params: TrainRecommenderParams) -> dict[str, str]:
    """:func:`_inputs` by seed, written beside the seeds' folders after these and their mean curve are complete."""
    seeds = seeds_of(params.of(name), params.seeds)
    return {str(seed): _inputs(workspace, variant, name, seed, params) for seed in seeds}


def _was_made_of(folder: Path, inputs: object) -> bool:
    path = folder / MADE_OF
    return path.is_file() and read_json(path, "inputs of a training") == inputs


def _missing_seeds(workspace: Workspace, variant: str, name: str, inputs: Mapping[str, str]) -> dict[int, str]:
    """The seeds of ``inputs`` without a model made from these inputs."""
    return {
        int(seed): made_of
        for seed, made_of in inputs.items()
        if not _was_made_of(workspace.model(variant, name, int(seed)), {"sha256": made_of})
    }


def _is_complete(workspace: Workspace, variant: str, name: str, inputs: Mapping[str, str]) -> bool:
    """Whether every seed's model, and the summary beside them, was made from ``inputs``.

    The seeds are also checked, because an interrupted run may leave new models beside the summary of the old ones.
    """
    folder = workspace.recommender(variant, name)
    return _was_made_of(folder, inputs) and not _missing_seeds(workspace, variant, name, inputs)


def train_one(workspace: Workspace, params: Params, name: str, *, variant: str) -> dict[str, object]:
    """:func:`train` with the sections of the given params."""
    return train(workspace, variant, name, params.train_recommender, params.runtime)


def train(
    workspace: Workspace, variant: str, name: str, params: TrainRecommenderParams, runtime: RuntimeParams
) -> dict[str, object]:
    """Train one recommender with every seed in this process, or resume it, and save it in ``models/<variant>/<name>``.

    Seeds whose model was made from the same inputs are kept.  A model, its curve and its inputs are written together, and the
    folder's summary (the mean curve, then its ``made_of.json``) last, so an interrupted run resumes at the unfinished seed and
    epoch.  The summary is removed before a seed is trained; if no seed has to be trained, it is replaced unless it matches.

    Args:
        workspace: paths of the run.
        variant: the variant of item vectors.
        name: name of the recommender.
        params: settings of all recommenders, and the seeds.
        runtime: device and threads.

    Returns:
        Seeds, epochs, and NDCG@10 on the validation split, mean over the seeds.

    Raises:
        ConfigError: no such recommender, or contradictory settings.
        ArtifactError: an input is missing or damaged.
    """
    from sda_core.recommenders import history

    inputs = _inputs_by_seed(workspace, variant, name, params)
    folder = workspace.recommender(variant, name)
    seeds = [int(seed) for seed in inputs]
    summary = (folder / MADE_OF, folder / history.HISTORY)
    missing = _missing_seeds(workspace, variant, name, inputs)
    for path in folder.glob("*"):
        if path.name not in inputs and (missing or path not in summary):  # of other seeds or models
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if missing:
        _train_seeds(workspace, variant, name, missing, params, runtime)
    histories = [history.read_history(workspace.model(variant, name, seed)) for seed in seeds]
    if not (summary[1].is_file() and _was_made_of(folder, inputs)):
        write_tsv(folder / history.HISTORY, history.mean_over_seeds(histories))
        write_json(folder / MADE_OF, inputs)
    found = [best for records in histories if (best := history.best_ndcg(records)) is not None]
    counts: dict[str, object] = {"variant": variant, "recommender": name, "seeds": len(seeds)}
    counts["epochs"] = sum(map(len, histories))
    return counts | ({"valid ndcg@10": sum(found) / len(found)} if found else {})


def _train_seeds(
    workspace: Workspace,
    variant: str,
    name: str,
    inputs: Mapping[int, str],
    params: TrainRecommenderParams,
    runtime: RuntimeParams,
) -> None:
    """Train the seeds in the keys of ``inputs``, each with its :func:`_inputs`, and save each after its training."""
    import polars as pl

    from sda_core import recommenders
    from sda_core.recommenders.history import HISTORY
    from sda_core.runtime import prepare_torch

    section = params.of(name)
    device = prepare_torch(runtime)
    interactions = INTERACTIONS.read(workspace.interactions)
    test = interactions.filter(pl.col("split") == "test")
    vectors = recommenders.read_item_vectors(workspace.embeddings(variant), section)
    aligns = aligns_to_ids(section) and vectors is not None
    num_items = EMBEDDINGS.count(workspace.embeddings(variant))  # the whole catalogue, including items without interactions
    for seed, made_of in inputs.items():
        data = recommenders.training_data(
            interactions.filter(pl.col("split").is_in(["train", "valid"])),
            num_users=interactions["user_id"].n_unique(),
            num_items=num_items,
            leaked_test_items=test["item_id"].to_numpy() if counts_test(section) else None,
            item_table=recommenders.read_item_table(workspace.model("id", name, seed)) if aligns else None,
        )
        model = recommenders.build(section, data.num_users, data.num_items, vectors, seed=seed)
        scratch = workspace.resume("train_recommender", variant, name, str(seed))
        records = model.fit(data, checkpoint=scratch / "checkpoint.safetensors", fingerprint=made_of, device=device)
        with replace_directory(workspace.model(variant, name, seed)) as folder:
            model.save(folder)
            write_tsv(folder / HISTORY, records)
            write_json(folder / MADE_OF, {"sha256": made_of})
        shutil.rmtree(scratch, ignore_errors=True)
