"""CMSA and InfoNCE against float64 NumPy written from the formulas alone: values by loops over rows, gradients by calculus.

Every teacher, every policy about false negatives, two and three modalities; nothing here calls the library but to compare.
"""

from __future__ import annotations

import itertools
import math
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
from sda_core.losses import cmsa, cmsa_many, infonce, infonce_many
from sda_core.params import Teacher

Array = NDArray[np.float64]
POLICIES = ["keep", "mask", "share"]
TEACHERS = get_args(Teacher)
GROUPS = [5, 2, 5, 7, 2, 5, 1]  # three of one content, two of another, two alone
NAMES = ["image", "text", "sound"]


def draw(num_modalities: int = 2, num_rows: int = 7, seed: int = 0, width: int = 4) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    common = random.normal(size=(num_rows, width))
    return {name: common + random.normal(size=(num_rows, width)) for name in NAMES[:num_modalities]}


def tensors(vectors: dict[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in vectors.items()}


def groups_tensor(groups: list[int]) -> Tensor:
    return torch.tensor(groups)


# ------------------------------------------------------------------------------------------- values, row by row
def dot(x: Array, y: Array, normalize: bool) -> float:
    product = sum(float(a) * float(b) for a, b in zip(x, y, strict=True))
    return product / math.sqrt(sum(float(a) ** 2 for a in x) * sum(float(b) ** 2 for b in y)) if normalize else product


def distribution(similarities: list[float], temperature: float, shown: list[int]) -> dict[int, float]:
    """Softmax over the columns that are shown."""
    top = max(similarities[j] for j in shown)
    parts = {j: math.exp((similarities[j] - top) / temperature) for j in shown}
    return {j: part / sum(parts.values()) for j, part in parts.items()}


def kl(p: dict[int, float], q: dict[int, float]) -> float:
    return sum(value * math.log(value / q[j]) for j, value in p.items() if value > 0)


def shown_columns(i: int, groups: list[int], policy: str) -> list[int]:
    return [j for j in range(len(groups)) if j == i or policy != "mask" or groups[j] != groups[i]]


def spread(p: dict[int, float], groups: list[int], policy: str) -> dict[int, float]:
    if policy != "share":
        return p
    members = {j: [k for k in p if groups[k] == groups[j]] for j in p}
    return {j: sum(p[k] for k in members[j]) / len(members[j]) for j in p}


def cmsa_by_loops(
    vectors: dict[str, Array],
    temperature: float,
    teacher: str = "mean",
    teacher_temperature: float | None = None,
    normalize: bool = True,
    scope: str = "all",
    groups: list[int] | None = None,
    policy: str = "keep",
) -> float:
    rows = len(next(iter(vectors.values())))
    groups = list(range(rows)) if groups is None else groups
    sharpness = temperature if teacher_temperature is None else teacher_temperature
    pair_losses = []
    for a, b in itertools.combinations(vectors, 2):
        looks_at = [teacher] if teacher in vectors else list(vectors) if scope == "all" else [a, b]
        total, total_weight = 0.0, 0.0
        for i in range(rows):
            shown = shown_columns(i, groups, policy)
            own = {m: [dot(vectors[m][i], vectors[m][j], normalize) for j in range(rows)] for m in looks_at}
            mean = [sum(own[m][j] for m in looks_at) / len(looks_at) for j in range(rows)]
            p = spread(distribution(mean, sharpness, shown), groups, policy)
            across = distribution([dot(vectors[a][i], vectors[b][j], normalize) for j in range(rows)], temperature, shown)
            back = distribution([dot(vectors[b][i], vectors[a][j], normalize) for j in range(rows)], temperature, shown)
            weight = 1.0
            if teacher == "agreement":
                each = [spread(distribution(own[m], sharpness, shown), groups, policy) for m in looks_at]
                middle = {j: sum(p_m[j] for p_m in each) / len(each) for j in shown}
                weight = 1 - sum(kl(p_m, middle) for p_m in each) / len(each) / math.log(len(each))
            total += weight * (kl(p, across) + kl(p, back)) / 2
            total_weight += weight
        pair_losses.append(total / total_weight)
    return sum(pair_losses) / len(pair_losses)


def infonce_by_loops(
    vectors: dict[str, Array], temperature: float, normalize: bool = True, groups: list[int] | None = None, policy: str = "keep"
) -> float:
    rows = len(next(iter(vectors.values())))
    groups = list(range(rows)) if groups is None else groups
    total, num = 0.0, 0
    for a, b in itertools.permutations(vectors, 2):
        for i in range(rows):
            q = distribution(
                [dot(vectors[a][i], vectors[b][j], normalize) for j in range(rows)], temperature, shown_columns(i, groups, policy)
            )
            target = spread({j: float(j == i) for j in q}, groups, policy)
            total, num = total + kl(target, q), num + 1
    return total / num


# ------------------------------------------------------------------------------------------- gradients, by calculus
def softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cmsa_gradient(
    vectors: dict[str, Array],
    temperature: float,
    teacher: str,
    sharpness: float,
    detach: bool,
    scope: str,
    groups: list[int],
    policy: str,
) -> dict[str, Array]:
    """For unit vectors ``u = x / |x|``, ``S = u u^T``:

    ``dL / d logits = w / 2 (Q - P)``; where the teacher is not detached
    ``dL / dP = w / 2 sum over directions of (log P - log Q)``, through the spreading and the softmax to the structure;
    ``dL / dx = (g - u (u . g)) / |x|`` with ``g = dL / du``.
    """
    g = np.array(groups)
    same = g[:, None] == g[None, :]
    hidden = same & ~np.eye(len(g), dtype=bool) if policy == "mask" else np.zeros_like(same)
    mixing = same / same.sum(axis=1, keepdims=True) if policy == "share" else np.eye(len(g))
    length = {m: np.linalg.norm(x, axis=1, keepdims=True) for m, x in vectors.items()}
    unit = {m: x / length[m] for m, x in vectors.items()}
    at_unit = {m: np.zeros_like(x) for m, x in vectors.items()}

    def rows(structure: Array) -> Array:
        return softmax(np.where(hidden, -np.inf, structure))

    pairs = list(itertools.combinations(vectors, 2))
    for a, b in pairs:
        looks_at = [teacher] if teacher in vectors else list(vectors) if scope == "all" else [a, b]
        raw = rows(sum(unit[m] @ unit[m].T for m in looks_at) / len(looks_at) / sharpness)
        p = raw @ mixing
        weight = np.ones(len(g))
        if teacher == "agreement":
            each = [rows(unit[m] @ unit[m].T / sharpness) @ mixing for m in looks_at]
            middle = sum(each) / len(each)
            with np.errstate(divide="ignore", invalid="ignore"):
                js = sum(np.nansum(q * np.log(q / middle), axis=1) for q in each) / len(each)
            weight = 1 - js / np.log(len(each))
        weight = (weight / weight.sum() / len(pairs))[:, None]
        at_p = np.zeros_like(p)
        for one, two in ((a, b), (b, a)):
            q = rows(unit[one] @ unit[two].T / temperature)
            at_logits = weight / 2 * (q - p)
            at_unit[one] += at_logits @ unit[two] / temperature
            at_unit[two] += at_logits.T @ unit[one] / temperature
            at_p += weight / 2 * np.where(hidden, 0, np.log(np.where(hidden, 1, p) / np.where(hidden, 1, q)))
        if not detach:
            at_raw = at_p @ mixing.T
            at_structure = raw * (at_raw - (raw * at_raw).sum(axis=1, keepdims=True)) / sharpness / len(looks_at)
            for m in looks_at:
                at_unit[m] += (at_structure + at_structure.T) @ unit[m]
    return {m: (at - unit[m] * (unit[m] * at).sum(axis=1, keepdims=True)) / length[m] for m, at in at_unit.items()}


# ------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("options", [{}, {"teacher_temperature": 0.4}, {"normalize": False}], ids=["plain", "sharpness", "raw"])
def test_cmsa_is_its_formula(teacher: Any, policy: Any, options: dict[str, Any]) -> None:
    vectors = draw()
    x = tensors(vectors)
    given_groups = groups_tensor(GROUPS)
    value = cmsa(x["image"], x["text"], 0.3, teacher, groups_B=given_groups, false_negatives=policy, **options)
    expected = cmsa_by_loops(vectors, 0.3, teacher, groups=GROUPS, policy=policy, **options)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    if policy != "keep":
        assert abs(value.item() - cmsa(x["image"], x["text"], 0.3, teacher, **options).item()) > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_gradient_of_cmsa_is_that_of_calculus(teacher: Any, detach: bool, policy: Any) -> None:
    vectors = draw(seed=1)
    x = tensors(vectors)
    value = cmsa(
        x["image"],
        x["text"],
        0.3,
        teacher,
        teacher_temperature=0.2,
        detach_teacher=detach,
        groups_B=groups_tensor(GROUPS),
        false_negatives=policy,
    )
    value.backward()
    expected = cmsa_gradient(vectors, 0.3, teacher, 0.2, detach, "all", GROUPS, policy)
    for name in vectors:
        np.testing.assert_allclose(x[name].grad.numpy(), expected[name], rtol=0, atol=1e-12)  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scope", ["all", "pair"])
@pytest.mark.parametrize("teacher", ["mean", "agreement", "sound"])
def test_three_modalities(teacher: str, scope: Any, policy: Any) -> None:
    vectors = draw(3)
    x = tensors(vectors)
    options: dict[str, Any] = {"groups_B": groups_tensor(GROUPS), "false_negatives": policy, "teacher_scope": scope}
    value = cmsa_many(x, 0.3, teacher, detach_teacher=False, **options)
    expected = cmsa_by_loops(vectors, 0.3, teacher, scope=scope, groups=GROUPS, policy=policy)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    value.backward()
    gradient = cmsa_gradient(vectors, 0.3, teacher, 0.3, False, scope, GROUPS, policy)
    for name in vectors:
        np.testing.assert_allclose(x[name].grad.numpy(), gradient[name], rtol=0, atol=1e-12)  # type: ignore[union-attr]


def test_a_pairs_own_teacher_differs_from_that_of_all() -> None:
    x = tensors(draw(3))
    pairs = [cmsa(x[a], x[b], 0.3) for a, b in itertools.combinations(NAMES, 2)]
    own = cmsa_many(x, 0.3, teacher_scope="pair")
    assert own.item() == pytest.approx(sum(pair.item() for pair in pairs) / 3, abs=1e-12)
    assert abs(own.item() - cmsa_many(x, 0.3).item()) > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_modalities", [2, 3])
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
def test_infonce_is_its_formula(num_modalities: int, normalize: bool, policy: Any) -> None:
    vectors = draw(num_modalities)
    x = tensors(vectors)
    value = infonce_many(x, 0.3, normalize, groups_B=groups_tensor(GROUPS), false_negatives=policy)
    assert value.item() == pytest.approx(infonce_by_loops(vectors, 0.3, normalize, GROUPS, policy), abs=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_gradient_of_infonce_is_that_of_cross_entropy(policy: Any) -> None:
    """Targets and logits by hand, the rest by torch's own cross-entropy."""
    x = tensors(draw(seed=2))
    value = infonce(x["image"], x["text"], 0.3, groups_B=groups_tensor(GROUPS), false_negatives=policy)
    g = np.array(GROUPS)
    same = torch.from_numpy(g[:, None] == g[None, :])
    logits = F.normalize(x["image"]) @ F.normalize(x["text"]).T / 0.3
    target = torch.eye(len(g), dtype=torch.float64)
    entropy = 0.0
    if policy == "mask":
        logits = logits.masked_fill(same & (target == 0), -1e4)
    if policy == "share":
        target = same.double() / same.sum(dim=1, keepdim=True)
        entropy = float(same.sum(dim=1).double().log().mean())
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert value.item() == pytest.approx(expected.item() - entropy, abs=1e-12)
    got = torch.autograd.grad(value, list(x.values()))
    torch.testing.assert_close(got, torch.autograd.grad(expected, list(x.values())), rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("loss", ["mean", "text", "infonce"])
def test_autograd_agrees_with_differences(loss: Any, policy: Any) -> None:
    """Also for the temperature; the teacher is not detached, since differences would see it move."""
    x = [torch.from_numpy(v[:4, :3].copy()).requires_grad_() for v in draw().values()]
    options: dict[str, Any] = {"groups_B": groups_tensor(GROUPS[:4]), "false_negatives": policy}

    def value(image: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
        if loss == "infonce":
            return infonce(image, text, temperature, **options)
        return cmsa(image, text, temperature, loss, 0.3, detach_teacher=False, **options)

    assert torch.autograd.gradcheck(value, (*x, torch.tensor(0.4, dtype=torch.float64, requires_grad=True)))


# --------------------------------------------------------------------------------------------------- relations
@settings(deadline=None, max_examples=25)
@given(
    teacher=st.sampled_from(TEACHERS),
    policy=st.sampled_from(["mask", "share"]),
    num_rows=st.integers(2, 8),
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.02, 0.2, 1.0]),
    detach=st.booleans(),
)
def test_with_all_groups_different_the_policies_are_one(
    teacher: Any, policy: Any, num_rows: int, seed: int, temperature: float, detach: bool
) -> None:
    x = tensors(draw(2, num_rows, seed))
    groups = torch.from_numpy(np.random.default_rng(seed).permutation(num_rows))
    plain = cmsa(x["image"], x["text"], temperature, teacher, detach_teacher=detach)
    other = cmsa(x["image"], x["text"], temperature, teacher, detach_teacher=detach, groups_B=groups, false_negatives=policy)
    torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, list(x.values())) for value in (plain, other)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        infonce(x["image"], x["text"], temperature, groups_B=groups, false_negatives=policy),
        infonce(x["image"], x["text"], temperature),
        rtol=1e-10,
        atol=1e-12,
    )


