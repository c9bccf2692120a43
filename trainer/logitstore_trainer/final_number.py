"""The number that a text gives as its answer, and how sure a share of right answers is.

It is read as GSM8K is usually scored: the number behind "####", else the last number of the text, without "$" and
thousands commas. Numbers are compared by value, so that "$18.00" is 18; harnesses that compare strings count that as
wrong. What a model writes behind its first "####" line does not count, as when it goes on with a question of its own.
"""

import re
from decimal import Decimal
from statistics import NormalDist
from typing import NamedTuple

# A minus behind a word or a bracket is a hyphen or a subtraction: "step-2", "(3+4)-5".
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]%])[-\u2212])?(?:[$\u20ac\u00a3](?P<sign_behind>[-\u2212])?)?"
    r"(?P<digits>[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]+)?|\.[0-9]+)"
)
_MARKER = "####"


class Interval(NamedTuple):
    """Both ends of an interval of a share, in [0, 1]."""

    low: float
    high: float


def marked_number(text: str) -> Decimal | None:
    """The first number behind "####" on its line, of the first such line that has one; None where there is none."""
    for line in text.splitlines():
        _, marker, behind = line.partition(_MARKER)
        if marker and (match := _NUMBER.search(behind)):
            return _value(match)
    return None


def final_number(text: str) -> Decimal | None:
    """The number behind "####", else the last number of the text; None for a text without one."""
    marked = marked_number(text)
    if marked is not None:
        return marked
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def wilson_interval(n_right: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share n_right / n (n > 0), which is sound near 0 and 1, too.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = n_right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(max(centre - half, 0.0) if n_right else 0.0, min(centre + half, 1.0) if n_right < n else 1.0)


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["sign"] or match["sign_behind"] else value
