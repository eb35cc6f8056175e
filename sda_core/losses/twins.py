"""False negatives in a contrastive batch: rows with equal content, kept, masked, or given equal shares of the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

from sda_core.errors import TrainingError

FalseNegatives = Literal["keep", "mask", "share"]


@dataclass(frozen=True)
class Twins:
    """The policy for rows with equal content; made by :func:`find_twins`.

    Attributes:
        hidden_BB: true if the column is another row of the row's group and excluded from every softmax; None: no exclusion.
        spread_BB: each row's group as a distribution, ``1 / |group|`` on its members; None: targets are not changed.
    """

    hidden_BB: Tensor | None
    spread_BB: Tensor | None

    def log_softmax(self, logits_BB: Tensor) -> Tensor:
        """Row-wise log-softmax; minus infinity for hidden columns."""
        if self.hidden_BB is not None:
            logits_BB = logits_BB.masked_fill(self.hidden_BB, -torch.inf)
        return torch.log_softmax(logits_BB, dim=-1)

    def log_target(self, structure_BB: Tensor) -> Tensor:
        """A teacher's rows: as :meth:`log_softmax`, with the mass of a group spread evenly over its members."""
        log_BB = self.log_softmax(structure_BB)
        if self.spread_BB is None:
            return log_BB
        # underflow would give log 0; with so small a weight the logarithm does not matter
        return (log_BB.exp() @ self.spread_BB).clamp_min(torch.finfo(log_BB.dtype).tiny).log()

    def divergence(self, log_p_BB: Tensor, log_q_BB: Tensor) -> Tensor:
        """``KL(p || q)`` of each row in nats, from log-probabilities: ``(B,)``."""
        ratio_BB = log_p_BB - log_q_BB
        if self.hidden_BB is not None:
            ratio_BB = ratio_BB.masked_fill(self.hidden_BB, 0)  # both are 0 there, and 0 log (0 / 0) counts as 0
        return (log_p_BB.exp() * ratio_BB).sum(dim=-1)


NO_TWINS = Twins(None, None)


def find_twins(groups_B: Tensor | None, false_negatives: FalseNegatives, like_BD: Tensor) -> Twins:
    """Compare the group numbers of a batch.

    * ``keep``: no change, as in the paper's formula; rows of one group repel each other.
    * ``mask``: for each row, the *other* rows of its group are excluded from numerator and denominator, of student and teacher.
    * ``share``: the target mass of a group is spread evenly over its members, so that none of them is preferred.

    Without equal groups all three are the same.

    Args:
        groups_B: ``(B,)`` integers, equal for rows of the same item or with equal content.
        false_negatives: see above.
        like_BD: the batch, for the number of rows, dtype and device.

    Raises:
        TrainingError: groups are needed and missing, or are not one integer per row.
    """
    if false_negatives == "keep":
        return NO_TWINS
    if groups_B is None:
        raise TrainingError(
            "loss",
            f"false_negatives is {false_negatives!r}, and the batch came without groups",
            "pass groups_B, or set it to keep",
        )
    same_BB = same_group(groups_B, like_BD)
    match false_negatives:
        case "mask":
            return Twins(same_BB.fill_diagonal_(False), None)
        case "share":
            member_BB = same_BB.to(like_BD.dtype)
            return Twins(None, member_BB / member_BB.sum(dim=-1, keepdim=True))
        case _:
            assert_never(false_negatives)


def same_group(groups_B: Tensor, like_BD: Tensor) -> Tensor:
    """``(B, B)`` bool: whether two rows have equal group numbers.

    Raises:
        TrainingError: not one integer per row.
    """
    if groups_B.shape != like_BD.shape[:1] or groups_B.is_floating_point() or groups_B.dtype == torch.bool:
        raise TrainingError(
            "loss",
            f"groups_B should be {len(like_BD)} integers, one per row (got shape {tuple(groups_B.shape)}, {groups_B.dtype})",
        )
    groups_B = groups_B.to(like_BD.device)
    return groups_B[:, None] == groups_B[None, :]
