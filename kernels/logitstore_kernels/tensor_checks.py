"""The checks that the parts of a teacher batch share, and their wording.

Letters: N rows.
"""

import torch
from torch import Tensor


def check_tensor(name: str, value: Tensor, *, n_axes: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError / ValueError unless `value` is a tensor of one of `dtypes` with n_axes axes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.dim() != n_axes:
        raise ValueError(
            f"{name} must have {n_axes} axes (the letters at the end of its name), got shape {tuple(value.shape)}"
        )


def refuse_rows(bad_N: Tensor, what: str, values: Tensor) -> None:
    """Raise ValueError that names the first row where bad_N is True, if there is one; reads bad_N."""
    if bad_N.any():
        row = int(bad_N.nonzero()[0, 0])
        got = values[row].tolist()
        shown = f"{got[:8]}..." if isinstance(got, list) and len(got) > 8 else got
        raise ValueError(f"teacher row {row} has {what}: got {shown} ({int(bad_N.sum())} such rows)")
