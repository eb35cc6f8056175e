"""CMSA against an independent NumPy computation (values and finite-difference gradients) and its limits."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from sda_core.errors import TrainingError
from sda_core.losses import cmsa, cmsa_many, cmsa_reference, infonce
from sda_core.losses.cmsa import agreement, log_teacher, pool_width
from sda_core.params import Teacher

Array = NDArray[np.float64]
TEACHERS = get_args(Teacher)


def softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def kl(p: Array, q: Array) -> Array:
    return (p * np.log(p / q)).sum(axis=1)


def numpy_teacher(image: Array, text: Array, teacher: str, temperature: float) -> tuple[Array, Array]:
    """The teacher's rows and their weights."""
    v, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    own = {"image": v @ v.T, "text": t @ t.T}
    structure = own[teacher] if teacher in own else (own["image"] + own["text"]) / 2
    weight = np.ones(len(v))
    if teacher == "agreement":
        p, q = softmax(own["image"] / temperature), softmax(own["text"] / temperature)
        weight = 1 - (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2 / np.log(2)
    return softmax(structure / temperature), weight / weight.sum()


def numpy_cmsa(image: Array, text: Array, temperature: float, teacher: tuple[Array, Array]) -> float:
    v, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    p, weight = teacher
    rows = (kl(p, softmax(v @ t.T / temperature)) + kl(p, softmax(t @ v.T / temperature))) / 2
    return float((weight * rows).sum())


def pair(num_rows: int = 6, seed: int = 0, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_rows, width, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))  # type: ignore[return-value]


def finite_differences(function: Any, image: Array, text: Array, step: float = 1e-6) -> tuple[Array, Array]:
    found = []
    for which in (0, 1):
        gradient = np.zeros_like(image)
        for index in np.ndindex(*image.shape):
            values = []
            for sign in (1, -1):
                moved = [image.copy(), text.copy()]
                moved[which][index] += sign * step
                values.append(function(*moved))
            gradient[index] = (values[0] - values[1]) / (2 * step)
        found.append(gradient)
    return found[0], found[1]


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("teacher_temperature", [None, 0.5])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_value_and_gradient_are_those_of_numpy(teacher: Any, teacher_temperature: float | None, detach: bool) -> None:
    image, text = pair()
    value = cmsa(image, text, 0.2, teacher=teacher, teacher_temperature=teacher_temperature, detach_teacher=detach)
    x, y = image.detach().numpy(), text.detach().numpy()
    of = teacher_temperature or 0.2
    fixed = numpy_teacher(x, y, teacher, of)
    assert value.item() == pytest.approx(numpy_cmsa(x, y, 0.2, fixed), abs=1e-10)

    def attached(a: Array, b: Array) -> float:
        rows, _ = numpy_teacher(a, b, teacher, of)
        return numpy_cmsa(a, b, 0.2, (rows, fixed[1]))  # the weights carry no gradient either way

    expected = finite_differences((lambda a, b: numpy_cmsa(a, b, 0.2, fixed)) if detach else attached, x, y)
    value.backward()
    np.testing.assert_allclose(image.grad.numpy(), expected[0], rtol=0, atol=1e-6)  # type: ignore[union-attr]
    np.testing.assert_allclose(text.grad.numpy(), expected[1], rtol=0, atol=1e-6)  # type: ignore[union-attr]
    other = finite_differences(attached if detach else (lambda a, b: numpy_cmsa(a, b, 0.2, fixed)), x, y)
    assert max(np.abs(a - b).max() for a, b in zip(other, expected, strict=True)) > 1e-3  # detaching is not nothing


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_vectors_of_another_width_can_teach(teacher: Any, detach: bool) -> None:
    image, text = pair()
    others = pair(seed=7, width=9)
    value = cmsa(image, text, 0.2, teacher=teacher, teacher_temperature=0.5, detach_teacher=detach, taught_by=others)
    x, y = image.detach().numpy(), text.detach().numpy()
    fixed = numpy_teacher(*(other.detach().numpy() for other in others), teacher, 0.5)
    assert value.item() == pytest.approx(numpy_cmsa(x, y, 0.2, fixed), abs=1e-10)
    value.backward()
    expected = finite_differences(lambda a, b: numpy_cmsa(a, b, 0.2, fixed), x, y)
    np.testing.assert_allclose(image.grad.numpy(), expected[0], rtol=0, atol=1e-6)  # type: ignore[union-attr]
    np.testing.assert_allclose(text.grad.numpy(), expected[1], rtol=0, atol=1e-6)  # type: ignore[union-attr]
    looked_at = {"image": [True, False], "text": [False, True]}.get(teacher, [True, True])
    assert [other.grad is not None and bool(other.grad.any()) for other in others] == [not detach and one for one in looked_at]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_taught_by_themselves_is_the_default(teacher: Any) -> None:
    image, text = pair()
    itself = cmsa(image, text, 0.2, teacher=teacher, taught_by=(image.detach(), text.detach()))
    assert torch.equal(itself, cmsa(image, text, 0.2, teacher=teacher))


