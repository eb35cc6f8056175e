"""The fused Adam against torch's own optimizer, and that it needs no compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from sda_core.checkpoint import optimizer_tensors, restore_optimizer
from sda_core.recommenders.adam import Adam


def _gradients(parameters: list[nn.Parameter], number: int) -> None:
    torch.manual_seed(number)
    for place, parameter in enumerate(parameters):
        parameter.grad = None if place == 1 and number % 3 == 0 else torch.randn_like(parameter)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_torch_to_the_bit(weight_decay: float) -> None:
    """Also where a parameter has no gradient in some steps, and after it was restored from a checkpoint's tensors."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(()))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer = Adam(ours, 0.02, weight_decay)
    expected = torch.optim.Adam(theirs, lr=0.02, weight_decay=weight_decay, fused=True)
    for number in range(12):
        if number == 6:
            tensors = optimizer_tensors(optimizer)
            optimizer = Adam(ours, 0.02, weight_decay)
            restore_optimizer(optimizer, tensors)
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in ours)
        _gradients(ours, number)
        _gradients(theirs, number)
        optimizer.step()
        expected.step()
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_the_compiler_is_not_imported() -> None:
    code = (
        "import sys, torch; from sda_core.recommenders.adam import Adam; p = torch.nn.Parameter(torch.ones(2)); "
        "p.grad = torch.ones(2); Adam([p], 0.1, 0.0).step(); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
