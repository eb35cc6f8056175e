"""Gradient caching against one backward pass of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sda_core.adapters import MoDAConfig, checkpoint_contexts, modality
from sda_core.losses import build
from sda_core.losses.grad_cache import cached_backward
from tests.sections import SHIPPED, changed

LOSS = changed(SHIPPED.train_adapter.loss, temperature=0.1, learn_temperature=True)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """Two layers, the second one recomputed in backward where that is asked for."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.first, self.second, self.recompute = nn.Linear(6, 8), nn.Linear(8, 5), recompute
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = torch.tanh(self.first(x))
        return (
            checkpoint(self.second, hidden, use_reentrant=False, context_fn=checkpoint_contexts)
            if self.recompute
            else self.second(hidden)
        )


def adapted(recompute: bool, dropout: float) -> Any:
    torch.manual_seed(0)
    config = MoDAConfig(r=4, num_experts=2, lora_dropout=dropout, modality_dim=3, target_modules=["first", "second"])
    model = get_peft_model(Net(recompute), config)
    for name, parameter in model.named_parameters():
        if "moda_" in name:
            nn.init.normal_(parameter)
    return model.train()


def gradients(model: nn.Module, criterion: nn.Module) -> dict[str, Tensor]:
    found = {
        name: parameter.grad.clone()
        for name, parameter in [*model.named_parameters(), *criterion.named_parameters()]
        if parameter.grad is not None
    }
    model.zero_grad()
    criterion.zero_grad()
    return found


def embedders(model: nn.Module, data: dict[str, Tensor], size: int) -> list[list[Callable[[], Tensor]]]:
    def embedder(name: str, part: Tensor) -> Callable[[], Tensor]:
        def embed() -> Tensor:
            with modality(model, name):
                return model(part)

        return embed

    return [[embedder(name, part) for part in x.split(size)] for name, x in data.items()]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7])  # 7 rows: the last chunk is shorter, or there is one
def test_it_equals_the_whole_batch_dropout_included(size: int, recompute: bool) -> None:
    model, criterion = adapted(recompute, dropout=0.4), build(LOSS).double()
    data = {"image": torch.randn(7, 6), "text": torch.randn(7, 6)}
    chunks = embedders(model, data, size)
    torch.manual_seed(5)
    value = cached_backward(chunks, criterion)
    got = gradients(model, criterion)
    calls = model.base_model.model.calls
    assert calls == 2 * len(chunks[0]) * (1 if size == 7 else 2)
    torch.manual_seed(5)
    whole = criterion(*(torch.cat([chunk() for chunk in parts]) for parts in chunks))
    whole.backward()
    expected = gradients(model, criterion)
    torch.testing.assert_close(value, whole.detach(), rtol=0, atol=1e-10)
    assert got.keys() == expected.keys()
    assert len(got) == 2 * 4 + 1
    for name, grad in expected.items():
        assert grad.any(), name
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-10)


def test_without_dropout_chunks_do_not_matter() -> None:
    model, criterion = adapted(recompute=False, dropout=0.0), build(LOSS).double()
    data = {"image": torch.randn(8, 6), "text": torch.randn(8, 6)}
    found = []
    for size in (2, 8):
        value = cached_backward(embedders(model, data, size), criterion)
        found.append((value, gradients(model, criterion)))
    (value, cached), (whole, expected) = found
    torch.testing.assert_close(value, whole, rtol=0, atol=1e-10)
    for name, grad in expected.items():
        torch.testing.assert_close(cached[name], grad, rtol=0, atol=1e-10)


def test_draws_after_it_go_on_as_after_the_first_pass() -> None:
    model, criterion = adapted(recompute=False, dropout=0.4), build(LOSS).double()
    chunks = embedders(model, {"image": torch.randn(4, 6), "text": torch.randn(4, 6)}, 2)
    torch.manual_seed(5)
    cached_backward(chunks, criterion)
    after = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        for parts in chunks:
            for chunk in parts:
                chunk()
    assert torch.equal(after, torch.rand(3))


def test_at_most_one_chunk_has_a_graph() -> None:
    model, criterion = adapted(recompute=False, dropout=0.0), build(LOSS).double()
    held: dict[str, int] = {"now": 0, "most": 0}

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if any(ctx.needs_input_grad):
                held["now"] += 1
                held["most"] = max(held.values())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
            held["now"] -= 1
            return grads[0]

    chunks = embedders(model, {"image": torch.randn(8, 6), "text": torch.randn(8, 6)}, 2)
    counted = [[lambda chunk=chunk: Count.apply(chunk()) for chunk in parts] for parts in chunks]
    cached_backward(counted, criterion)
    assert held == {"now": 0, "most": 1}


def test_a_loss_that_is_not_finite_leaves_no_gradient() -> None:
    model, criterion = adapted(recompute=False, dropout=0.0), build(LOSS).double()
    data = {"image": torch.full((4, 6), torch.nan), "text": torch.randn(4, 6)}
    assert not torch.isfinite(cached_backward(embedders(model, data, 2), criterion))
    assert gradients(model, criterion) == {}


def test_a_modality_without_a_gradient_is_passed_over() -> None:
    model, criterion = adapted(recompute=False, dropout=0.0), build(LOSS).double()
    chunks = embedders(model, {"image": torch.randn(4, 6), "text": torch.randn(4, 6)}, 2)
    deaf = [lambda chunk=chunk: chunk().detach() for chunk in chunks[1]]
    order: list[int] = []
    cached_backward([chunks[0], deaf], criterion, order.append)
    assert order == [0, 1]
    assert len(gradients(model, criterion)) == 2 * 4 + 1
