"""Projects in which experiments make everything themselves."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from experiments import adaptation, workspaces


@contextmanager
def new_project(factory: pytest.TempPathFactory, repository: Path, *, processes: bool = False) -> Generator[Path]:
    """A project folder with conf/ alone; meanwhile the repository is the current folder, from which stages are run.

    Stages run in this process, unless ``processes`` is true: each real one imports torch and transformers, for seconds.
    """
    root = factory.mktemp("project")
    (root / "conf").symlink_to(repository / "conf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        if not processes:
            stages_in_this_process(patch)
        yield root


def stages_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Make the experiments call the functions of stages instead of starting ``python -m stages.NAME``."""
    for module in (adaptation, workspaces):
        patch.setattr(module, "subprocess", SimpleNamespace(run=_run))


def _run(command: Sequence[str], *, check: bool) -> subprocess.CompletedProcess[str]:
    _, flag, module, *given = command
    assert (flag, check) == ("-m", False), command
    name = module.removeprefix("stages.")
    options = dict(zip(given[::2], given[1::2], strict=True))
    arguments = {key.removeprefix("--"): Path(text) if key == "--root" else text for key, text in options.items()}
    stage = importlib.import_module(module)
    function = getattr(stage, f"{name}_", None) or getattr(stage, name)  # filter_, because filter is Python's
    try:
        function(**arguments)
    except typer.Exit as stopped:
        return subprocess.CompletedProcess(list(command), stopped.exit_code)
    return subprocess.CompletedProcess(list(command), 0)
