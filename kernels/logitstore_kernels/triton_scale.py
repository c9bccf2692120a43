"""Rows times a factor each, in place; a row whose factor is 1 is left without being read."""

import triton
import triton.language as tl


@triton.jit
def scale_rows_kernel(rows_ptr, factor_ptr, n_columns, row_stride, BLOCK: tl.constexpr):
    """One program a row: rows [N, W] of any float dtype, factor [N] float32. NaN is a factor like any other."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    if factor != 1:
        row_ptr = rows_ptr + row * row_stride
        for start in range(0, n_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < n_columns
            scaled = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(row_ptr + column, scaled.to(rows_ptr.dtype.element_ty), mask=inside)
