"""Variation between seeds in ``sda diff``: its source, the rows it applies to, and the verdict on two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sda_core.cli.revisions import list_keys
from sda_core.errors import DataError
from sda_core.evaluation import Change, noise_file
from sda_core.evaluation.noise_file import SeedNoise
from sda_core.evaluation.seed_noise import Judged, Judgement, Spread, spread_of_seeds

Key = tuple[str, str]
_MOST_NAMED = 8


def find(path: Path | None, root: Path) -> tuple[SeedNoise | None, str]:
    """Read the measured variation between whole runs, with its path; None if it was not measured.

    Args:
        path: the file; None: ``seed_noise.json`` of the project folder if it exists.
        root: the project folder.

    Raises:
        ArtifactError: no such file, or a damaged one.
    """
    if path is None:
        path = root / noise_file.NAME
        return (noise_file.read(path), noise_file.NAME) if path.exists() else (None, "")
    return noise_file.read(path), str(path)


def spreads(
    found: SeedNoise | None,
    source: str,
    changes: Sequence[Change],
    params: tuple[Mapping[str, Any], Mapping[str, Any]],
    names: tuple[str, str],
    targets: str | None,
) -> tuple[list[Spread | None], list[str]]:
    """The spread of each row, and lines that describe its source and the rows that the file does not fit.

    A row has the spread of the file if that was measured with the row's settings and test targets, else the spread between
    the seeds of the two runs.

    Args:
        found: the measured variation between whole runs.
        source: path of its file.
        changes: the rows.
        params: the settings of both runs.
        names: names of both runs.
        targets: :func:`sda_core.evaluation.noise_file.targets_hash` of the runs; None without positions.
    """
    rows = [spread_of_seeds(change) for change in changes]
    lines = [_between_seeds(changes)]
    trained = [
        key for key in dict.fromkeys((change.variant, change.recommender) for change in changes)
        if any(noise_file.has_adapter(settings, key[0]) for settings in params)
        and noise_file.has_seed(params[1], key[1])
    ]  # fmt: skip
    if found is None:
        if trained:
            lines.append(f"  not included: other seeds of the adapters; measure them with `{noise_file.COMMAND}`")
        return rows, lines
    if targets is not None and targets != found.targets:
        return rows, [
            *lines,
            f"  not used: {source}, which was measured on other test targets; measure again with `{noise_file.COMMAND}`",
        ]
    unlike: dict[str, list[Key]] = {}
    fits: set[Key] = set()
    for key in trained:
        in_runs = [found.unlike(settings, *key) for settings in params]
        if all(in_runs):
            unlike.setdefault(", ".join(min(in_runs, key=len)), []).append(key)
        else:
            fits.add(key)
    replaced = [
        found.spread(change.variant, change.recommender, change.name) if (change.variant, change.recommender) in fits else None
        for change in changes
    ]
    used = [
        key for key in trained if any(s and (c.variant, c.recommender) == key for s, c in zip(replaced, changes, strict=True))
    ]
    if used:
        lines.append(
            f"  for {list_keys(used)}: measured over the {len(found.seeds)} runs in {source}, each with its own adapters"
        )
    lines += [
        f"  not used for {list_keys(keys)}: {source}, which was measured with other settings in {where}"
        for where, keys in unlike.items()
    ]
    for settings, name in zip(params, names, strict=True):
        if used and noise_file.at(settings, "train_adapter.training.seed") in found.seeds:
            lines.append(f"  the adapter seed of {name} is one of those in {source}, which may therefore include this run itself")
    return [own if spread is None else spread for own, spread in zip(rows, replaced, strict=True)], lines


def _between_seeds(changes: Sequence[Change]) -> str:
    counts = sorted({change.num_seeds for change in changes if change.num_seeds > 1})
    if not counts:
        return "variation between seeds: not known, because each run has one seed; set several train_recommender.seeds"
    return f"variation between seeds: measured over the {counts[-1]} recommender seeds of each run"


_SEEDS = ("train_adapter.training.seed", "train_recommender.seeds")


def _some(named: Sequence[str]) -> str:
    more = f", and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    return ", ".join(named[:_MOST_NAMED]) + more


def settings_lines(
    params: tuple[Mapping[str, Any], Mapping[str, Any]], names: tuple[str, str], keys: Sequence[Key]
) -> Iterator[str]:
    """The differences of two runs in the settings on which the results of some variants and recommenders depend."""
    if not all(params):
        for settings, name in zip(params, names, strict=True):
            if not settings:
                yield f"settings of {name}: not known (it has no params.yaml)"
        return
    differing: dict[str, str] = {}
    for key in keys:
        old, new = (_flat(noise_file.sections(settings, *key)) for settings in params)
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                differing[name] = f"{name} {_shown(old, name)} -> {_shown(new, name)}"
    if differing:
        yield f"settings differ: {_some(list(differing.values()))}"
    seeds = {}
    for name in _SEEDS:
        old, new = (noise_file.at(settings, name) for settings in params)
        if old != new:
            seeds[name] = f"{name} {old} -> {new}"
    if seeds:
        yield f"seeds differ: {', '.join(seeds.values())}"


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return "absent" if name not in flat else "null" if flat[name] is None else str(flat[name])


def closing(judgement: Judgement) -> Iterator[str]:
    """The lines under the table: the rule, the number of rows expected by chance, and the verdict on the two runs."""
    if judgement.measured:
        yield (
            "limit: if two runs differ only in their seeds, a change is at most this large in 95 of 100 cases "
            "(Student's t-test; at least the effect of one user)."
        )
        number, outside = len(judgement.measured), len(judgement.outside)
        yield f"changes above the limit: {outside} of {number} rows; about {0.05 * number:.1f} are expected by chance."
    yield f"verdict: {verdict(judgement)}"


def verdict(judgement: Judgement) -> str:
    """The verdict on the two runs in one line."""
    if judgement.outcome == "different":
        return f"not the same; changes larger than the variation between seeds (adjusted p < 0.05): {_named(judgement.different)}"
    if judgement.outcome == "unknown":
        pairs = list(dict.fromkeys((row.change.variant, row.change.recommender) for row in judgement.unknown))
        so_far = "no other change is larger than the variation between seeds; " if judgement.measured else ""
        return f"not known; {so_far}the variation was not measured for {list_keys(pairs)}"
    if all(row.is_equal for row in judgement.rows):
        return "equal"
    return "same within the variation between seeds (so few seeds cannot show a smaller difference)"


def _named(rows: Sequence[Judged]) -> str:
    named = [
        f"{row.change.variant}/{row.change.recommender} {row.change.name} {row.change.difference:+.4f} (limit {row.band:.4f})"
        for row in rows
    ]
    return _some(named)


def check_same(judgement: Judgement, keys: tuple[Sequence[Key], Sequence[Key]], names: tuple[str, str]) -> None:
    """Check that two runs are equal within the variation between seeds, and have the same variants and recommenders.

    Raises:
        DataError: they differ, or the variation is not known.
    """
    for one, other, name in ((*keys, names[0]), (*keys[::-1], names[1])):
        alone = [key for key in one if key not in other]
        if alone:
            raise DataError("--same", f"{list_keys(alone)} is only in {name}")
    if judgement.outcome != "same":
        raise DataError(
            "--same",
            verdict(judgement),
            "train both with several train_recommender.seeds" if judgement.outcome == "unknown" else "",
        )
