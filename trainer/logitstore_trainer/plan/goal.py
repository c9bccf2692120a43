"""What a plan is asked for: a size or a fidelity, at a temperature, for a number of tokens."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_TOKENS = 1e9
_SHARE_OF_THE_WAY = 0.95  # to a step that should just keep the goal: neither bytes nor KL follow a power of it exactly


@dataclass(frozen=True)
class Goal:
    """At most max_bytes_per_token bytes, or at most max_kl nats: one of the two. temperature: at which KL counts, None
    for T = 1 and T = 2 together (max_kl: T = 1). tokens: how many will be stored, None where nobody said
    (DEFAULT_TOKENS then). Raises ValueError for others."""

    max_bytes_per_token: float | None
    max_kl: float | None
    temperature: float | None = None
    tokens: float | None = None

    def __post_init__(self) -> None:
        if (self.max_bytes_per_token is None) == (self.max_kl is None):
            raise ValueError("a goal is either --max-bytes-per-token or --max-kl")
        for name in ("max_bytes_per_token", "max_kl", "temperature", "tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """At which KL is measured: 1, 2 and the goal's own."""
        return tuple(sorted({1.0, 2.0, *([self.temperature] if self.temperature else [])}))

    @property
    def counted_temperatures(self) -> tuple[float, ...]:
        """Those whose KLs, added, are what counts."""
        if self.temperature is not None:
            return (self.temperature,)
        return (1.0,) if self.max_kl is not None else (1.0, 2.0)

    def loss(self, row: dict[str, Any]) -> float:
        """The KL that counts, in nats, of a measured configuration."""
        return sum(row["kl"][f"{temperature:g}"] for temperature in self.counted_temperatures)

    def total_bytes(self, row: dict[str, Any]) -> float:
        """What the goal's tokens take in a measured configuration, its tables included."""
        return row["bytes_per_token"] * (self.tokens or DEFAULT_TOKENS) + row["table_bytes"]

    def chosen(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The best of the configurations that keep to the goal, None where none does. Bytes keep to it with two
        standard errors to spare, so that other text of the kind does too."""
        if self.max_kl is not None:
            fitting = [row for row in rows if self.loss(row) <= self.max_kl]
            return min(fitting, key=self.total_bytes, default=None)
        fitting = [row for row in rows if _most_bytes(row) <= self.max_bytes_per_token]
        return min(fitting, key=self.loss, default=None)

    def between(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The config of a step between the chosen row's and the nearest one that misses the goal, both of one head, at
        which the goal should just be kept; None where there is no such step, or it is within 1 % of the chosen one."""
        chosen = self.chosen(rows)
        if chosen is None or chosen["config"].get("tail_step") is None:
            return None
        measure, limit = self.loss, self.max_kl
        if self.max_bytes_per_token is not None:
            measure, limit = _most_bytes, self.max_bytes_per_token
        others = [row for row in rows if _same_head(row, chosen) and measure(row) > limit]
        if not others:
            return None
        missed = min(others, key=measure)
        share = math.log(limit / measure(chosen)) / math.log(measure(missed) / measure(chosen))
        step, missed_step = chosen["config"]["tail_step"], missed["config"]["tail_step"]
        found = float(f"{step * (missed_step / step) ** (_SHARE_OF_THE_WAY * share):.3g}")
        return {**chosen["config"], "tail_step": found} if abs(math.log(found / step)) > 0.01 else None

    def text(self) -> str:
        """The goal in words."""
        if self.max_kl is not None:
            return f"a KL of at most {self.max_kl:g} nats at T = {self.temperature or 1:g}"
        at = "T = 1 and T = 2 together" if self.temperature is None else f"T = {self.temperature:g}"
        return f"the least KL at {at} in at most {self.max_bytes_per_token:g} bytes a token"


def _same_head(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configurations differ in nothing but a step that both have."""
    a, b = row["config"], other["config"]
    return a.get("tail_step") is not None and {**a, "tail_step": 0} == {**b, "tail_step": 0}


def _most_bytes(row: dict[str, Any]) -> float:
    return row["bytes_per_token"] + 2 * (row["bytes_per_token_se"] or 0.0)


def add_goal_arguments(group: argparse._ArgumentGroup, *, required: bool, tokens: str) -> None:
    """Adds the goal's arguments; tokens: what stands for --tokens where it is left out."""
    goal = group.add_mutually_exclusive_group(required=required)
    goal.add_argument("--max-bytes-per-token", type=float, metavar="B", help="the least KL in at most B bytes a token")
    goal.add_argument("--max-kl", type=float, metavar="NATS", help="the fewest bytes at a KL of at most this")
    group.add_argument(
        "--temperature", type=float, metavar="T",
        help="at which KL counts (default: T = 1 and T = 2 together; with --max-kl T = 1)",
    )  # fmt: skip
    group.add_argument("--tokens", type=float, metavar="N", help=f"that will be stored (default: {tokens})")


def goal_from_arguments(args: argparse.Namespace) -> Goal | None:
    """The goal of parsed arguments, None where they name none. Raises ValueError for numbers out of range, and for a
    temperature or a number of tokens without a goal."""
    if args.max_bytes_per_token is None and args.max_kl is None:
        for name in ("temperature", "tokens"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} belongs to a goal: add --max-kl or --max-bytes-per-token, or leave it out")
        return None
    return Goal(args.max_bytes_per_token, args.max_kl, args.temperature, args.tokens)
