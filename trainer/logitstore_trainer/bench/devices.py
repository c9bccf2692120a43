"""The device that a benchmark runs on, and how to wait for it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pick_device(name: str | None) -> "torch.device":
    """The device of that name, or the fastest there is. Raises ValueError for one that torch does not have here."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def synchronizer(device: "torch.device") -> Callable[[], None] | None:
    """What waits for the device's queue, for a clock to read; None for a CPU, which has none."""
    import torch

    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
