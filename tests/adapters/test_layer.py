"""The MoDA layer against independent arithmetic: NumPy, PEFT's LoRA, and itself by another way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from sda_core.adapters import MoDAConfig, MoDALinear, modality
from sda_core.adapters.moda.modality import Owner

Array = NDArray[np.float64]


def linear(in_features: int, out_features: int, config: MoDAConfig, seed: int) -> MoDALinear:
    """A float64 layer with random adapter parameters."""
    torch.manual_seed(seed)
    layer = MoDALinear(nn.Linear(in_features, out_features).double(), "default", config, Owner())
    layer.base_layer.requires_grad_(False)
    for parameters in (layer.moda_A, layer.moda_B, layer.moda_embedding, layer.moda_gate):
        for parameter in parameters.values():
            nn.init.normal_(parameter, std=0.7)
    return layer


class NumpyMoDA:
    """The formula, expert by expert, with gradients by hand; knows nothing of the layer's way to compute."""

    def __init__(self, layer: MoDALinear, config: MoDAConfig) -> None:
        self.config = config
        rank = config.r // config.num_experts if config.expert_rank == "split" else config.r
        A, B = layer.moda_A["default"].detach().numpy(), layer.moda_B["default"].detach().numpy()
        self.A = [A[e * rank : (e + 1) * rank] for e in range(config.num_experts)]
        self.B = [B[:, e * rank : (e + 1) * rank] for e in range(config.num_experts)]
        self.W0 = layer.base_layer.weight.detach().numpy()
        self.b0 = layer.base_layer.bias.detach().numpy()
        self.embedding = layer.moda_embedding["default"].detach().numpy() if "default" in layer.moda_embedding else None
        self.W_g = layer.moda_gate["default"].detach().numpy() if "default" in layer.moda_gate else None
        self.scale = config.lora_alpha / (np.sqrt(config.r) if config.use_rslora else config.r)

    def gate(self, m: int) -> Array:
        E, M = self.config.num_experts, len(self.config.modalities)
        if self.config.gate == "uniform" or E == 1:
            return np.full(E, 1 / E)
        if self.config.gate == "onehot":
            return np.array([1.0 if e // (E // M) == m else 0.0 for e in range(E)])
        logits = self.W_g @ self.embedding[m]
        e = np.exp(logits - logits.max())
        return e / e.sum()

    def forward(self, x_BLD: Array, modality_B: list[int]) -> Array:
        rows = []
        for x_LD, m in zip(x_BLD, modality_B, strict=True):
            y = x_LD @ self.W0.T + self.b0
            for g, A, B in zip(self.gate(m), self.A, self.B, strict=True):
                y = y + self.scale * g * (x_LD @ A.T) @ B.T
            rows.append(y)
        return np.stack(rows)

    def backward(self, x_BLD: Array, modality_B: list[int], c_BLO: Array) -> dict[str, Array]:
        """Gradients of ``sum(c * y)``."""
        E = self.config.num_experts
        dA, dB = [np.zeros_like(a) for a in self.A], [np.zeros_like(b) for b in self.B]
        dx = np.zeros_like(x_BLD)
        learned = self.W_g is not None
        d_embedding = np.zeros_like(self.embedding) if learned else None
        d_W_g = np.zeros_like(self.W_g) if learned else None
        for row, m in enumerate(modality_B):
            x, c, g = x_BLD[row], c_BLO[row], self.gate(m)
            dx[row] += c @ self.W0
            dg = np.zeros(E)
            for e in range(E):
                h, back = x @ self.A[e].T, c @ self.B[e]
                dB[e] += self.scale * g[e] * c.T @ h
                dA[e] += self.scale * g[e] * back.T @ x
                dx[row] += self.scale * g[e] * back @ self.A[e]
                dg[e] = self.scale * (c * (h @ self.B[e].T)).sum()
            if learned:
                d_logits = g * (dg - (dg * g).sum())
                d_W_g += np.outer(d_logits, self.embedding[m])
                d_embedding[m] += self.W_g.T @ d_logits
        found = {"A": np.concatenate(dA), "B": np.concatenate(dB, axis=1), "x": dx}
        return found | ({"embedding": d_embedding, "gate": d_W_g} if learned else {})


CASES = [
    pytest.param({"gate": "modality"}, id="paper"),
    pytest.param({"gate": "modality", "expert_rank": "full"}, id="full rank"),
    pytest.param({"gate": "modality", "num_experts": 8}, id="8 experts"),
    pytest.param({"gate": "onehot"}, id="onehot"),
    pytest.param({"gate": "uniform"}, id="uniform"),
    pytest.param({"gate": "modality", "num_experts": 1}, id="1 expert"),
    pytest.param({"gate": "modality", "modalities": ["image", "text", "audio"]}, id="3 modalities"),
    pytest.param({"gate": "modality", "use_rslora": True}, id="rsLoRA"),
    pytest.param({"gate": "onehot", "use_rslora": True, "expert_rank": "full"}, id="rsLoRA, onehot, full rank"),
    pytest.param({"gate": "modality", "variant": "reference"}, id="reference"),
]


@pytest.mark.parametrize("ids_of", ["batch", "rows", "tokens"])
@pytest.mark.parametrize("options", CASES)
def test_forward_and_gradients_are_those_of_numpy(options: dict[str, object], ids_of: str) -> None:
    config = MoDAConfig(r=8, lora_alpha=12, lora_dropout=0.0, modality_dim=5, target_modules=["x"], **options)  # type: ignore[arg-type]
    layer = linear(7, 6, config, seed=3)
    oracle = NumpyMoDA(layer, config)
    x = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, 3, 6, dtype=torch.float64)
    last = len(config.modalities) - 1
    ids = {
        "batch": torch.full((4, 3), last),
        "rows": torch.tensor([[0], [last], [last], [0]]).expand(4, 3),
        "tokens": torch.tensor([[0, last, 0], [last, last, last], [last, 0, 0], [0, 0, last]]),
    }[ids_of]
    flat = ids.flatten().tolist()  # the oracle takes one sequence a position
    with modality(layer, {"batch": config.modalities[last], "rows": ids[:, 0], "tokens": ids}[ids_of]):
        y = layer(x)
    alone = oracle.forward(x.detach().numpy().reshape(12, 1, 7), flat).reshape(4, 3, 6)
    np.testing.assert_allclose(y.detach().numpy(), alone, rtol=0, atol=1e-10)
    (y * c).sum().backward()
    expected = oracle.backward(x.detach().numpy().reshape(12, 1, 7), flat, c.numpy().reshape(12, 1, 6))
    expected["x"] = expected["x"].reshape(4, 3, 7)
    got = {
        "A": layer.moda_A["default"].grad,
        "B": layer.moda_B["default"].grad,
        "x": x.grad,
        **(
            {"embedding": layer.moda_embedding["default"].grad, "gate": layer.moda_gate["default"].grad}
            if "gate" in expected
            else {}
        ),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(got[name].numpy(), value, rtol=0, atol=1e-9, err_msg=name)
        assert np.abs(value).max() > 1e-3, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("gate", ["modality", "uniform"])
def test_one_expert_is_peft_lora(gate: str, dropout: float) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4))
    reference = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4))
    reference.load_state_dict(base.state_dict())
    ours = peft.get_peft_model(
        base, MoDAConfig(r=4, lora_alpha=8, lora_dropout=dropout, num_experts=1, gate=gate, target_modules=["0", "2"])
    )
    theirs = peft.get_peft_model(reference, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["0", "2"]))
    theirs_by_name = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "moda_" in name:
                nn.init.normal_(parameter)
                theirs_by_name[name.replace("moda_", "lora_") + ".weight"].copy_(parameter)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(5, 3, 6)
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(9)  # of the dropout
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1).step()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)
    compared = 0
    for name, parameter in ours.named_parameters():
        if "moda_" in name:
            torch.testing.assert_close(
                parameter.grad, theirs_by_name[name.replace("moda_", "lora_") + ".weight"].grad, rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                parameter, theirs_by_name[name.replace("moda_", "lora_") + ".weight"], rtol=1e-5, atol=1e-5
            )
            compared += 1
    assert compared == 4


