"""What pre-commit checks, for those who have not installed it: lint, format, types."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = ("sda_core", "stages", "hydra_plugins", "experiments", "bench", "pretraining", "docs")


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=["lint", "format"])
def test_ruff(repository: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", *SOURCES, "tests"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright(repository: Path) -> None:
    """Strict on the torch-free packages, basic elsewhere (pyproject.toml)."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        pytest.skip(f"pyright cannot run here (its Node.js part is fetched at first use): {done.stderr.strip()[-200:]}")
    errors = [f"{d['file']}:{d['range']['start']['line'] + 1}: {d['message']}" for d in found["generalDiagnostics"]]
    assert found["summary"]["filesAnalyzed"] > 60
    assert not errors, "\n".join(errors)


def text_calls_without_encoding(source: str) -> list[int]:
    """Lines that read or write text in an encoding that the system chooses."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [value for argument in node.args if isinstance(value := getattr(argument, "value", None), str)]
        is_text_mode = bool(modes) and set(modes[-1]) <= set("rwax+t")
        has_no_mode = not node.keywords and len(node.args) == (0 if is_method else 1)
        if (name in ("read_text", "write_text") and is_method) or (name == "open" and (is_text_mode or has_no_mode)):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("path.read_text()", [1]),
        ("path.read_text(encoding='utf-8')", []),
        ("path.write_text(text)", [1]),
        ("write_text(path, text)", []),
        ("open(path)", [1]),
        ("open(path, 'rb')", []),
        ("path.open()", [1]),
        ("path.open('w')", [1]),
        ("path.open('rb')", []),
        ("open(path, 'a', encoding='utf-8')", []),
        ("gzip.open(path)", []),
    ],
)
def test_the_check_of_encodings_finds_them(source: str, lines: list[int]) -> None:
    assert text_calls_without_encoding(source) == lines


def test_every_text_file_has_its_encoding_named(repository: Path) -> None:
    """By default Windows reads and writes text in a code page of its own."""
    files = [path for folder in SOURCES for path in sorted((repository / folder).rglob("*.py"))]
    assert len(files) > 100
    found = [f"{path}:{line}" for path in files for line in text_calls_without_encoding(path.read_text(encoding="utf-8"))]
    assert not found


def test_line_ends_are_the_same_in_every_checkout(repository: Path) -> None:
    """DVC hashes the files of the checkout: with Windows' line ends every stage would count as changed."""
    command = ["git", "ls-files", "--eol"]
    done = subprocess.run(command, cwd=repository, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        pytest.skip("no Git checkout here: the tracked files are not known")
    for line in done.stdout.splitlines():
        fields, name = line.split("\t")
        index, worktree, *attributes = fields.split()
        is_binary = name.endswith((".png", ".safetensors", ".jpg", ".gif", ".parquet", ".zip", ".gz", ".faiss"))
        expected = ("i/-text", "w/-text", ["attr/-text"]) if is_binary else ("i/lf", "w/lf", ["attr/text=auto", "eol=lf"])
        assert (index, worktree, attributes) == expected or index == "i/none", line


# Standard terms: image, again.  Where the word is part of a result, or names a product, it stays.
BANNED = re.compile(r"picture|\banew\b", re.IGNORECASE)
EXCEPTIONS = {
    "The picture shows a": "an image prompt: the vectors depend on it",
    "The picture is the poster of a": "likewise",
    "picture of an item": "a prompt that nano was trained with",
    '"pictures 3"': "part of the key of every stored image: another value fetches them all again",
    '"demo", "picture"': "the seed of the built-in shop's images",
    '"externalsource", "picture"': "a tag of the clip art that nano saw",
    "picture frame": "a product",
    "picture book": "a product",
}
GUIDES = ("results", "reproduction", "data", "shop", "gpu", "scale", "exchange")


def test_standard_terms(repository: Path) -> None:
    files = [path for folder in (*SOURCES, "conf") for path in (repository / folder).rglob("*")]
    files = [path for path in files if path.suffix in {".py", ".j2", ".css", ".yaml"}]
    files += [repository / "dvc.yaml", *(repository / "docs" / f"{name}.md" for name in GUIDES)]
    used: set[str] = set()
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            plain = line
            for text in (text for text in EXCEPTIONS if text in line):
                used.add(text)
                plain = plain.replace(text, "")
            assert not BANNED.search(plain), f"{path}:{number}: write image, and again (or EXCEPTIONS in {Path(__file__).name})"
    assert used == set(EXCEPTIONS)
