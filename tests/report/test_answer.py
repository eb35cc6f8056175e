"""Chosen on validation, told by test intervals: what the page says first."""

from __future__ import annotations

import pytest

from sda_core.report.answer import answer
from sda_core.report.model import Change, Result, Score
from sda_core.report.page import cards, power_lines, statement_lines


def change(
    baseline: str, low: float, high: float, relative: float | None = 0.1, margin: float | None = 0.0, p_value: float = 0.01
) -> Change:
    return Change(baseline, (low + high) / 2, relative, low, high, p_value, margin)


def result(variant: str, ndcg: float, valid: float | None, *changes: Change, recommender: str = "sasrec") -> Result:
    score = Score(ndcg, ndcg - 0.01, ndcg + 0.01)
    return Result(recommender, variant, 100, score, score, 0, None, valid, changes, ())


IDS = result("id", 0.05, 0.050)
ZERO_SHOT = result("zero_shot", 0.06, 0.055, change("id", 0.002, 0.018, 0.2))
SDA = result("sda", 0.07, 0.052, change("zero_shot", -0.005, 0.025), change("id", 0.01, 0.03))
ORACLE = result("oracle", 0.10, 0.099, change("id", 0.03, 0.07, 1.0))
LADDER = (IDS, ORACLE, ZERO_SHOT, SDA)


def test_validation_chooses_and_the_test_does_not() -> None:
    """`sda` is first on the test, `oracle` on both; `zero_shot` is first on validation of what competes."""
    found = answer(LADDER, ("oracle",), ("sda",), 3, 1500)
    (choice,) = found.choices
    assert (choice.chosen.variant, choice.valid, choice.next_best) == ("zero_shot", 0.055, ("sda", 0.052))
    assert [(pair.change.baseline, pair.verdict) for pair in choice.against] == [("id", "higher")]
    (card,) = cards(found)
    assert (card.advised, card.ndcg) == ("zero_shot", "0.0600 (0.0500 to 0.0700)")
    assert card.validation == "Chosen on validation: 0.0550, next sda 0.0520"
    ((baseline, cell),) = card.against
    assert (baseline, cell.kind, cell.arrow, cell.word) == ("id", "up", "▲", "higher")


def test_a_tie_on_validation_goes_to_the_first_of_the_ladder() -> None:
    found = answer((IDS, result("sda", 0.07, 0.05, change("id", 0.01, 0.03))), (), ("sda",), 3, 1500)
    assert found.choices[0].chosen.variant == "id"


def test_ids_that_are_chosen_are_compared_the_other_way_round() -> None:
    ids = result("id", 0.05, 0.060)
    (choice,) = answer((ids, ZERO_SHOT), (), (), 3, 1500).choices
    assert choice.chosen.variant == "id"
    (pair,) = choice.against
    assert (pair.change.baseline, pair.verdict) == ("zero_shot", "lower")
    assert (pair.change.low, pair.change.high) == (-0.018, -0.002)
    assert pair.change.difference == pytest.approx(-0.01)
    assert pair.change.relative == pytest.approx(-0.01 / 0.06)


def test_what_holds_zero_is_not_decided_and_has_no_colour() -> None:
    sda = result("sda", 0.05, 0.09, change("zero_shot", -0.02, 0.001, -0.17), change("id", -0.003, 0.003, None))
    found = answer((IDS, result("zero_shot", 0.06, 0.055, change("id", -0.01, 0.03)), sda), (), ("sda",), 3, 1500)
    (card,) = cards(found)
    assert {(baseline, cell.kind, cell.word, cell.arrow) for baseline, cell in card.against} == {
        ("id", "same", "no clear difference", ""),
        ("zero_shot", "same", "no clear difference", ""),
    }
    assert found.shown == ()
    assert statement_lines(found.undecided) == [
        "sda against id in sasrec (+0.0000, −0.0030 to +0.0030)",
        "sda against zero_shot in sasrec (−17.0\u00a0%, −0.0200 to +0.0010)",
        "zero_shot against id in sasrec (+10.0\u00a0%, −0.0100 to +0.0300)",
    ]
    without = answer((IDS, result("sda", 0.05, 0.09, Change("id", 0.1, 1.0, None, None, None, None))), (), ("sda",), 1, 1500)
    assert [statement.against.verdict for statement in without.undecided] == ["no clear difference"]


