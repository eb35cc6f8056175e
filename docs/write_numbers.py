"""Write the numbers of the default run into README.md and docs/results.md: ``python docs/write_numbers.py``.

It reads ``metrics/`` and ``comparisons.json``, the committed results of ``dvc repro``.  With ``--check`` it writes nothing and
exits with 1 if a file is out of date; the tests use this.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("id", "random", "image_only", "text_only", "zero_shot", "lora", "sda", "oracle")
IN_README = ("nearest", "sasrec")
NAMES = {"nearest": "nearest items", "sasrec": "SASRec", "vbpr": "VBPR", "bert4rec": "BERT4Rec"}  # those that use vectors
RECOMMENDERS = ("pop", "nearest", "sasrec", "vbpr", "bert4rec")
METRIC = "ndcg@10"


def block(name: str, text: str, inside: str) -> str:
    """A file's text with the block between ``<!-- name -->`` and ``<!-- /name -->`` replaced.

    Raises:
        ValueError: the file has no such markers, or several.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"should have one pair of markers {name!r}")
    return pattern.sub(lambda match: match[1] + inside + match[2], text)


def number(value: float) -> str:
    """Four decimals without the leading zero: ``.0788``, ``-.0088``."""
    return f"{value:.4f}".replace("0.", ".", 1)


def signed(value: float) -> str:
    """Four decimals with a sign and without the leading zero: ``+.0788``, ``-.0088``."""
    return f"{value:+.4f}".replace("0.", ".", 1)


def _metrics(root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    paths = {(v, r): root / "metrics" / v / f"{r}.json" for v in VARIANTS for r in RECOMMENDERS}
    return {key: json.loads(path.read_text(encoding="utf-8")) for key, path in paths.items() if path.is_file()}


def _gain(found: dict[str, float], recommender: str, first: str, second: str) -> tuple[str, str]:
    """A difference with its interval, and the verdict: by the interval and by Holm's correction for several comparisons."""
    name = f"{recommender}/{first}_vs_{second}/{METRIC}"
    gain, low, high, clear = (found[f"{name}_{part}"] for part in ("gain", "low", "high", "clear"))
    if clear:
        verdict = "higher" if gain > 0 else "lower"
    else:
        verdict = "not clear after Holm's correction" if low > 0 or high < 0 else "no clear difference"
    return f"{signed(gain)} [{signed(low)}, {signed(high)}]", verdict


def _cell(found: dict[str, Any]) -> str:
    """The metric, followed by that of the tail in brackets if the tail is not empty."""
    tail = found.get(f"tail_{METRIC}")
    return f"{number(found[METRIC])} ({'no tail' if tail is None else number(tail)})"


def _verdict(found: dict[str, float], recommender: str, first: str, second: str) -> str:
    """A difference with its interval and verdict, in one phrase."""
    difference, verdict = _gain(found, recommender, first, second)
    return f"{verdict}, {difference}"


def readme_row(root: Path) -> str:
    """The row of README's table on the default run."""
    comparisons = json.loads((root / "comparisons.json").read_text(encoding="utf-8"))
    answers: list[str] = []
    for variant in ("sda", "lora"):
        shown = [
            f"{NAMES[recommender]} {_verdict(comparisons, recommender, variant, 'zero_shot')}"
            for recommender in IN_README
            if f"{recommender}/{variant}_vs_zero_shot/{METRIC}_gain" in comparisons
        ]
        if shown:
            answers.append(f"NDCG@10 of `{variant}` against `zero_shot`: {'; '.join(shown)}")
    return (
        f"| Does adaptation improve a recommender on the built-in shop? | {'. '.join(answers)} "
        f"| [the default run](docs/results.md#the-default-run) |\n"
    )


def control_row(root: Path) -> str:
    """The row with the gain by oracle vectors in each recommender; empty without that control."""
    comparisons = json.loads((root / "comparisons.json").read_text(encoding="utf-8"))
    found = [
        f"{name} {_verdict(comparisons, recommender, 'oracle', 'id')}"
        for recommender, name in NAMES.items()
        if f"{recommender}/oracle_vs_id/{METRIC}_gain" in comparisons
    ]
    if not found:
        return ""
    answer = f"NDCG@10 of the true attributes (`oracle`) against `id`: {'; '.join(found)}"
    return f"| Could that shop show a gain? | {answer} | [its controls](docs/results.md#the-controls) |\n"


def results_block(root: Path) -> str:
    """The tables of docs/results.md on the default run."""
    metrics = _metrics(root)
    comparisons = json.loads((root / "comparisons.json").read_text(encoding="utf-8"))
    lines = [f"| NDCG@10 (tail) | {' | '.join(f'`{v}`' for v in VARIANTS)} |", "|---" * (1 + len(VARIANTS)) + "|"]
    for recommender in RECOMMENDERS:
        found = (metrics.get((variant, recommender)) for variant in VARIANTS)
        cells = ("" if one is None else _cell(one) for one in found)
        lines.append(f"| `{recommender}` | {' | '.join(cells)} |")
    lines += ["", "| difference in NDCG@10 | with its 95 % interval | |", "|---|---|---|"]
    for recommender in RECOMMENDERS:
        for first, second in (("oracle", "id"), ("sda", "id"), ("sda", "zero_shot"), ("lora", "zero_shot")):
            if f"{recommender}/{first}_vs_{second}/{METRIC}_gain" in comparisons:
                difference, verdict = _gain(comparisons, recommender, first, second)
                lines.append(f"| `{recommender}`: `{first}` - `{second}` | {difference} | {verdict} |")
    users = {found["num_users"] for found in metrics.values()}
    tail = {found.get("tail_num_users", 0) for found in metrics.values()}
    lines += ["", f"{max(users):,} test users, of whom {max(tail):,} have a tail target.", ""]
    return "\n".join(lines)


def pages(root: Path) -> dict[Path, str]:
    """The expected contents of the two files."""
    readme, results = root / "README.md", root / "docs" / "results.md"
    text = readme.read_text(encoding="utf-8")
    for row in filter(None, (readme_row(root), control_row(root))):
        text = _row_of_readme(text, row)
    return {
        readme: text,
        results: block("default run", results.read_text(encoding="utf-8"), results_block(root)),
    }


def _row_of_readme(text: str, row: str) -> str:
    """Replace the row in README; tables cannot contain markers, so the row is found by its question."""
    question = row.split("|")[1]
    pattern = re.compile(rf"^\|{re.escape(question)}\|.*\n", re.M)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"README.md should have one row{question}")
    return pattern.sub(lambda _: row, text)


def main(arguments: list[str]) -> int:
    """Write or check the files; returns the exit status."""
    outdated = [path for path, text in pages(ROOT).items() if path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        print(*(f"{path.relative_to(ROOT)} is out of date; run `python docs/write_numbers.py`" for path in outdated), sep="\n")
        return 1 if outdated else 0
    for path, text in pages(ROOT).items():
        path.write_text(text, encoding="utf-8", newline="\n")
    print("\n".join(f"{path.relative_to(ROOT)}: {'written' if path in outdated else 'unchanged'}" for path in pages(ROOT)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
