"""The factors of all layers at once: the same gradients as layer by layer, whatever order passes and losses come in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sda_core.adapters import MoDAConfig, MoDALayer, card, checkpoint_contexts, modality
from sda_core.adapters.moda import layer as layer_module
from sda_core.adapters.moda.config import GATES, GateKind
from sda_core.adapters.moda.gates import SharedFactors
from sda_core.adapters.moda.modality import current_block
from sda_core.errors import ConfigError
from sda_core.params import AdapterParams
from tests.tolerances import assert_equal_up_to_rounding, assert_gradients_equal_up_to_rounding

Make = Callable[..., peft.PeftModel]
Gradients = Callable[[nn.Module], dict[str, Tensor]]


def batch(seed: int = 5) -> Tensor:
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a layer took a shared factor, and how often it had to compute its own; ``off`` switches sharing off."""
    counts = {"shared": 0, "own": 0, "off": 0}
    pop_or_compute = SharedFactors.pop_or_compute

    def counting(self: SharedFactors, layer: MoDALayer, name: str) -> Tensor | None:
        found = None if counts["off"] else pop_or_compute(self, layer, name)
        counts["own" if found is None else "shared"] += 1
        return found

    monkeypatch.setattr(SharedFactors, "pop_or_compute", counting)
    return counts


def assert_as_layer_by_layer(run: Callable[[], Any], model: nn.Module, gradients: Gradients, shares: dict[str, int]) -> None:
    run()
    got = gradients(model)
    assert shares["shared"] > 0
    assert shares["own"] == 0
    shares["off"] = 1
    run()
    expected = gradients(model)
    shares["off"] = 0
    assert any("moda_gate" in name for name in expected)
    assert all(value.abs().max() > 0 for value in expected.values())
    assert_gradients_equal_up_to_rounding(got, expected)


@pytest.mark.parametrize("num_experts", [2, 4, 8])
def test_one_pass_of_each_modality(make_stack: Make, gradients: Gradients, shares: dict[str, int], num_experts: int) -> None:
    model = make_stack(num_experts=num_experts, r=8)

    def run() -> None:
        for name in ("image", "text"):
            with modality(model, name):
                model(batch()).square().sum().backward()

    assert_as_layer_by_layer(run, model, gradients, shares)


def test_float32_at_the_paper_s_setting(make_stack: Make, gradients: Gradients, shares: dict[str, int]) -> None:
    """How many layers are computed together decides the order of a sum, so it is the rounding alone that depends on it."""
    model = make_stack(num_experts=4, r=8, modality_dim=64).float()

    def run() -> None:
        with modality(model, "text"):
            model(batch().float()).square().sum().backward()

    assert_as_layer_by_layer(run, model, gradients, shares)


def test_parts_of_a_model_with_losses_of_their_own(make_stack: Make, gradients: Gradients, shares: dict[str, int]) -> None:
    """The first backward frees its graph, which the layers of the second share."""
    model = make_stack()
    first, second, third = model.base_model.model.blocks

    def run() -> None:
        with modality(model, "image"):
            one, two = first(batch(1)).square().sum(), second(batch(2)).square().sum()
            one.backward()
            three = third(batch(3)).square().sum()
        two.backward()
        three.backward()

    assert_as_layer_by_layer(run, model, gradients, shares)


def test_two_backwards_through_one_graph(make_stack: Make, gradients: Gradients, shares: dict[str, int]) -> None:
    model = make_stack()

    def run() -> None:
        with modality(model, "image"):
            y = model(batch())
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()

    assert_as_layer_by_layer(run, model, gradients, shares)


def test_a_layer_that_is_called_twice_in_a_pass(make_stack: Make, gradients: Gradients, shares: dict[str, int]) -> None:
    model = make_stack()
    block = model.base_model.model.blocks[0]

    def run() -> None:
        with modality(model, "text"):
            model(block(block(batch()))).square().sum().backward()

    assert_as_layer_by_layer(run, model, gradients, shares)


def test_some_blocks_checkpointed_and_others_not(make_stack: Make, gradients: Gradients, shares: dict[str, int]) -> None:
    model = make_stack()
    first, second, third = model.base_model.model.blocks
    checkpointed = partial(checkpoint, use_reentrant=False, context_fn=checkpoint_contexts)

    def run() -> None:
        x = batch().requires_grad_()
        with modality(model, "image"):
            y = third(checkpointed(second, first(x)))
        with modality(model, "text"):
            z = checkpointed(third, second(checkpointed(first, x)))
        (y * z).sum().backward()

    assert_as_layer_by_layer(run, model, gradients, shares)


