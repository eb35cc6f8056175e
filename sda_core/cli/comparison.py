"""Compare two runs by the positions of their users, or by their metrics if one of them has no positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from sda_core import evaluation
from sda_core.artifacts import Workspace
from sda_core.cli import noise as seeds
from sda_core.cli import revisions
from sda_core.evaluation.noise_file import has_seed, targets_hash
from sda_core.evaluation.seed_noise import Judgement, judge
from sda_core.params import Params

Key = tuple[str, str]  # variant and recommender
Pair = tuple[Workspace, Workspace]


@dataclass(frozen=True)
class Compared:
    """The results that two runs share, and their changes."""

    changes: Sequence[evaluation.Change]
    keys: tuple[list[Key], list[Key]]
    equal: list[Key]
    targets: str | None
    """Hash of the test targets; None without positions."""
    how: str
    remarks: list[str]
    by_positions: bool

    @property
    def shared(self) -> list[Key]:
        """The variants and recommenders of both runs, in the order of the second."""
        return [key for key in self.keys[1] if key in self.keys[0]]


@dataclass(frozen=True)
class TwoRuns:
    """The workspaces of two runs, with their revisions and the settings of the comparison."""

    workspaces: Pair
    revisions: tuple[str | None, str | None]
    settings: Params

    @property
    def names(self) -> tuple[str, str]:
        """The names of the runs in messages."""
        old, new = self.revisions
        return revisions.name_of(old), revisions.name_of(new)

    @property
    def runs(self) -> tuple[tuple[Workspace, str | None], tuple[Workspace, str | None]]:
        """Each workspace with its revision."""
        return (self.workspaces[0], self.revisions[0]), (self.workspaces[1], self.revisions[1])

    @property
    def interactions(self) -> pl.DataFrame | None:
        """The interactions of the second run, or of the first if the second has none."""
        return revisions.interactions(*self.workspaces[::-1])

    @property
    def num_items(self) -> int | None:
        """The number of items of the run that :attr:`interactions` belong to."""
        return revisions.num_items(*self.workspaces[::-1])

    @property
    def params(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The settings of each run, not validated."""
        (before, old), (after, new) = self.runs
        return revisions.params_of(before, old), revisions.params_of(after, new)

    def compare(self, interactions: pl.DataFrame | None) -> Compared:
        """Compare the runs.

        Raises:
            ConfigError: the runs were evaluated in different ways.
            ArtifactError: a run has no evaluation, a file is damaged, or the negatives differ.
        """
        if any(revisions.has_metrics_alone(*run) for run in self.runs):
            return self._by_metrics()
        return self._by_positions(interactions)

    def _by_positions(self, interactions: pl.DataFrame | None) -> Compared:
        first, second = (revisions.positions(*run) for run in self.runs)
        revisions.check_same_protocol(*self.runs)
        section, cutoff = self.settings.evaluate, self.settings.report.cutoff
        changes = evaluation.compare_runs(first, second, interactions, section, cutoff, self.num_items)
        equal = [key for key in second if key in first and second[key]["position"].equals(first[key]["position"])]
        how = f"paired intervals over users and seeds ({section.bootstrap_samples:,} draws)"
        targets = targets_hash(next(iter(second.values())))
        return Compared(changes, (list(first), list(second)), equal, targets, how, [], by_positions=True)

    def _by_metrics(self) -> Compared:
        first, second = (revisions.metrics(*run) for run in self.runs)
        revisions.check_same_protocol(*self.runs)
        revisions.check_same_negatives_of(first, second)
        changes = evaluation.compare_metrics(first, second, self.settings.report.cutoff)
        equal = [key for key in second if key in first and first[key] == second[key]]
        placed = [revisions.positions(*run) for run in self.runs if not revisions.has_metrics_alone(*run)]
        targets = targets_hash(next(iter(placed[0].values()))) if placed else None
        without = [name for run, name in zip(self.runs, self.names, strict=True) if revisions.has_metrics_alone(*run)]
        remark = f"positions of {' and '.join(without)} are neither in the DVC cache nor on a remote, so there are no intervals"
        return Compared(changes, (list(first), list(second)), equal, targets, "by their metrics", [remark], by_positions=False)


@dataclass(frozen=True)
class Verdict:
    """The comparison of two runs, judged by the variation between seeds."""

    judgement: Judgement
    keys: tuple[list[Key], list[Key]]
    names: tuple[str, str]
    lines: list[str]
    """The lines to print."""


def hold_against_noise(two: TwoRuns, noise: Path | None, root: Path) -> Verdict:
    """Compare two runs, and find the changes that are larger than the variation between seeds.

    Args:
        two: the runs.
        noise: file of the variation between whole runs; see :func:`sda_core.cli.noise.find`.
        root: the project folder.

    Raises:
        ConfigError: see :meth:`TwoRuns.compare` and :func:`sda_core.cli.noise.find`.
        ArtifactError: likewise.
    """
    interactions = two.interactions
    compared = two.compare(interactions)
    found, source = seeds.find(noise, root)
    params, names = two.params, two.names
    settings_lines = list(seeds.settings_lines(params, names, compared.shared))
    spreads, noise_lines = seeds.spreads(found, source, compared.changes, params, names, compared.targets)
    seedless = {name for _, name in compared.shared if not any(has_seed(run, name) for run in params)}
    judgement = judge(compared.changes, spreads, seedless)
    lines = revisions.table(
        judgement,
        compared.equal,
        compared.keys,
        two.revisions,
        compared.how,
        [*compared.remarks, *settings_lines, *noise_lines],
        by_positions=compared.by_positions,
        with_noise=any(spread is not None for spread in spreads),
    )
    return Verdict(judgement, compared.keys, names, [*lines, *seeds.closing(judgement)])
