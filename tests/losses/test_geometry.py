"""Centring and the temperature of a wanted number of targets, against NumPy, finite differences and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from sda_core.errors import TrainingError
from sda_core.losses import cmsa
from sda_core.losses.geometry import MOMENTUM, Centering, effective_targets, temperature_for


def batch(
    seed: int, rows: int = 6, width: int = 5, common: float = 0.0, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """Image and text vectors that share a direction of the given length."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.ones(width, dtype=torch.float64) * common
    return {
        name: (torch.randn(rows, width, generator=generator, dtype=torch.float64) + direction).to(dtype)
        for name in ("image", "text")
    }


def test_none_changes_nothing_but_the_type() -> None:
    vectors = batch(0)
    centred = Centering("none")(vectors, update=True)
    assert all(torch.equal(centred[name], vectors[name]) for name in vectors)
    half = Centering("none")(batch(0, dtype=torch.bfloat16), update=True)
    assert all(x_BD.dtype == torch.float32 for x_BD in half.values())


def test_batch_is_the_difference_to_the_mean() -> None:
    vectors = batch(1, common=3.0)
    centred = Centering("batch")(vectors, update=True)
    for name, x_BD in vectors.items():
        np.testing.assert_allclose(centred[name].numpy(), x_BD.numpy() - x_BD.numpy().mean(axis=0), atol=1e-12)


def test_half_precision_is_centred_in_float32() -> None:
    """In bfloat16 the difference to a mean of 100 would keep no digit."""
    vectors = {name: x_BD + 100 for name, x_BD in batch(2).items()}
    half = {name: x_BD.bfloat16() for name, x_BD in vectors.items()}
    centred = Centering("batch")(half, update=True)
    for name, x_BD in half.items():
        expected = x_BD.double() - x_BD.double().mean(dim=0)
        np.testing.assert_allclose(centred[name].double().numpy(), expected.numpy(), atol=1e-4)


def test_gradients_pass_through_the_mean_of_the_batch() -> None:
    """Finite differences of CMSA on centred vectors, with a teacher that is detached and so held fixed."""
    vectors, teaching = batch(3, common=2.0), batch(4, common=2.0)

    def loss(image: Any, text: Any) -> torch.Tensor:
        centre = Centering("batch")
        own = centre({"image": image, "text": text}, update=True)
        base = centre(teaching, update=True)
        return cmsa(own["image"], own["text"], 0.3, taught_by=(base["image"], base["text"]))

    image, text = (x_BD.clone().requires_grad_() for x_BD in vectors.values())
    loss(image, text).backward()
    for which, leaf in enumerate((image, text)):
        assert leaf.grad is not None
        for index in np.ndindex(*leaf.shape):
            values = []
            for sign in (1, -1):
                moved = [image.detach().clone(), text.detach().clone()]
                moved[which][index] += sign * 1e-6
                values.append(float(loss(*moved)))
            assert float(leaf.grad[index]) == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)


def test_running_is_the_mean_of_the_batches_at_first_and_forgets_later() -> None:
    centre = Centering("running")
    expected = np.zeros(5)
    for number in range(1, 25):
        vectors = batch(number, common=1.0)
        mean = vectors["image"].numpy().mean(axis=0)
        expected = expected + (mean - expected) * max(1 / number, 1 - MOMENTUM)
        looked = centre(vectors, update=False)
        stepped = centre(vectors, update=True)
        assert torch.equal(looked["image"], stepped["image"]), "a look sees what the step sees"
        np.testing.assert_allclose(stepped["image"].numpy(), vectors["image"].numpy() - expected, atol=1e-12)
        if number == 10:
            means = [batch(n, common=1.0)["image"].numpy().mean(axis=0) for n in range(1, 11)]
            np.testing.assert_allclose(centre.means["image"].numpy(), np.mean(means, axis=0), atol=1e-12)


def test_the_running_mean_carries_no_gradient() -> None:
    vectors = {name: x_BD.requires_grad_() for name, x_BD in batch(5).items()}
    centred = Centering("running")(vectors, update=True)
    centred["image"].sum().backward()
    assert torch.equal(vectors["image"].grad, torch.ones_like(vectors["image"]))  # type: ignore[arg-type]


def test_a_restored_centre_continues_as_the_first() -> None:
    first, second = Centering("running"), Centering("running")
    for seed in range(3):
        first(batch(seed), update=True)
    second.restore(*first.state())
    one, two = first(batch(9), update=True), second(batch(9), update=True)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("center", ["batch", "running"])
def test_a_common_direction_leaves_the_teacher_nothing_until_it_is_removed(center: Any) -> None:
    vectors = batch(6, rows=32, width=16, common=8.0)

    def targets(of: dict[str, torch.Tensor]) -> float:
        unit = [torch.nn.functional.normalize(x_BD, dim=-1) for x_BD in of.values()]
        return effective_targets(torch.log_softmax(sum(x_BD @ x_BD.T for x_BD in unit) / 2 / 0.05, dim=-1))

    assert targets(vectors) > 16
    assert targets(Centering(center)(vectors, update=True)) < 3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 0.9), rows=st.integers(3, 40))
def test_the_temperature_is_that_of_a_root_finder(seed: int, share: float, rows: int) -> None:
    x_BD = torch.nn.functional.normalize(batch(seed, rows=rows, width=8)["image"], dim=-1)

    def num_targets(temperature: float) -> float:
        return effective_targets(torch.log_softmax(x_BD @ x_BD.T / temperature, dim=-1))

    wanted = 1 + share * (rows - 1)
    found = temperature_for(wanted, num_targets, rows)
    assert num_targets(found) == pytest.approx(wanted, rel=1e-6)
    assert found == pytest.approx(brentq(lambda t: num_targets(t) - wanted, 1e-5, 1e3, xtol=1e-14, rtol=1e-12), rel=1e-5)


@pytest.mark.parametrize("targets", [1.0, 0.5, 6.0, 40.0])
def test_a_number_that_no_temperature_gives_is_one_line(targets: float) -> None:
    x_BD = torch.nn.functional.normalize(batch(0)["image"], dim=-1)
    with pytest.raises(TrainingError, match=r"teacher_targets: should be between 1 and 6, .* \(got"):
        temperature_for(targets, lambda t: effective_targets(torch.log_softmax(x_BD @ x_BD.T / t, dim=-1)), len(x_BD))


def test_equal_rows_have_no_single_target() -> None:
    x_BD = torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(TrainingError, match="between 4 and 4"):
        temperature_for(2.0, lambda t: effective_targets(torch.log_softmax(x_BD @ x_BD.T / t, dim=-1)), 4)