def lora_of(layer: MoDALinear, experts: slice, r: int, alpha: float) -> peft.PeftModel:
    """PEFT's LoRA with some of a layer's ranks as its own."""
    out_features, in_features = layer.base_layer.weight.shape
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=["0"])
    lora = peft.get_peft_model(nn.Sequential(nn.Linear(in_features, out_features)).double(), config)
    target = lora.base_model.model[0]
    target.base_layer.load_state_dict(layer.base_layer.state_dict())
    with torch.no_grad():
        target.lora_A["default"].weight.copy_(layer.moda_A["default"][experts])
        target.lora_B["default"].weight.copy_(layer.moda_B["default"][:, experts])
    return lora


def lora_gradients(lora: peft.PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    target = lora.base_model.model[0]
    return target.lora_A["default"].weight.grad, target.lora_B["default"].weight.grad


@pytest.mark.parametrize("together", [False, True], ids=["one pass each", "one pass, ids a row"])
def test_onehot_is_one_lora_a_modality(together: bool) -> None:
    config = MoDAConfig(r=6, lora_alpha=9, lora_dropout=0.0, num_experts=2, gate="onehot", target_modules=["x"])
    layer = linear(5, 4, config, seed=1)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    loras = [lora_of(layer, slice(3 * m, 3 * m + 3), 3, 4.5) for m in range(2)]
    if together:
        with modality(layer, [0, 1]):
            y = layer(x)
        expected = torch.cat([loras[0](x[:1]), loras[1](x[1:])])
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        y.square().sum().backward()
        expected.square().sum().backward()
    else:
        for m, name in enumerate(config.modalities):
            with modality(layer, name):
                y = layer(x)
            torch.testing.assert_close(y, loras[m](x), rtol=1e-12, atol=1e-12)
            y.square().sum().backward()
            loras[m](x).square().sum().backward()
            if m == 0:  # the other modality's experts learn nothing from this pass
                assert not layer.moda_A["default"].grad[3:].any()
                assert not layer.moda_B["default"].grad[:, 3:].any()
    for m, lora in enumerate(loras):
        a_grad, b_grad = lora_gradients(lora)
        torch.testing.assert_close(layer.moda_A["default"].grad[3 * m : 3 * m + 3], a_grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.moda_B["default"].grad[:, 3 * m : 3 * m + 3], b_grad, rtol=1e-12, atol=1e-12)
        assert a_grad.abs().min() > 0


def test_uniform_is_one_lora() -> None:
    """Of the same rank, with alpha a number of experts lower."""
    config = MoDAConfig(r=8, lora_alpha=12, lora_dropout=0.0, num_experts=4, gate="uniform", target_modules=["x"])
    layer = linear(5, 4, config, seed=1)
    lora = lora_of(layer, slice(None), 8, 3.0)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    y, expected = layer(x), lora(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    for got, gradient in zip((layer.moda_A["default"].grad, layer.moda_B["default"].grad), lora_gradients(lora), strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-12, atol=1e-12)


def test_rslora_is_pefts() -> None:
    config = MoDAConfig(r=4, lora_alpha=8, use_rslora=True, num_experts=1, lora_dropout=0.0, target_modules=["x"])
    layer = linear(5, 4, config, seed=1)
    theirs = lora_of(layer, slice(None), 4, 8.0 * 4**0.5)  # alpha / r with r**0.5 more of alpha
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert config.scale == 4.0


# ------------------------------------------------------------------------------------ the public code's dropout
class PublicCode(nn.Module):
    """The layer as the paper's public code has it: a loop over experts, each with a dropout mask of its own."""

    def __init__(self, layer: MoDALinear, config: MoDAConfig) -> None:
        super().__init__()
        self.base = copy.deepcopy(layer.base_layer)
        each = config.rank_per_expert
        with torch.no_grad():
            self.A = nn.ParameterList(part.clone() for part in layer.moda_A["default"].split(each))
            self.B = nn.ParameterList(part.clone() for part in layer.moda_B["default"].split(each, dim=1))
            self.embedding = nn.Parameter(layer.moda_embedding["default"].clone())
            self.gate = nn.Parameter(layer.moda_gate["default"].clone())
        self.dropout = nn.Dropout(config.lora_dropout)
        self.scale = config.lora_alpha / config.r

    def forward(self, x: torch.Tensor, ids_B: torch.Tensor) -> torch.Tensor:
        gate_BE = torch.softmax(self.embedding[ids_B] @ self.gate.T, dim=-1)
        result = self.base(x)
        for e, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            result = result + (self.dropout(x) @ A.T @ B.T) * self.scale * gate_BE[:, e, None, None]
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("expert_rank", ["split", "full"])
def test_the_reference_variant_is_a_loop_over_experts(expert_rank: str, dropout: float) -> None:
    config = MoDAConfig(
        r=8, lora_dropout=dropout, expert_rank=expert_rank, modality_dim=5, variant="reference", target_modules=["x"]
    )
    layer = linear(7, 6, config, seed=2).train()
    public = PublicCode(layer, config).train()
    x, ids_B = torch.randn(4, 3, 7, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    torch.manual_seed(5)
    with modality(layer, ids_B):
        y = layer(x)
    torch.manual_seed(5)
    expected = public(x, ids_B)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    for got, parts in (
        (layer.moda_A["default"], torch.cat([A.grad for A in public.A])),
        (layer.moda_B["default"], torch.cat([B.grad for B in public.B], dim=1)),
        (layer.moda_embedding["default"], public.embedding.grad),
        (layer.moda_gate["default"], public.gate.grad),
    ):
        torch.testing.assert_close(got.grad, parts, rtol=1e-11, atol=1e-11)


def test_the_two_variants_differ_in_the_masks_alone() -> None:
    layers = [
        linear(7, 6, MoDAConfig(lora_dropout=0.5, modality_dim=5, variant=variant, target_modules=["x"]), seed=2)
        for variant in ("paper", "reference")
    ]
    assert all(torch.equal(a, b) for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True))
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    outputs = []
    for layer in layers:
        torch.manual_seed(5)
        with modality(layer, "text"):
            outputs.append((layer.train()(x), layer.eval()(x)))
    assert not torch.allclose(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


@settings(deadline=None, max_examples=30)
@given(
    ids=st.lists(st.integers(0, 1), min_size=1, max_size=6), seed=st.integers(0, 99), shape=st.sampled_from([(), (3,), (2, 2)])
)
def test_each_row_gets_what_it_gets_alone(ids: list[int], seed: int, shape: tuple[int, ...]) -> None:
    layer = linear(4, 3, MoDAConfig(r=4, modality_dim=5, lora_dropout=0.0, target_modules=["x"]), seed)
    x = torch.randn(len(ids), *shape, 4, dtype=torch.float64)
    with modality(layer, ids):
        together = layer(x)
    for row, m in enumerate(ids):
        with modality(layer, ["image", "text"][m]):
            torch.testing.assert_close(layer(x[row : row + 1])[0], together[row], rtol=1e-12, atol=1e-12)


def test_a_fresh_adapter_changes_nothing_and_has_the_papers_init() -> None:
    torch.manual_seed(0)
    base = nn.Linear(200, 300)
    layer = MoDALinear(base, "default", MoDAConfig(target_modules=["x"]), Owner())
    x = torch.randn(2, 200)
    with modality(layer, "text"):
        assert torch.equal(layer(x), base(x))
    assert abs(layer.moda_A["default"].std().item() - 0.01) < 0.001
    assert not layer.moda_B["default"].any()
    assert layer.moda_gate["default"].shape == (4, 64)
    assert layer.moda_embedding["default"].shape == (2, 64)
    assert layer.moda_A["default"].shape == (8, 200)
    torch.testing.assert_close(layer.gates("default").sum(-1), torch.ones(2))


def test_float32_adapter_on_a_bfloat16_base() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 16)).to(torch.bfloat16), MoDAConfig(lora_dropout=0.0, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    assert layer.moda_A["default"].dtype == torch.float32
    assert layer.base_layer.weight.dtype == torch.bfloat16
    nn.init.normal_(layer.moda_B["default"])
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    with modality(model, "image"):
        y = model(x)
    assert y.dtype == torch.bfloat16
    exact = layer.base_layer(x).float() + x.float() @ layer.get_delta_weight("default", "image").T
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=0)
    y.sum().backward()
    assert layer.moda_A["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own_dtype", [True, False], ids=["float32 adapter", "adapter like the base"])
@pytest.mark.parametrize("ids", ["image", [[0, 1, 1]] * 4], ids=["name", "tokens"])
def test_half_precision_is_float32_but_for_rounding(dtype: torch.dtype, own_dtype: bool, ids: object) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 16))
    config = MoDAConfig(lora_dropout=0.0, modality_dim=5, target_modules=["0"])
    exact = peft.get_peft_model(copy.deepcopy(base), config)
    half = peft.get_peft_model(base.to(dtype), config, autocast_adapter_dtype=own_dtype)
    theirs = dict(half.named_parameters())
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if "moda_" in name:
                nn.init.normal_(parameter, std=0.2)
                theirs[name].copy_(parameter)
            parameter.copy_(theirs[name])  # the same numbers on both sides
    assert {p.dtype for name, p in theirs.items() if "moda_" in name} == {torch.float32 if own_dtype else dtype}
    x = torch.randn(4, 3, 32, dtype=dtype)
    outputs = []
    for model in (exact, half):
        with modality(model, ids):
            outputs.append(model(x.to(model.base_model.model[0].base_layer.weight.dtype)))
        outputs[-1].float().square().mean().backward()
    assert outputs[1].dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(outputs[1].float(), outputs[0], rtol=4 * step, atol=4 * step)
    for name, parameter in exact.named_parameters():
        if "moda_" in name:
            got = theirs[name].grad
            assert got.dtype == theirs[name].dtype
            assert torch.isfinite(got).all()
            assert (got.float() - parameter.grad).norm() < 8 * step * parameter.grad.norm(), name


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(base_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 16)).to(base_dtype), MoDAConfig(lora_dropout=0.0, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    nn.init.normal_(layer.moda_B["default"], std=0.2)
    x = torch.randn(4, 3, 32)
    with torch.no_grad(), modality(model, "text"):
        plain_gates = layer.gates("default")
        exact = layer.base_layer(x.to(base_dtype)).float() + x @ layer.get_delta_weight("default", "text").T
    with torch.autocast("cpu", dtype=torch.bfloat16), modality(model, "text"):
        assert torch.equal(layer.gates("default"), plain_gates)  # a gate is not worth half precision
        y = model(x)
        assert y.dtype == layer.base_layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2**-6, atol=2**-6)
    y.float().square().mean().backward()
    for parameters in (layer.moda_A, layer.moda_B, layer.moda_embedding, layer.moda_gate):
        assert parameters["default"].grad.dtype == torch.float32
        assert torch.isfinite(parameters["default"].grad).all()
        assert parameters["default"].grad.any()


