"""Peak memory of one call beyond what was allocated before it.

On a CUDA device it is the caching allocator's own peak. On a CPU it is the running sum of the allocations and frees
that torch's allocator reports to the profiler: every tensor is in it, those made inside an operator included, which a
count of operators' results would miss (torch.logsumexp makes one of the input's size). Other devices: not measured.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def peak_extra_bytes(call: Callable[[], Any], device: "torch.device") -> int | None:
    """Bytes of the highest moment of `call` above the moment before it; None where it cannot be measured."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _peak_cpu_bytes(call) if device.type == "cpu" else None


def _peak_cpu_bytes(call: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints a line whenever it starts or stops
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak
