"""The modality of a pass: blocks, nesting, and gradient checkpointing."""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sda_core.adapters import MoDAConfig, MoDALinear, checkpoint_contexts, modality
from sda_core.adapters.moda.modality import Modality
from sda_core.errors import TrainingError
from tests.tolerances import assert_equal_up_to_rounding

Make = Callable[..., peft.PeftModel]
Gradients = Callable[[nn.Module], dict[str, Tensor]]


def joint_loss(model: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """Both modalities pass through the same layers before one backward: what recomputation has to keep apart."""
    with modality(model, "image"):
        image = model(x)
    with modality(model, "text"):
        text = model(z)
    return (image * text).sum() + image.square().sum() - text.sum()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(3, 6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))  # type: ignore[return-value]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert all(value.abs().max() > 0 for value in expected.values())


# ---------------------------------------------------------------------------------------- checkpointing
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("backward_in", [None, "image", "text"])
def test_checkpointing_leaves_gradients_as_they_are(
    make_stack: Make, gradients: Gradients, backward_in: str | None, dropout: float
) -> None:
    model = make_stack(lora_dropout=dropout)
    x, z = inputs()
    torch.manual_seed(1)
    joint_loss(model, x, z).backward()
    expected = gradients(model)
    model.base_model.model.use_reentrant = False
    torch.manual_seed(1)
    value = joint_loss(model, x, z)
    with modality(model, backward_in) if backward_in else nullcontext():
        value.backward()  # whatever is open now says nothing about the passes
    assert_same(gradients(model), expected)
    with pytest.raises(TrainingError, match="none is set"):
        model(x)  # and nothing stays behind


def test_backward_in_another_thread(make_stack: Make, gradients: Gradients) -> None:
    """As on a GPU, whose part of backward runs in a thread of its own."""
    model = make_stack()
    x, z = inputs()
    joint_loss(model, x, z).backward()
    expected = gradients(model)
    model.base_model.model.use_reentrant = False
    value = joint_loss(model, x, z)
    thread = threading.Thread(target=value.backward)
    with modality(model, "text"):
        thread.start()
        thread.join()
    assert_same(gradients(model), expected)


def test_checkpointing_of_rows_with_their_own_modality(make_stack: Make, gradients: Gradients) -> None:
    model = make_stack()
    x, z = inputs()
    found = []
    for use_reentrant in (None, False):
        model.base_model.model.use_reentrant = use_reentrant
        with modality(model, torch.tensor([0, 1, 0])):
            first = model(x)
        with modality(model, torch.tensor([1, 1, 0])):
            second = model(z)
        (first * second).sum().backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])


def test_blocks_inside_a_checkpointed_function(make_stack: Make, gradients: Gradients) -> None:
    model = make_stack()
    x, z = inputs()
    joint_loss(model, x, z).backward()
    expected = gradients(model)
    checkpoint(joint_loss, model, x, z, use_reentrant=False).backward()
    assert_same(gradients(model), expected)


def test_nested_checkpoints(make_stack: Make, gradients: Gradients) -> None:
    model = make_stack()
    x, z = inputs()
    joint_loss(model, x, z).backward()
    expected = gradients(model)
    model.base_model.model.use_reentrant = False
    outer = lambda v: checkpoint(model, v, use_reentrant=False, context_fn=checkpoint_contexts)  # noqa: E731
    with modality(model, "image"):
        image = outer(x)
    with modality(model, "text"):
        text = outer(z)
    ((image * text).sum() + image.square().sum() - text.sum()).backward()
    assert_same(gradients(model), expected)


def test_two_models_in_one_graph(make_stack: Make, gradients: Gradients) -> None:
    first, second = make_stack(seed=1), make_stack(seed=2)
    found = []
    for use_reentrant in (None, False):
        for model in (first, second):
            model.base_model.model.use_reentrant = use_reentrant
        x, z = inputs()
        with modality(first, "image"), modality(second, "text"):
            value = (first(x) * second(z)).sum()
        with modality(first, "text"):
            value = value + first(x).sum()
        value.backward()
        found.append((gradients(first), gradients(second)))
    assert_same(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])


def test_a_recomputation_with_the_wrong_modality_raises(make_stack: Make) -> None:
    model = make_stack()
    x, _ = inputs()
    wrong = lambda: (nullcontext(), modality(model, "text"))  # noqa: E731
    with modality(model, "image"):
        y = checkpoint(model, x, use_reentrant=False, context_fn=wrong)
    with pytest.raises(TrainingError, match="another modality than it first ran with"):
        y.sum().backward()


