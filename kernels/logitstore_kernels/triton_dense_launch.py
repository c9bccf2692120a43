"""How the Triton loss with a dense tail is launched: its three kernels, their tiles, and the memory between them.

Besides the gradient a call takes 48 bytes a row and 4 a kept logit. Without a gradient the rows are marked in scratch
memory of a bounded size, a run of rows at a time.

Letters: N rows, K entries kept, V vocabulary, W columns (W >= V), r coefficients.
"""

from dataclasses import asdict, dataclass

import torch
import triton
from torch import Tensor

from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.triton_dense import (
    N_ROW_NUMBERS,
    dense_rows_kernel,
    finish_rows_kernel,
    mark_rows_kernel,
)
from logitstore_kernels.triton_launch import LossOutputs, PackedTeacher, say_odd_rows

_SCRATCH_BYTES = 256 << 20
# The kernels that take a row alone copy and clear it in tiles.
ROW_TILE = {"BLOCK": 1024}
ROW_OPTIONS = {"num_warps": 4}
BLOCK_OPTIONS = {"num_warps": 8}


@dataclass(frozen=True)
class DenseVariant:
    """The compile-time arguments of the three kernels, by their own names; each takes what it names."""

    CE: bool
    TWO: bool
    SQUARE: bool
    AT_ONE: bool
    GRADIENT: bool
    IN_PLACE: bool
    SOFTCAP: bool
    CODES: bool
    NUMBERS: bool
    SLOTS: int
    COEFS: int
    PRECISION: str
    M: int
    BLOCK: int
    BLOCK_R: int

    def of(self, kernel: triton.JITFunction) -> dict[str, object]:
        """The arguments that this kernel takes."""
        return {name: value for name, value in asdict(self).items() if name in kernel.arg_names}


def dense_variant_of(
    terms: LossTerms,
    *,
    n_slots: int,
    n_coefs: int,
    gradient: bool,
    in_place: bool,
    codes: bool,
    numbers: bool,
    even: bool,
    precision: str,
) -> DenseVariant:
    """The variant that computes `terms`; even: whether the row stride and the vocabulary are multiples of 16, so that
    accesses are wide. What addresses elements one by one keeps more of a tile in registers, so its tile is smaller."""
    two = terms.ce_wanted and terms.temperature != 1
    return DenseVariant(
        CE=terms.ce_wanted,
        TWO=two,
        SQUARE=two and terms.temperature == 2,
        AT_ONE=terms.temperature == 1,
        GRADIENT=gradient,
        IN_PLACE=in_place,
        SOFTCAP=terms.softcap is not None,
        CODES=codes,
        NUMBERS=numbers,
        SLOTS=triton.next_power_of_2(max(n_slots, 1)),
        COEFS=triton.next_power_of_2(n_coefs),
        PRECISION=precision,
        M=64 if even else 32,
        BLOCK=64 if even else 32,
        BLOCK_R=32,
    )


def launch_dense(
    logits_NW: Tensor,
    gradient_NW: Tensor | None,
    teacher: PackedTeacher,
    labels_N: Tensor,
    counted_N: Tensor,
    upstream_N: Tensor,
    terms: LossTerms,
    *,
    vocab_size: int,
) -> LossOutputs:
    """The values of all rows; mutates gradient_NW, where it is given, to their gradient * upstream_N. As launch."""
    n_rows, n_columns = logits_NW.shape
    outputs = LossOutputs(*(logits_NW.new_empty(n_rows, dtype=torch.float32) for _ in range(3)))
    say_odd_rows(logits_NW)
    teacher = PackedTeacher(*(None if tensor is None else tensor.contiguous() for tensor in teacher))
    labels_N, counted_N, upstream_N = (tensor.contiguous() for tensor in (labels_N, counted_N, upstream_N))
    if gradient_NW is not None:
        _launch_rows(
            logits_NW, gradient_NW, teacher, labels_N, counted_N, upstream_N, terms, outputs, vocab_size,
            gradient=True,
        )  # fmt: skip
        return outputs
    chunk_rows = max(1, _SCRATCH_BYTES // (n_columns * logits_NW.element_size()))
    scratch_CW = logits_NW.new_empty(min(chunk_rows, n_rows), n_columns)
    for start in range(0, n_rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, n_rows))
        shared = ("table_256", "basis_Vr", "bias_V")
        chunk = PackedTeacher(*(x if x is None or name in shared else x[rows] for name, x in teacher._asdict().items()))
        _launch_rows(
            logits_NW[rows], scratch_CW[: rows.stop - start], chunk, labels_N[rows], counted_N[rows],
            upstream_N[rows], terms, LossOutputs(*(output[rows] for output in outputs)), vocab_size, gradient=False,
        )  # fmt: skip
    return outputs


def _launch_rows(
    logits_NW: Tensor,
    work_NW: Tensor,
    teacher: PackedTeacher,
    labels_N: Tensor,
    counted_N: Tensor,
    upstream_N: Tensor,
    terms: LossTerms,
    outputs: LossOutputs,
    vocab_size: int,
    *,
    gradient: bool,
) -> None:
    n_rows, n_columns = logits_NW.shape
    if n_rows == 0:
        return
    tail = (teacher.coefs_Nr, teacher.basis_Vr, teacher.bias_V)
    n_slots, n_coefs = teacher.ids_NK.shape[1], teacher.coefs_Nr.shape[1]
    variant = dense_variant_of(
        terms, n_slots=n_slots, n_coefs=n_coefs, gradient=gradient,
        in_place=work_NW.data_ptr() == logits_NW.data_ptr(), codes=teacher.table_256 is not None,
        numbers=teacher.scale_N is not None, even=work_NW.stride(0) % 16 == vocab_size % 16 == 0,
        precision="tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    )  # fmt: skip
    head_NK = logits_NW.new_empty(n_rows, n_slots, dtype=torch.float32)
    row_numbers_XN = logits_NW.new_empty(N_ROW_NUMBERS, n_rows, dtype=torch.float32)
    entries = (teacher.ids_NK, teacher.values_NK, *(labels_N if t is None else t for t in teacher.entries[2:]))
    beta, softcap = 1.0 / terms.temperature, terms.softcap or 0.0
    weights = (beta, terms.temperature, terms.alpha, terms.label_smoothing, terms.z_loss, softcap)
    mark_rows_kernel[(n_rows,)](
        logits_NW, work_NW, head_NK, row_numbers_XN, *entries, labels_N, counted_N, n_rows, vocab_size, n_slots,
        logits_NW.stride(0), work_NW.stride(0), beta, softcap, **(variant.of(mark_rows_kernel) | ROW_TILE),
        **ROW_OPTIONS,
    )  # fmt: skip
    dense_rows_kernel[(triton.cdiv(n_rows, variant.M),)](
        work_NW, row_numbers_XN, *tail, counted_N, upstream_N, n_rows, vocab_size, n_coefs, work_NW.stride(0),
        *weights, **variant.of(dense_rows_kernel), **BLOCK_OPTIONS,
    )  # fmt: skip
    finish_rows_kernel[(n_rows,)](
        work_NW, head_NK, row_numbers_XN, *entries, *tail, labels_N, counted_N, upstream_N, *outputs, n_rows,
        vocab_size, n_columns, n_slots, n_coefs, work_NW.stride(0), *weights,
        **(variant.of(finish_rows_kernel) | ROW_TILE), **ROW_OPTIONS,
    )  # fmt: skip
