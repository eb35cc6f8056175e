"""The console script ``sda``: the stages as sub-commands, and the commands that read a finished run."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import typer

from sda_core import __version__
from sda_core.cli.check_adapter import check_adapter
from sda_core.cli.costs import costs
from sda_core.cli.diff import diff
from sda_core.cli.explore import explore
from sda_core.cli.export import export
from sda_core.cli.import_hm import import_hm
from sda_core.cli.init import init, upgrade
from sda_core.cli.neighbors import neighbors
from sda_core.cli.recommend import recommend
from sda_core.cli.search import search
from sda_core.cli.stage import one_stage_a_process, run_app
from sda_core.cli.verify import verify

STAGES = {
    "download": "Download and check the raw files.",
    "filter": "Parse, filter and split the raw files.",
    "fetch-images": "Fetch the images of the kept items.",
    "train-adapter": "Train LoRA or MoDA on items alone.",
    "export-embeddings": "Embed every item for a variant.",
    "control-embeddings": "Write control embeddings.",
    "import-embeddings": "Import embeddings from a file.",
    "build-index": "Build a FAISS index and measure recall.",
    "train-recommender": "Train a recommender on frozen vectors.",
    "draw-negatives": "Draw the negatives of uni100 and pop100.",
    "evaluate": "Rank test targets and compute metrics.",
    "report": "Compare variants and write the report.",
}
"""The stages in pipeline order, each with a short help text for the list of commands."""


def stages_package() -> str:
    """The package of the stages: inside ``sda_core`` if it was installed from a wheel, else beside it, as in the repository."""
    return "sda_core.stages" if find_spec("sda_core.stages") else "stages"


def stage_command(name: str) -> Callable[..., None]:
    """The function of a stage's command: ``fetch_images`` of ``stages/fetch_images.py`` for ``fetch-images``."""
    module = name.replace("-", "_")
    return getattr(import_module(f"{stages_package()}.{module}"), "filter_" if module == "filter" else module)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"sda {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="sda",
    help=(
        "Adapt a vision-language model to a shop's items, and train recommenders on its embeddings.\n\n"
        "`dvc repro` runs every stage in order and skips what is up to date. The commands from download to report run one "
        "stage each, with the settings of params.yaml; the others create a project, or read a finished run. "
        "Every setting that can change a result is in params.yaml; change it with `dvc exp run -S section.key=value`."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _help in STAGES.items():
    app.command(_name, short_help=_help)(stage_command(_name))
app.command("init", short_help="Create a project in a new folder.")(init)
app.command("upgrade", short_help="Upgrade a project to this version.")(upgrade)
app.command("check-adapter", short_help="Check embeddings before training.")(check_adapter)
app.command("neighbors", short_help="List the nearest items of an item.")(neighbors)
app.command("diff", short_help="Compare two runs, with intervals.")(diff)
app.command("verify", short_help="Check every artifact of the workspace.")(verify)
app.command("costs", short_help="Show each stage's time and memory.")(costs)
app.command("recommend", short_help="Recommend for a history of items.")(recommend)
app.command("search", short_help="Find items near a text.")(search)
app.command("explore", short_help="Explore a finished run in a browser.")(explore)
app.command("export", short_help="Export to MMRec, RecBole or Hugging Face datasets.")(export)
app.command("import-hm", short_help="Convert Kaggle's H&M files.")(import_hm)


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Show the version and exit.", callback=_version, is_eager=True),
) -> None:
    """Options before the name of a command."""


def run() -> None:
    """Run the command line."""
    one_stage_a_process()
    run_app(app)
