"""Picture fetching: our fetcher against a plain loop over httpx, and against the bound that politeness sets.

A server in a process of its own answers every request after a wait.  The plain loop asks for one picture at a time,
decodes it, reduces it and encodes it again, as the stage does.  With ``max_per_host`` requests at a time to the one host,
nothing can be faster than ``latency x pictures / max_per_host``.

    python bench/pictures.py
    python bench/pictures.py --num-pictures 300 --latency-ms 200 --max-per-host 16
"""

from __future__ import annotations

import argparse
import asyncio
import io
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import numpy as np
import polars as pl
from PIL import Image

from sda_core.artifacts import ITEMS
from sda_core.fetch.images import fetch_images
from sda_core.params import FetchImagesParams

STORED_PIXELS = 65_536
NUM_DIFFERENT = 16


def jpeg(seed: int, side: int, num_bytes: int) -> bytes:
    """A picture of smooth colours with as much noise as brings it to about ``num_bytes``."""
    random = np.random.default_rng(seed)
    waves = np.sin(np.add.outer(np.arange(side) * random.uniform(0.01, 0.05), np.arange(side) * random.uniform(0.01, 0.05)))
    base = 128 + 80 * waves[:, :, None] * random.uniform(0.3, 1.0, 3)
    data = b""
    for strength in range(1, 60):
        noisy = base + random.normal(0, strength, (side, side, 3))
        stream = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=80)
        data = stream.getvalue()
        if len(data) >= num_bytes:
            break
    return data


def serve(latency_seconds: float, pictures: list[bytes], told: Connection) -> None:
    """Answer ``GET /<number>.jpg`` with one of the pictures after a wait, for ever."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                number = int(head.split(b" ", 2)[1].strip(b"/").split(b".")[0])
                await asyncio.sleep(latency_seconds)
                body = pictures[number % len(pictures)]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


def items(port: int, num_pictures: int) -> pl.DataFrame:
    """A catalogue with one address an item."""
    empty = {name: [[] if dtype == pl.List(pl.String) else ""] * num_pictures for name, dtype in ITEMS.columns.items()}
    columns = empty | {
        "item_id": range(1, num_pictures + 1),
        "raw_item_id": [f"B{number:09d}" for number in range(num_pictures)],
        "image_references": [[f"http://127.0.0.1:{port}/{number}.jpg"] for number in range(num_pictures)],
        "has_metadata": [True] * num_pictures,
    }
    return pl.DataFrame(columns, schema=dict(ITEMS.columns))


def ours(port: int, options: argparse.Namespace, folder: Path) -> int:
    """Fetch with the stage's function; gives the number of good pictures."""
    (folder / "manifest.json").write_text('{"files": []}', encoding="utf-8")
    params = FetchImagesParams(
        num_workers=max(16, options.max_per_host), max_per_host=options.max_per_host, timeout_seconds=20.0, num_retries=3,
        backoff_seconds=1.0, max_bytes=20_000_000, max_pixels=50_000_000, stored_pixels=STORED_PIXELS, shard_rows=1024,
    )  # fmt: skip
    coverage = fetch_images(items(port, options.num_pictures), folder, None, None, params, folder / "images")
    return int(coverage["num_ok"])


def plain(port: int, options: argparse.Namespace, folder: Path) -> int:
    """One request at a time on one connection, each picture decoded, reduced, encoded and written to a file."""
    num_ok = 0
    with httpx.Client(timeout=20.0) as client:
        for number in range(options.num_pictures):
            data = client.get(f"http://127.0.0.1:{port}/{number}.jpg").raise_for_status().content
            image = Image.open(io.BytesIO(data)).convert("RGB")
            image.thumbnail((int(STORED_PIXELS**0.5),) * 2, Image.Resampling.LANCZOS)
            image.save(folder / f"{number}.jpg", quality=90, subsampling=0)
            num_ok += 1
    return num_ok


def measure(way: str, port: int, options: argparse.Namespace, told: Connection) -> None:
    """In a process of its own: seconds and peak memory of one way."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        num_ok = {"ours": ours, "plain": plain}[way](port, options, Path(folder))
        seconds = time.perf_counter() - begin
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak_mib = used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    told.send({"num_ok": num_ok, "seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_mib": peak_mib})


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pictures", type=int, default=1_000)
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--max-per-host", type=int, default=4)
    parser.add_argument("--side", type=int, default=500)
    parser.add_argument("--num-bytes", type=int, default=30_000)
    options = parser.parse_args()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    pictures = [jpeg(seed, options.side, options.num_bytes) for seed in range(NUM_DIFFERENT)]
    context = multiprocessing.get_context("spawn")
    hear, tell = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(options.latency_ms / 1000, pictures, tell), daemon=True)
    server.start()
    port = hear.recv()
    results: dict[str, dict[str, float]] = {}
    for way in ("ours", "plain"):
        process = context.Process(target=measure, args=(way, port, options, tell))
        process.start()
        results[way] = hear.recv()
        process.join()
    server.terminate()
    server.join()
    bound = options.latency_ms / 1000 * options.num_pictures / options.max_per_host
    mean_bytes = sum(map(len, pictures)) // len(pictures)
    what = f"{options.num_pictures} pictures of {options.side} x {options.side}, {mean_bytes} bytes"
    how = f"{options.latency_ms:g} ms an answer; {options.max_per_host} requests at a time"
    print(f"{what}; {how}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for way, result in results.items():
        print(
            f"| {way:<5} | {result['seconds']:7.2f} s | {options.num_pictures / result['seconds']:7.1f} pictures/s |"
            f" {result['cpu_seconds']:6.2f} s of CPU | peak {result['peak_mib']:5.0f} MiB | {result['num_ok']} good"
        )
    print(f"| bound | {bound:7.2f} s | {options.num_pictures / bound:7.1f} pictures/s |")
    seconds = {way: result["seconds"] for way, result in results.items()}
    print(
        f"ours is {seconds['plain'] / seconds['ours']:.2f} x as fast as the plain loop, {seconds['ours'] / bound:.2f} x the bound"
    )


if __name__ == "__main__":
    main()
