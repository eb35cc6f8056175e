"""One of several processes that run the stage.  Run by test_train_adapter.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    INDEX, COUNT, ADDRESS, PORT = 0, 1, "", 0
    ARGUMENTS: tuple[Any, ...] = ()

root, variant = ARGUMENTS
torch.set_num_threads(1)
os.environ |= {
    "MASTER_ADDR": ADDRESS,
    "MASTER_PORT": str(PORT),
    "RANK": str(INDEX),
    "WORLD_SIZE": str(COUNT),
    "LOCAL_RANK": str(INDEX),
}
os.dup2(os.open(Path(root, f"said-{INDEX}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
sys.argv = ["train_adapter", "--variant", variant, "--root", str(root)]

from sda_core.cli.stage import run_as_script  # noqa: E402 (its log goes to the stderr of above)
from stages.train_adapter import train_adapter  # noqa: E402

run_as_script(train_adapter)
