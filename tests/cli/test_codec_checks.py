"""What all coefficients of a tail save at a budget: log-log between measured steps, and nothing beyond them."""

from pathlib import Path

import pytest

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


def rows_of(rank: int, sizes: list[float], scale: float) -> list[dict]:
    kls = [scale * size**-0.5 for size in sizes]
    rows = [
        {"rank": rank, "tail_step": 1 / size, "bytes_per_token": size, "kl_t1": kl, "kl_t2": 2 * kl}
        for size, kl in zip(sizes, kls, strict=True)
    ]
    return [*rows, {"rank": rank, "tail_step": None, "bytes_per_token": 1.0, "kl_t1": 9.0, "kl_t2": 9.0}]


def test_savings_are_between_the_steps_of_both_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the last step of one rank there is nothing to compare with; rows without corrections are on no curve."""
    monkeypatch.syspath_prepend(str(QUALITY))
    import codec_checks

    rows = [*rows_of(256, [20.0, 33.0, 50.0], 1.0), *rows_of(576, [21.0, 30.0, 70.0], 0.9)]
    saved = codec_checks.saved_shares(rows, 256, 576)
    assert saved.keys() == {"24", "40"}
    for budget in saved.values():
        assert budget == {"kl_t1": pytest.approx(0.1), "kl_t2": pytest.approx(0.1)}