def test_three_modalities_are_taught_by_others() -> None:
    vectors = dict(zip("abc", [*pair(), pair(seed=5)[0]], strict=True))
    others = dict(zip("abc", [*pair(seed=7), pair(seed=8)[0]], strict=True))
    value = cmsa_many(vectors, 0.2, teacher_scope="pair", taught_by=others)
    pairs = [cmsa(vectors[a], vectors[b], 0.2, taught_by=(others[a], others[b])) for a, b in ("ab", "ac", "bc")]
    torch.testing.assert_close(value, torch.stack(pairs).mean())
    assert abs(value.item() - cmsa_many(vectors, 0.2, teacher_scope="pair").item()) > 1e-3


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_certain_teacher_is_infonce(teacher: Any) -> None:
    image, text = pair(seed=3)
    value = cmsa(image, text, 0.1, teacher=teacher, teacher_temperature=1e-4)
    weights_are_equal = teacher == "agreement"  # both modalities are certain of the same row, so all rows weigh 1
    assert value.item() == pytest.approx(infonce(image, text, 0.1).item(), abs=1e-9), weights_are_equal
    expected = torch.autograd.grad(infonce(image, text, 0.1), [image, text])
    torch.testing.assert_close(torch.autograd.grad(value, [image, text]), expected, rtol=1e-8, atol=1e-10)
    v, t = F.normalize(image), F.normalize(text)
    target = torch.arange(len(v))
    direct = (F.cross_entropy(v @ t.T / 0.1, target) + F.cross_entropy(t @ v.T / 0.1, target)) / 2
    assert value.item() == pytest.approx(direct.item(), abs=1e-9)


