"""Gradient cosines: cases worked out by hand, the training loop's own gradient, and a model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sda_core.adapters import MoDAConfig, checkpoint_contexts, merged_modality, modality
from sda_core.diagnostics import GradientProducts, gradient_products
from sda_core.errors import TrainingError
from sda_core.losses import cmsa, cmsa_many

Vectors = Mapping[str, Tensor]


class TwoLayers(nn.Module):
    """Side by side: the first two columns of the vectors come from one layer, the others from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=-1)


class Deep(nn.Module):
    """One after the other, with dropout, and checkpointed where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.dropout = nn.Dropout(0.5)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

        if not self.checkpointed:
            return self.dropout(block(x))
        return self.dropout(checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts))


def adapted(base: nn.Module, seed: int = 0, **options: Any) -> peft.PeftModel:
    torch.manual_seed(seed)
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    config = MoDAConfig(**{"r": 1, "num_experts": 1, "lora_dropout": 0.0, "target_modules": names, "modality_dim": 3, **options})
    model = peft.get_peft_model(base.double(), config)
    for name, parameter in model.named_parameters():
        if "moda_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def pulled(pulls: Vectors) -> Callable[[Vectors], Tensor]:
    """A loss whose gradient by each modality's vectors is what the test wants it to be."""
    return lambda vectors: sum(((pulls[name] * x).sum() for name, x in vectors.items()), start=torch.zeros(()).double())


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def measure(model: nn.Module, inputs: Vectors, pulls: Vectors) -> GradientProducts:
    passes = {name: (lambda x=x: model(x)) for name, x in inputs.items()}
    return gradient_products(model, passes, pulled(pulls))


