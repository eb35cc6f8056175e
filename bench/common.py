"""Code shared by the benchmarks: clocks, peak memory, separate processes, a random shop, the default params."""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sda_core.params import Params, load_params

REPOSITORY = Path(__file__).resolve().parents[1]
Seconds = tuple[float, float]  # wall-clock time, processor time


def default_params() -> Params:
    """``params.yaml`` of the repository."""
    return load_params(REPOSITORY / "params.yaml")


# --------------------------------------------------------------------------------------------------------- measuring
def now() -> Seconds:
    """Wall-clock and processor time now."""
    return time.perf_counter(), time.process_time()


def since(begin: Seconds) -> Seconds:
    """Seconds since a start, as wall-clock and processor time."""
    end = now()
    return end[0] - begin[0], end[1] - begin[1]


def peak_mebibytes() -> float:
    """Peak memory of this process in MiB; the system reports at least that of the parent process."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --------------------------------------------------------------------------------------------------------- processes
def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new Python process, to separate its memory and imports.

    Args:
        function: a function at the top level of its module.
        arguments: arguments that JSON can represent.

    Returns:
        The return value, converted by JSON.

    Raises:
        SystemExit: the function failed; its traceback is on stderr.
    """
    command = [sys.executable, "-m", "bench.common", function.__module__, function.__qualname__, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{function.__module__}.{function.__qualname__} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------------------- data
def random_shop(num_users: int, num_items: int, length: int) -> pl.DataFrame:
    """Random histories with Zipf popularity, split by leave-one-out."""
    random = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, num_items + 1)
    items = random.choice(num_items, size=(num_users, length), p=weights / weights.sum()) + 1
    items[: min(num_users, num_items), 0] = np.arange(1, min(num_users, num_items) + 1)  # every item occurs
    items[-1, 0] = num_items
    return pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(1, num_users + 1, dtype=np.int32), length),
            "item_id": items.ravel().astype(np.int32),
            "timestamp": np.tile(np.arange(length, dtype=np.int64), num_users),
            "rating": np.full(num_users * length, 5.0, dtype=np.float32),
            "split": np.tile([*["train"] * (length - 2), "valid", "test"], num_users),
        }
    )


if __name__ == "__main__":
    _module, _name, _arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(_module), _name)(*json.loads(_arguments))))
