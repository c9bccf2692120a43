"""Stages of a comparison: each is timed, counted in tokens, and says one line when it ends."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Say = Callable[[str], None]


class Stages:
    """`rows` holds a dict for each finished stage: stage, what, tokens, seconds, cpu_seconds, tokens_per_s."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """The stage's row, in which the body sets "what" (for the reader) and "tokens"; a stage that fails has none."""
        row: dict[str, Any] = {"stage": name, "what": "", "tokens": None}
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        yield row
        row["seconds"] = time.perf_counter() - wall_s
        row["cpu_seconds"] = time.process_time() - cpu_s
        row["tokens_per_s"] = row["tokens"] / row["seconds"] if row["tokens"] else None
        self.rows.append(row)
        rate = f", {row['tokens_per_s']:,.0f} tokens/s" if row["tokens"] else ""
        self._say(f"{name:<18} {row['what']} ({row['seconds']:.1f} s{rate})")
