"""The goals of the kernels, each evaluated from the rows of the run: met, not met, or not measured."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gpu_parts.log import RowLog

_OURS = "ours, in place"
_CELL = {"section": "logits in", "n_rows": 8192, "vocab_size": 128_256}
_PLAIN = _CELL | {"section": "beside PyTorch"}
_HEADS = {4096: {"n_rows": 4096, "limit": 1.08}, 1024: {"n_rows": 8192, "limit": 1.20}}
_CHUNK_ROWS = 2048
_MS = {"H100": 1.52, "H200": 1.06}


class Goal(NamedTuple):
    """at_least: whether the value may not be below the limit, or not above it. value: None if it is not measured."""

    goal: str
    value: float | None
    at_least: bool
    limit: float


def add_goals(log: RowLog) -> None:
    """One row a goal."""
    for goal in goals(log.rows, log.facts["device"]):
        met = None if goal.value is None else goal.value >= goal.limit if goal.at_least else goal.value <= goal.limit
        status = "not measured" if met is None else "met" if met else "not met"
        limit = f"{'>=' if goal.at_least else '<='} {goal.limit:g}"
        log.add("goal", {"goal": goal.goal}, status, value=goal.value, limit=limit)


def goals(rows: list[dict[str, Any]], device: str) -> Iterator[Goal]:
    """The table of goals, for 8192 x 128256 bfloat16 with a bucket tail and 64 entries where nothing else is said."""

    def number(name: str, **wanted: Any) -> float | None:
        found = [row for row in rows if row["status"] == "measured" and wanted.items() <= row.items()]
        return found[0].get(name) if found else None

    def ratio(above: dict[str, Any], below: dict[str, Any]) -> float | None:
        return _combined(lambda a, b: a / b, number("p50_ms", **above), number("p50_ms", **below))

    for T, share in ((1.0, 0.92), (2.0, 0.90), (1.5, 0.80)):
        value = number("share_of_copy", **_CELL, temperature=T, loss=_OURS)
        yield Goal(f"share of the copy bandwidth, two passes, T = {T:g}", value, True, share)
    at_one = _CELL | {"temperature": 1.0, "loss": _OURS}
    for name, limit in _MS.items():
        yield Goal(f"ms on {name}, T = 1", number("p50_ms", **at_one) if name in device else None, False, limit)
    ce_only = _CELL | {"temperature": 1.0, "loss": "ours, cross-entropy alone, in place"}
    yield Goal("time over that of our cross-entropy alone, T = 1", ratio(at_one, ce_only), False, 1.03)
    for loss, limit in (("eager", 5.0), ("compiled", 2.0)):
        plain = _PLAIN | {"temperature": 1.0}
        yield Goal(f"{loss} PyTorch's time over ours, T = 1", ratio(plain | {"loss": loss}, plain | {"loss": _OURS}),
                   True, limit)  # fmt: skip
    for vocab_size in (128_256, 151_936):
        cell = at_one | {"vocab_size": vocab_size}
        value = ratio(cell | {"loss": "Liger cross-entropy"}, cell)
        yield Goal(f"Liger cross-entropy's time over ours, V = {vocab_size}", value, True, 1.4)
    yield from _memory(number)
    for width, head in _HEADS.items():
        cell = {"section": "through a head", "width": width, "n_rows": head["n_rows"]}
        value = ratio(cell | {"loss": "ours, T = 1"}, cell | {"loss": "three products"})
        yield Goal(f"time through a head over the three products alone, D = {width}", value, False, head["limit"])
    errors = [row["gradient_error"] for row in rows if row["section"] == "logits in" and row["status"] == "measured"
              and "gradient_error" in row and row.get("n_rows", 0) >= 4096]  # fmt: skip
    yield Goal("gradient error in bfloat16, the worst of all sizes", max(errors, default=None), False, 2e-3)
    dense = {"section": "dense tail", "rank": 128, "n_rows": 8192, "temperature": 1.0}
    value = ratio(dense | {"loss": "dense"}, dense | {"loss": "bucket"})
    yield Goal("a dense tail's time over the bucket tail's, r = 128", value, False, 1.6)
    value = number("extra_peak_bytes", **dense, loss="dense")
    yield Goal("a dense tail's extra bytes, in place", value, False, _CHUNK_ROWS * 128_256 * 2)


def _memory(number: Callable[..., float | None]) -> Iterator[Goal]:
    """Bytes a row beyond the logits, and beyond the gradient where that is a tensor of its own."""
    cell = _CELL | {"temperature": 1.0}
    in_place, new = (number("extra_peak_bytes", **cell, loss=loss) for loss in (_OURS, "ours"))
    yield Goal("extra bytes a row, in place", _combined(lambda x: x / 8192, in_place), False, 64)
    new = _combined(lambda x: x / 8192 - 128_256 * 2, new)
    yield Goal("extra bytes a row beside the gradient, not in place", new, False, 64)


def _combined(function: Callable[..., float], *values: float | None) -> float | None:
    return None if any(value is None for value in values) else function(*values)