@settings(deadline=None, max_examples=25)
@given(
    teacher=st.sampled_from(TEACHERS),
    policy=st.sampled_from(POLICIES),
    groups=st.lists(st.integers(0, 3), min_size=2, max_size=8),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_any_grouping_gives_finite_gradients_and_a_divergence(
    teacher: Any, policy: Any, groups: list[int], seed: int, dtype: torch.dtype, temperature: float
) -> None:
    x = [torch.from_numpy(v).to(dtype).requires_grad_() for v in draw(2, len(groups), seed).values()]
    options: dict[str, Any] = {"groups_B": torch.tensor(groups), "false_negatives": policy}
    for value in (cmsa(*x, temperature, teacher, detach_teacher=False, **options), infonce(*x, temperature, **options)):
        assert value.item() >= -1e-5
        for gradient in torch.autograd.grad(value, x):
            assert gradient.isfinite().all()
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    moved = cmsa(x[0][order], x[1][order], temperature, teacher, groups_B=options["groups_B"][order], false_negatives=policy)
    whole = cmsa(*x, temperature, teacher, **options)
    torch.testing.assert_close(moved, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        cmsa(*x, temperature, teacher, groups_B=options["groups_B"] * 7 - 3, false_negatives=policy), whole
    )  # only equality of the numbers counts


def test_a_certain_teacher_is_infonce_under_every_policy() -> None:
    x = tensors(draw(seed=3))
    for policy in ("mask", "share"):
        options: dict[str, Any] = {"groups_B": groups_tensor(GROUPS), "false_negatives": policy}
        soft = cmsa(x["image"], x["text"], 0.2, teacher_temperature=1e-4, **options)
        assert soft.item() == pytest.approx(infonce(x["image"], x["text"], 0.2, **options).item(), abs=1e-9)


def test_identical_rows_do_not_push_each_other_away() -> None:
    """Two rows that nothing can tell apart: kept, they cost log 2 each and their gradient pulls them apart; else nothing."""
    image = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]
    groups = torch.tensor([8, 8, 1, 2])
    for policy, expected in (("keep", math.log(2) / 2), ("mask", 0.0), ("share", 0.0)):
        value = infonce(image, image.clone(), 0.01, groups_B=groups, false_negatives=policy)  # type: ignore[arg-type]
        assert value.item() == pytest.approx(expected, abs=1e-12), policy


