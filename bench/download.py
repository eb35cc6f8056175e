"""Compare the downloader with curl, sha256sum and gunzip: one large gzip file from a server on this machine.

Both sides store the same file, compute its sha256 and decompress it once; ours in one process, the other in three commands
one after the other.  Rounds alternate, and the best of each side counts.

    python -m bench download                          # 500 MB
    python -m bench download --megabytes 2000 --rounds 5
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import typer

from sda_core.fingerprint import sha256_file


def write_file(path: Path, num_bytes: int) -> None:
    """A gzip file of many equal members, each of JSON lines of random words."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 10))) for _ in range(20_000)]
    lines = [
        json.dumps(
            {
                "reviewerID": f"A{generator.randrange(10**12):012d}",
                "asin": f"B{generator.randrange(10**9):09d}",
                "overall": float(generator.randint(1, 5)),
                "reviewText": " ".join(generator.choices(words, k=60)),
                "unixReviewTime": generator.randrange(10**9, 1_600_000_000),
            }
        )
        for _ in range(20_000)
    ]
    member = gzip.compress(("\n".join(lines) + "\n").encode(), compresslevel=6, mtime=0)
    with path.open("wb") as writer:
        while writer.tell() < num_bytes:
            writer.write(member)


def serve(folder: Path, port: Connection) -> None:
    """Serve files by GET with sendfile."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = folder / self.path.rsplit("/", 1)[-1]
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.send_header("ETag", '"bench"')
            self.end_headers()
            self.wfile.flush()
            with path.open("rb") as reader:
                self.connection.sendfile(reader)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    port.send(server.server_port)
    server.serve_forever()


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Seconds, processor seconds, and peak memory in MiB (at least that of this script) of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(
    megabytes: int = 500,
    rounds: int = 3,
    folder: Annotated[Path | None, typer.Option(help="Folder of the files; default: a temporary folder.")] = None,
) -> None:
    """Measure and print."""
    curl = shutil.which("curl")
    if curl is None:
        raise SystemExit("curl is not installed: install it, or run the comparison on another machine")
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        (place / "served").mkdir()
        file = place / "served" / "reviews.json.gz"
        write_file(file, megabytes * 1_000_000)
        (place / "served" / "metadata.json").write_text("{}\n", encoding="utf-8")
        context = get_context("spawn")
        receiver, sender = context.Pipe()
        server = context.Process(target=serve, args=(place / "served", sender), daemon=True)
        server.start()
        address = f"http://127.0.0.1:{receiver.recv()}"
        ours, steps = [], []
        try:
            for number in range(rounds):
                raw, copy = place / f"raw{number}", place / f"copy{number}.gz"
                addresses = [f"{address}/reviews.json.gz", f"{address}/metadata.json"]
                ours.append(measured([sys.executable, "-m", "bench.download_side", *addresses, str(raw)], environment))
                commands = [[curl, "-sS", "-o", str(copy), addresses[0]], ["sha256sum", str(copy)], ["gunzip", "-t", str(copy)]]
                steps.append([measured(command, environment) for command in commands])
                assert sha256_file(raw / "reviews.json.gz") == sha256_file(copy) == sha256_file(file)
                shutil.rmtree(raw)
                copy.unlink()
        finally:
            server.terminate()
            server.join()
        size = file.stat().st_size
    seconds, cpu_seconds, memory = (min(values) for values in zip(*ours, strict=True))
    best = [[min(values) for values in zip(*step, strict=True)] for step in zip(*steps, strict=True)]
    print(f"file: {size / 1e6:.0f} MB gzip, best of {rounds}, load average {os.getloadavg()[0]:.1f}")
    print(
        f"sda download  {seconds:6.2f} s  {size / seconds / 1e6:5.0f} MB/s  processor {cpu_seconds:6.2f} s  peak {memory:.0f} MiB"
    )
    for tool, (step, cpu_step, _) in zip(("curl -o", "sha256sum", "gunzip -t"), best, strict=True):
        print(f"  {tool:10s}  {step:6.2f} s  {size / step / 1e6:5.0f} MB/s  processor {cpu_step:6.2f} s")
    yardstick, cpu_yardstick = sum(step[0] for step in best), sum(step[1] for step in best)
    print(f"the three     {yardstick:6.2f} s              processor {cpu_yardstick:6.2f} s")
    print(f"sda download takes {seconds / yardstick:.2f} x their time, {cpu_seconds / cpu_yardstick:.2f} x their processor time")
