"""Set-up of torch, seen from a process that has done nothing else."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sda_core.errors import ConfigError
from sda_core.params import RuntimeParams
from sda_core.runtime import prepare_torch

ROOT = Path(__file__).resolve().parents[1]


def test_determinism_without_the_compiler_and_memory_that_is_kept() -> None:
    """A small stage takes five seconds, or with the compiler's imports seven."""
    code = """
        import ctypes, sys, torch
        from sda_core.params import RuntimeParams
        from sda_core.runtime import prepare_torch
        print(prepare_torch(RuntimeParams(device="cpu", num_threads=0, num_trainings=1)))
        print(torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
        print(sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
        NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
        class Counts(ctypes.Structure):  # of glibc's mallinfo2
            _fields_ = [(name, ctypes.c_size_t) for name in NAMES]
        count = getattr(ctypes.CDLL(None), "mallinfo2", None)
        if count is not None:
            count.restype = Counts
            for turn in range(3):
                tensors = [torch.ones(5_000_000) for _ in range(5)]  # 100 MB
                held = count()
                del tensors
                print(held.hblkhd, count().fordblks)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["cpu", "True False", "[]"]
    # What the allocator says, not page faults: a system short of memory takes pages back from whoever has them.
    for line in done.stdout.split("\n")[3:-1]:
        mapped, kept = map(int, line.split())
        assert mapped < 20_000_000, "a tensor was mapped by itself: it goes back to the system when it is freed"
        assert kept > 100_000_000, "what was freed went back to the system"


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        prepare_torch(RuntimeParams(device="cuda", num_threads=0, num_trainings=1))


def test_a_gpu_is_as_deterministic_as_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With warnings in the place of errors the attention's backward pass may take what way it likes."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    torch.set_deterministic_debug_mode("warn")
    assert prepare_torch(RuntimeParams(device="auto", num_threads=0, num_trainings=1)).type == "cuda"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
