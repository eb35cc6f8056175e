"""The processes of one launch (``torchrun``, ``accelerate launch``), and their communication.

They exchange arrays and plain text, over gloo on the CPU and over NCCL on GPUs.  The loss of a process is detected by its
closed connection, and an error in one process is raised in all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import numpy as np

from sda_core.errors import ArtifactError, ConfigError, DataError, DownloadError, SDAError, StorageError, TrainingError

if TYPE_CHECKING:  # a single process needs no torch for this
    import torch
    import torch.distributed as dist
    from torch import Tensor

# For slow processes.  A lost process is detected at once, by its closed connection.
_LONGEST_WAIT = timedelta(days=30)

_KINDS = {
    kind.__name__: kind for kind in (SDAError, ArtifactError, ConfigError, DataError, DownloadError, StorageError, TrainingError)
}


class ProcessLostError(SDAError):
    """Another process of the launch has ended."""


@dataclass(frozen=True)
class Processes:
    """The processes of the launch, seen from this one.

    Attributes:
        index: index of this process, from 0.
        count: number of processes.
        talk: the gloo group for messages; None for a single process.
    """

    index: int
    count: int
    talk: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the result."""
        return self.index == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: each process uses a separate GPU of the machine."""
        if device.type != "cuda" or self.count == 1:
            return device
        import torch

        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(own)
        return own

    def broadcast_flags(self, flags: np.ndarray | None, length: int) -> np.ndarray:
        """Send the flags of process 0 to every process.

        Args:
            flags: used in process 0 only, ``(length,)`` bool.
            length: number of flags.

        Returns:
            ``(length,)`` bool, equal in every process.

        Raises:
            SDAError: a process has ended.
        """
        sent = np.zeros(length, dtype=np.uint8) if flags is None else flags.astype(np.uint8)
        if self.count > 1:
            import torch
            import torch.distributed as dist

            with self.explain_connection_errors():
                dist.broadcast(torch.from_numpy(sent), src=0, group=self.talk)  # in place, in the array's memory
        return sent.astype(bool)

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Send the bytes of process 0 to every process.

        Args:
            data: used in process 0 only.

        Raises:
            SDAError: a process has ended.
        """
        own = (data or b"") if self.is_main else b""
        if self.count == 1:
            return own
        import torch
        import torch.distributed as dist

        with self.explain_connection_errors():
            length = torch.tensor([len(own)])
            dist.broadcast(length, src=0, group=self.talk)
            sent = _as_tensor(own) if self.is_main else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(sent, src=0, group=self.talk)
        return sent.numpy().tobytes()

    def share(self, data: bytes) -> list[bytes]:
        """Gather the data of every process, by process index; all must call this.

        Raises:
            SDAError: a process has ended.
        """
        if self.count == 1:
            return [data]
        import torch
        import torch.distributed as dist

        with self.explain_connection_errors():
            lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.count)]
            dist.all_gather(lengths, torch.tensor([len(data)]), group=self.talk)
            longest = max(int(length) for length in lengths)
            if not longest:
                return [b""] * self.count
            gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.count)]
            dist.all_gather(gathered, _as_tensor(data.ljust(longest, b"\0")), group=self.talk)
        return [one[: int(length)].numpy().tobytes() for one, length in zip(gathered, lengths, strict=True)]

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes, on its device; all must call this.

        Raises:
            SDAError: a process has ended.
        """
        if self.count > 1:
            import torch.distributed as dist

            with self.explain_connection_errors():
                dist.all_reduce(tensor)

    def wait(self) -> None:
        """Wait until all processes have called this.

        Raises:
            SDAError: a process has ended.
        """
        if self.count > 1:
            import torch.distributed as dist

            with self.explain_connection_errors():
                dist.monitored_barrier(self.talk, timeout=_LONGEST_WAIT)

    @contextmanager
    def raise_on_all_ranks(self) -> Generator[None]:
        """Context that raises an ``SDAError`` of one process in all of them; all must enter this block.

        If several fail, the error of the lowest index is raised.  It is marked as known to all, so that only process 0 logs
        it.

        Raises:
            SDAError: raised in the block, here or in another process; or a process has ended.
        """
        own: SDAError | None = None
        try:
            yield
        except ProcessLostError:
            raise
        except SDAError as error:
            own = error
        if self.count == 1:
            if own is not None:
                raise own
            return
        message = b"" if own is None else json.dumps([type(own).__name__, own.where, own.problem, own.advice]).encode()
        for received in self.share(message):
            if received:
                kind, where, problem, advice = json.loads(received)
                error = _KINDS.get(kind, SDAError)(where, problem, advice)
                error.known_to_all = True
                raise error

    @contextmanager
    def explain_connection_errors(self) -> Generator[None]:
        """Context that converts a connection error of gloo or NCCL to a :class:`ProcessLostError`; other errors pass.

        Raises:
            SDAError: a process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            reason = str(error).strip().split("\n", 1)[0]
            raise ProcessLostError(
                f"process {self.index} of {self.count}",
                f"another process of this launch is gone ({reason[:120]})",
                "read its error above, then run the same command again: finished work is kept",
            ) from None


ALONE = Processes(index=0, count=1)
"""A single process."""


@contextmanager
def processes() -> Generator[Processes]:
    """Join the processes of this launch; without a launcher there is one process.

    Raises:
        SDAError: the others cannot be reached.
    """
    own = Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if own.count == 1:
        yield own
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with own.explain_connection_errors():
        dist.init_process_group(backend, rank=own.index, world_size=own.count)
        talk = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_LONGEST_WAIT))
    try:
        yield Processes(own.index, own.count, talk)
    finally:
        dist.destroy_process_group()


def _as_tensor(data: bytes) -> Tensor:
    import torch

    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error comes from the network between processes; gloo raises plain RuntimeErrors."""
    import torch.distributed as dist

    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "monitoredbarrier", "broken pipe", "timed out", "timeout")
    return isinstance(error, dist.DistError) or any(word in text for word in words)
