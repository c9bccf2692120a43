"""Some rows of a TeacherBatch: what losses that work over row chunks hand on.

Letters: N rows.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from logitstore_kernels.teacher_batch import TeacherBatch


def rows_of(teacher: TeacherBatch, rows: slice | Tensor) -> TeacherBatch:
    """The batch of these rows (a slice, or row numbers) alone; what is not per row is shared, slices are views.

    A field is per row if the letters at the end of its name begin with N.
    """
    return _rows_of_fields(teacher, rows)


def _rows_of_fields(whole: Any, rows: slice | Tensor) -> Any:
    parts = {}
    for field in dataclasses.fields(whole):
        value = getattr(whole, field.name)
        if dataclasses.is_dataclass(value):
            parts[field.name] = _rows_of_fields(value, rows)
        elif isinstance(value, torch.Tensor) and field.name.rpartition("_")[2].startswith("N"):
            parts[field.name] = value[rows]
    return dataclasses.replace(whole, **parts)
