"""Run a script of a package: ``python -m experiments NAME ...``, ``python -m bench NAME ...``.

A script is a module of the package with a function ``main``, whose parameters are its options (typer).  The package's
``--help`` shows the first sentence of its docstring, the script's ``--help`` the whole docstring.  Only the requested script
is imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from sda_core.cli.stage import run_app, run_arguments
from sda_core.errors import SDAError

TYPER: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
WIDE = {"max_content_width": 130}


class Names(tuple[str, ...]):
    """The value of an option that lists names, separated by commas."""

    __slots__ = ()


class Numbers(tuple[int, ...]):
    """The value of an option that lists whole numbers, separated by commas."""

    __slots__ = ()


def names(text: str | Names) -> Names:
    """Parse ``a,b,c`` (the ``parser`` of an option)."""
    if isinstance(text, Names):  # a default value
        return text
    parts = Names(part.strip() for part in text.split(","))
    if not all(parts):
        raise typer.BadParameter(f"expected names with commas between them (got {text!r})")
    if len({*parts}) < len(parts):
        raise typer.BadParameter(f"expected each name once (got {text!r})")
    return parts


def numbers(text: str | Numbers) -> Numbers:
    """Parse ``1,2,3`` (the ``parser`` of an option)."""
    if isinstance(text, Numbers):
        return text
    try:
        found = Numbers(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected whole numbers with commas between them (got {text!r})") from None
    if min(found) < 0 or len({*found}) < len(found):
        raise typer.BadParameter(f"expected each number once, none below 0 (got {text!r})")
    return found


def scripts(package: str) -> Iterator[tuple[str, str]]:
    """Names of the scripts of a package and the first sentences of their docstrings; nothing is imported."""
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    for path in sorted(Path(spec.origin).parent.glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            yield path.stem, re.split(r"(?<=[.:?]) |\n", ast.get_docstring(module) or "", maxsplit=1)[0].rstrip(":.")


def run_scripts(package: str) -> None:
    """Run the command line of a package.  A user's mistake is reported in one line, with exit status 1.

    Args:
        package: name of an importable package, with a docstring that describes its scripts.
    """
    app = typer.Typer(no_args_is_help=True, help=importlib.import_module(package).__doc__, context_settings=WIDE, **TYPER)
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    for name, sentence in scripts(package):
        app.command(name, short_help=sentence, add_help_option=False, context_settings=settings)(_command(package, name))

    @app.callback()
    def options() -> None:
        """Reject options before the name of the script."""

    run_app(app)


def _command(package: str, name: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        run_script(package, name, context.args)

    return run


def script(package: str, name: str) -> typer.Typer:
    """The command line of one script; imports it."""
    module = importlib.import_module(f"{package}.{name}")
    app = typer.Typer(context_settings=WIDE, **TYPER)
    paragraphs = inspect.cleandoc(module.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(f"\b\n{paragraph}" for paragraph in paragraphs))(module.main)  # \b: keep line breaks
    return app


def run_script(package: str, name: str, arguments: Sequence[str]) -> None:
    """Run one script with its options.

    Raises:
        SystemExit: always; the status is 1 after a user's mistake.
    """
    program = f"python -m {package} {name}"
    try:
        run_arguments(script(package, name), arguments, program)
    except SDAError as error:
        typer.echo(f"{program}: error: {error}", err=True)
        raise SystemExit(1) from None
