"""Autocast, asked about and switched off, on devices that have none, too."""

from contextlib import AbstractContextManager, nullcontext

import torch


def is_autocast_on(device: torch.device) -> bool:
    """Whether autocast is enabled for this kind of device; False for one that has none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which nothing on this kind of device is cast."""
    return torch.autocast(device.type, enabled=False) if is_autocast_on(device) else nullcontext()
