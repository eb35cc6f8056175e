"""Hooks of MkDocs for this repository: pages outside docs/, links, the reference of settings, docstrings in Markdown."""

from __future__ import annotations

import ast
import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "bench.md",
    "pretraining/README.md": "pretraining.md",
    "sda_core/backbones/nano/MODEL_CARD.md": "nano.md",
    "sda_core/backbones/nano2/MODEL_CARD.md": "nano2.md",
}
"""Files outside docs/, and their names on the site."""

SETTINGS = "settings.md"
"""The page whose tables are made from ``sda_core/params.py`` and ``params.yaml``."""

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_HEADER = re.compile(r"\A---\n.*?\n---\n", re.S)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/."""
    for source, name in PAGES.items():
        text = _HEADER.sub("", (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Convert links between files of the repository to links between pages of the site."""
    name = page.file.src_uri
    if name == SETTINGS:
        markdown = markdown.replace("<!-- settings -->", settings_reference())
    source = next((path for path, target in PAGES.items() if target == name), f"docs/{name}")
    return "".join(
        part if part.startswith("```") else _LINK.sub(lambda match: _on_site(match, source, name), part)
        for part in re.split(r"(^```.*?^```)", markdown, flags=re.S | re.M)
    )


def _on_site(match: re.Match[str], source: str, page: str) -> str:
    target = match[2]
    if "://" in target or target.startswith("mailto:"):
        return match[0]
    path = os.path.normpath(Path(source).parent / target).replace(os.sep, "/")
    inside = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    if inside is None:
        return match[0]  # the strict build reports it
    return f"{match[1]}{os.path.relpath(inside, Path(page).parent)}{match[3] or ''}{match[4]}".replace(os.sep, "/")


# -------------------------------------------------------------------------------------------------------- settings
_WORDS = {
    "Count": "whole number from 1", "CountOrZero": "whole number from 0", "Positive": "number above 0", "Share": "0 to 1",
    "NonNegative": "number from 0", "Strength": "number from 0", "int": "whole number", "float": "number", "str": "text",
    "bool": "true, false", "Cut": "day or share", "Sha256": "sha256", "Name": "name", "tuple": "list", "dict": "mapping",
}  # fmt: skip
"""The names of the types of fields in the reference."""


def settings_reference() -> str:
    """One table per section of ``params.yaml``: setting, value, possible values, and the comment in ``sda_core/params.py``."""
    source = (ROOT / "sda_core" / "params.py").read_text(encoding="utf-8")
    module, lines = ast.parse(source), source.splitlines()
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    aliases = {
        node.targets[0].id: node.value
        for node in module.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }  # fmt: skip
    values = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))

    def fields(name: str) -> Iterator[tuple[str, ast.expr, str]]:
        for base in classes[name].bases:
            if isinstance(base, ast.Name) and base.id in classes:
                yield from fields(base.id)
        for node in classes[name].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                comment = re.search(r"  # (.+)$", lines[(node.end_lineno or 1) - 1])
                yield node.target.id, node.annotation, html.escape(comment[1], quote=False) if comment else ""

    def sections_of(kind: ast.expr) -> list[str]:
        """The classes of a type: one, or those of a union."""
        if isinstance(kind, ast.BinOp):
            return sections_of(kind.left) + sections_of(kind.right)
        if isinstance(kind, ast.Subscript) and isinstance(kind.slice, ast.Tuple):
            return sections_of(kind.slice.elts[0])
        names = [node.id for node in ast.walk(kind) if isinstance(node, ast.Name)]
        return [
            name for one in names for name in ([one] if one in classes else sections_of(aliases[one]) if one in aliases else [])
        ]

    def possible(kind: ast.expr) -> str:
        match kind:
            case ast.BinOp(left, ast.BitOr(), right):
                return f"{possible(left)}, {possible(right)}"
            case ast.Subscript(ast.Name("Literal"), ast.Tuple(choices)):
                return ", ".join(map(possible, choices))
            case ast.Subscript(ast.Name("Literal"), choice):
                return possible(choice)
            case ast.Subscript(ast.Name("Annotated"), ast.Tuple([inner, *_])):
                return possible(inner)
            case ast.Subscript(ast.Name(name), _):
                return _WORDS.get(name, name)
            case ast.Name(name) if name in aliases and name not in _WORDS:
                return possible(aliases[name])
            case ast.Name(name):
                return _WORDS.get(name, name)
            case ast.Constant(value):
                return "null" if value is None else f"`{value}`"
            case _:
                return ""

    def table(path: str, name: str, content: Any) -> Iterator[str]:
        rows: list[str] = []
        nested: list[tuple[str, str, Any]] = []
        for field, kind, comment in fields(name):
            found = content.get(field) if isinstance(content, dict) else None
            is_section = not isinstance(kind, ast.Subscript) or ast.unparse(kind.value) == "Annotated"
            inner = sections_of(kind) if is_section else []
            if inner:
                nested += [(f"{path}.{field}".lstrip("."), one, found) for one in inner]
            else:
                shown = "" if content is None else f"`{json.dumps(found, ensure_ascii=False)}`".replace("|", "\\|")
                rows.append(f"| `{field}` | {shown} | {possible(kind)} | {comment} |")
        if rows:
            summary = (ast.get_docstring(classes[name]) or "").split("\n\n")[0].replace("``", "`")
            yield f"## {path or 'params.yaml'}\n\n{summary}\n"
            yield "| setting | in `params.yaml` | values | what |\n|---|---|---|---|"
            yield "\n".join(rows) + "\n"
        for inner_path, one, found in nested:
            choice = next((kind for field, kind, _ in fields(one) if field in ("kind", "source")), None)
            if choice is not None and len([each for each in nested if each[0] == inner_path]) > 1:
                wanted = possible(choice).strip("`")
                is_used = isinstance(found, dict) and wanted in (found.get("kind"), found.get("source"))
                yield from table(f"{inner_path} ({wanted})", one, found if is_used else None)
            else:
                yield from table(inner_path, one, found)

    return "\n".join(table("", "Params", values))


# ------------------------------------------------------------------------------------------------------- docstrings
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_TABLE = re.compile(r"^=+(?: +=+)+\n((?:.+\n)*)=+(?: +=+)+$", re.M)
_LITERAL = re.compile(r"::$", re.M)


def plain(text: str) -> str:
    """A docstring in Markdown: roles become code, tables of equals signs become preformatted text, ``::`` a colon."""
    text = _ROLE.sub(lambda match: f"`{match[1].lstrip('.')}`", text)
    text = _TABLE.sub(lambda match: f"```text\n{match[1].rstrip()}\n```", text)
    return _LITERAL.sub(lambda _: ":", text)


class PlainDocstrings(griffe.Extension):
    """Apply :func:`plain` to every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
