"""The device that was asked for, or the best there is; on a machine with several GPUs, one for each process."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def choose_device(device: str) -> "torch.device":
    """Returns the device asked for; "auto" is CUDA, else MPS, else the CPU. Raises ValueError if it is not there."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch_device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device is {device!r}, expected auto, cpu, cuda, cuda:N or mps") from None
    is_there = {
        "cuda": torch.cuda.is_available() and (torch_device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not is_there.get(torch_device.type, False):
        raise ValueError(f"--device is {device!r}, which this machine does not have; use --device auto")
    return torch_device


def device_of_process(device: str, local_rank: int) -> str:
    """`device`, with the GPU of the local_rank-th process of this machine where it leaves open which GPU."""
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{local_rank % torch.cuda.device_count()}"
    return device
