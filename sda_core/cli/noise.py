"""The seeds' noise of ``sda diff``: where it comes from, which rows it fits, and what it says of two runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from sda_core.cli.revisions import list_keys
from sda_core.errors import ConfigError, DataError
from sda_core.evaluation import Change, noise_file
from sda_core.evaluation.noise_file import SeedNoise
from sda_core.evaluation.seed_noise import Judged, Judgement, Spread
from sda_core.params import Params

Key = tuple[str, str]
_MOST_NAMED = 8


def find(
    path: Path | None, root: Path, interactions: pl.DataFrame | None, settings: Params, num_items: int | None
) -> tuple[SeedNoise | None, str]:
    """The measured noise and where it stands; None where no path was given and the project folder has no file.

    Args:
        path: a file, or a folder below ``experiments/positions``; None takes ``seed_noise.json`` of the project folder.
        root: the project folder.
        interactions: the whole table; says which items are tail where positions are read.
        settings: definition of tail and cut-off.
        num_items: I.

    Raises:
        ConfigError: a folder was given, and there are no interactions.
        ArtifactError: no such file, or a damaged one.
    """
    if path is None:
        path = root / noise_file.NAME
        if not path.exists():
            return None, ""
        return noise_file.read(path), noise_file.NAME
    if not path.is_dir():
        return noise_file.read(path), str(path)
    if interactions is None:
        raise ConfigError("--noise", f"{path} holds positions, which need data/filtered", "run `dvc repro filter`")
    cutoffs = {*settings.evaluate.cutoffs, settings.report.cutoff}
    return noise_file.read_kept(path, interactions, settings.evaluate.tail, cutoffs, num_items), str(path)


def spreads(
    found: SeedNoise | None,
    source: str,
    changes: Sequence[Change],
    params: tuple[Mapping[str, Any], Mapping[str, Any]],
    names: tuple[str, str],
    targets: str | None,
) -> tuple[list[Spread | None], list[str]]:
    """The spread of each row, and lines that tell where it comes from and what it does not fit.

    Args:
        found: the measured noise.
        source: where it stands.
        changes: the rows.
        params: the settings of both runs.
        names: of both runs.
        targets: :func:`sda_core.evaluation.noise_file.targets_hash` of the runs; None where their positions are not at hand.
    """
    if found is None:
        return [None] * len(changes), [
            f"seeds' noise: not measured here (no {noise_file.NAME}); `{noise_file.COMMAND}` measures it"
        ]
    told = f"seeds' noise: {source}, {len(found.seeds)} seeds"
    if targets is not None and targets != found.targets:
        return [None] * len(changes), [
            f"{told}, measured on other test targets: not used; `{noise_file.COMMAND}` measures it again"
        ]
    if found.settings is None:
        told += ", whose settings are not recorded"
    fits: dict[Key, bool] = {}
    one_sided: set[str] = set()
    unlike: dict[str, list[Key]] = {}
    for key in dict.fromkeys((change.variant, change.recommender) for change in changes):
        in_runs = [found.unlike(settings, *key) for settings in params]
        fits[key] = not all(in_runs)
        if fits[key] and any(in_runs):
            one_sided.add(names[0] if not in_runs[0] else names[1])
        if not fits[key] and noise_file.has_seed(params[1], key[1]):
            unlike.setdefault(", ".join(min(in_runs, key=len)), []).append(key)
    if one_sided:
        told += f", measured under the settings of {' and '.join(sorted(one_sided))} (taken to hold for both runs)"
    lines = [told]
    lines += [f"  not measured with these {where}: {list_keys(keys)}" for where, keys in unlike.items()]
    rows: list[Spread | None] = []
    absent: list[str] = []
    for change in changes:
        key = (change.variant, change.recommender)
        rows.append(found.spread(*key, change.name) if fits[key] else None)
        if fits[key] and rows[-1] is None and noise_file.has_seed(params[1], key[1]):
            absent.append(f"{'/'.join(key)} {change.name}")
    if absent:
        lines.append(f"  not measured: {_some(absent)}")
    for settings, name in zip(params, names, strict=True):
        own = {noise_file.at(settings, f"{section}.seed") for section in _trainings(fits)}
        if among := sorted(own & set(found.seeds)):
            seeds = ", ".join(map(str, among))
            lines.append(f"  seed {seeds} of {name} is among the measured ones: the noise may contain the run it is held against")
    return rows, lines


def _trainings(keys: Iterable[Key]) -> list[str]:
    """The sections of params that hold a seed of a training."""
    return ["train_adapter.training", *dict.fromkeys(f"train_recommender.{recommender}" for _, recommender in keys)]


def _some(named: Sequence[str]) -> str:
    more = f", and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    return ", ".join(named[:_MOST_NAMED]) + more


def settings_lines(
    params: tuple[Mapping[str, Any], Mapping[str, Any]], names: tuple[str, str], keys: Sequence[Key]
) -> Iterator[str]:
    """What differs in the settings of two runs, of those that the results of some variants and recommenders follow from."""
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
    for name in _trainings(keys):
        old, new = (noise_file.at(settings, f"{name}.seed") for settings in params)
        if old != new:
            seeds[name] = f"{name}.seed {old} -> {new}"
    if seeds:
        yield f"seeds differ: {', '.join(seeds.values())}"


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return "absent" if name not in flat else "null" if flat[name] is None else str(flat[name])


def closing(judgement: Judgement, num_seeds: int | None) -> Iterator[str]:
    """The lines under the table: the rule, how many rows chance explains, and the verdict on the two runs."""
    if num_seeds is not None and judgement.measured:
        yield (
            f"noise: two runs that differ only in their seeds differ by at most this in 95 of 100 cases "
            f"(t({num_seeds - 1}) * s * sqrt(2), s over {num_seeds} seeds, at least one user's worth)."
        )
        number, outside = len(judgement.measured), len(judgement.outside)
        yield f"larger than the noise: {outside} of {number} rows; by chance alone about {0.05 * number:.1f} would be."
    yield f"verdict: {verdict(judgement)}"


def verdict(judgement: Judgement) -> str:
    """One line on the two runs as wholes."""
    if judgement.outcome == "different":
        return f"not the same; larger than the seeds' noise (adjusted p < 0.05): {_named(judgement.different)}"
    if judgement.outcome == "unknown":
        pairs = list(dict.fromkeys((row.change.variant, row.change.recommender) for row in judgement.unknown))
        so_far = "nothing else is larger than the seeds' noise; " if judgement.measured else ""
        return f"not known; {so_far}no noise was measured for {list_keys(pairs)}"
    if all(row.is_equal for row in judgement.rows):
        return "equal"
    return "same to within the seeds' noise (what is smaller than the noise cannot be seen with one seed)"


def _named(rows: Sequence[Judged]) -> str:
    named = [
        f"{row.change.variant}/{row.change.recommender} {row.change.name} {row.change.difference:+.4f} (noise {row.band:.4f})"
        for row in rows
    ]
    return _some(named)


def check_same(judgement: Judgement, keys: tuple[Sequence[Key], Sequence[Key]], names: tuple[str, str]) -> None:
    """See that two runs are the same to within the seeds' noise, and have the same variants and recommenders.

    Raises:
        DataError: they are not, or it is not known.
    """
    for one, other, name in ((*keys, names[0]), (*keys[::-1], names[1])):
        alone = [key for key in one if key not in other]
        if alone:
            raise DataError("--same", f"{list_keys(alone)} is only in {name}")
    if judgement.outcome != "same":
        raise DataError("--same", verdict(judgement), f"run `{noise_file.COMMAND}`" if judgement.outcome == "unknown" else "")
