"""A penalty on changes of the structure within each modality by adaptation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sda_core.losses.infonce import prepare
from sda_core.losses.twins import NO_TWINS, Twins


def keep_structure(
    vectors: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    temperature: float | Tensor,
    normalize: bool = True,
    twins: Twins = NO_TWINS,
) -> Tensor:
    """Divergence of each modality's similarity structure from that of the backbone.

    With ``X_m`` the unit vectors of modality ``m``, ``X_m'`` those of the backbone without its adapter, and row-wise softmax over
    the *other* rows of the batch (a row's similarity to itself is always 1)::

        K = mean over m of KL( softmax(X_m' X_m'^T / temperature) || softmax(X_m X_m^T / temperature) )

    It is CMSA within one modality with the base as teacher, and 0 if nothing has changed.  The alignment across modalities
    strengthens information that both have; this term preserves information that only one of them has.

    Args:
        vectors: ``(B, D)`` by modality.
        base: ``(B, D')`` by modality, for the same items; without gradient.
        temperature: temperature of both softmaxes.
        normalize: scale the rows to unit length first.
        twins: policy for rows with equal content, see :func:`~sda_core.losses.twins.find_twins`.

    Returns:
        Scalar in nats, at least 0; 0 for a single row.
    """
    prepared = prepare(vectors, normalize)
    fixed = prepare({name: base[name].detach() for name in prepared}, normalize)
    sharpness = temperature.detach() if isinstance(temperature, Tensor) else temperature
    like_BD = next(iter(prepared.values()))
    own_BB = torch.eye(len(like_BD), dtype=torch.bool, device=like_BD.device)
    hidden_BB = own_BB if twins.hidden_BB is None else own_BB | twins.hidden_BB
    counts_B = ~hidden_BB.all(dim=-1)  # a row without other rows has no structure
    others = Twins(hidden_BB & counts_B[:, None], None)
    weight_B = counts_B.to(like_BD.dtype) / counts_B.sum().clamp_min(1)
    losses: list[Tensor] = []
    for name, x_BD in prepared.items():
        log_base_BB = others.log_softmax(fixed[name] @ fixed[name].T / sharpness)
        log_own_BB = others.log_softmax(x_BD @ x_BD.T / sharpness)
        losses.append((weight_B * others.divergence(log_base_BB, log_own_BB)).sum())
    return torch.stack(losses).mean()
