"""Measure download and filter on ten million reviews: seconds and peak memory of each process.

It writes a gzip file of reviews and one of metadata in the 2018 edition's format to a folder (every field of the published
files, Zipf popularity, geometric history lengths, times in whole days, every twentieth item without metadata), then runs
``python -m stages.download`` and ``python -m stages.filter`` on it, with a params file made from ``params.yaml``.

    python -m bench ten_million --folder /tmp/ten_million
    python -m bench ten_million --folder /tmp/ten_million --num-reviews 100000
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer
from ruamel.yaml import YAML

from bench.common import REPOSITORY, in_own_process
from sda_core.local_files import watched

REVIEWS, METADATA = "Synthetic.json.gz", "meta_Synthetic.json.gz"
ROWS_PER_WRITE = 100_000


# --------------------------------------------------------------------------------------------- writing files
def write_files(folder: str, num_reviews: int, num_items: int, mean_history_length: float) -> None:
    """Write both raw files; runs in a separate process, so that its memory is not counted for a stage."""
    random = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvw" for b in "aeiou"]
    vocabulary = np.array(["".join(random.choice(syllables, size=random.integers(1, 5))) for _ in range(8_000)])
    word_weights = 1.0 / np.arange(10, 8_010)
    word_weights /= word_weights.sum()

    def texts(num: int, mean_words: float) -> pl.Series:
        """JSON strings of some words, lengths log-normal."""
        lengths = np.maximum(1, random.lognormal(np.log(mean_words) - 0.5, 1.0, num)).astype(int)
        words = vocabulary[random.choice(len(vocabulary), size=lengths.sum(), p=word_weights)]
        ends = np.cumsum(lengths)
        return pl.Series([json.dumps(" ".join(words[end - n : end])) for end, n in zip(ends, lengths, strict=True)])

    def pick(pool: pl.Series, num: int) -> pl.Series:
        return pool.gather(random.integers(0, len(pool), num))

    def item_ids(numbers: np.ndarray) -> pl.Series:
        """Distinct ids of ten characters; the modulus is a prime."""
        return "B" + pl.Series((numbers.astype(np.int64) + 1) * 48_271 % 999_999_937).cast(pl.String).str.zfill(9)

    def write(handle: gzip.GzipFile, lines: pl.DataFrame) -> None:
        handle.write(lines.to_series().str.join("\n").item().encode() + b"\n")

    def filled(template: str, *values: str | pl.Expr) -> pl.Expr:
        """The template with each # replaced by a value, column or expression."""
        first, *rest = template.split("#")
        pieces = [pl.lit(first)]
        for value, piece in zip(values, rest, strict=True):
            pieces += [pl.col(value) if isinstance(value, str) else value, pl.lit(piece)]
        return pl.concat_str(pieces)

    body, summary, name = texts(40_000, 60), texts(5_000, 4), texts(5_000, 2)
    per_user = random.geometric(1.0 / mean_history_length, size=int(1.1 * num_reviews / mean_history_length))
    users = np.repeat(np.arange(len(per_user), dtype=np.uint32), per_user)[:num_reviews]
    random.shuffle(users)
    popularity = np.cumsum(1.0 / np.arange(1, num_items + 1) ** 0.8)
    with gzip.open(Path(folder) / REVIEWS, "wb", compresslevel=1) as handle:
        for start in range(0, len(users), ROWS_PER_WRITE):
            user = users[start : start + ROWS_PER_WRITE].astype(np.int64)
            num = len(user)
            item = np.searchsorted(popularity, random.random(num) * popularity[-1])
            day = 12_784 + np.minimum(random.geometric(0.001, num), 5_000)  # from 2005 on
            frame = pl.DataFrame(
                {
                    "overall": random.choice([5, 4, 3, 2, 1], num, p=[0.62, 0.17, 0.08, 0.05, 0.08]),
                    "vote": random.geometric(0.2, num),
                    "user": (user + 1) * 2_654_435_761 % 9_999_999_999_971,
                    "item": item_ids(item),
                    "name": pick(name, num),
                    "text": pick(body, num),
                    "summary": pick(summary, num),
                    "time": day * 86_400,
                    "date": pl.Series(day).cast(pl.Int32).cast(pl.Date),
                }
            )
            vote = pl.when(pl.col("vote") > 4).then(filled('"vote": "#", ', "vote")).otherwise(pl.lit(""))
            lines = frame.select(
                filled(
                    '{"overall": #.0, #"verified": true, "reviewTime": "#", "reviewerID": "A#", "asin": "#",'
                    ' "style": {"Size:": " Large", "Color:": " Black"}, "reviewerName": #, "reviewText": #, "summary": #,'
                    ' "unixReviewTime": #}',
                    "overall", vote, pl.col("date").dt.strftime("%m %d, %Y"), pl.col("user").cast(pl.String).str.zfill(13),
                    "item", "name", "text", "summary", "time",
                )
            )  # fmt: skip
            write(handle, lines)
    with gzip.open(Path(folder) / METADATA, "wb", compresslevel=1) as handle:
        for start in range(0, num_items, ROWS_PER_WRITE):
            numbers = np.arange(start, min(start + ROWS_PER_WRITE, num_items))
            numbers = numbers[numbers % 20 != 7]
            num = len(numbers)
            columns = {"title": pick(summary, num), "brand": pick(name, num), "item": item_ids(numbers)}
            columns |= {f"text{place}": pick(body, num) for place in range(4)}
            columns |= {"price": pl.Series(random.integers(100, 20_000, num) / 100).cast(pl.String)}
            lines = pl.DataFrame(columns).select(
                filled(
                    '{"category": ["Synthetic", "Things", "Small Things"], "tech1": "", "description": [#, #], "fit": "",'
                    ' "title": #, "also_buy": ["B000000001", "B000000002", "B000000003"], "tech2": "", "brand": #,'
                    ' "feature": [#, #], "rank": ["1,234 in Things ("], "also_view": [], "main_cat": "Things",'
                    ' "similar_item": "", "date": "", "price": "$#", "asin": "#",'
                    ' "imageURL": ["https://images.example/I/#._SS40_.jpg"],'
                    ' "imageURLHighRes": ["https://images.example/I/#.jpg"]}',
                    "text0", "text1", "title", "brand", "text2", "text3", "price", "item", "item", "item",
                )
            )  # fmt: skip
            write(handle, lines)