def test_a_checkpoint_that_saves_no_input_raises(make_stack: Make) -> None:
    """Nothing is unpacked before the recomputation, so nothing says which modality it is in."""
    model = make_stack()
    x, _ = inputs()
    with modality(model, "image"):
        y = checkpoint(lambda: model(x), use_reentrant=False)
    with pytest.raises(TrainingError, match=r"none is set|another modality"):
        y.sum().backward()


def test_hooks_around_a_block_stay_in_force(make_stack: Make, gradients: Gradients) -> None:
    model = make_stack()
    x, z = inputs()
    joint_loss(model, x, z).backward()
    expected = gradients(model)
    for use_reentrant in (None, False):
        model.base_model.model.use_reentrant = use_reentrant
        packed: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, packed=packed: (packed.append(1), t)[1], lambda t: t):
            value = joint_loss(model, x, z)
        assert len(packed) > 3
        value.backward()
        assert_same(gradients(model), expected)


def test_a_block_inside_a_checkpoint_saves_nothing_more(make_stack: Make) -> None:
    """The checkpoint still sees, and drops, what the block's pass saves."""
    model = make_stack()
    x, _ = inputs()

    def run(v: Tensor) -> Tensor:
        with modality(model, "image"):
            return model(v)

    alive: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (alive.append(t.numel()), t)[1], lambda t: t):
        checkpoint(run, x, use_reentrant=False)
    assert alive == [x.numel()]


def test_the_right_modality_by_the_checkpoints_own_contexts(make_stack: Make, gradients: Gradients) -> None:
    model = make_stack()
    x, _ = inputs()
    with modality(model, "image"):
        model(x).square().sum().backward()
    expected = gradients(model)
    contexts = lambda: (modality(model, "image"), modality(model, "image"))  # noqa: E731
    checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    assert_same(gradients(model), expected)


def test_checkpoints_whose_inputs_are_packed_by_someone_else(make_stack: Make, gradients: Gradients) -> None:
    """Right, or an error: with inputs moved to the CPU by an inner hook, ours does not see them."""
    model = make_stack()
    x, z = inputs()
    joint_loss(model, x, z).backward()
    expected = gradients(model)
    model.base_model.model.use_reentrant = False
    with modality(model, "image"), torch.autograd.graph.save_on_cpu():
        image = model(x)
    with modality(model, "text"), torch.autograd.graph.save_on_cpu():
        text = model(z)
    value = (image * text).sum() + image.square().sum() - text.sum()
    try:
        value.backward()
    except TrainingError:
        return
    assert_same(gradients(model), expected)


def test_in_place_changes_of_saved_tensors_are_still_noticed(make_stack: Make) -> None:
    model = make_stack()
    x, _ = inputs()
    with modality(model, "image"):
        hidden = model(x) * 1.0
        y = hidden.square()
    hidden.data.add_(0)  # bypasses the version counter, as everywhere in torch
    with torch.no_grad():
        hidden.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives(make_stack: Make) -> None:
    model = make_stack(depth=1)
    parameter = model.base_model.model.blocks[0].up.moda_gate["default"]

    def value(gate: Tensor, x: Tensor) -> Tensor:
        with modality(model, "text"):
            return torch.func.functional_call(model, {"base_model.model.blocks.0.up.moda_gate.default": gate}, (x,)).sum(-1)

    arguments = (parameter.detach().clone().requires_grad_(), inputs()[0])
    assert torch.autograd.gradcheck(value, arguments)
    assert torch.autograd.gradgradcheck(value, arguments)


def adapted_vl(tiny_vl: Callable[[], nn.Module], **config: Any) -> peft.PeftModel:
    pattern = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 uses a name that transformers 5.23 renamed
        return peft.get_peft_model(tiny_vl(), MoDAConfig(target_modules=pattern, lora_dropout=0.0, **config)).train()


