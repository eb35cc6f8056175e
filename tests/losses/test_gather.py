"""The rows of all processes as one batch: in real processes over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sda_core.losses.gather import gather


@pytest.mark.parametrize("count", [2, 4])
def test_losses_and_gradients_equal_the_big_batch(run_processes: Any, count: int) -> None:
    assert run_processes(Path(__file__).with_name("gathered.py"), count) == [0] * count


def test_alone_it_is_the_tensor_itself() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather(x) is x