@pytest.mark.parametrize("ids", ["text", [0, 1, 1], [[0, 1], [1, 1], [0, 0]]], ids=["name", "rows", "tokens"])
def test_a_pass_reads_nothing_from_the_device(ids: object) -> None:
    """On the meta device, whatever waits for a value raises: a GPU would stand still there, in every layer."""
    layer = linear(6, 4, MoDAConfig(modality_dim=5, target_modules=["x"]), seed=0).to("meta").train()
    x = torch.empty(3, 2, 6, dtype=torch.float64, device="meta", requires_grad=True)
    with torch.device("meta"), modality(layer, ids):  # a default device is where a user's tensors go, not our markers
        y = layer(x)
    y.sum().backward()
    assert y.shape == (3, 2, 4)
    assert all(parameter["default"].grad is not None for parameter in (layer.moda_A, layer.moda_B, layer.moda_gate))


def test_an_adapter_drawn_again_keeps_nothing_of_the_former() -> None:
    layer = linear(5, 4, MoDAConfig(lora_dropout=0.0, target_modules=["x"]), seed=0)
    layer.update_layer("default", MoDAConfig(gate="uniform", lora_dropout=0.0, target_modules=["x"]))
    assert sorted(name for name, _ in layer.named_parameters() if "moda_" in name) == ["moda_A.default", "moda_B.default"]
    assert layer.gates("default").tolist() == [[0.25] * 4] * 2


def test_gates_of_all_kinds(make_stack: Callable[..., peft.PeftModel]) -> None:
    layer = make_stack(gate="onehot", num_experts=4).base_model.model.blocks[0].up
    assert layer.gates("default").tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    layer = make_stack(gate="uniform", num_experts=4).base_model.model.blocks[0].up
    assert layer.gates("default").tolist() == [[0.25] * 4] * 2