def test_parameters_that_change_inside_a_block(make_stack: Make, shares: dict[str, int]) -> None:
    """Steps of an optimiser between passes, and a change between two layers of one pass."""
    results = []
    for off in (0, 1):
        shares["off"] = off
        model = make_stack()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        first, second, third = model.base_model.model.blocks
        with modality(model, "image"):
            for _ in range(3):
                optimizer.zero_grad()
                model(batch()).square().sum().backward()
                optimizer.step()
            hidden = first(batch())
            with torch.no_grad():
                for block in (second, third):
                    block.up.moda_gate["default"].add_(0.5 * torch.randn(4, 5, generator=torch.Generator().manual_seed(1)))
            results.append(third(second(hidden)).detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert shares["shared"] == shares["own"]


def test_frozen_and_differing_layers(make_stack: Make, gradients: Gradients, shares: dict[str, int]) -> None:
    """One layer without a gate, one whose gate is frozen, and one that is frozen whole."""
    model = make_stack(plain_modules=["blocks.2.up"])
    first, second, _ = model.base_model.model.blocks
    first.up.moda_gate.requires_grad_(requires_grad=False)
    second.down.requires_grad_(requires_grad=False)

    def run() -> None:
        with modality(model, "image"):
            model(batch()).square().sum().backward()

    assert_as_layer_by_layer(run, model, gradients, shares)
    run()
    found = gradients(model)
    assert not any("blocks.0.up.moda_gate" in name or "blocks.1.down" in name for name in found)
    assert any("blocks.0.up.moda_embedding" in name for name in found)


def test_passes_without_gradients(make_stack: Make, shares: dict[str, int]) -> None:
    """Each kind has factors of its own: a tensor of inference mode may not enter a graph."""
    model = make_stack()
    with modality(model, "image"):
        with torch.inference_mode():
            inferred = model(batch()).clone()
        with torch.no_grad():
            plain = model(batch())
        y = model(batch())
    y.sum().backward()
    assert_equal_up_to_rounding(plain, y.detach())
    assert_equal_up_to_rounding(inferred, y.detach())
    assert shares["own"] == 0


def test_second_derivatives_through_shared_factors(make_stack: Make, shares: dict[str, int]) -> None:
    model = make_stack()
    weights = [p for name, p in model.named_parameters() if "moda_gate" in name or "moda_embedding" in name]
    found = []
    for off in (0, 1):
        shares["off"] = off
        with modality(model, "text"):
            value = model(batch()).square().sum()
        first = torch.autograd.grad(value, weights, create_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        found.append(torch.autograd.grad(penalty, weights))  # type: ignore[arg-type]
    assert shares["shared"] == shares["own"] == 6
    for got, expected in zip(*found, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_parameters_put_in_place_for_one_call_are_used(make_stack: Make, shares: dict[str, int]) -> None:
    model = make_stack()
    name = "base_model.model.blocks.1.up.moda_gate.default"
    other = {name: model.get_parameter(name).detach() * -2.0}
    with modality(model, "text"):
        before = model(batch())
        changed = torch.func.functional_call(model, other, (batch(),))
        torch.testing.assert_close(model(batch()), before, rtol=1e-12, atol=1e-12)
    assert shares["own"] > 0
    with torch.no_grad():
        model.get_parameter(name).copy_(other[name])
    with modality(model, "text"):
        torch.testing.assert_close(changed, model(batch()), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, changed)


def test_a_block_around_a_part_of_the_model(make_stack: Make, gradients: Gradients, shares: dict[str, int]) -> None:
    """Layers outside of the part compute their own."""
    model = make_stack()
    part = model.base_model.model.blocks[0]
    found = []
    for off in (0, 1):
        shares["off"] = off
        with modality(part, "image"):
            model(batch()).square().sum().backward()
        found.append(gradients(model))
    assert_gradients_equal_up_to_rounding(*found)
    assert shares["shared"] == 2


def test_one_block_around_two_models(make_stack: Make, gradients: Gradients, shares: dict[str, int]) -> None:
    """Of other sizes, types and orders of the modalities: each kind of layer is computed with its own."""
    models = nn.ModuleList(
        [
            make_stack(num_experts=4, r=8),
            make_stack(num_experts=2, r=8, lora_alpha=3.0, modalities=["text", "image"], modality_dim=3),
            make_stack(num_experts=2, r=8).float(),
        ]
    )

    def run() -> None:
        with modality(models, "image"):
            sum(model(batch().to(next(model.parameters()).dtype)).square().sum().double() for model in models).backward()  # type: ignore[union-attr]

    run()
    got = gradients(models)
    assert shares["own"] == 0
    shares["off"] = 1
    run()
    assert_gradients_equal_up_to_rounding(got, gradients(models))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_stays_in_float32(make_stack: Make, shares: dict[str, int], dtype: torch.dtype) -> None:
    """Under autocast, and for an adapter in half precision."""
    model = make_stack(modality_dim=64).to(dtype)
    layer = model.base_model.model.blocks[0].up
    expected = (layer.gates("default")[1] * layer.moda_config["default"].scale).repeat_interleave(2)
    with modality(model, "text"), torch.autocast("cpu", dtype=torch.bfloat16):
        block = current_block(layer.moda_owner)
        assert block is not None
        factor = block.factors.pop_or_compute(layer, "default")
        y = model(batch().to(dtype))
    assert factor is not None
    assert factor.dtype == torch.float32
    assert_equal_up_to_rounding(factor, expected)
    y.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    assert layer.moda_gate["default"].grad.abs().max() > 0
    assert shares["own"] == 0


def test_a_model_made_in_inference_mode(make_stack: Make, shares: dict[str, int]) -> None:
    with torch.inference_mode():
        model = make_stack()
        with modality(model, "text"):
            y = model(batch())
    with modality(model.eval(), "text"), torch.inference_mode():
        torch.testing.assert_close(model(batch()), y)
    assert shares["shared"] == 0


def test_parameters_in_pieces_are_not_shared(make_stack: Make, shares: dict[str, int]) -> None:
    """A parameter that is elsewhere between the passes, as an offload leaves it: whole for its own layer only."""
    model = make_stack()
    layer = model.base_model.model.blocks[1].up
    weight = layer.moda_gate["default"]
    layer.moda_gate["default"] = nn.Parameter(weight.to("meta"))
    block = modality(model, "text")
    layer.moda_gate["default"] = weight
    with block:
        model(batch()).sum().backward()
    with modality(model, "text"):  # and it stays so
        model(batch()).sum().backward()
    assert shares["shared"] == 0
    assert weight.grad is not None


def test_every_kind_is_a_value_of_params_and_has_a_sentence_in_the_card() -> None:
    assert set(get_args(AdapterParams.model_fields["gate"].annotation)) == set(GATES) == set(card._GATES)


@pytest.mark.parametrize("is_learned", [True, False])
@pytest.mark.parametrize("depends_on_modality", [True, False])
def test_a_kind_without_a_formula_is_rejected(
    make_stack: Make, monkeypatch: pytest.MonkeyPatch, is_learned: bool, depends_on_modality: bool
) -> None:
    monkeypatch.setitem(GATES, "new", GateKind(is_learned, depends_on_modality))
    model = make_stack(gate="new")
    function = "learned_gate" if is_learned else "fixed_gate"
    with modality(model, "text"), pytest.raises(ConfigError, match=rf"gate: 'new' has no formula in {function}; add one"):
        model(batch())


def test_a_fixed_gate_that_ignores_the_modality_counts_in_passes_and_merges(
    make_stack: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GATES, "first", GateKind(is_learned=False, depends_on_modality=False))
    model = make_stack(gate="first").eval()

    def first(config: MoDAConfig, like: Tensor) -> Tensor:
        return torch.eye(1, config.num_experts, dtype=like.dtype).expand(len(config.modalities), -1)

    monkeypatch.setattr(layer_module, "fixed_gate", first)
    y = model(batch())
    model.merge_adapter()
    torch.testing.assert_close(model(batch()), y, rtol=1e-10, atol=1e-12)
    model.unmerge_adapter()
    monkeypatch.setattr(layer_module, "fixed_gate", lambda config, like: first(config, like).flip(-1))
    assert not torch.allclose(model(batch()), y)
