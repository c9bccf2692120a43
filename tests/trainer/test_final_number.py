"""The number that a text gives as its answer, in many spellings, and Wilson's interval against its definition."""

from decimal import Decimal

import pytest
from logitstore_trainer.final_number import final_number, marked_number, wilson_interval

GSM8K_COMPLETION = "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (GSM8K_COMPLETION, "18"),
        ("The answer is 18.", "18"),
        ("The answer is 18...", "18"),
        ("so she has $70,000.", "70000"),
        ("so she has $ 70,000", "70000"),
        ("#### 1,234,567", "1234567"),
        ("####18", "18"),
        ("#### $18.00", "18"),
        ("#### **18**", "18"),
        ("#### 18 eggs in 3 days", "18"),
        ("#### 018", "18"),
        ("#### -7", "-7"),
        ("#### \u22127", "-7"),
        ("#### -$7.50", "-7.5"),
        ("#### $-7.50", "-7.5"),
        ("it falls to -7", "-7"),
        ("x=-7", "-7"),
        ("10-7", "7"),
        ("(3+4)-7", "7"),
        ("that is step-7", "7"),
        ("\\boxed{18}", "18"),
        ("a third, .5, is left", "0.5"),
        ("0.50", "0.5"),
        ("18%", "18"),
        ("18\u20ac", "18"),
        ("\u20ac18", "18"),
        ("first 5, then 6, then 7", "7"),
        ("####\n18", "18"),
        ("#### none of the 3, no: #### 4", "3"),
        ("#### 18\nQuestion: how many are 5 and 6?\nAnswer: 11\n#### 11", "18"),
        ("#### ?\n#### 5\n6", "5"),
        ("12 is wrong #### it is\n13", "13"),
    ],
)
def test_spellings_of_an_answer(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number at all", "####", "#### eighteen", "$ . , -"])
def test_a_text_without_a_number_has_no_answer(text):
    assert final_number(text) is None


def test_the_right_number_of_a_completion_must_be_marked():
    assert marked_number(GSM8K_COMPLETION) == 18
    assert marked_number("The answer is 18") is None


def test_different_numbers_are_different():
    assert final_number("1.8") != final_number("18")
    assert final_number("-18") != final_number("18")
    assert final_number("180,000") != final_number("180")


@pytest.mark.parametrize(("n_right", "n"), [(0, 7), (7, 7), (1, 1), (3, 10), (141, 1319), (1318, 1319)])
def test_the_interval_holds_the_shares_that_a_score_test_does_not_reject(n_right, n):
    """Wilson: all p for which |share - p| <= z sqrt(p (1 - p) / n), found here on a fine grid."""
    z, steps = 1.959963984540054, 200_000
    share = n_right / n
    kept = [
        i / steps for i in range(steps + 1) if (share - i / steps) ** 2 <= z * z * (i / steps) * (1 - i / steps) / n
    ]
    interval = wilson_interval(n_right, n)
    assert interval.low == pytest.approx(min(kept), abs=1.5 / steps)
    assert interval.high == pytest.approx(max(kept), abs=1.5 / steps)
    assert 0 <= interval.low <= share <= interval.high <= 1
