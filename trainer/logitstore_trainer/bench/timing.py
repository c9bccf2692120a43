"""Times of repeated calls as quantiles, with the candidates interleaved so that a busy machine slows all alike."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Times:
    """Durations of one call in seconds, in the order measured."""

    seconds: tuple[float, ...]

    def quantile_ms(self, percent: float) -> float:
        """The quantile in milliseconds; percent in 0..100."""
        return float(np.percentile(self.seconds, percent)) * 1e3

    @property
    def p50_s(self) -> float:
        return self.quantile_ms(50) / 1e3

    def as_json(self) -> dict[str, float | int]:
        """p20_ms, p50_ms, p80_ms and the number of calls."""
        quantiles = {f"p{percent}_ms": self.quantile_ms(percent) for percent in (20, 50, 80)}
        return {**quantiles, "calls": len(self.seconds)}


def interleaved_times(
    calls: Mapping[str, Callable[[int], Any]],
    *,
    repeats: int,
    warmup: int = 1,
    synchronize: Callable[[], None] | None = None,
    after_each: Callable[[], None] | None = None,
) -> dict[str, Times]:
    """Times of each call: `warmup` rounds that do not count, then `repeats` rounds of one call of each.

    A call gets the number of its round, to rotate through its buffers. synchronize waits for the device before the
    clock is read; after_each runs outside the clock (a progress display).
    """
    wait = synchronize or (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_index in range(warmup + repeats):
        for name, call in calls.items():
            wait()
            start_s = time.perf_counter()
            call(round_index)
            wait()
            elapsed_s = time.perf_counter() - start_s
            if round_index >= warmup:
                seconds[name].append(elapsed_s)
            if after_each is not None:
                after_each()
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def median_call(call: Callable[[], Any], *, repeats: int = 3) -> tuple[Any, float]:
    """(result of the last call, median duration in seconds) of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start_s)
    return result, float(np.median(seconds))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch on one core inside, as before outside."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