BETTER = {"id": change("id", 0.01, 0.03), "zero_shot": change("zero_shot", 0.01, 0.03)}
UNCLEAR = {"id": change("id", -0.01, 0.03), "zero_shot": change("zero_shot", -0.01, 0.03)}
WORSE = change("zero_shot", -0.03, -0.01)
CORRECTED = change("id", 0.001, 0.03, p_value=0.3)


@pytest.mark.parametrize(
    ("chosen", "changes", "advice"),
    [
        ("sda", (BETTER["id"], BETTER["zero_shot"]), "use"),
        ("sda", (UNCLEAR["id"], BETTER["zero_shot"]), "not clearly better than id"),
        ("sda", (BETTER["id"], UNCLEAR["zero_shot"]), "not clearly better than zero_shot"),
        ("sda", (UNCLEAR["id"], UNCLEAR["zero_shot"]), "not clearly better than id or zero_shot"),
        ("sda", (CORRECTED, BETTER["zero_shot"]), "not clearly better than id"),
        ("zero_shot", (BETTER["id"],), "use"),
        ("zero_shot", (UNCLEAR["id"],), "not clearly better than id"),
        ("text_only", (BETTER["id"], UNCLEAR["zero_shot"]), "use"),
        ("text_only", (BETTER["id"], WORSE), "clearly worse than zero_shot on the test targets"),
    ],
)  # fmt: skip
def test_a_variant_is_advised_if_it_is_clearly_better_than_each_cheaper_one(
    chosen: str, changes: tuple[Change, ...], advice: str
) -> None:
    others = [result("zero_shot", 0.06, 0.055, UNCLEAR["id"])] if chosen != "zero_shot" else []
    (card,) = cards(answer((IDS, *others, result(chosen, 0.07, 0.09, *changes)), (), ("sda",), 3, 1500))
    doubt = f"{chosen} is highest on validation, but {advice}"
    assert (card.advised, card.doubt) == ((chosen, "") if advice == "use" else ("", doubt))


def test_the_frozen_backbone_is_advised_if_it_is_clearly_better_than_ids_and_the_adapter_is_not_than_it() -> None:
    frozen = result("zero_shot", 0.06, 0.055, BETTER["id"])
    found = answer((IDS, frozen, result("sda", 0.07, 0.09, BETTER["id"], UNCLEAR["zero_shot"])), (), ("sda",), 3, 1500)
    (card,) = cards(found)
    assert (card.advised, card.ndcg) == ("zero_shot", "0.0600 (0.0500 to 0.0700)")
    assert card.doubt == "sda is highest on validation, but not clearly better than zero_shot"
    assert card.validation == "NDCG@10 on validation 0.0550, highest sda 0.0900"
    assert [(baseline, cell.word) for baseline, cell in card.against] == [("id", "higher")]
    assert statement_lines(found.shown) == [
        "sda is better than id in sasrec (+10.0\u00a0%, +0.0100 to +0.0300)",
        "zero_shot is better than id in sasrec (+10.0\u00a0%, +0.0100 to +0.0300)",
    ]


def test_ids_are_the_cheapest_choice() -> None:
    (card,) = cards(answer((result("id", 0.05, 0.06), ZERO_SHOT), (), (), 3, 1500))
    assert card.doubt == "id is highest on validation, but clearly worse than zero_shot on the test targets"
    unclear = result("zero_shot", 0.06, 0.055, UNCLEAR["id"])
    (card,) = cards(answer((result("id", 0.05, 0.06), unclear), (), (), 3, 1500))
    assert (card.advised, card.doubt) == ("id", "")


def test_a_run_without_ids_compares_with_what_it_has() -> None:
    sda = result("sda", 0.07, 0.09, BETTER["zero_shot"])
    (card,) = cards(answer((result("zero_shot", 0.06, 0.055), sda), (), ("sda",), 3, 1500))
    assert card.advised == "sda"


