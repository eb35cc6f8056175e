"""Several processes of one launch (``torchrun``, ``accelerate launch``): who is who, and what they tell each other.

What travels between them is bits and plain text, over gloo where it is on the CPU and over NCCL where it is on GPUs.
A process that is gone is noticed by its closed connection, and a mistake that one process finds is every process's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import numpy as np

from sda_core.errors import ArtifactError, ConfigError, DataError, DownloadError, SDAError, StorageError, TrainingError

if TYPE_CHECKING:  # a process that is alone needs no torch for this
    import torch
    import torch.distributed as dist
    from torch import Tensor

# Nobody waits so long for a process that is gone, its closed connection is noticed at once; the slow ones are waited for.
_LONGEST_WAIT = timedelta(days=30)

_KINDS = {
    kind.__name__: kind for kind in (SDAError, ArtifactError, ConfigError, DataError, DownloadError, StorageError, TrainingError)
}


class ProcessLostError(SDAError):
    """Another process of the launch is gone; whoever is left says so."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the launch.

    Attributes:
        index: of this process, from 0.
        count: of all.
        talk: the group in which they talk, over gloo; None for a process that is alone.
    """

    index: int
    count: int
    talk: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

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

            with self.meeting():
                dist.broadcast(torch.from_numpy(sent), src=0, group=self.talk)  # into the array's own memory
        return sent.astype(bool)

    def bytes_of_main(self, data: bytes | None) -> bytes:
        """The bytes of process 0, in every process.

        Args:
            data: needed in process 0, not looked at elsewhere.

        Raises:
            SDAError: a process is gone.
        """
        own = (data or b"") if self.is_main else b""
        if self.count == 1:
            return own
        import torch
        import torch.distributed as dist

        with self.meeting():
            length = torch.tensor([len(own)])
            dist.broadcast(length, src=0, group=self.talk)
            sent = _as_tensor(own) if self.is_main else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(sent, src=0, group=self.talk)
        return sent.numpy().tobytes()

    def share(self, data: bytes) -> list[bytes]:
        """What every process has to say, by process index; all must call this.

        Raises:
            SDAError: a process is gone.
        """
        if self.count == 1:
            return [data]
        import torch
        import torch.distributed as dist

        with self.meeting():
            lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.count)]
            dist.all_gather(lengths, torch.tensor([len(data)]), group=self.talk)
            longest = max(int(length) for length in lengths)
            if not longest:
                return [b""] * self.count
            said = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.count)]
            dist.all_gather(said, _as_tensor(data.ljust(longest, b"\0")), group=self.talk)
        return [one[: int(length)].numpy().tobytes() for one, length in zip(said, lengths, strict=True)]

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes, on its device; all must call this.

        Raises:
            SDAError: a process is gone.
        """
        if self.count > 1:
            import torch.distributed as dist

            with self.meeting():
                dist.all_reduce(tensor)

    def wait(self) -> None:
        """Go on when all processes are here.

        Raises:
            SDAError: a process is gone.
        """
        if self.count > 1:
            import torch.distributed as dist

            with self.meeting():
                dist.monitored_barrier(self.talk, timeout=_LONGEST_WAIT)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process fails in all of them, with the error of the lowest index; all must come by here.

        The error is marked as known to all, so that process 0 alone says it.

        Raises:
            SDAError: the block raised it, here or in another process; or a process is gone.
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
        said = b"" if own is None else json.dumps([type(own).__name__, own.where, own.problem, own.advice]).encode()
        for told in self.share(said):
            if told:
                kind, where, problem, advice = json.loads(told)
                error = _KINDS.get(kind, SDAError)(where, problem, advice)
                error.known_to_all = True
                raise error

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Say in words that help what gloo or NCCL says about a lost connection; other errors pass.

        Raises:
            SDAError: a process is gone.
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
                "see what it says above, then run the same command again: what was finished is kept",
            ) from None


ALONE = Processes(index=0, count=1)
"""A process without others."""


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
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with own.meeting():
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
