"""The console script ``sda``: the stages as sub-commands, and what one asks of a finished run."""

from __future__ import annotations

import typer

from sda_core import __version__
from stages._stage import one_stage_a_process, run_app
from stages.build_index import build_index
from stages.control_embeddings import control_embeddings
from stages.costs import costs
from stages.diff import diff
from stages.download import download
from stages.draw_negatives import draw_negatives
from stages.evaluate import evaluate
from stages.export import export
from stages.export_embeddings import export_embeddings
from stages.fetch_images import fetch_images
from stages.filter import filter_
from stages.import_embeddings import import_embeddings
from stages.neighbors import neighbors
from stages.recommend import recommend
from stages.report import report
from stages.train_adapter import train_adapter
from stages.train_recommender import train_recommender
from stages.verify import verify

app = typer.Typer(
    name="sda",
    help=(
        "Adapt a vision-language model to a shop's items, and recommend with its vectors.\n\n"
        "`dvc repro` runs every stage in order and skips what is up to date; the commands below run one stage each, "
        "with the settings of params.yaml. Everything that can change a result stands in params.yaml; "
        "change it with `dvc exp run -S section.key=value`."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STAGES = {
    "download": download,
    "filter": filter_,
    "fetch-images": fetch_images,
    "train-adapter": train_adapter,
    "export-embeddings": export_embeddings,
    "control-embeddings": control_embeddings,
    "import-embeddings": import_embeddings,
    "build-index": build_index,
    "train-recommender": train_recommender,
    "draw-negatives": draw_negatives,
    "evaluate": evaluate,
    "report": report,
}
# Short enough to stand whole in the list of commands.
SHORT_HELP = {
    "download": "Fetch the raw files, whole and checked.",
    "filter": "Parse, filter, number and split them.",
    "fetch-images": "Fetch the pictures of the kept items.",
    "train-adapter": "Train LoRA or MoDA on items alone.",
    "export-embeddings": "Write a variant's item vectors.",
    "control-embeddings": "Write vectors to be beaten.",
    "import-embeddings": "Take in vectors made elsewhere.",
    "build-index": "Build a FAISS index, measure its recall.",
    "train-recommender": "Train a recommender on frozen vectors.",
    "draw-negatives": "Draw the negatives of uni100 and pop100.",
    "evaluate": "Place the test targets, compute metrics.",
    "report": "Compare variants, write the page.",
}
for _name, _command in STAGES.items():
    app.command(_name, short_help=SHORT_HELP[_name])(_command)
app.command("neighbors", short_help="Show the items nearest to an item.")(neighbors)
app.command("diff", short_help="Compare two runs, with intervals.")(diff)
app.command("verify", short_help="Check every artifact of the workspace.")(verify)
app.command("costs", short_help="Show what each stage cost last time.")(costs)
app.command("recommend", short_help="Recommend for a history of items.")(recommend)
app.command("export", short_help="Write data for MMRec, RecBole, datasets.")(export)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"sda {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Show the version and exit.", callback=_version, is_eager=True),
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Entry point of the console script."""
    one_stage_a_process()
    run_app(app)


if __name__ == "__main__":
    main()