def test_minus_one_zero_and_one() -> None:
    """Equal inputs: the left layer is pulled the same way twice, the right one to opposite ways, twice as hard."""
    model = adapted(TwoLayers())
    x = rows([1.0, 2.0, -1.0])
    pulls = {"image": rows([1.0, 3.0, 2.0, 6.0]), "text": rows([1.0, 3.0, -2.0, -6.0])}
    found = measure(model, {"image": x, "text": x}, pulls)
    assert [name.rpartition(".")[2] for name in found.layers] == ["left", "right"]
    by_layer = list(found.cosine_by_layer("image", "text").values())
    assert by_layer == pytest.approx([1, -1], abs=1e-12)
    squares = {name: found.norms(rf".*\.{name}") for name in ("left", "right")}
    left, right = squares["left"]["image"] ** 2, squares["right"]["image"] ** 2
    assert left == pytest.approx(squares["left"]["text"] ** 2)
    together = found.cosine()
    assert together[0, 1].item() == pytest.approx((left - right) / (left + right), abs=1e-12)
    torch.testing.assert_close(together, together.T)
    torch.testing.assert_close(together.diagonal(), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(found.overlap(), torch.ones(2, 2, dtype=torch.float64))
    # B's gradient is the outer product of the pull and A x: pulls at a right angle give B gradients at a right angle
    across = measure(model, {"image": x, "text": x}, {"image": rows([1.0, 3.0, 1.0, 0.0]), "text": rows([3.0, -1.0, 1.0, 0.0])})
    assert across.cosine(r".*\.left", "B")[0, 1].item() == pytest.approx(0, abs=1e-12)
    assert abs(across.cosine(r".*\.left", "A")[0, 1].item()) == pytest.approx(1)  # one row along x, whatever the pull
    assert across.cosine(r".*\.right")[0, 1].item() == pytest.approx(1)


def test_products_are_those_of_the_formula() -> None:
    """``dL/dB = s c (A x)^T`` and ``dL/dA = s B^T c x^T`` with the scale ``s = alpha / r``."""
    model = adapted(TwoLayers(), r=2, lora_alpha=6.0)
    inputs = {"image": rows([1.0, 2.0, -1.0], [0.5, 0.0, 1.0]), "text": rows([0.0, 1.0, 1.0], [2.0, -1.0, 0.0])}
    pulls = {"image": rows([1.0, 3.0, 0, 0], [0, 1, 0, 0]), "text": rows([0.5, -1.0, 0, 0], [1, 1, 0, 0])}
    found = measure(model, inputs, pulls)
    left = model.base_model.model.left
    a, b = left.moda_A["default"].detach(), left.moda_B["default"].detach()
    of_a, of_b = {}, {}
    for name, x in inputs.items():
        c = pulls[name][:, :2]
        of_b[name], of_a[name] = 3.0 * c.T @ (x @ a.T), 3.0 * b.T @ c.T @ x
    for m, one in enumerate(inputs):
        for n, two in enumerate(inputs):
            assert found.products[0, 0, m, n].item() == pytest.approx((of_a[one] * of_a[two]).sum().item(), rel=1e-12)
            assert found.products[0, 1, m, n].item() == pytest.approx((of_b[one] * of_b[two]).sum().item(), rel=1e-12)
    assert not found.products[1].any()  # nothing pulls at the right layer
    assert found.cosine(r".*\.right").isnan().all()
    assert found.overlap(r".*\.right").isnan().all()


def test_disjoint_experts_are_exactly_orthogonal() -> None:
    x = {"image": torch.randn(3, 4, dtype=torch.float64), "text": torch.randn(3, 4, dtype=torch.float64)}
    for gate, disjoint in (("onehot", True), ("modality", False), ("uniform", False)):
        model = adapted(Deep(), r=4, num_experts=4, gate=gate)
        found = gradient_products(model, {name: (lambda v=v, m=model: m(v)) for name, v in x.items()}, align)
        assert (found.cosine()[0, 1].item() == 0) == disjoint, gate
        assert found.overlap()[0, 1].item() == (0 if disjoint else 1), gate
        assert min(found.norms().values()) > 0


def align(vectors: Vectors) -> Tensor:
    return cmsa(vectors["image"], vectors["text"], 0.3)


def test_a_new_adapter_pulls_at_b_alone() -> None:
    model = adapted(Deep())
    for name, parameter in model.named_parameters():
        if "moda_B" in name:
            nn.init.zeros_(parameter)
    x = torch.randn(3, 4, dtype=torch.float64)
    found = gradient_products(model, {"image": lambda: model(x), "text": lambda: model(2 * x + 1)}, align)
    assert found.cosine(matrices="A").isnan().all()
    assert found.cosine(matrices="B").isfinite().all()
    torch.testing.assert_close(found.cosine(), found.cosine(matrices="B"))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("names", [("image", "text"), ("image", "text", "sound")], ids=["two", "three"])
def test_the_gradients_add_up_to_that_of_training(names: tuple[str, ...], checkpointed: bool) -> None:
    """The squared length of the sum is the sum of all products; the whole gradient is that of one backward call."""
    base = Deep()
    model = adapted(base, r=4, num_experts=2, modalities=list(names)).eval()
    base.checkpointed = checkpointed
    inputs = {name: torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for name in names}

    def passes(name: str) -> Callable[[], Tensor]:
        return lambda: model(inputs[name])

    def loss(vectors: Vectors) -> Tensor:
        return cmsa_many(vectors, 0.3, detach_teacher=False)

    found = gradient_products(model, {name: passes(name) for name in names}, loss)
    vectors = {}
    for name in names:
        with modality(model, name):
            vectors[name] = model(inputs[name])
    loss(vectors).backward()
    matrices = [p.grad for name, p in model.named_parameters() if "moda_A" in name or "moda_B" in name]
    square = sum(float((grad**2).sum()) for grad in matrices if grad is not None)
    assert len(matrices) == 4
    assert found.products.sum().item() == pytest.approx(square, rel=1e-9)
    assert found.cosine().shape == (len(names), len(names))
    assert found.modalities == names
    assert len({round(value, 9) for value in found.cosine()[0].tolist()}) == len(names)  # a matrix of all pairs


def test_the_model_is_left_as_it_was() -> None:
    model = adapted(Deep(), num_experts=2, r=2)
    model.train()
    model.base_model.model.second.eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    with modality(model, "image"):
        model(x).sum().backward()
    model.base_model.model.first.moda_A["default"].requires_grad_(False)
    before = {
        name: (p.detach().clone(), p.requires_grad, p.grad if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    }
    modes = {name: module.training for name, module in model.named_modules()}
    random_state = torch.get_rng_state()

    def run() -> None:
        gradient_products(model, {"image": lambda: model(x), "text": lambda: model(x + 1)}, align)

    def check() -> None:
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert torch.equal(torch.get_rng_state(), random_state)  # no dropout was drawn
        for name, p in model.named_parameters():
            value, requires_grad, gradient = before[name]
            assert torch.equal(p, value)
            assert p.requires_grad == requires_grad
            assert (p.grad is None) if gradient is None else torch.equal(p.grad, gradient), name  # type: ignore[arg-type]

    run()
    check()

    def broken() -> Tensor:
        raise RuntimeError("no such image")

    with pytest.raises(RuntimeError, match="no such image"):
        gradient_products(model, {"image": lambda: model(x), "text": broken}, align)
    check()


def test_a_frozen_adapter_is_measured_all_the_same() -> None:
    model = adapted(Deep(), num_experts=2, r=2)
    x = torch.randn(3, 4, dtype=torch.float64)
    passes = {"image": lambda: model(x), "text": lambda: model(x + 1)}
    found = gradient_products(model, passes, align)
    frozen = gradient_products(model.requires_grad_(False), passes, align)
    torch.testing.assert_close(frozen.products, found.products)
    assert not any(p.requires_grad for p in model.parameters())


def test_mistakes_are_named() -> None:
    model = adapted(Deep(), num_experts=2, r=2)
    x = torch.randn(3, 4, dtype=torch.float64)
    passes = {"image": lambda: model(x), "text": lambda: model(x + 1)}
    with pytest.raises(TrainingError, match=r"should compare at least two modalities \(got image\)"):
        gradient_products(model, {"image": passes["image"]}, align)
    with pytest.raises(TrainingError, match="has no MoDA adapter 'other'"):
        gradient_products(model, passes, align, adapter_name="other")
    with pytest.raises(TrainingError, match="should be one of image, text"):
        gradient_products(model, {"image": passes["image"], "smell": passes["text"]}, align)
    with pytest.raises(TrainingError, match="is not finite"):
        gradient_products(model, passes, lambda vectors: align(vectors) * torch.nan)
    with pytest.raises(TrainingError, match=r"'nothing' matches none of 2 layers"):
        gradient_products(model, passes, align).cosine("nothing")
    with merged_modality(model, "image"), pytest.raises(TrainingError, match="has no MoDA adapter"):
        gradient_products(model, passes, align)
    with modality(model, "image"):
        model.merge_adapter()
    with pytest.raises(TrainingError, match=r"merged into .*first; call unmerge_modality"):
        gradient_products(model, passes, align)
