"""How close two results have to be.

*The same computation twice* (the same operations on tensors of the same shapes, with as many threads, on one machine) gives
the same bits, and a test may ask for them: saved and loaded, merged and unmerged again, killed and resumed.

*Two formulations of one sum* do not: a matrix product takes its terms in an order of its own for each shape, library,
processor and number of threads, fuses multiplication and addition or does not, and a compiler does it all in yet another
way.  One layer at a time or all at once, one batch or two, compiled or not, with gradients or without: a test that compares
such results asks for equality up to rounding and no more, whatever they are on the machine that it was written on.

Each of ``n`` operations moves a result by up to ``eps / 2`` of the size of what it adds up.  Errors of either sign add up
like a random walk, so a sum of ``K`` terms is off by about ``eps sqrt(K)`` of that size, and ``L`` layers by ``L`` times
as much.  The models of the tests have ``K`` up to 512 and ``L`` up to 12: ``12 sqrt(512) = 270``.  With a factor of four
for what layers amplify that is :data:`ROUNDINGS`.  The size is that of the largest number of the tensor, because a small one
may be the difference of two large ones.

*A few steps of Adam* divide each gradient by its own size, so that the rounding error of a gradient near zero becomes a share
of a whole step: weights agree to :func:`a_tenth_of_a_step`, where a real difference shows as steps into other directions.

Numbers that come out of many steps of training have no such bound, because each step amplifies the error of the last.
So only first steps are compared with numbers that are written down here.
"""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

ROUNDINGS = 1000


class Tolerances(TypedDict):
    """Arguments of :func:`torch.testing.assert_close` and :func:`numpy.testing.assert_allclose`."""

    rtol: float
    atol: float


def up_to_rounding(expected: Tensor | np.ndarray[Any, Any], dtype: torch.dtype | None = None) -> Tolerances:
    """For two formulations of one computation.

    Args:
        expected: what is compared with.
        dtype: what it was computed in, where that is narrower than its own type.
    """
    values = torch.as_tensor(expected).detach()
    step = ROUNDINGS * torch.finfo(dtype or values.dtype).eps
    size = float(values.abs().max()) if values.numel() else 0.0
    return {"rtol": step, "atol": step * size}


def a_tenth_of_a_step(learning_rate: float) -> Tolerances:
    """For float32 weights after a few steps of Adam."""
    return {"rtol": 0.0, "atol": learning_rate / 10}


def assert_equal_up_to_rounding(got: Tensor, expected: Tensor) -> None:
    """Two formulations of one computation agree."""
    torch.testing.assert_close(got, expected, **up_to_rounding(expected))


def assert_gradients_equal_up_to_rounding(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Two formulations of one backward pass agree, in models of ``K`` up to 16 and ``L`` up to 6 (``4 * 6 sqrt(16) = 96``).

    A gate's gradient is a difference of gradients, so the size is that of the largest number of all tensors of a type.
    """
    assert got.keys() == expected.keys()
    sizes: dict[torch.dtype, float] = {}
    for value in expected.values():
        sizes[value.dtype] = max(sizes.get(value.dtype, 0.0), float(value.abs().max()))
    for name, value in expected.items():
        step = 100 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(
            got[name], value, rtol=step, atol=step * sizes[value.dtype], msg=lambda text, name=name: f"{name}: {text}"
        )
