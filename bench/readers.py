"""Compare readers of raw files with gunzip, the least work on such a file.

* Reviews and metadata, JSON lines to a parquet file, against ``gunzip -c`` of the same file (one thread, output discarded);
  Python's zlib is also measured.
* Metadata of 2014 (Python literals): ``parse_literal`` against ``ast.literal_eval``, line by line, and whether both agree
  on every line.

Every side runs in a separate process, in turns, and the best run of each counts; memory is the peak of the process.  The time
excludes the start of Python and imports on both sides, but includes the start of gunzip.  The readers decompress in a second
thread, so processor seconds are shown, too.  The files are generated deterministically, with the lengths and defects of the
published ones, or given.

    python -m bench readers                            # about 120 MB of each kind, decompressed
    python -m bench readers --megabytes 20 --repeats 1
    python -m bench readers --data ../shared/data      # the real files of a folder as well (small ones say little)
    python -m bench readers --file metadata 2018 FILE  # one real file
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import polars as pl
import pyarrow.parquet as pq
import typer

from bench.common import in_own_process
from sda_core.data.amazon import read_metadata, read_reviews
from sda_core.data.literals import parse_literal

KEPT_SHARE = 0.05

REAL_FILES = [
    ("reviews", 2014, "beauty_2014_sequences/reviews_Beauty_5.json.gz"),
    ("reviews", 2018, "amazon_2018_gift_cards/Gift_Cards_5.json.gz"),
    ("reviews", 2023, "movies_2023_format/Movies.jsonl.gz"),
    ("metadata", 2014, "beauty_2014_sequences/meta_Beauty.json.gz"),
    ("metadata", 2014, "amazon_2014_raw_samples/musical_instruments_metadata_top100.json"),
    ("metadata", 2018, "amazon_2018_gift_cards/meta_Gift_Cards.json.gz"),
    ("metadata", 2018, "amazon_2018_gift_cards/older_scrape/meta_Gift_Cards.json.gz"),
    ("metadata", 2023, "movies_2023_format/meta_Movies.jsonl.gz"),
]


# ---------------------------------------------------------------------------------------------------- made files
class Writer:
    """Records of generated reviews and items, with field lengths and defects as in the published files."""

    def __init__(self, edition: int) -> None:
        self.edition = edition
        self.random = random.Random(edition)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        weights = [1 / (place + 2) for place in range(len(letters))]
        lengths = [2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9, 11]
        words = ["".join(self.random.choices(letters, weights, k=self.random.choice(lengths))) for _ in range(8_000)]
        drawn = self.random.choices(words, [1 / (place + 3) for place in range(len(words))], k=400_000)
        ends = self.random.choices(["", "", "", "", ",", "."] * 20 + ["!", "'s", "n't", "'", '"'], k=len(drawn))
        self.prose = " ".join(word + end for word, end in zip(drawn, ends, strict=True))
        self.names = [" ".join(self.random.choices(words, k=2)).title() for _ in range(3_000)]
        self.paths = [[" & ".join(self.random.sample(self.names, 1 + level % 2)) for level in range(4)] for _ in range(400)]
        self.items = [self._id("B0", 8) for _ in range(200_000)]
        self.users = [self._id("A", 13) for _ in range(100_000)]

    def _id(self, start: str, length: int) -> str:
        return start + "".join(self.random.choices("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=length))

    def text(self, mean_chars: float) -> str:
        """A random text; lengths are distributed like real ones, most of them short."""
        length = min(int(self.random.expovariate(1 / mean_chars)) + 2, 20_000)
        start = self.random.randrange(len(self.prose) - length)
        return self.prose[start : start + length].strip()

    def dirty(self, text: str, share: float) -> str:
        """The text, sometimes with entities and markup as in real shops."""
        if self.random.random() >= share:
            return text
        kind = self.random.randrange(4)
        if kind == 0:
            return text.replace("and", "&amp;").replace("'", "&#39;") + " &quot;new&quot;"
        if kind == 1:
            return (
                f'<div class="aplus"> <br>{text}<br /><br /> <a href="http://www.example.com/gp/x/ref=g_1">{text[:20]}</a></div>'
            )
        if kind == 2:
            return f"\n        {text}\n\n   \t  {text[:30]}"
        return f"{text} caf\u00e9 \u2122 \u2013 \u65e5\u672c"

    def review(self) -> dict[str, object]:
        """A review's record."""
        rng = self.random
        user, item = rng.choice(self.users), rng.choice(self.items)
        seconds, rating, body, title = rng.randrange(10**9, 15 * 10**8), float(rng.randint(1, 5)), self.text(400), self.text(25)
        if self.edition == 2023:
            return {
                "rating": rating, "title": title, "text": body, "images": [], "asin": item, "parent_asin": item,
                "user_id": user, "timestamp": seconds * 1000 + rng.randrange(1000), "helpful_vote": rng.randrange(9),
                "verified_purchase": rng.random() < 0.9,
            }  # fmt: skip
        if self.edition == 2018:
            record: dict[str, object] = {
                "overall": rating, "vote": str(rng.randrange(2, 99)), "verified": True, "reviewTime": "06 17, 2018",
                "reviewerID": user, "asin": item, "style": {"Color:": f" {self.text(6)}"}, "reviewerName": self.text(12),
                "reviewText": body, "summary": title, "unixReviewTime": seconds,
            }  # fmt: skip
            for key in ("vote", "style", "reviewText"):
                if rng.random() < {"vote": 0.8, "style": 0.5, "reviewText": 0.001}[key]:
                    del record[key]
            return record
        return {
            "reviewerID": user, "asin": item, "reviewerName": self.text(12), "helpful": [rng.randrange(5), 5],
            "reviewText": body, "overall": rating, "summary": title, "unixReviewTime": seconds, "reviewTime": "02 28, 2014",
        }  # fmt: skip

    def item(self, item: str) -> dict[str, object]:
        """An item's record."""
        rng = self.random
        title, brand, path = self.dirty(self.text(60), 0.05), rng.choice(self.names), rng.choice(self.paths)
        price = round(rng.expovariate(1 / 30), 2) + 1
        images = [self._id("", 10) for _ in range(min(8, int(rng.expovariate(1 / 3))))]
        if self.edition == 2014:
            record: dict[str, object] = {
                "asin": item, "title": title, "price": price, "brand": brand,
                "imUrl": f"http://ecx.images-amazon.com/images/I/{self._id('', 11)}._SY300_.jpg",
                "related": {key: rng.sample(self.items, rng.randrange(40)) for key in ("also_bought", "also_viewed")},
                "salesRank": {path[0]: rng.randrange(10**6)}, "categories": [path] * rng.choice([1, 1, 1, 2]),
                "description": self.dirty(self.text(500), 0.3),
            }  # fmt: skip
            for key in ("brand", "description", "price", "related"):
                if rng.random() < 0.3:
                    del record[key]
            return record
        features = [self.dirty(self.text(90), 0.15) for _ in range(rng.randrange(7))]
        if self.edition == 2018:
            return {
                "category": path, "tech1": "", "description": [self.dirty(self.text(500), 0.4)], "fit": "", "title": title,
                "also_buy": rng.sample(self.items, rng.randrange(30)), "tech2": "", "brand": brand, "feature": features,
                "rank": rng.choice([["1,786 in Gift Cards ("], "1,786 in Gift Cards ("]),
                "also_view": rng.sample(self.items, rng.randrange(40)),
                "details": {"Shipping Weight:": "3 ounces", "ASIN: ": item, "Dimensions": self.text(40)}, "main_cat": path[0],
                "similar_item": "", "date": "", "asin": item,
                "price": rng.choice(["", "", f"${price}", f"${price} - ${price + 9}", ".a-box-inner{color:#fff}"]),
                "imageURL": [f"https://images-na.ssl-images-amazon.com/images/I/{name}._SX38_SY50_CR,0,0,38,50_.jpg"
                             for name in images],
                "imageURLHighRes": [f"https://images-na.ssl-images-amazon.com/images/I/{name}.jpg" for name in images],
            }  # fmt: skip
        host = "https://m.media-amazon.com/images/I/"
        return {
            "main_category": path[0], "title": title, "average_rating": 4.1, "rating_number": rng.randrange(999),
            "features": features, "description": [self.dirty(self.text(300), 0.1) for _ in range(rng.randrange(4))],
            "price": rng.choice([None, price, f"from {price}"]),
            "images": [{"thumb": f"{host}{name}._SS40_.jpg", "large": f"{host}{name}.jpg",
                        "variant": f"PT{at:02d}" if at else "MAIN",
                        "hi_res": f"{host}{name[::-1]}._SL1500_.jpg" if at % 3 else None}
                       for at, name in enumerate(images)],
            "videos": [], "store": brand, "categories": path,
            "details": {self.text(9): self.text(20) for _ in range(6)}, "parent_asin": item, "bought_together": None,
        }  # fmt: skip

    def lines(self, kind: str) -> Iterator[str]:
        """Infinitely many lines; after one line for every item, items repeat, as in the published metadata."""
        write = repr if (kind, self.edition) == ("metadata", 2014) else json.dumps
        for item in itertools.cycle(self.items):
            yield write(self.item(item) if kind == "metadata" else self.review())


