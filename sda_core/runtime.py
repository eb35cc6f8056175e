"""Set-up of torch for a stage: device, threads, determinism."""

from __future__ import annotations

import os

import torch

from sda_core.errors import ConfigError
from sda_core.params import RuntimeParams


def prepare_torch(params: RuntimeParams) -> torch.device:
    """Make torch deterministic and choose the device.

    Raises:
        ConfigError: ``runtime.device`` is ``cuda`` and there is none.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    # a debugging aid that writes every new tensor twice
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if params.num_threads:
        torch.set_num_threads(params.num_threads)
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "params.yaml: runtime.device", "is 'cuda', but torch sees no GPU", "use 'auto' or 'cpu', or install the gpu extra"
        )
    if params.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")
