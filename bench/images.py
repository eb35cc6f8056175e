"""Compare fetchers of images from a server: our fetcher against a plain loop over httpx, and against the bound by the rate limit.

A server in a separate process responds to every request after a delay.  The plain loop requests one image at a time, decodes
it, reduces it and encodes it again, as in the stage.  With ``max_per_host`` parallel requests to one host, the lower bound is
``latency x images / max_per_host``.

    python -m bench images
    python -m bench images --num-images 300 --latency-ms 200 --max-per-host 16
"""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import numpy as np
import polars as pl
from PIL import Image

from bench.common import in_own_process, peak_mebibytes
from sda_core.artifacts import ITEMS
from sda_core.fetch.images import fetch_images
from sda_core.params import FetchImagesParams

STORED_PIXELS = 65_536
NUM_DIFFERENT = 16


def jpeg(seed: int, side: int, num_bytes: int) -> bytes:
    """An image of smooth colours with noise, of about ``num_bytes``."""
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


def serve(latency_seconds: float, images: list[bytes], told: Connection) -> None:
    """Respond to ``GET /<number>.jpg`` with one of the images after a delay, forever."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                number = int(head.split(b" ", 2)[1].strip(b"/").split(b".")[0])
                await asyncio.sleep(latency_seconds)
                body = images[number % len(images)]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


def items(port: int, num_images: int) -> pl.DataFrame:
    """A catalogue with one address per item."""
    empty = {name: [[] if dtype == pl.List(pl.String) else ""] * num_images for name, dtype in ITEMS.columns.items()}
    columns = empty | {
        "item_id": range(1, num_images + 1),
        "raw_item_id": [f"B{number:09d}" for number in range(num_images)],
        "image_references": [[f"http://127.0.0.1:{port}/{number}.jpg"] for number in range(num_images)],
        "has_metadata": [True] * num_images,
    }
    return pl.DataFrame(columns, schema=dict(ITEMS.columns))


def ours(port: int, num_images: int, max_per_host: int, folder: Path) -> int:
    """Fetch with the stage's function; returns the number of valid images."""
    (folder / "manifest.json").write_text('{"files": []}', encoding="utf-8")
    params = FetchImagesParams(
        num_workers=max(16, max_per_host), max_per_host=max_per_host, timeout_seconds=20.0, num_retries=3,
        backoff_seconds=1.0, max_bytes=20_000_000, max_pixels=50_000_000, stored_pixels=STORED_PIXELS, shard_rows=1024,
    )  # fmt: skip
    coverage = fetch_images(items(port, num_images), folder, None, None, params, folder / "images")
    return int(coverage["num_ok"])


def plain(port: int, num_images: int, folder: Path) -> int:
    """One request at a time on one connection, each image decoded, reduced, encoded and written to a file."""
    num_ok = 0
    with httpx.Client(timeout=20.0) as client:
        for number in range(num_images):
            data = client.get(f"http://127.0.0.1:{port}/{number}.jpg").raise_for_status().content
            image = Image.open(io.BytesIO(data)).convert("RGB")
            image.thumbnail((int(STORED_PIXELS**0.5),) * 2, Image.Resampling.LANCZOS)
            image.save(folder / f"{number}.jpg", quality=90, subsampling=0)
            num_ok += 1
    return num_ok


def measure(way: str, port: int, num_images: int, max_per_host: int) -> dict[str, float]:
    """Seconds and peak memory of one side in this process."""
    with tempfile.TemporaryDirectory() as name:
        begin = time.perf_counter()
        folder = Path(name)
        num_ok = ours(port, num_images, max_per_host, folder) if way == "ours" else plain(port, num_images, folder)
        seconds = time.perf_counter() - begin
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = used.ru_utime + used.ru_stime
    return {"num_ok": num_ok, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak_mebibytes()}


def main(
    num_images: int = 1_000, latency_ms: float = 50.0, max_per_host: int = 4, side: int = 500, num_bytes: int = 30_000
) -> None:
    """Run and print a table."""
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    images = [jpeg(seed, side, num_bytes) for seed in range(NUM_DIFFERENT)]
    context = multiprocessing.get_context("spawn")
    hear, tell = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(latency_ms / 1000, images, tell), daemon=True)
    server.start()
    port = hear.recv()
    results: dict[str, dict[str, float]] = {}
    for way in ("ours", "plain"):
        results[way] = in_own_process(measure, way, port, num_images, max_per_host)
    server.terminate()
    server.join()
    bound = latency_ms / 1000 * num_images / max_per_host
    mean_bytes = sum(map(len, images)) // len(images)
    what = f"{num_images} images of {side} x {side}, {mean_bytes} bytes"
    how = f"{latency_ms:g} ms per response; {max_per_host} parallel requests"
    print(f"{what}; {how}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for way, result in results.items():
        print(
            f"| {way:<5} | {result['seconds']:7.2f} s | {num_images / result['seconds']:7.1f} images/s |"
            f" {result['cpu_seconds']:6.2f} s of CPU | peak {result['peak_mib']:5.0f} MiB | {result['num_ok']} valid"
        )
    print(f"| bound | {bound:7.2f} s | {num_images / bound:7.1f} images/s |")
    seconds = {way: result["seconds"] for way, result in results.items()}
    print(
        f"ours is {seconds['plain'] / seconds['ours']:.2f} x as fast as the plain loop, {seconds['ours'] / bound:.2f} x the bound"
    )
