"""Convert raw files to tables: parse, filter, number ids, split."""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, run_as_script, stage


def filter_(root: Root = Path(), params: ParamsFile = None) -> None:
    """Parse the raw files, filter and split the interactions, and count every dropped row by reason."""
    from sda_core.artifacts import INTERACTIONS, ITEMS, USERS, replace_directory, write_json
    from sda_core.data.filtering import filter_dataset
    from sda_core.fetch.manifest import manifest_file

    with stage("filter", root, params) as run:
        raw, target = run.workspace.raw, run.workspace.filtered
        reviews, metadata = manifest_file(raw, "reviews"), manifest_file(raw, "metadata")
        data = filter_dataset(reviews, metadata, run.params.dataset.edition, run.params.filter)
        data.check_targets()
        with replace_directory(target) as folder:
            INTERACTIONS.write(data.interactions, folder / run.workspace.interactions.name)
            ITEMS.write(data.items, folder / run.workspace.items.name)
            USERS.write(data.users, folder / run.workspace.users.name)
            write_json(folder / run.workspace.statistics.name, data.statistics)
        run.counts = data.counts


if __name__ == "__main__":
    run_as_script(filter_)