@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, None], ids=["non-reentrant", "default"])
@pytest.mark.parametrize("switch", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_of_a_real_vision_language_model(
    tiny_vl: Callable[[], nn.Module], gradients: Gradients, switch: str, kwargs: dict[str, bool] | None
) -> None:
    """A Qwen2.5-VL of the real architecture, with the switch that its users turn."""
    model = adapted_vl(tiny_vl)
    for name, parameter in model.named_parameters():
        if "moda_" in name:
            nn.init.normal_(parameter, std=0.2)
    grid = torch.tensor([[1, 4, 4]] * 2)
    image_ids = torch.tensor([[5, 91, 90, 90, 90, 90, 92, 7]] * 2)
    pixels = torch.randn(32, 3 * 2 * 4 * 4)
    text_ids = torch.randint(0, 80, (2, 7))

    def step() -> tuple[float, dict[str, Tensor]]:
        def encode(**arguments: Any) -> Tensor:
            return model.get_base_model().model(use_cache=False, **arguments).last_hidden_state.mean(1)

        with modality(model, "image"):
            image_types = (image_ids == 90).int()
            image = encode(input_ids=image_ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=image_types)
        with modality(model, "text"):
            words = encode(input_ids=text_ids)
        value = ((image @ words.T).log_softmax(-1)).diagonal().sum()
        value.backward()
        return value.item(), gradients(model)

    value, expected = step()
    assert len(expected) == 3 * 7 * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 renamed the switch; users turn either
        getattr(model, f"{switch}_enable")(**({f"{switch}_kwargs": kwargs} if kwargs else {}))
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    again, got = step()
    assert again == pytest.approx(value, rel=1e-6)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_the_reentrant_kind_is_rejected(tiny_vl: Callable[[], nn.Module]) -> None:
    """Where it is switched on; an adapter without a gate has no need to know its modality."""
    with pytest.raises(TrainingError, match=r"does not support re-entrant checkpointing; pass {'use_reentrant': False}"):
        adapted_vl(tiny_vl).activation_checkpointing_enable({"use_reentrant": True})
    model = adapted_vl(tiny_vl, gate="uniform")
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()  # the re-entrant kind gives no gradient to a frozen base otherwise
    model.get_base_model().model(input_ids=torch.arange(6)[None], use_cache=False).last_hidden_state.sum().backward()


@pytest.mark.parametrize("backward_in", [None, "image", "text"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpoint_that_does_not_keep_the_modality_raises(
    make_stack: Make, use_reentrant: bool, backward_in: str | None
) -> None:
    """Whatever is open around `backward` may be of another pass."""
    model = make_stack()
    with modality(model, "image"):
        y = checkpoint(model, inputs()[0], use_reentrant=use_reentrant)
    raised = pytest.raises(TrainingError, match="none is set; this is a region under gradient checkpointing: call gradient")
    with modality(model, backward_in) if backward_in else nullcontext(), raised:
        y.sum().backward()


def test_two_backwards_through_one_checkpoint(make_stack: Make, gradients: Gradients) -> None:
    model = make_stack()
    found = []
    for use_reentrant in (None, False):
        model.base_model.model.use_reentrant = use_reentrant
        value = joint_loss(model, *inputs())
        value.backward(retain_graph=True)
        value.backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])


# -------------------------------------------------------------------------------------------------- blocks
def test_the_innermost_block_counts_and_ends_on_errors(make_stack: Make) -> None:
    model = make_stack()
    x, _ = inputs()
    with modality(model, "text"):
        text = model(x)
    with modality(model, "image"):
        image = model(x)
        with modality(model, "text"):
            assert torch.equal(model(x), text)
        with pytest.raises(ZeroDivisionError), modality(model, "text"):
            raise ZeroDivisionError
        assert torch.equal(model(x), image)
    assert not torch.allclose(image, text)
    with pytest.raises(TrainingError, match="none is set"):
        model(x)


def test_a_block_can_be_kept_and_used_again(make_stack: Make) -> None:
    model = make_stack()
    x, _ = inputs()
    block = modality(model, "image")
    with block:
        first = model(x)
        with block:
            assert torch.equal(model(x), first)
    with block:
        assert torch.equal(model(x), first)


def test_a_part_of_a_model_will_do(make_stack: Make) -> None:
    model = make_stack()
    x, _ = inputs()
    with modality(model, "image"):
        expected = model(x)
    with modality(model.base_model.model.blocks[0], "image"):
        assert_equal_up_to_rounding(model(x), expected)


def test_a_copy_of_a_model_is_another_model(make_stack: Make) -> None:
    model = make_stack()
    other = copy.deepcopy(model)
    x, _ = inputs()
    with modality(model, "image"):
        image = model(x)
    with modality(model, "image"), modality(other, "text"):
        assert torch.equal(model(x), image)
        assert not torch.allclose(other(x), image)
    with modality(model, "image"), pytest.raises(TrainingError, match="none is set"):
        other(x)


def test_another_thread_is_another_pass(make_stack: Make) -> None:
    model = make_stack()
    x, _ = inputs()
    seen: list[BaseException] = []

    def run() -> None:
        try:
            model(x)
        except TrainingError as error:
            seen.append(error)

    with modality(model, "image"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_inference_needs_no_graph(make_stack: Make) -> None:
    model = make_stack().eval()
    x, _ = inputs()
    with modality(model, "image"):
        expected = model(x)
        with torch.no_grad():
            assert_equal_up_to_rounding(model(x), expected)
        with torch.inference_mode():
            assert_equal_up_to_rounding(model(x).clone(), expected)


@pytest.mark.parametrize("options", [{"gate": "uniform"}, {"num_experts": 1}, {"num_experts": 1, "gate": "uniform"}])
def test_where_all_modalities_are_alike_none_is_needed(make_stack: Make, options: dict[str, Any]) -> None:
    model = make_stack(**options)
    x, _ = inputs()
    plain = model(x)
    with modality(model, "text"):
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("audio", r"should be one of image, text \(got 'audio'\)"),
        (torch.tensor([0, 2, 1]), r"ids should be from 0 to 1 \(image, text; got 0 to 2\)"),
        (torch.tensor([-1, 0, 1]), "got -1 to 1"),
        (torch.tensor([0.0, 1.0]), "vector or matrix of integer ids"),
        (torch.tensor([[[0], [1]]]), r"got shape \(1, 2, 1\)"),
        (torch.tensor(1), r"got shape \(\)"),
        (torch.tensor([[0, 1], [5, 0]]), r"ids should be from 0 to 1 \(image, text; got 0 to 5\)"),
        ([[0, 1], [1]], "ids in a vector or a matrix"),
    ],
)
def test_wrong_modalities(make_stack: Make, value: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        modality(make_stack(), value)


def test_wrong_number_of_rows(make_stack: Make) -> None:
    model = make_stack()
    with modality(model, [0, 1]), pytest.raises(TrainingError, match="2 ids for an input of 3 rows"):
        model(inputs()[0])


@pytest.mark.parametrize("shape", [(3, 5), (3,), (2, 4), (12,)])
def test_ids_that_do_not_fit_the_input(make_stack: Make, shape: tuple[int, ...]) -> None:
    """Nothing is broadcast or flattened: ids that fit by accident would be wrong without a word."""
    model = make_stack()
    x = torch.randn(*shape, 6, dtype=torch.float64)
    message = rf"ids of shape \(3, 4\) for an input of shape {re.escape(str(shape))}; give one id for each token"
    with modality(model, torch.ones(3, 4, dtype=torch.long)), pytest.raises(TrainingError, match=message):
        model(x)


def test_checkpointing_of_tokens_with_their_own_modality(make_stack: Make, gradients: Gradients) -> None:
    model = make_stack()
    generator = torch.Generator().manual_seed(5)
    x, z = (torch.randn(2, 3, 6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    found = []
    for kind in (None, False):
        model.base_model.model.use_reentrant = kind
        with modality(model, torch.tensor([[0, 1, 1], [0, 0, 1]])):
            first = model(x)
        with modality(model, torch.tensor([[1, 1, 0], [0, 1, 1]])):
            second = model(z)
        with modality(model, "text"):  # says nothing about the passes
            (first * second).sum().backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])


def test_a_recomputation_with_other_ids_raises(make_stack: Make) -> None:
    model = make_stack()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    wrong = lambda: (nullcontext(), modality(model, [[0, 1, 1], [0, 1, 1]]))  # noqa: E731
    with modality(model, [[0, 1, 1], [0, 0, 1]]):
        y = checkpoint(model, x, use_reentrant=False, context_fn=wrong)
    with pytest.raises(TrainingError, match="another modality than it first ran with"):
        y.sum().backward()


def test_markers_tell_ids_apart() -> None:
    values = ["image", "text", [0, 1], [1, 0], [0, 1, 0], [[0, 1]], [[0], [1]], [[1, 0]]]
    assert len({int(Modality.of(value).marker) for value in values}) == len(values)
    assert int(Modality.of(torch.tensor([[0, 1]], dtype=torch.int32)).marker) == int(Modality.of([[0, 1]]).marker)
    assert int(Modality.of(torch.tensor([[0, 9], [1, 9]])[:, 0]).marker) == int(Modality.of([0, 1]).marker)


def test_ids_are_what_they_were_when_the_block_was_made(make_stack: Make) -> None:
    model = make_stack()
    x, _ = inputs()
    ids = torch.tensor([0, 1, 0])
    with torch.inference_mode():
        block = modality(model, ids)
        with block:
            expected = model(x).clone()
    ids.fill_(1)
    with block:  # a block made for inference serves training
        y = model(x)
    assert_equal_up_to_rounding(y, expected)
    y.sum().backward()


def test_a_model_without_adapter() -> None:
    with pytest.raises(TrainingError, match="Linear has no MoDA layer"):
        modality(nn.Linear(2, 2), "image")


def test_the_message_without_modality_says_what_to_do(make_stack: Make) -> None:
    with pytest.raises(TrainingError, match=r"put the pass into `with modality\(model, 'image'\)`"):
        make_stack()(inputs()[0])
    assert isinstance(make_stack().base_model.model.blocks[0].up, MoDALinear)
