"""The first part of the page: what the shop can show, the variant to use, the differences shown or not, and the next step.

The variant of a recommender is chosen on the validation targets and reported on the test targets, so test results do not
influence the choice.  A difference counts as shown by :func:`sda_core.evaluation.is_clear`, as in the result table.

A variant is advised only if it is clearly better than each cheaper choice: ids for all, and the frozen backbone for adapters.
If an adapter is not, the frozen backbone is advised if it is clearly better than ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from sda_core.evaluation import is_clear
from sda_core.report.model import Change, Result

ORACLE = "oracle"
BASELINES = ("id", "zero_shot")
_FROZEN = BASELINES[1]

Verdict = Literal["higher", "lower", "equal", "no clear difference"]


@dataclass(frozen=True)
class Against:
    """A variant's test NDCG compared with a baseline's."""

    variant: str
    change: Change

    @property
    def verdict(self) -> Verdict:
        """The verdict by interval and p-value; undecided without them."""
        low, high, p_value = self.change.low, self.change.high, self.change.p_value
        if low == high == 0.0:
            return "equal"
        if low is None or not is_clear(low, high, p_value):
            return "no clear difference"
        return "higher" if low > 0.0 else "lower"


@dataclass(frozen=True)
class Power:
    """The power of a recommender: its gain with oracle vectors, and the size of the differences that are too small for it.

    ``smallest`` is relative to ids: half the width of the intervals against ids, median of the competing variants.  A smaller
    difference cannot be clear here, and a larger one may still not be.
    """

    recommender: str
    oracle: Against
    smallest: float | None


@dataclass(frozen=True)
class Choice:
    """The variant of one recommender that was chosen on validation, with its test results.

    ``cheaper`` names the baselines that cost less than the chosen variant: ids, and for an adapter the frozen backbone too.
    ``frozen`` is the frozen backbone's result with its comparison with ids, None if one of the two is missing.
    """

    recommender: str
    chosen: Result
    valid: float
    next_best: tuple[str, float] | None
    against: tuple[Against, ...]
    cheaper: tuple[str, ...]
    frozen: tuple[Result, Against] | None

    @property
    def not_beaten(self) -> tuple[str, ...]:
        """The cheaper baselines that the chosen variant is not clearly better than."""
        better = {pair.change.baseline for pair in self.against if pair.verdict == "higher"}
        return tuple(name for name in self.cheaper if name not in better)

    @property
    def is_advised(self) -> bool:
        """Whether to use the chosen variant: it is clearly better than all cheaper baselines, and clearly worse than none."""
        return not self.not_beaten and all(pair.verdict != "lower" for pair in self.against)

    @property
    def is_frozen_advised(self) -> bool:
        """Whether to use the frozen backbone instead of the chosen adapter, which is not clearly better than it."""
        return self.frozen is not None and _FROZEN in self.not_beaten and self.frozen[1].verdict == "higher"


@dataclass(frozen=True)
class Statement:
    """A difference in one recommender: a line in the list of shown or of undecided differences."""

    recommender: str
    against: Against


@dataclass(frozen=True)
class Answer:
    """The content of the first part of the page."""

    powers: tuple[Power, ...]
    choices: tuple[Choice, ...]
    shown: tuple[Statement, ...]
    undecided: tuple[Statement, ...]
    next_for_shown: str
    next_for_undecided: str


def answer(
    results: Sequence[Result], controls: Sequence[str], trained: Sequence[str], num_seeds: int, shop_users: int | None
) -> Answer:
    """Choose variants on validation, and summarise their test results.

    Args:
        results: results of all recommenders and variants, in the order of the params.
        controls: variants that do not compete.
        trained: variants with an adapter.
        num_seeds: number of seeds of the recommenders.
        shop_users: number of simulated users of the built-in shop, which can have an oracle; None for another shop.
    """
    powers: list[Power] = []
    choices: list[Choice] = []
    statements: list[Statement] = []
    for recommender in dict.fromkeys(result.recommender for result in results):
        own = {result.variant: result for result in results if result.recommender == recommender}
        competing = [result for result in own.values() if result.variant not in controls and result.valid_ndcg is not None]
        if len(competing) < 2:
            continue  # it does not use vectors, or there is no choice
        oracle = _against(own, ORACLE, "id")
        if oracle is not None:
            powers.append(Power(recommender, oracle, _smallest(own, [result.variant for result in competing])))
        ordered = sorted(competing, key=lambda result: -_valid(result))  # stable: the first variant of the ladder wins ties
        chosen, runner_up = ordered[:2]
        pairs = [found for name in BASELINES if (found := _against(own, chosen.variant, name)) is not None]
        cheaper = tuple(name for name in _cheaper(chosen.variant, trained) if name in own)
        next_best = runner_up.variant, _valid(runner_up)
        of_frozen = _against(own, _FROZEN, "id")
        frozen = None if of_frozen is None else (own[_FROZEN], of_frozen)
        choices.append(Choice(recommender, chosen, _valid(chosen), next_best, tuple(pairs), cheaper, frozen))
        adapted = [found for name in trained if (found := _against(own, name, "zero_shot")) is not None]
        said = dict.fromkeys((found.variant, found.change.baseline) for found in pairs)
        adapted += [] if of_frozen is None else [of_frozen]
        pairs += [found for found in adapted if (found.variant, found.change.baseline) not in said]
        statements += [Statement(recommender, found) for found in pairs]
    undecided = tuple(statement for statement in statements if statement.against.verdict in ("no clear difference", "equal"))
    shown = tuple(statement for statement in statements if statement not in undecided)
    return Answer(
        tuple(powers),
        tuple(choices),
        shown,
        undecided,
        _next_for_shown(shown, shop_users is not None),
        _next_for_undecided(undecided, powers, num_seeds, shop_users),
    )


def _cheaper(variant: str, trained: Sequence[str]) -> tuple[str, ...]:
    if variant == "id":
        return ()
    return BASELINES if variant in trained else ("id",)


def _valid(result: Result) -> float:
    assert result.valid_ndcg is not None
    return result.valid_ndcg


def _against(own: dict[str, Result], variant: str, baseline: str) -> Against | None:
    """A comparison of one recommender; two baselines were compared only once, so the sign may have to be inverted."""
    if variant not in own or baseline not in own or variant == baseline:
        return None
    for change in own[variant].changes:
        if change.baseline == baseline:
            return Against(variant, change)
    for change in own[baseline].changes:
        if change.baseline == variant:
            value = own[baseline].ndcg.value
            relative = -change.difference / value if value else None
            low, high = (None if end is None else -end for end in (change.high, change.low))
            return Against(variant, Change(baseline, -change.difference, relative, low, high, change.p_value, change.seed_margin))
    return None


def _smallest(own: dict[str, Result], competing: Iterable[str]) -> float | None:
    found = [pair.change for name in competing if (pair := _against(own, name, "id")) is not None]
    halves = [(change.high - change.low) / 2 for change in found if change.low is not None and change.high is not None]
    value = own["id"].ndcg.value
    return median(halves) / value if halves and value else None


def _next_for_shown(shown: Sequence[Statement], simulated: bool) -> str:
    if not shown:
        return ""
    if simulated:
        return "Run the pipeline on your own shop (docs/shop.md): `dvc exp run -S dataset=own -S dataset.local_folder=FOLDER`"
    return "Export the chosen vectors and use them in your own recommender: `sda export --help`"


def _next_for_undecided(undecided: Sequence[Statement], powers: Sequence[Power], num_seeds: int, shop_users: int | None) -> str:
    """The first reason that may prevent a decision on a difference, with the next step.

    Args:
        undecided: the differences.
        powers: the power of each recommender; empty if the ladder has no positive control.
        num_seeds: number of seeds of the recommenders.
        shop_users: see :func:`answer`.
    """
    if not undecided:
        return ""
    simulated = shop_users is not None
    more_users = f"`dvc exp run -S dataset.num_users={4 * (shop_users or 0)}`"  # four times as many: half the width
    blind = [power.recommender for power in powers if power.oracle.verdict in ("lower", "equal")]
    unclear = [power.recommender for power in powers if power.oracle.verdict == "no clear difference"]
    if blind:
        names = " and ".join(blind)
        return f"Repair {names} first: change `train_recommender.{blind[0]}` until oracle is clearly better than id on validation"
    if simulated and not powers:
        return "Add the positive control first: add oracle to `variants` and `control_embeddings.variants`"
    if unclear:
        names = " and ".join(unclear)
        return (
            f"Add users ({more_users}), or compare several draws of the shop (docs/results.md, "
            f'"Eight draws of the default shop"): in {names} even perfect knowledge is not clearly better than ids here'
        )
    if any(_is_for_seeds(statement.against.change) for statement in undecided):
        more = ",".join(map(str, range(1, num_seeds + 3)))
        return f"Add seeds, which cause most of the widest interval: `dvc exp run -S 'train_recommender.seeds=[{more}]'`"
    if simulated:
        return f"Add users; more seeds would not decide it: {more_users}"
    return "Add users, or take a longer period; more seeds would not decide it"


def _is_for_seeds(change: Change) -> bool:
    """Whether seeds contribute more than half of an interval's width."""
    if change.seed_margin is None or change.low is None or change.high is None:
        return False
    return change.seed_margin > (change.high - change.low) / 4
