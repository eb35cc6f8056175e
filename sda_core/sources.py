"""The source files on which a module's result depends: its own, and those of everything it imports.

They are determined from the text of the files, without importing them.  :data:`EXEMPT` lists the modules that cannot change a
result; tests check that ``dvc.yaml`` has the same list, and that none of these modules computes results.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

EXEMPT = {
    "sda_core": "the version, and the import hook",
    "sda_core._peft_hook": "makes MoDA known to PEFT; code that uses an adapter imports sda_core.adapters itself",
    "sda_core.artifacts": "paths, schemas of tables, files written whole: what is read is what was written",
    "sda_core.cli": "the entry point of the console script",
    "sda_core.cli.process": "when a process began, how its threads wait, when garbage is collected",
    "sda_core.cli.project": "writes the files of a new project, and rejects a project of another version",
    "sda_core.cli.stage": "options, messages and costs of a stage",
    "sda_core.costs": "seconds and memory, which are not part of an output of the pipeline",
    "sda_core.errors": "messages",
    "sda_core.log": "messages and progress bars",
    "sda_core.params": "declares and checks the params; their values are dependencies of their own",
    "stages": "nothing but a docstring",
}
"""Modules that are not in the ``deps`` of any stage, each with the reason why it cannot change a result."""


def sources_of(*entries: str) -> list[Path]:
    """The source files of some modules and their imports, sorted, without the :data:`EXEMPT` ones.

    Imports inside functions are included, those for type checkers only are not.  For a parent package of a module, only the
    imports that run when it is imported are included.

    Args:
        entries: names of modules, such as ``sda_core.recommenders.sasrec``.

    Raises:
        ModuleNotFoundError: there is no such module in this project.
    """
    todo, found = list(entries), dict[str, Path]()
    while todo:
        name = todo.pop()
        if name in found or name in EXEMPT:
            continue
        path = _file(name)
        if path is None:
            raise ModuleNotFoundError(name)
        found[name] = path
        parents = [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]
        todo += [parent for parent in parents if parent not in EXEMPT]
        todo += [module for imported in _imports(path) if (module := _module(imported)) is not None]
    return sorted(found.values())


def package_sources(package: str) -> list[Path]:
    """All source files of a package, sorted; for a package whose modules are imported by the params' choice.

    Args:
        package: name of the package, such as ``sda_core.backbones``.
    """
    return sorted(ROOT.joinpath(*package.split(".")).glob("*.py"))


@cache
def _file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _module(imported: str) -> str | None:
    """The module of an imported name (``from a.b import c`` may import a module or a name in one); None for libraries."""
    if imported.split(".")[0] not in {"sda_core", "stages"}:
        return None
    while _file(imported) is None:
        imported = imported.rpartition(".")[0]
    return imported


@cache
def _imports(path: Path) -> tuple[str, ...]:
    """The names that a file imports; for a package's ``__init__`` only those imported when the package is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(_imported(tree, into_functions=path.name != "__init__.py"))


def _imported(node: ast.AST, *, into_functions: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    is_for_checkers = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    children = node.orelse if isinstance(node, ast.If) and is_for_checkers else ast.iter_child_nodes(node)
    for child in children:
        if into_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imported(child, into_functions=into_functions)