def test_is_zero_where_the_modalities_are_one() -> None:
    image, _ = pair()
    assert cmsa(image, image.detach(), 0.3).item() == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    teacher=st.sampled_from(TEACHERS),
    num_rows=st.integers(2, 9),
    seed=st.integers(0, 10_000),
    scale=st.floats(0.01, 100),
    temperature=st.sampled_from([0.01, 0.05, 0.2, 1.0]),
)
def test_properties(teacher: Any, num_rows: int, seed: int, scale: float, temperature: float) -> None:
    image, text = pair(num_rows, seed)
    value = cmsa(image, text, temperature, teacher=teacher)
    assert value.item() >= -1e-12  # a divergence
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(cmsa(image[order], text[order], temperature, teacher=teacher), value, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(cmsa(image, text * scale, temperature, teacher=teacher), value, rtol=1e-7, atol=1e-9)
    swapped = {"image": "text", "text": "image"}.get(teacher, teacher)
    torch.testing.assert_close(cmsa(text, image, temperature, teacher=swapped), value, rtol=1e-8, atol=1e-10)  # type: ignore[arg-type]


def test_agreement_weighs_rows_by_what_the_modalities_share() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    similar = torch.tensor([[9.0, 9, 0, 0], [9, 9, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9]], dtype=torch.float64)
    torch.testing.assert_close(agreement([similar, similar], 0.1), torch.ones(4, dtype=torch.float64))
    weight = agreement([similar, 9 * eye], 0.1)
    torch.testing.assert_close(weight[2:], torch.ones(2, dtype=torch.float64))
    assert (weight[:2] < 0.75).all()
    disjoint = torch.tensor([[-9.0, 9.0], [9.0, -9.0]], dtype=torch.float64)
    torch.testing.assert_close(agreement([disjoint, -disjoint], 0.1), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_without_normalising_length_counts() -> None:
    image, text = pair()
    assert cmsa(image, text, 0.5, normalize=False).item() != pytest.approx(
        cmsa(2 * image, text, 0.5, normalize=False).item(), abs=1e-3
    )


def test_a_learned_temperature_learns_from_the_student_alone() -> None:
    image, text = pair()
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    (learned,) = torch.autograd.grad(cmsa(image, text, temperature), temperature)
    (fixed_teacher,) = torch.autograd.grad(cmsa(image, text, temperature, teacher_temperature=0.2), temperature)
    torch.testing.assert_close(learned, fixed_teacher)
    assert learned.item() != 0


# ----------------------------------------------------------------------------------- the public code's variant
def test_reference_is_the_public_codes_formula() -> None:
    image, text = pair(seed=4)
    v, t = image.detach().numpy(), text.detach().numpy()
    value = cmsa_reference(image, text, 3.0).item()
    logits = v @ t.T / 3.0
    targets = softmax((v @ v.T + t @ t.T) / 2 * 3.0)
    across = -(targets * np.log(softmax(logits))).sum(1)
    back = -(targets.T * np.log(softmax(logits.T))).sum(1)
    assert value == pytest.approx(float(((across + back) / 2).mean()), abs=1e-10)


def test_reference_detaches_nothing() -> None:
    image, text = pair(4, 4, 3)
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cmsa_reference, (image, text, temperature))

    def with_fixed_targets(a: Tensor, b: Tensor) -> Tensor:
        targets = torch.softmax((a @ a.T + b @ b.T) / 2 * 2.0, dim=-1).detach()
        logits = a @ b.T / 2.0
        across = -(targets * logits.log_softmax(-1)).sum(1)
        back = -(targets.T * logits.T.log_softmax(-1)).sum(1)
        return ((across + back) / 2).mean()

    torch.testing.assert_close(with_fixed_targets(image, text), cmsa_reference(image, text, 2.0))
    (detached,) = torch.autograd.grad(with_fixed_targets(image, text), image)
    (attached,) = torch.autograd.grad(cmsa_reference(image, text, 2.0), image)
    assert (detached - attached).abs().max() > 1e-3


def test_reference_pools_the_7b_width_as_the_public_code_does() -> None:
    x = torch.randn(2, 3584, dtype=torch.float64)
    expected = torch.cat([x[:, :1024].reshape(2, 256, 4).mean(2), x[:, 1024:].reshape(2, 512, 5).mean(2)], dim=1)
    torch.testing.assert_close(pool_width(x), expected)
    text = torch.randn(2, 3584, dtype=torch.float64)
    torch.testing.assert_close(cmsa_reference(x, text, 3.0), cmsa_reference(pool_width(x), pool_width(text), 3.0))


@pytest.mark.parametrize(("width", "pooled"), [(64, 64), (768, 768), (769, 768), (1536, 768), (2048, 768)])
def test_other_widths(width: int, pooled: int) -> None:
    x = torch.randn(3, width, dtype=torch.float64)
    assert pool_width(x).shape == (3, pooled)
    if width % pooled == 0:
        torch.testing.assert_close(pool_width(x), x.reshape(3, pooled, -1).mean(-1))
    torch.testing.assert_close(pool_width(torch.ones(1, width)), torch.ones(1, pooled))


def test_an_unknown_teacher_is_rejected() -> None:
    structures = {"image": torch.eye(3), "text": torch.eye(3)}
    with pytest.raises(TrainingError, match=r"teacher should be one of mean, agreement, none, image, text \(got 'median'\)"):
        log_teacher(structures, "median", 0.1)