def make(path: Path, kind: str, edition: int, megabytes: int) -> None:
    """Write a gzip file with this many decompressed bytes."""
    size = 0
    temporary = path.with_suffix(".part")
    with gzip.GzipFile(temporary, "wb", compresslevel=6, mtime=0) as handle:
        for line in Writer(edition).lines(kind):
            size += handle.write(line.encode() + b"\n")
            if size >= megabytes * 1_000_000:
                break
    temporary.replace(path)


# --------------------------------------------------------------------------------------------------------- sides
def write_parquet(frames: Iterable[pl.DataFrame], path: Path) -> int:
    """Write the rows of a stream of tables one table at a time."""
    writer: pq.ParquetWriter | None = None
    num_rows = 0
    for frame in frames:
        table = frame.to_arrow()
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
        num_rows += len(frame)
    if writer is not None:
        writer.close()
    return num_rows


def wanted_items(path: Path, edition: int) -> frozenset[str]:
    """One in twenty of a file's items, selected by hash, as if the others had no reviews."""
    items = read_metadata(path, edition, max_bad_line_share=1.0)["raw_item_id"]
    return frozenset(item for item in items if hashlib.sha256(item.encode()).digest()[0] < 256 * KEPT_SHARE)


def unpacked(path: Path) -> Iterator[bytes]:
    """Decompress a file with zlib, without further processing."""
    with path.open("rb") as handle:
        if handle.read(2) != b"\x1f\x8b":
            handle.seek(0)
            yield from iter(lambda: handle.read(1 << 18), b"")
            return
        handle.seek(0)
        unpacker = zlib.decompressobj(wbits=31)
        yield from (unpacker.decompress(packed) for packed in iter(lambda: handle.read(1 << 18), b""))


