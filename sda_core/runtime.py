"""Set-up of torch for a stage: device, threads, determinism."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from sda_core.errors import ConfigError
from sda_core.params import RuntimeParams

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def prepare_torch(params: RuntimeParams) -> torch.device:
    """Make torch deterministic, let it keep the memory it works in, and choose the device.

    Raises:
        ConfigError: ``runtime.device`` is ``cuda`` and there is none.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    # use_deterministic_algorithms does the same, and imports the compiler first: 2 of the 5 seconds that a small stage takes
    # (on a GPU "warn" would leave the attention's backward pass as it likes: it is deterministic only where errors are wanted)
    torch.set_deterministic_debug_mode("error")
    # a debugging aid that writes every new tensor twice
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    _keep_freed_memory()
    if params.num_threads:
        torch.set_num_threads(params.num_threads)
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "params.yaml: runtime.device", "is 'cuda', but torch sees no GPU", "use 'auto' or 'cpu', or install the gpu extra"
        )
    if params.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def _keep_freed_memory() -> None:
    """Keep the CPU memory of one step for the next, where the C library is glibc.

    By default every large tensor is asked of the kernel, filled with zeros page by page, and given back (measured: half of
    a training's page faults, a sixth of its processor time).  The peak is the same.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