def test_a_batch_of_one_group_has_nothing_to_align_against() -> None:
    x = tensors(draw())
    one = torch.zeros(7, dtype=torch.long)
    for loss in (cmsa, infonce):
        value = loss(x["image"], x["text"], 0.3, groups_B=one, false_negatives="mask")
        assert value.item() == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(value, list(x.values())))


def test_two_modalities_of_many_are_the_two_of_cmsa() -> None:
    x = tensors(draw())
    for teacher in TEACHERS:
        for scope in ("all", "pair"):
            many = cmsa_many(x, 0.05, teacher, teacher_scope=scope)  # type: ignore[arg-type]
            assert torch.equal(many, cmsa(x["image"], x["text"], 0.05, teacher))  # type: ignore[arg-type]
    assert torch.equal(infonce_many(x, 0.05), infonce(x["image"], x["text"], 0.05))


def test_mistakes_are_named() -> None:
    x = tensors(draw())
    with pytest.raises(TrainingError, match=r"false_negatives is 'mask', and the batch came without groups; pass groups_B"):
        cmsa(x["image"], x["text"], 0.3, false_negatives="mask")
    with pytest.raises(TrainingError, match=r"groups_B should be 7 integers, one per row \(got shape \(6,\), torch.int64\)"):
        infonce(x["image"], x["text"], 0.3, groups_B=torch.arange(6), false_negatives="share")
    with pytest.raises(TrainingError, match=r"one per row \(got shape \(7,\), torch.float32\)"):
        infonce(x["image"], x["text"], 0.3, groups_B=torch.ones(7), false_negatives="share")
    with pytest.raises(TrainingError, match=r"teacher should be one of mean, agreement, image, text \(got 'sound'\)"):
        cmsa_many(x, 0.3, "sound")
    with pytest.raises(TrainingError, match=r"should align at least two modalities \(got image\)"):
        cmsa_many({"image": x["image"]}, 0.3)