def test_adapted_variants_are_told_whether_or_not_they_are_chosen() -> None:
    worse = result("sda", 0.04, 0.052, change("zero_shot", -0.03, -0.01, -0.3), change("id", -0.02, 0.0))
    found = answer((IDS, ZERO_SHOT, worse), (), ("sda",), 3, 1500)
    assert statement_lines(found.shown) == [
        "zero_shot is better than id in sasrec (+20.0\u00a0%, +0.0020 to +0.0180)",
        "sda is worse than zero_shot in sasrec (−30.0\u00a0%, −0.0300 to −0.0100)",
    ]


def test_the_page_begins_with_what_the_shop_can_show() -> None:
    (line,) = power_lines(answer(LADDER, ("oracle",), ("sda",), 3, 1500).powers, 10)
    # against ids the intervals of zero_shot and sda are .016 and .020 wide: half of it is 18 % of .05
    assert line == (
        "With perfect knowledge (variant oracle) sasrec gains 100.0\u00a0% NDCG@10 over ids (+0.0300 to +0.0700). "
        "Differences smaller than about 18.0\u00a0% cannot be detected here."
    )
    for low, high, gain in ((0.0, 0.0, "shows no gain"), (-0.03, -0.01, "loses")):
        blind = result("oracle", 0.05, 0.05, change("id", low, high))
        found = answer((IDS, blind, ZERO_SHOT), ("oracle",), (), 3, 1500)
        (line,) = power_lines(found.powers, 10)
        assert f"sasrec {gain} over ids" in line
        assert "sasrec cannot use good vectors here" in line


def test_an_unclear_oracle_says_that_the_run_is_too_small_and_not_that_the_recommender_is_blind() -> None:
    unclear = result("oracle", 0.056, 0.056, change("id", -0.0095, 0.0218))
    (line,) = power_lines(answer((IDS, unclear, ZERO_SHOT), ("oracle",), (), 3, 1500).powers, 10)
    assert line == (
        "With perfect knowledge (variant oracle) sasrec shows no clear gain over ids (−0.0095 to +0.0218). This run is too small "
        "to tell whether sasrec can use good vectors, and so whether one variant is better than another there."
    )


def test_a_recommender_without_a_choice_has_no_card() -> None:
    pop = result("any", 0.02, None, recommender="pop")
    bpr = result("any", 0.02, 0.03, recommender="bpr")
    found = answer((pop, bpr, IDS, ZERO_SHOT), (), (), 3, 1500)
    assert [choice.recommender for choice in found.choices] == ["sasrec"]
    assert answer((pop,), (), (), 3, 1500).choices == ()


@pytest.mark.parametrize(
    ("oracle", "margin", "simulated", "expected"),
    [
        (change("id", -0.03, -0.01), 0.0, True, "Repair sasrec first"),
        (change("id", 0.0, 0.0), 0.0, True, "Repair sasrec first"),
        (change("id", -0.01, 0.02), 0.0, True, "in sasrec even perfect knowledge is not clearly better than ids here"),
        (None, 0.0, True, "Add the positive control first"),
        (change("id", 0.01, 0.02), 0.012, True, "'train_recommender.seeds=[1,2,3,4,5]'"),
        (change("id", 0.01, 0.02), 0.001, True, "dataset.num_users=6000"),  # four times as many
        (None, 0.001, False, "Add users, or take a longer period"),
    ],
)
def test_the_next_step_is_the_first_thing_that_keeps_it_undecided(
    oracle: Change | None, margin: float, simulated: bool, expected: str
) -> None:
    sda = result("sda", 0.05, 0.09, change("id", -0.01, 0.01, margin=margin))
    ladder = (IDS, sda) if oracle is None else (IDS, result("oracle", 0.06, 0.06, oracle), sda)
    found = answer(ladder, ("oracle",), ("sda",), 3, 1500 if simulated else None)
    assert expected in found.next_for_undecided
    assert found.next_for_shown == ""


def test_what_was_shown_has_a_next_step_too() -> None:
    assert "dataset.local_folder=FOLDER" in answer(LADDER, ("oracle",), ("sda",), 3, 1500).next_for_shown
    assert "sda export" in answer(LADDER, ("oracle",), ("sda",), 3, None).next_for_shown
