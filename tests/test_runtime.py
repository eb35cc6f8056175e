"""Set-up of torch, seen from a process that has done nothing else."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sda_core.errors import ConfigError
from sda_core.params import RuntimeParams
from sda_core.runtime import prepare_torch

ROOT = Path(__file__).resolve().parents[1]


def test_determinism_without_the_compiler_and_memory_that_is_kept() -> None:
    """A small stage takes five seconds, or with the compiler's imports seven."""
    code = """
        import resource, sys, torch
        from sda_core.params import RuntimeParams
        from sda_core.runtime import prepare_torch
        print(prepare_torch(RuntimeParams(device="cpu", num_threads=0, num_trainings=1)))
        print(torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
        print(sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
        for turn in range(5):
            tensors = [torch.ones(5_000_000) for _ in range(5)]  # 100 MB
            del tensors
            if turn == 1:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True)
    *said, page_faults = done.stdout.split("\n")[:-1]
    assert said == ["cpu", "True False", "[]"]
    if sys.platform == "linux":
        assert int(page_faults) < 20_000, (
            "of the 73,242 pages that the last three turns touch; a system short of memory takes some back"
        )


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        prepare_torch(RuntimeParams(device="cuda", num_threads=0, num_trainings=1))
