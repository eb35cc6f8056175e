"""Options that several experiments share.

Lists are separated by commas (``--seeds 1,2,3 --variants lora,sda``).  ``--set PATH=VALUE`` can be repeated, because a value may
contain commas.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.scripts import Names, Numbers, names, numbers

Root = Annotated[Path, typer.Option("--root", help="The project folder of the run.", show_default="the current folder")]
SeedRoot = Annotated[
    str, typer.Option("--root", help="The project folder of the run.  {seed} in it is replaced by the seed.", show_default=False)
]
Source = Annotated[
    Path, typer.Option("--source", help="The project folder whose data is used.", show_default="the current folder")
]


def folder_name(text: str) -> str:
    """Check a name that becomes a folder's (the ``parser`` of an option)."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", text):
        raise typer.BadParameter(f"expected letters, digits, _ . + and -, which become a folder's name (got {text!r})")
    return text


Name = Annotated[
    str,
    typer.Option(
        "--name", parser=folder_name, metavar="NAME", help="Name of this experiment, which is part of its folders' names."
    ),
]
Seeds = Annotated[Numbers, typer.Option("--seeds", parser=numbers, metavar="1,2,...", help="Seeds of the trainings.")]
Variants = Annotated[
    Names, typer.Option("--variants", parser=names, metavar="A,B,...", help="Variants whose item vectors are used.")
]
Baselines = Annotated[
    Names, typer.Option("--baselines", parser=names, metavar="A,B,...", help="Variants that the others are compared with.")
]
Recommenders = Annotated[Names, typer.Option("--recommenders", parser=names, metavar="A,B,...", help="Recommenders to train.")]
Recommender = Annotated[str, typer.Option("--recommender", help="Recommender to train.")]
MaxEpochs = Annotated[
    int | None, typer.Option("--max-epochs", help="Replaces max_epochs of the recommender.", show_default=False)
]
NumSteps = Annotated[
    int | None, typer.Option("--num-steps", help="Replaces train_adapter.training.num_steps.", show_default=False)
]
FusedDim = Annotated[
    int | None,
    typer.Option("--fused-dim", help="Fuse image and text vectors again, to this many components.", show_default=False),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Change a setting; the value is YAML.  Repeat it for more.", show_default=False
    ),
]

THREE_SEEDS = Numbers((1, 2, 3))
