"""What changed between two runs, user by user, and whether it is more than another seed would change."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.stage import ParamsFile, Root, one_line_errors

Old = Annotated[str, typer.Argument(metavar="REV_A", help="Before: a commit, branch, tag, or a DVC experiment.")]
New = Annotated[
    str | None, typer.Argument(metavar="[REV_B]", help="After; left out: the files of the workspace.", show_default=False)
]
Noise = Annotated[
    Path | None,
    typer.Option(
        "--noise",
        help="The seeds' noise: a file of experiments/seed_noise.py, or a folder below experiments/positions.",
        show_default="seed_noise.json of the project folder",
    ),
]
Same = Annotated[bool, typer.Option("--same", help="Exit with 1 unless the runs are the same to within the seeds' noise.")]


def diff(
    old: Old, new: New = None, noise: Noise = None, same: Same = False, root: Root = Path(), params: ParamsFile = None
) -> None:
    """Compare two runs: Hit and NDCG of every variant and recommender that both have, with paired 95 % intervals.

    Positions are read from the DVC cache (or a remote) as they were at each revision; users are joined by user and target.
    Where a revision has only its metrics at hand, these are compared, without intervals. The intervals take both trained
    models as fixed. Whether another seed, or another machine, would change as much is held against the seeds' noise.
    The settings of evaluate and report in params.yaml say how: cut-off, definition of tail, bootstrap.
    """
    from sda_core import evaluation
    from sda_core.cli import noise as seeds
    from sda_core.cli import revisions
    from sda_core.evaluation.noise_file import has_seed, targets_hash
    from sda_core.evaluation.seed_noise import judge
    from sda_core.params import load_params

    with one_line_errors("diff", root if params is None else None), ExitStack() as opened:
        settings = load_params(params or root / "params.yaml")
        before, after = (opened.enter_context(revisions.workspace_at(root, revision)) for revision in (old, new))
        runs = ((before, old), (after, new))
        names = (revisions.name_of(old), revisions.name_of(new))
        interactions, num_items = revisions.interactions(after, before), revisions.num_items(after, before)
        cutoff, num_samples = settings.report.cutoff, settings.evaluate.bootstrap_samples
        without = [name for run, name in zip(runs, names, strict=True) if revisions.has_metrics_alone(*run)]
        remarks: list[str] = []
        targets: str | None = None
        if without:
            numbers = revisions.metrics(*runs[0]), revisions.metrics(*runs[1])
            revisions.check_same_protocol(*runs)
            revisions.check_same_negatives_of(*numbers)
            changes = evaluation.compare_metrics(*numbers, cutoff)
            keys = list(numbers[0]), list(numbers[1])
            equal = [key for key in keys[1] if key in keys[0] and numbers[0][key] == numbers[1][key]]
            how = "by their metrics"
            remarks.append(
                f"positions of {' and '.join(without)} are not in the DVC cache, and no remote gave them: no intervals over users"
            )
            if len(without) < 2:
                placed = revisions.positions(*next(run for run in runs if not revisions.has_metrics_alone(*run)))
                targets = targets_hash(next(iter(placed.values())))
        else:
            first, second = revisions.positions(before, old), revisions.positions(after, new)
            revisions.check_same_protocol(*runs)
            changes = evaluation.compare_runs(first, second, interactions, settings.evaluate, cutoff, num_items)
            keys = list(first), list(second)
            equal = [key for key in second if key in first and second[key]["position"].equals(first[key]["position"])]
            how = f"paired bootstrap over users ({num_samples:,} samples)"
            targets = targets_hash(next(iter(second.values())))
        found, source = seeds.find(noise, root, interactions, settings, num_items)
        given = revisions.params_of(before, old), revisions.params_of(after, new)
        shared = [key for key in keys[1] if key in keys[0]]
        remarks += seeds.settings_lines(given, names, shared)
        spreads, told = seeds.spreads(found, source, changes, given, names, targets)
        remarks += told
        seedless = {name for _, name in shared if not any(has_seed(run, name) for run in given)}
        judgement = judge(changes, spreads, seedless)
        lines = revisions.table(
            judgement, equal, keys, (old, new), how, remarks, by_positions=not without, with_noise=found is not None
        )
        typer.echo("\n".join([*lines, *seeds.closing(judgement, None if found is None else len(found.seeds))]))
        if same:
            seeds.check_same(judgement, keys, names)