def literal_lines(path: Path) -> list[str]:
    """All lines in memory, so that reading is not measured."""
    return [line for line in b"".join(unpacked(path)).decode().split("\n") if line]


def literals(path: Path, parse: Callable[[str], object]) -> tuple[float, float]:
    """Parse every line; returns the times at the start of the first line."""
    lines = literal_lines(path)
    warnings.simplefilter("ignore")
    begin = time.perf_counter(), time.process_time()
    for line in lines:
        parse(line)
    return begin


def agreement(path: Path) -> tuple[int, int]:
    """Number of lines, and of those on which both parsers return the same value, including types and order of keys."""
    warnings.simplefilter("ignore")
    lines = literal_lines(path)
    return len(lines), sum(repr(parse_literal(line)) == repr(ast.literal_eval(line)) for line in lines)


def side(name: str, file: str, edition: int, folder: str) -> dict[str, float]:
    """Run one side in this process."""
    path, scratch = Path(file), Path(folder)
    keep = frozenset((scratch / "keep.txt").read_text(encoding="utf-8").split("\n")) if name == "metadata, some" else None
    begin, begin_cpu = time.perf_counter(), time.process_time()
    size = 0
    match name:
        case "zlib":
            size = sum(map(len, unpacked(path)))
        case "reviews":
            size = write_parquet(read_reviews(path, edition, max_bad_line_share=0.01), scratch / "out.parquet")
        case "metadata" | "metadata, some":
            frame = read_metadata(path, edition, max_bad_line_share=0.01, keep=keep)
            size = write_parquet([frame], scratch / "out.parquet")
        case "parse_literal":
            begin, begin_cpu = literals(path, parse_literal)
        case "literal_eval":
            begin, begin_cpu = literals(path, ast.literal_eval)
        case _:
            raise ValueError(name)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    return {"seconds": seconds, "cpu": cpu, "size": size, "peak": peak_bytes()}


