"""Set up torch for a stage: device, threads, determinism."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from sda_core.errors import ConfigError
from sda_core.params import RuntimeParams

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def prepare_torch(params: RuntimeParams) -> torch.device:
    """Make torch deterministic, configure the memory allocator, and choose the device.

    Raises:
        ConfigError: ``runtime.device`` is ``cuda`` but there is none.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    # use_deterministic_algorithms does the same, but imports the compiler first: 2 of the 5 seconds of a small stage
    # (on a GPU, the attention's backward pass is not deterministic with "warn", only with errors)
    torch.set_deterministic_debug_mode("error")
    # a debugging aid that writes every new tensor twice, so it is disabled
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
    """Keep freed CPU memory for the next step, if the C library is glibc.

    By default the memory of every large tensor is requested from the kernel, zeroed page by page, and returned (measured:
    half of a training's page faults, a sixth of its processor time).  The peak is the same.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the maximum value
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
