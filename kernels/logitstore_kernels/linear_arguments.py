"""What hidden states, weight and bias a loss through a linear head may be given, and the dtype of its logits.

Letters: N rows, D width, V vocabulary.
"""

import torch
from torch import Tensor

from logitstore_kernels.autocast import is_autocast_on
from logitstore_kernels.teacher_batch import TeacherBatch


def check_head(hidden_ND: Tensor, weight_VD: Tensor, bias: Tensor | None) -> None:
    """Raise TypeError or ValueError, saying what was got and expected, unless these make logits."""
    named = {"hidden_ND": (hidden_ND, 2), "weight_VD": (weight_VD, 2), "bias": (bias, 1)}
    for name, (value, n_axes) in named.items():
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be of a float dtype, got {value.dtype}")
        if value.dim() != n_axes:
            raise ValueError(
                f"hidden_ND must be [N, D], weight_VD [V, D] and bias [V]; {name} has shape {tuple(value.shape)}"
            )
        if value.device != hidden_ND.device:
            raise ValueError(
                f"{name} is on {value.device} but hidden_ND on {hidden_ND.device}; move them to one device"
            )
        if value.dtype != hidden_ND.dtype and not is_autocast_on(hidden_ND.device):
            raise TypeError(
                f"hidden_ND is {hidden_ND.dtype} but {name} {value.dtype}; convert one of them, or call under autocast"
            )
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden_ND has width {hidden_ND.shape[1]} but weight_VD {weight_VD.shape[1]}; both must be D")
    if bias is not None and len(bias) != len(weight_VD):
        raise ValueError(f"bias has {len(bias)} elements but weight_VD {len(weight_VD)} rows; both must be V")


def check_head_against(hidden_ND: Tensor, weight_VD: Tensor, teacher: TeacherBatch, chunk_rows: int | None) -> None:
    """Raise TypeError or ValueError unless the head's logits are for that teacher; what a loss of logits checks, too,
    is left to it."""
    if isinstance(teacher, TeacherBatch) and len(weight_VD) < teacher.vocab_size:
        raise ValueError(
            f"weight_VD has {len(weight_VD)} rows, fewer than the teacher's vocab_size={teacher.vocab_size}; student "
            "and teacher must share one vocabulary"
        )
    if isinstance(teacher, TeacherBatch) and len(hidden_ND) != teacher.n_rows:
        raise ValueError(f"rows must be aligned: hidden_ND has {len(hidden_ND)}, the teacher batch {teacher.n_rows}")
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int)):
        raise TypeError(f"chunk_rows must be an int or None, got {type(chunk_rows).__name__}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")


def logits_dtype(hidden_ND: Tensor) -> torch.dtype:
    """That of autocast, if it is on and the hidden states are not float64, which it leaves alone; else theirs."""
    if is_autocast_on(hidden_ND.device) and hidden_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden_ND.device.type)
    return hidden_ND.dtype
