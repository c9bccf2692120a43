"""CodeValues: what one-byte codes of log-probs stand for, so that a batch can carry bytes instead of floats.

Every one-byte head format of a store is ln p = scale * table[code] + offset with one table of 256 numbers and, in some,
two numbers a row. The losses know tables and not formats.

Letters: N rows, K entries kept. 256 codes in a table.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from logitstore_kernels.tensor_checks import check_tensor


@dataclass(frozen=True, eq=False)
class CodeValues:
    """table_256: float32 [256], natural logs before scale and offset; what no entry's code selects may be NaN.

    scale_N, offset_N: float32 [N], anything in absent rows; both None where ln p = table[code].
    Raises TypeError / ValueError for a wrong dtype or shape, one of scale and offset without the other, and tensors on
    different devices.
    """

    table_256: Tensor
    scale_N: Tensor | None = None
    offset_N: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("value_table_256", self.table_256, n_axes=1, dtypes=(torch.float32,))
        if len(self.table_256) != 256:
            raise ValueError(f"value_table_256 must have one number for each of 256 codes, got {len(self.table_256)}")
        if (self.scale_N is None) != (self.offset_N is None):
            missing = "scale_N" if self.scale_N is None else "offset_N"
            raise ValueError(f"{missing} is missing: give scale_N and offset_N together, or neither")
        for name, value in (("scale_N", self.scale_N), ("offset_N", self.offset_N)):
            if value is not None:
                check_tensor(name, value, n_axes=1, dtypes=(torch.float32,))

    def check_against(self, *, n_rows: int, device: torch.device) -> None:
        """Raise ValueError unless these are the values of n_rows rows of codes on that device."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            name = "value_table_256" if field.name == "table_256" else field.name
            if value is not None and value.device != device:
                raise ValueError(f"{name} is on {value.device} but ids_NK is on {device}; move it with .to(device)")
            if value is not None and field.name != "table_256" and len(value) != n_rows:
                raise ValueError(f"{name} must have shape ({n_rows},) to go with ids_NK, got {tuple(value.shape)}")

    def logprobs(self, codes_NK: Tensor) -> Tensor:
        """scale * table[code] + offset, float32 [N, K]: bit for bit what a store's own decoder makes of the codes."""
        values_NK = self.table_256[codes_NK.int()]
        if self.scale_N is None or self.offset_N is None:
            return values_NK
        return self.scale_N[:, None] * values_NK + self.offset_N[:, None]

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "CodeValues":
        """These values with every tensor on `device`."""
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        return CodeValues(
            *(None if value is None else value.to(device, non_blocking=non_blocking) for value in tensors)
        )
