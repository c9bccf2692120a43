"""How calls are timed and their memory is counted: device events per call, candidates in turn, the cache cold.

Before each call the inputs that it destroys are restored, a buffer larger than the L2 cache is written, and the device
is kept busy for some milliseconds, so that the host is done queueing the call before the device begins it: what is
timed is the device's work and not Python's.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20
_BUSY_CYCLES = 6_000_000  # 3 to 4 ms
WARM_UP = 3


def interleaved_ms(
    calls: Mapping[str, Callable[[], Any]], restore: Callable[[], Any], device: torch.device, *, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, the calls in turn; restore() precedes every call, untimed."""
    times: dict[str, list] = {name: [] for name in calls}
    on_cuda = device.type == "cuda"
    flush = torch.empty(_FLUSH_BYTES if on_cuda else 0, dtype=torch.uint8, device=device)
    for index in range((WARM_UP if on_cuda else 0) + rounds):
        for name, call in calls.items():
            restore()
            took = _on_cuda(call, flush) if on_cuda else _on_cpu(call)
            if index >= (WARM_UP if on_cuda else 0):
                times[name].append(took)
    if on_cuda:
        torch.cuda.synchronize(device)
        return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in times.items()}
    return times


def _on_cuda(call: Callable[[], Any], flush: torch.Tensor) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(_BUSY_CYCLES)
    start.record()
    call()
    end.record()
    return start, end


def _on_cpu(call: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    call()
    return (time.perf_counter() - start_s) * 1e3


def quantiles(times_ms: list[float]) -> dict[str, float]:
    """p20_ms, p50_ms, p80_ms: the measurements at those ranks, and how many there were."""
    ordered = sorted(times_ms)
    ranks = {f"p{percent}_ms": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in (20, 50, 80)}
    return ranks | {"n_calls": len(ordered)}


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes of the highest moment of the call above the moment before it; None where there is no such counter."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = call()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before
