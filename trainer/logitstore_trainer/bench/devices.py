"""How to wait for the device that a benchmark runs on."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def synchronizer(device: "torch.device") -> Callable[[], None] | None:
    """What waits for the device's queue, for a clock to read; None for a CPU, which has none."""
    import torch

    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
