"""What MkDocs needs to show this repository: pages that stand outside docs/, their links, and docstrings in Markdown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "bench.md",
    "pretraining/README.md": "pretraining.md",
    "sda_core/backbones/nano/MODEL_CARD.md": "nano.md",
}
"""Files outside docs/, and what they are called on the site."""

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_HEADER = re.compile(r"\A---\n.*?\n---\n", re.S)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand outside docs/."""
    for source, name in PAGES.items():
        text = _HEADER.sub("", (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links between files of the repository lead to pages of the site; what has no page is shown as its path."""
    name = page.file.src_uri
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


# ------------------------------------------------------------------------------------------------------- docstrings
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_TABLE = re.compile(r"^=+(?: +=+)+\n((?:.+\n)*)=+(?: +=+)+$", re.M)
_LITERAL = re.compile(r"::$", re.M)


def plain(text: str) -> str:
    """A docstring in Markdown: roles become code, tables of equals signs become preformatted text, ``::`` a colon."""
    text = _ROLE.sub(lambda match: f"`{match[1].lstrip('.')}`", text)
    text = _TABLE.sub(lambda match: f"```text\n{match[1].rstrip()}\n```", text)
    return _LITERAL.sub(lambda _: ":", text)


def setting_comment(obj: griffe.Object) -> str | None:
    """The comment behind a field of ``sda_core.params``, which explains a setting; None for everything else."""
    if not obj.is_attribute or obj.parent is None or not obj.parent.is_class or obj.module.path != "sda_core.params":
        return None
    lines = obj.lines[-1:] if obj.lineno else []
    match = re.search(r"  # (.+)$", lines[0]) if lines else None
    return match[1] if match else None


class PlainDocstrings(griffe.Extension):
    """Apply :func:`plain` to every docstring before it is parsed, and take the comments of settings as docstrings."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is None and (comment := setting_comment(obj)) is not None:
            obj.docstring = griffe.Docstring(f"{comment[0].upper()}{comment[1:]}.", parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