def peak_bytes() -> int:
    """Peak memory of this process; ru_maxrss would include the parent process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def run(name: str, path: Path, edition: int, scratch: Path) -> dict[str, float]:
    """Run one side in a separate process."""
    if name == "gunzip":
        packed = path.read_bytes()[:2] == b"\x1f\x8b"
        begin = time.perf_counter()
        child = subprocess.Popen(["gunzip", "-c", str(path)] if packed else ["cat", str(path)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"gunzip -c {path} ended with {child.returncode}")
        seconds, cpu = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
        return {"seconds": seconds, "cpu": cpu, "size": 0, "peak": 0}
    return in_own_process(side, name, str(path), edition, str(scratch))


# ---------------------------------------------------------------------------------------------------------- table
def compare(kind: str, edition: int, path: Path, scratch: Path, repeats: int) -> None:
    """Print the rows of one file."""
    as_literals = (kind, edition) == ("metadata", 2014)
    some = frozenset[str]()
    if kind == "metadata":
        some = wanted_items(path, edition)
        (scratch / "keep.txt").write_text("\n".join(sorted(some)), encoding="utf-8")
    sides = ["gunzip", "zlib", "reviews"] if kind == "reviews" else ["gunzip", "zlib", "metadata", "metadata, some"]
    sides += ["literal_eval", "parse_literal"] if as_literals else []
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name in sides:
            runs[name].append(run(name, path, edition, scratch))
    best = {name: {key: min(outcome[key] for outcome in runs[name]) for key in runs[name][0]} for name in sides}
    size = best["zlib"]["size"] / 1e6
    yardstick = best["gunzip"]
    notes = {
        "zlib": "decompressed by Python's zlib, output discarded",
        "reviews": f"{best['reviews']['size']:,} reviews to parquet" if kind == "reviews" else "",
        "metadata": f"all {best['metadata']['size']:,} items cleaned, to parquet" if kind == "metadata" else "",
        "metadata, some": f"{len(some):,} of the items cleaned, to parquet",
    }
    for name, note in notes.items():
        if name in best:
            own = best[name]
            print(
                f"| {kind} {edition}, {size:,.1f} MB: {note} | gunzip -c, {yardstick['seconds']:.2f} s | "
                f"{own['seconds']:.2f} s, {own['seconds'] / yardstick['seconds']:.2f} x its time | "
                f"{own['cpu'] / yardstick['cpu']:.2f} x | {max(outcome['peak'] for outcome in runs[name]) / 2**20:,.0f} MiB |",
                flush=True,
            )
    if as_literals:
        num_lines, num_equal = agreement(path)
        slow, fast = best["literal_eval"], best["parse_literal"]
        print(
            f"| metadata 2014, {num_lines:,} lines: parse_literal | ast.literal_eval, {slow['seconds']:.2f} s | "
            f"{fast['seconds']:.2f} s, {slow['seconds'] / fast['seconds']:.1f} x faster, equal on {num_equal:,} lines | "
            f"{slow['cpu'] / fast['cpu']:.1f} x faster | |",
            flush=True,
        )


def main(
    megabytes: Annotated[int, typer.Option(help="Decompressed size of each generated file (Python literals: a quarter).")] = 120,
    repeats: int = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Folder in which generated files are kept; default: a temporary folder.")
    ] = None,
    only: Annotated[str, typer.Option(help="Run only comparisons whose name contains this, e.g. 'metadata 2018'.")] = "",
    data: Annotated[Path | None, typer.Option(help="A folder with the real files named in this script.")] = None,
    file: Annotated[
        tuple[str, int, Path] | None,
        typer.Option(metavar="KIND EDITION FILE", help="Read only this file; KIND is reviews or metadata.", show_default=False),
    ] = None,
) -> None:
    """Run and print a table."""
    scratch = Path(tempfile.mkdtemp(prefix="readers-"))
    try:
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        print(f"{os.cpu_count()} cores, load {load} before the run; best of {repeats} in turns\n")
        print("| what | against | result | ratio of processor seconds | peak memory |\n|---|---|---|---|---|")
        if file:
            compare(*file, scratch, repeats)
            return
        made = folder or scratch
        made.mkdir(parents=True, exist_ok=True)
        for kind, edition in itertools.product(("reviews", "metadata"), (2014, 2018, 2023)):
            if only not in f"{kind} {edition}":
                continue
            size = megabytes // 4 if (kind, edition) == ("metadata", 2014) else megabytes
            path = made / f"{kind}_{edition}_{size}.gz"
            if not path.exists():
                make(path, kind, edition, size)
            compare(kind, edition, path, scratch, repeats)
        for kind, edition, name in REAL_FILES if data else []:
            if only in f"{kind} {edition}" and (data / name).is_file():
                compare(kind, edition, data / name, scratch, repeats)
        print(f"\nload {', '.join(f'{value:.1f}' for value in os.getloadavg())} after the run")
    finally:
        shutil.rmtree(scratch)
