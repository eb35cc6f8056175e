"""Building the adapter from params: the right layers, the right number of them, the same weights every time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sda_core.adapters import MoDALinear, adapter_is_zero, base_model, build, gate_values, modality
from sda_core.errors import TrainingError
from tests.sections import SHIPPED, changed

PARAMS = changed(SHIPPED.train_adapter.moda, modality_dim=16)
LANGUAGE = r"language\.\d+\.(up|down)"


class Model(nn.Module):
    """A language and a vision part with layers of the same last names."""

    def __init__(self) -> None:
        super().__init__()
        part = lambda: nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4), "norm": nn.LayerNorm(4)})  # noqa: E731
        self.language = nn.ModuleList(part() for _ in range(3))
        self.vision = nn.ModuleList(part() for _ in range(2))


def test_hits_what_the_pattern_names() -> None:
    model = build(Model(), PARAMS, ["image", "text"], LANGUAGE, 6, seed=1)
    hit = [name for name, module in model.base_model.model.named_modules() if isinstance(module, MoDALinear)]
    assert sorted(hit) == sorted(f"language.{i}.{name}" for i in range(3) for name in ("up", "down"))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.num_experts) == (8, 32.0, 0.1, 4)
    assert (config.expert_rank, config.gate, config.modality_dim, config.modalities) == (
        "split",
        "modality",
        16,
        ["image", "text"],
    )
    assert adapter_is_zero(model)
    values = gate_values(model)
    assert len(values) == 6
    assert all(value.shape == (2, 4) for value in values.values())


def test_weights_depend_on_the_seed_alone() -> None:
    weights = []
    for seed, disturbance in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(disturbance)
        base = Model()
        before = torch.get_rng_state()
        model = build(base, PARAMS, ["image", "text"], LANGUAGE, 6, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(torch.cat([p.flatten() for name, p in model.named_parameters() if ".moda_" in name]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("pattern", "expected", "message"),
    [
        (r".*(up|down)", 6, r"matches 10 modules, expected 6 \(language.\*.down x3, .*, vision.\*.up x2\)"),
        ("up", 6, r"'up' matches 0 modules, expected 6 \(no module; linear layers here are language.\*.down x3, .*\)"),
        (r"language\.0\.norm", 1, r"module language\.0\.norm: is a LayerNorm"),
    ],
)
def test_wrong_targets_leave_the_model_alone(pattern: str, expected: int, message: str) -> None:
    model = Model()
    with pytest.raises(TrainingError, match=message):
        build(model, PARAMS, ["image", "text"], pattern, expected, seed=1)
    assert not any(isinstance(module, MoDALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_base_can_be_asked_in_the_middle_of_a_step() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 4), nn.Dropout(0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts(x)

    torch.manual_seed(0)
    plain = Net().eval()
    x = torch.randn(3, 4)
    expected = plain(x).detach()
    model = build(plain, PARAMS, ["image", "text"], r"parts\.[02]", 2, seed=1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.3)
    model.train()
    model.base_model.model.parts[3].eval()  # whatever the modes were, they come back

    def step(ask: bool) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        with modality(model, "image"):
            if ask:
                with base_model(model):
                    assert torch.equal(model(x), expected)
                    assert not model(x).requires_grad
            out = model(x)
            if ask:
                with pytest.raises(ZeroDivisionError), base_model(model):
                    raise ZeroDivisionError
        out.square().sum().backward()
        assert [module.training for module in model.base_model.model.parts] == [True, True, True, False]
        return [out.detach(), *(parameter.grad.clone() for parameter in trained if parameter.grad is not None)]

    asked, alone = step(ask=True), step(ask=False)
    assert len(asked) == 1 + 2 * 4
    assert all(torch.equal(one, two) for one, two in zip(asked, alone, strict=True))
    assert not torch.allclose(asked[0], expected, atol=1e-2)
