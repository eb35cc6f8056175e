"""InfoNCE against torch's cross-entropy and against its own definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sda_core.losses import infonce


def pair(num_rows: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_rows, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("normalize", [True, False])
def test_is_the_mean_of_both_cross_entropies(normalize: bool) -> None:
    image, text = pair(7, 0)
    v, t = (F.normalize(image), F.normalize(text)) if normalize else (image, text)
    logits, target = v @ t.T / 0.07, torch.arange(7)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert infonce(image, text, 0.07, normalize).item() == pytest.approx(expected.item(), abs=1e-12)


def test_known_values() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    assert infonce(eye, eye, 1.0).item() == pytest.approx(math.log(1 + 3 / math.e), abs=1e-12)
    same = torch.ones(4, 3)
    assert infonce(same, same, 0.05).item() == pytest.approx(math.log(4), abs=1e-5)  # float32, and cosines are divided by 0.05


@settings(deadline=None, max_examples=30)
@given(num_rows=st.integers(2, 8), seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_order_and_length_of_the_rows_do_not_count(num_rows: int, seed: int, scale: float) -> None:
    image, text = pair(num_rows, seed)
    value = infonce(image, text, 0.1)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(infonce(image[order], text[order], 0.1), value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(infonce(image * scale, text, 0.1), value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(infonce(text, image, 0.1), value, rtol=1e-10, atol=1e-12)


def test_half_precision_is_computed_in_float32() -> None:
    image, text = pair(6, 1, torch.bfloat16)
    value = infonce(image, text, 0.01)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, infonce(image.float(), text.float(), 0.01))


def test_rows_must_match() -> None:
    with pytest.raises(AssertionError, match="one image row a text row"):
        infonce(torch.randn(3, 2), torch.randn(4, 2), 0.1)