# ------------------------------------------------------------------------------------------- running stages
def run_stage(module: str, root: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak memory in MiB of one process."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", module, "--root", str(root)], cwd=REPOSITORY)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{module} ended with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(
    folder: Annotated[Path, typer.Option(help="Folder of the files; about 700 bytes per review.")],
    num_reviews: int = 10_000_000,
    num_items: int = 400_000,
    mean_history_length: float = 3.0,
) -> None:
    """Write, run, print a table."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    in_own_process(write_files, str(folder), num_reviews, num_items, mean_history_length)
    print(f"written in {time.perf_counter() - begin:.0f} s")
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load(REPOSITORY / "params.yaml")
    preset = yaml.load(REPOSITORY / "conf" / "dataset" / "gift_cards.yaml")["dataset"]
    sources = {"reviews": [REVIEWS], "metadata": [METADATA], "local_folder": str(folder.resolve())}
    params["dataset"] = preset | {"category": "Synthetic"} | sources
    root = folder / "project"
    root.mkdir(exist_ok=True)
    params["local_files"] = watched(params["dataset"], params["backbone"], root)
    yaml.dump(params, root / "params.yaml")
    measured = {module: run_stage(module, root) for module in ("stages.download", "stages.filter")}
    size = sum((folder / name).stat().st_size for name in (REVIEWS, METADATA))
    print(f"{num_reviews:,} reviews, {size / 1e9:.2f} GB compressed, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}")
    for module, (seconds, cpu_seconds, mebibytes) in measured.items():
        print(f"| {module:<16} | {seconds:7.1f} s | {cpu_seconds:7.1f} CPU s | {mebibytes:7.0f} MiB peak |")
    for name, value in json.loads((root / "data" / "filtered" / "statistics.json").read_text(encoding="utf-8")).items():
        print(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}")
