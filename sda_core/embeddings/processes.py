"""Several processes of one launch (``torchrun``, ``accelerate launch``) that share an export.

They meet twice: process 0 tells which blocks are unfinished, and everyone waits until all are done.  What travels is
bits, over gloo; the vectors go through the folder of finished blocks, which all processes see.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np

from sda_core.errors import SDAError

if TYPE_CHECKING:  # a process that was started alone, for a variant of ids, needs no torch
    import torch

# Nobody waits so long for a process that is gone, its closed connection is noticed at once; the slow ones are waited for.
_LONGEST_EXPORT = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process among those of the launch.

    Attributes:
        index: of this process, from 0.
        count: of all.
    """

    index: int
    count: int

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the result."""
        return self.index == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: with several GPUs on a machine each takes its own."""
        if device.type != "cuda" or self.count == 1:
            return device
        import torch

        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(own)
        return own

    def told_by_main(self, flags: np.ndarray | None, length: int) -> np.ndarray:
        """The flags of process 0, in every process: ``(length,)`` bool.

        Args:
            flags: needed in process 0, not looked at elsewhere.
            length: how many there are.

        Raises:
            SDAError: a process is gone.
        """
        sent = np.zeros(length, dtype=np.uint8) if flags is None else flags.astype(np.uint8)
        if self.count > 1:
            import torch
            import torch.distributed as dist

            with _one_line(self):
                dist.broadcast(torch.from_numpy(sent), src=0)  # into the array's own memory
        return sent.astype(bool)

    def wait(self) -> None:
        """Go on when all processes are here.

        Raises:
            SDAError: a process is gone.
        """
        if self.count > 1:
            import torch.distributed as dist

            with _one_line(self):
                dist.monitored_barrier(timeout=_LONGEST_EXPORT)


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes of this launch; a process that was started alone is the only one.

    Raises:
        SDAError: the others cannot be reached.
    """
    own = Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if own.count == 1:
        yield own
        return
    import torch.distributed as dist

    with _one_line(own):
        dist.init_process_group("gloo", rank=own.index, world_size=own.count)
    try:
        yield own
    finally:
        dist.destroy_process_group()


@contextmanager
def _one_line(own: Processes) -> Iterator[None]:
    """What gloo says about a lost connection, in words that help."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise SDAError(
            f"process {own.index} of {own.count}",
            f"another process of this launch is gone ({reason[:120]})",
            "see what it says above, then run the same command again: finished blocks are kept",
        ) from None
