"""Documents, messages, docstrings and comments use the standard terms of docs/glossary.md: one term for one idea."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.docs.conftest import DOCUMENTS, ROOT, prose

# A pattern, and what to write instead.
INSTEAD = {
    r"pictures?\b": "image",
    r"\banew\b": "again, or restart",
    r"\b(go|goes|gone|going) on\b": "continue, or resume",
    r"\bbelongs (in)?to\b": "is part of, or is of",
    r"\btells\b": "says, or shows",
    r"\brefus(e|es|ed|al|als)\b": "reject",
    r"\b(once|one|two|three|ten) an? (row|item|user|text|image|line|seed|modality|layer|question|variant)\b": "for each, or per",
    r"\btakes no (sum|adapter|weight)\b": "does not take, or cannot",
    r"\bis no error\b": "is not an error",
    r"\bmatter of\b": "say what it is",
    r"\bown partner\b": "retrieval@1",
    r"\bthe words\b": "the text",
    r"\bto be beaten\b": "control",
    r"\bstrangers?'?\b": "say who: a user, another shop",
    r"\bby luck\b": "by chance",
    r"\bseeds?'? noise\b": "variation between seeds",
    r"\bpart conflicting\b": "separate conflicting",
    r"(?<!there )\b(is|are|was|were) no (?!longer\b|more\b|better\b|clear\b|other\b|worse\b|further\b|such\b)\w+": "is not a",
    r"\btold\b(?! apart)": "said, or recorded",
    r"\bmend(s|ed|ing)?\b": "correct, or repair",
    r"\bhanded (over|to)\b": "given to",
    r"\bpassed over\b": "skipped",
    r"\bclimbing paths?\b": "a path that leaves the folder",
    r"\b(placed|looked for) among\b": "ranked among",
    r"\bown other side\b": "retrieval@1",
    r"\bmade elsewhere\b": "imported",
    r"\bheld against\b": "compared with",
    r"\blooks? at no\b": "does not use",
    r"\bnames? (no|none)\b": "has no, or lists no",
    r"\b(to|from) and from\b": "import and export",
    r"\bbehind step\b": "after step",
    r"\bleads? nowhere\b": "cannot be resolved",
    r"\bbears? (it|its name)\b": "has",
    r"\bcomes? twice\b": "occurs twice",
    r"\bsome (?!of\b)(ten|\d+)": "about",
    r"\bby the clock\b": "wall-clock time",
    r"\bto (play|be played) with\b": "to explore",
    r"\bwhat stands here\b": "say what",
    r"\b(is|are) called as\b": "has the name of",
    r"\bknows? of no\b": "has no record of",
    r"\b(brings?|brought) the pipeline\b": "installs",
    r"\b(m?s|MiB|GiB|calls|mask|minutes|pixels|tokens|time) an? "
    r"(answer|expert|epoch|field|item|pass|process|side|step|text|training)\b": "per, or s/step",
}
# Usual words; for docstrings, comments and the messages of scripts.
USUAL_WORDS = {
    r"\b(no|some|any)body\b|\bwhoever\b": "say who, or use the passive",
    r"\bas (it|they) (is|are)\b": "unchanged",
    r"\b[Nn]one where\b|\bwhere (there|none)\b": "if",
    r"\ball but\b|\bbut for\b": "all except",
    r"\bto the bit\b": "bit for bit",
    r"\bput(s)? back\b|\bgiv(es|e|ing) back\b": "restore, or return",
    r"\bhand(s|ed|ing)?\b": "pass",
    r"\btak(e|es|en) off\b": "subtract",
    r"\blook(s|ed|ing)? at\b": "use, read, or compare",
    r"\b(lies|stand|stands|stood) (in|there|for|beside|behind|before|above|below|under|where)\b": "is in, or represents",
    r"\bwant(s|ed)? (?!name\b|to do\b)\w": "need, or request",
    r"\b(is|was) made of\b|\bmakes? of\b": "computed from",
    r"\bsees? (that|to)\b|\bmake sure\b": "check",
    r"\bthe very\b|\bby hand\b|\bof one's own\b": "leave it out",
    r"\bsame thing\b": "equal content",
    r"\balike in\b": "similar in",
}
# The same for docstrings and comments alone: short sentences that begin with their subject.
PLAINER = USUAL_WORDS | {
    r"\A(?-i:Of|What|How|Where|Whose|Which|Those|That)\b": "begin with what it is or does",
    r"^\s+\w+: (of|whose|which|that|what|where)\b": "name the thing: seed: seed of the draws",
}
# Words of prose that mean something else than in the usual technical English.
PROSE = {
    r"\bbeside\b": "next to, with, or besides",
    r"\b(lies?|lay|stands?|stood) (in|on|beside|before|behind|above|below|near|under)\b": "is in",
    r"\bno(body| one)\b|\bwhoever\b": "say who, or use the passive",
    r"\bas (it|they) (is|are)\b": "unchanged",
    r"\balike\b": "similar, or equal",
    r"\b[Nn]one where\b|\bwhere (there is|there are|none)\b": "if",
    r"\bby hand\b|\bof one's own\b|\bthe very\b": "leave it out",
    r"\bintervals? holds?\b|\b(file|folder|table|metrics|list|run|rows?|column|interval|report|page)s? holds?\b": "contains",
    r"^#+ (What|Which|Where|Who|Whose|How)\b[^?]*$": "a heading that is a noun or a question",
}
LATER = {"docs/log.md", "docs/glossary.md", "pretraining/README.md", "sda_core/backbones/nano/MODEL_CARD.md"}
"""The log keeps the language of its day, the glossary names the older terms, and the last two are written with a program."""

EXCEPTIONS = {
    "The picture shows a": "an image prompt: the vectors depend on it",
    "The picture is the poster of a": "likewise",
    "picture of an item": "a prompt that nano was trained with",
    "pictures 3": "part of the key of every stored image: another value fetches them all again",
    "picture frame": "a product",
    "picture book": "a product",
}


def found(text: str, terms: Mapping[str, str] = INSTEAD) -> list[str]:
    for exception in EXCEPTIONS:
        text = text.replace(exception, "")
    flags = re.IGNORECASE | re.MULTILINE
    return [f"{match[0]!r}: write {instead}" for term, instead in terms.items() for match in re.finditer(term, text, flags)]


def explanations(path: Path) -> list[tuple[int, str]]:
    """Docstrings and comments of a module, by line."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    values = (node.value for node in nodes if isinstance(node, ast.Expr))
    texts = [(value.lineno, str(value.value)) for value in values if isinstance(value, ast.Constant)]
    with tokenize.open(path) as file:
        comments = [token for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
    return texts + [(comment.start[0], comment.string.lstrip("# ")) for comment in comments]


def messages(path: Path) -> list[tuple[int, str]]:
    """Texts of a module that may be shown: all but docstrings; the docstrings of commands, which are their help."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    is_command = path.parent.name in ("cli", "stages")
    hidden: set[int] = set()
    for parent in ast.walk(tree):
        is_shown = is_command and isinstance(parent, ast.FunctionDef) and not parent.name.startswith("_")
        body = getattr(parent, "body", None)
        if isinstance(body, list) and not is_shown:
            hidden |= {id(node.value) for node in body if isinstance(node, ast.Expr)}
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [(node.lineno, str(node.value)) for node in nodes if id(node) not in hidden]


SCRIPTS = ("bench", "experiments", "pretraining")
MESSAGES = sorted(path for folder in ("sda_core", "stages", *SCRIPTS) for path in ROOT.glob(f"{folder}/**/*.py"))
NAMES = {
    "picture",  # the seed of the built-in shop's images
    "as they are", "refused",  # values and keys of results that experiments keep
    "Neutral Moisturizing Hand Cream, 8.5 fl. oz (Pack of 2)",
}  # fmt: skip


@pytest.mark.parametrize("path", MESSAGES, ids=lambda p: f"{p.relative_to(ROOT).parts[0]}-{p.stem}")
def test_messages(path: Path) -> None:
    """Logs, errors, help texts, headings of tables and labels of plots."""
    terms = INSTEAD | USUAL_WORDS
    wrong = [f"{path}:{number}: {one}" for number, text in messages(path) if text not in NAMES for one in found(text, terms)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["sda_core", "stages", "hydra_plugins", *SCRIPTS])
def test_docstrings_and_comments(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    texts = [(path, number, text) for path in paths for number, text in explanations(path)]
    assert texts
    wrong = [f"{path}:{number}: {problem}" for path, number, text in texts for problem in found(text, INSTEAD | PLAINER)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("What an item is.", 1), ("The item.", 0), ("The draws.\n\n    Args:\n        seed: of the draws.\n", 1),
        ("Read it; None where it is missing.", 1), ("Whether the result is bit-equal.", 0), ("vectors as they are", 1),
        ("vectors that the caller hands over", 1), ("all but the last", 1),
    ],
)  # fmt: skip
def test_the_check_of_docstrings_finds_them(text: str, number: int) -> None:
    assert len(found(text, PLAINER)) == number


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.relative_to(ROOT).as_posix() not in LATER], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_documents(path: Path) -> None:
    lines = prose(path.read_text(encoding="utf-8"))
    is_older = path.parent.name in ("archive", "nano2") or path.name == "CHANGELOG.md"
    terms = INSTEAD if is_older else INSTEAD | PROSE
    wrong = [f"{path}:{number}: {problem}" for number, line in lines for problem in found(line, terms)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [ROOT / "dvc.yaml", *sorted(ROOT.glob("sda_core/report/*.j2"))], ids=lambda p: p.name)
def test_the_pipeline_and_the_page(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    wrong = [f"{path}:{number}: {problem}" for number, line in enumerate(lines, start=1) for problem in found(line)]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the picture", 1), ("begins anew", 1), ("what is unfinished is gone on with", 1), ("one a row", 1), ("one an item", 1),
        ("items are told apart", 0), ("it is told", 1), ("tells all", 1), ("is no folder", 1), ("there is no folder", 0),
        ("is no longer there", 0), ("names no image", 1), ("after step 3", 0),
        ("a picture frame", 0), ("refused", 1), ("depicts", 0),
    ],
)  # fmt: skip
def test_the_check_finds_them(text: str, number: int) -> None:
    assert len(found(text)) == number


def test_the_glossary_has_one_line_a_term() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| .+ \|$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.M)
    assert 25 <= len(rows) == len(set(rows)) <= 50
    assert [row.casefold() for row in rows] == sorted(row.casefold() for row in rows)
