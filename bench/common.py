"""What the comparisons share: both clocks, peak memory, processes of their own, a random shop, the default params."""

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
Seconds = tuple[float, float]  # by the clock, of the processor


def default_params() -> Params:
    """``params.yaml`` of the repository."""
    return load_params(REPOSITORY / "params.yaml")


# --------------------------------------------------------------------------------------------------------- measuring
def now() -> Seconds:
    """Both clocks."""
    return time.perf_counter(), time.process_time()


def since(begin: Seconds) -> Seconds:
    """Seconds since then, by both clocks."""
    end = now()
    return end[0] - begin[0], end[1] - begin[1]


def peak_mebibytes() -> float:
    """The most memory that this process has held, in MiB; to the system it is at least that of the process that started it."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --------------------------------------------------------------------------------------------------------- processes
def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new Python, so that its memory and its imports are its own.

    Args:
        function: at the top of its module.
        arguments: as JSON has them.

    Returns:
        What the function returned, as JSON has it.

    Raises:
        SystemExit: it failed; its traceback is on stderr.
    """
    command = [sys.executable, "-m", "bench.common", function.__module__, function.__qualname__, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{function.__module__}.{function.__qualname__} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------------------- data
def random_shop(num_users: int, num_items: int, length: int) -> pl.DataFrame:
    """Random histories over a Zipf popularity, split leave-one-out."""
    random = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, num_items + 1)
    items = random.choice(num_items, size=(num_users, length), p=weights / weights.sum()) + 1
    items[: min(num_users, num_items), 0] = np.arange(1, min(num_users, num_items) + 1)  # the catalogue is whole
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
