"""What keeps the structure of the base, against NumPy and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sda_core.losses import keep_structure
from sda_core.losses.twins import find_twins

Array = NDArray[np.float64]


def batch(seed: int, rows: int = 6, width: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, width, generator=generator, dtype=torch.float64) for name in ("image", "text")}


def numpy_keep(vectors: dict[str, Array], base: dict[str, Array], temperature: float, hidden: Array) -> float:
    total = 0.0
    for name, x in vectors.items():
        rows = []
        for of in (base[name], x):
            unit = of / np.linalg.norm(of, axis=1, keepdims=True)
            e = np.exp(unit @ unit.T / temperature)
            e[hidden] = 0
            rows.append(e / e.sum(axis=1, keepdims=True))
        p, q = rows
        inside = ~hidden
        total += sum((p[i, inside[i]] * np.log(p[i, inside[i]] / q[i, inside[i]])).sum() for i in range(len(x))) / len(x)
    return total / len(vectors)


@pytest.mark.parametrize("groups", [None, [0, 1, 1, 2, 3, 4]], ids=["all different", "two alike"])
def test_the_value_is_that_of_numpy(groups: list[int] | None) -> None:
    vectors, base = batch(0), batch(1, width=7)
    hidden = np.eye(6, dtype=bool)
    twins = find_twins(None, "keep", vectors["image"])
    if groups is not None:
        twins = find_twins(torch.tensor(groups), "mask", vectors["image"])
        hidden |= np.equal.outer(groups, groups)
    expected = numpy_keep({k: v.numpy() for k, v in vectors.items()}, {k: v.numpy() for k, v in base.items()}, 0.3, hidden)
    assert keep_structure(vectors, base, 0.3, twins=twins).item() == pytest.approx(expected, abs=1e-12)


def test_the_gradient_is_that_of_finite_differences_and_none_goes_to_the_base() -> None:
    vectors = {name: x_BD.requires_grad_() for name, x_BD in batch(2).items()}
    base = {name: x_BD.requires_grad_() for name, x_BD in batch(3).items()}
    keep_structure(vectors, base, 0.3).backward()
    assert all(x_BD.grad is None for x_BD in base.values())
    for name, leaf in vectors.items():
        assert leaf.grad is not None
        for index in np.ndindex(*leaf.shape):
            values = []
            for sign in (1, -1):
                moved = {other: x_BD.detach().clone() for other, x_BD in vectors.items()}
                moved[name][index] += sign * 1e-6
                values.append(float(keep_structure(moved, base, 0.3)))
            assert float(leaf.grad[index]) == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)


def test_what_has_not_moved_costs_nothing_and_has_no_gradient() -> None:
    vectors = {name: x_BD.requires_grad_() for name, x_BD in batch(4).items()}
    value = keep_structure(vectors, {name: 3 * x_BD.detach() for name, x_BD in vectors.items()}, 0.1)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert all(x_BD.grad is not None and float(x_BD.grad.abs().max()) < 1e-12 for x_BD in vectors.values())


def test_a_rotation_of_one_modality_is_free() -> None:
    """Only the similarities inside a modality count, so alignment across modalities may turn it."""
    vectors = batch(5)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    assert keep_structure({"image": vectors["image"] @ rotation, "text": vectors["text"]}, vectors, 0.1).item() == pytest.approx(
        0, abs=1e-9
    )


@pytest.mark.parametrize("groups", [[0], [7, 7, 7]], ids=["a single row", "all alike"])
def test_rows_without_others_have_nothing_to_keep(groups: list[int]) -> None:
    vectors = {name: x_BD.requires_grad_() for name, x_BD in batch(6, rows=len(groups)).items()}
    twins = find_twins(torch.tensor(groups), "mask", vectors["image"])
    value = keep_structure(vectors, batch(7, rows=len(groups)), 0.1, twins=twins)
    value.backward()
    assert value.item() == 0
    assert all(x_BD.grad is not None and bool(torch.isfinite(x_BD.grad).all()) for x_BD in vectors.values())
