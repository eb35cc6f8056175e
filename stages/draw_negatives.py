"""Draw the negatives of the sampled protocols, once for all variants."""

from __future__ import annotations

from pathlib import Path

from sda_core.cli.stage import ParamsFile, Root, run_as_script, stage


def draw_negatives(root: Root = Path(), params: ParamsFile = None) -> None:
    """Draw 100 negatives for every test user and store them with their hash; with protocol fullrank the table is empty."""
    from sda_core import evaluation
    from sda_core.artifacts import INTERACTIONS, ITEMS

    with stage("draw-negatives", root, params) as run:
        section, workspace = run.params.evaluate, run.workspace
        interactions, num_items = INTERACTIONS.read(workspace.interactions), ITEMS.count(workspace.items)
        drawn = evaluation.write_negatives(workspace.negatives(section.protocol), interactions, section, num_items)
        run.counts = {"protocol": section.protocol, **drawn.metadata}


if __name__ == "__main__":
    run_as_script(draw_negatives)
