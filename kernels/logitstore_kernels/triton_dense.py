"""The distillation loss with a dense tail as three Triton kernels: mark the rows, stream them in blocks, finish them.

The tail's logits of a token are a product over r coefficients, so rows are streamed together: a block of rows shares
every piece of the basis that it reads. mark_rows_kernel gathers the K kept logits and puts NaN in their place, which no
tail token has; dense_rows_kernel reduces the tails of student and teacher side by side and writes the dense gradient,
computing the teacher's logits in both passes rather than keeping [N, V] of them; finish_rows_kernel works out the
values and writes the K + 1 columns that differ. A NaN that was in a row before is one mark too many, and makes the row
NaN.

Computes in float32; the products follow torch.set_float32_matmul_precision: three TF32 products at "highest".

Letters: N rows, M rows of a block, K entries kept, V vocabulary, r coefficients. T is the temperature, beta = 1 / T.
"""

import triton
import triton.language as tl

from logitstore_kernels.triton_loss import (
    NEG_INF,
    capped,
    copy_columns,
    decoded_logprobs,
    exponentials,
    finite_or_zero,
    slope_of_cap,
    tempered,
    times_log_ratio,
    zero_columns,
)
from logitstore_kernels.triton_math import logaddexp, logsumexp

# What the kernels tell each other of a row: the first index of row_numbers [N_ROW_NUMBERS, N] float32.
HEAD_PEAK = tl.constexpr(0)  # the largest kept logit
HEAD_LSE_T = tl.constexpr(1)  # ln of the sum over the entries of e^((z - HEAD_PEAK) beta)
HEAD_LSE_1 = tl.constexpr(2)
LOGT_TAIL = tl.constexpr(3)  # ln of the teacher's tail mass at T
N_ENTRIES = tl.constexpr(4)
LABEL = tl.constexpr(5)  # z of the label
ROW_PEAK = tl.constexpr(6)  # the row's largest logit
LSE_T = tl.constexpr(7)  # ln of the sum over the vocabulary of e^((z - ROW_PEAK) beta)
LSE_1 = tl.constexpr(8)
SHAPE_LSE = tl.constexpr(9)  # ln of the sum over the tail of e^g, g a tail logit of the teacher at T
SHAPE_KL = tl.constexpr(10)  # what the shape adds to LOGT_TAIL + LSE_T to make the tail's mean log ratio
TAIL_TOTAL = tl.constexpr(11)  # sum over the tail of z, for label smoothing
N_ROW_NUMBERS = 12


@triton.jit
def mark_rows_kernel(
    logits_ptr,
    work_ptr,
    head_ptr,  # [N, K] float32, the kept logits
    row_numbers_ptr,
    ids_ptr,
    values_ptr,
    table_ptr,
    scale_ptr,
    offset_ptr,
    logmass_ptr,
    half_ptr,
    labels_ptr,
    counted_ptr,
    n_rows,
    vocab_size,
    n_slots,
    logits_stride,
    work_stride,
    beta,
    softcap,
    AT_ONE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CODES: tl.constexpr,
    NUMBERS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: the kept logits and what they sum to, and NaN in their place in the work row."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(counted_ptr + row) != 0:
        logits_row, work_row = logits_ptr + row * logits_stride, work_ptr + row * work_stride
        slot = tl.arange(0, SLOTS)
        slot_at_K = row * n_slots + slot
        ids_K = tl.load(ids_ptr + slot_at_K, mask=slot < n_slots, other=-1).to(tl.int64)
        entry_K = ids_K >= 0
        inside_K = entry_K & (ids_K < vocab_size)
        n_entries = tl.sum(entry_K.to(tl.int32), axis=0)
        head_K = tl.load(logits_row + ids_K, mask=inside_K, other=float("nan")).to(tl.float32)
        head_K = tl.where(entry_K, capped(head_K, softcap, SOFTCAP), NEG_INF)
        label = tl.load(labels_ptr + row).to(tl.int64)
        label_inside = (label >= 0) & (label < vocab_size)
        label_x = tl.load(logits_row + label, mask=label_inside, other=float("nan")).to(tl.float32)

        logp_K = decoded_logprobs(values_ptr, table_ptr, scale_ptr, offset_ptr, row, slot_at_K, entry_K, CODES, NUMBERS)
        logmass = tl.load(logmass_ptr + row).to(tl.float32)
        _, logt_tail = tempered(logp_K, logmass, half_ptr, row, vocab_size - n_entries, beta, "dense", AT_ONE)

        tl.store(head_ptr + slot_at_K, head_K, mask=slot < n_slots)
        numbers = row_numbers_ptr + row
        peak = tl.max(head_K, axis=0)
        head_K -= finite_or_zero(peak)
        tl.store(numbers + HEAD_PEAK * n_rows, peak)
        tl.store(numbers + HEAD_LSE_T * n_rows, logsumexp(head_K * beta))
        tl.store(numbers + HEAD_LSE_1 * n_rows, logsumexp(head_K))
        tl.store(numbers + LOGT_TAIL * n_rows, logt_tail)
        tl.store(numbers + N_ENTRIES * n_rows, n_entries.to(tl.float32))
        tl.store(numbers + LABEL * n_rows, capped(label_x, softcap, SOFTCAP))
        if not IN_PLACE:
            copy_columns(logits_row, work_row, vocab_size // BLOCK * BLOCK, vocab_size, BLOCK)
        tl.debug_barrier()  # the kept logits are read before, and copied before, they are marked
        tl.store(work_row + ids_K, tl.full((SLOTS,), float("nan"), tl.float32), mask=inside_K)


@triton.jit
def shape_tile(
    coefs_ptr, basis_ptr, bias_ptr, row_M, has_tail_M, column, in_vocabulary, n_coefs, beta,
    PRECISION: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The teacher's tail logits at T of a block of rows and a tile of tokens [M, BLOCK], by blocks of coefficients."""
    product = tl.zeros((M, BLOCK), tl.float32)
    for start in range(0, n_coefs, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        coefs_Mr = tl.load(
            coefs_ptr + row_M[:, None] * n_coefs + r[None, :],
            mask=has_tail_M[:, None] & (r < n_coefs)[None, :],
            other=0.0,
        ).to(tl.float32)
        basis_Vr = tl.load(
            basis_ptr + column.to(tl.int64)[:, None] * n_coefs + r[None, :],
            mask=in_vocabulary[:, None] & (r < n_coefs)[None, :],
            other=0.0,
        ).to(tl.float32)
        product = tl.dot(coefs_Mr, tl.trans(basis_Vr), product, input_precision=PRECISION)
    bias_V = tl.load(bias_ptr + column, mask=in_vocabulary, other=0.0).to(tl.float32)
    return (product + bias_V[None, :]) * beta


@triton.jit
def dense_rows_kernel(
    work_ptr,
    row_numbers_ptr,
    coefs_ptr,  # [N, r] floats
    basis_ptr,  # [V, r] floats
    bias_ptr,  # [V] floats
    counted_ptr,
    upstream_ptr,
    n_rows,
    vocab_size,
    n_coefs,
    work_stride,
    beta,
    temperature,
    alpha,
    label_smoothing,
    z_loss,
    softcap,
    CE: tl.constexpr,
    TWO: tl.constexpr,
    SQUARE: tl.constexpr,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program M rows: both tails' statistics, then the gradient of every column by the formula of the tail."""
    row_M = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    inside_M = row_M < n_rows
    counted_M = tl.load(counted_ptr + row_M, mask=inside_M, other=0) != 0
    work_M = work_ptr + row_M * work_stride
    numbers_M = row_numbers_ptr + row_M
    logt_tail_M = tl.load(numbers_M + LOGT_TAIL * n_rows, mask=counted_M, other=NEG_INF)
    has_tail_M = counted_M & (logt_tail_M > NEG_INF)

    peak_M = tl.full((M,), NEG_INF, tl.float32)
    shape_peak_M = tl.full((M,), NEG_INF, tl.float32)
    sum_T_M = tl.zeros((M,), tl.float32)
    sum_1_M = tl.zeros((M,), tl.float32)
    shape_sum_M = tl.zeros((M,), tl.float32)
    gap_sum_M = tl.zeros((M,), tl.float32)
    total_M = tl.zeros((M,), tl.float32)
    n_marks_M = tl.zeros((M,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        in_vocabulary = column < vocab_size
        wanted_MV = counted_M[:, None] & in_vocabulary[None, :]
        x_MV = tl.load(work_M[:, None] + column[None, :], mask=wanted_MV, other=NEG_INF).to(tl.float32)
        tail_MV = wanted_MV & (x_MV == x_MV)
        n_marks_M += tl.sum((x_MV != x_MV).to(tl.float32), axis=1)
        x_MV = tl.where(tail_MV, capped(x_MV, softcap, SOFTCAP), NEG_INF)
        new_peak_M = tl.maximum(peak_M, tl.max(x_MV, axis=1))
        finite_peak_M = finite_or_zero(new_peak_M)
        e_T_MV, e_1_MV = exponentials(x_MV, finite_peak_M[:, None], beta, TWO, SQUARE)
        old_T_M, old_1_M = exponentials(peak_M, finite_peak_M, beta, TWO, SQUARE)
        sum_T_M = sum_T_M * old_T_M + tl.sum(e_T_MV, axis=1)
        if TWO:
            sum_1_M = sum_1_M * old_1_M + tl.sum(e_1_MV, axis=1)
        if CE:
            total_M += tl.sum(tl.where(tail_MV, x_MV, 0.0), axis=1)
        peak_moved_M = (finite_peak_M - finite_or_zero(peak_M)) * beta
        peak_M = new_peak_M

        g_MV = shape_tile(
            coefs_ptr, basis_ptr, bias_ptr, row_M, has_tail_M, column, in_vocabulary, n_coefs, beta, PRECISION, M,
            BLOCK, BLOCK_R,
        )  # fmt: skip
        g_MV = tl.where(tail_MV, g_MV, NEG_INF)
        # The gap of a token is its g less the shape's peak, less its z beta less the student's: small where they agree.
        new_shape_peak_M = tl.maximum(shape_peak_M, tl.max(g_MV, axis=1))
        finite_shape_peak_M = finite_or_zero(new_shape_peak_M)
        g_MV -= finite_shape_peak_M[:, None]
        e_g_MV = tl.exp(g_MV)
        old_M = tl.exp(shape_peak_M - finite_shape_peak_M)
        peaks_moved_M = peak_moved_M - (finite_shape_peak_M - finite_or_zero(shape_peak_M))
        gap_sum_M = tl.where(old_M == 0, 0.0, (gap_sum_M + shape_sum_M * peaks_moved_M) * old_M)
        gap_MV = g_MV - (x_MV - finite_peak_M[:, None]) * beta
        gap_sum_M += tl.sum(tl.where(e_g_MV == 0, 0.0, e_g_MV * gap_MV), axis=1)
        shape_sum_M = shape_sum_M * old_M + tl.sum(e_g_MV, axis=1)
        shape_peak_M = new_shape_peak_M

    head_peak_M = tl.load(numbers_M + HEAD_PEAK * n_rows, mask=counted_M, other=0.0)
    row_peak_M = tl.maximum(peak_M, head_peak_M)
    peak_M = tl.where(peak_M == NEG_INF, row_peak_M, peak_M)
    tail_peak_M, head_peak_M = peak_M - row_peak_M, head_peak_M - row_peak_M
    shape_lse_M = finite_or_zero(shape_peak_M) + tl.log(shape_sum_M)
    shape_kl_M = gap_sum_M / shape_sum_M - tl.log(shape_sum_M) - tail_peak_M * beta
    tail_lse_M = tail_peak_M * beta + tl.log(sum_T_M)
    head_lse_M = head_peak_M * beta + tl.load(numbers_M + HEAD_LSE_T * n_rows, mask=counted_M, other=0.0)
    lse_T_M = logaddexp(tail_lse_M, head_lse_M)
    lse_1_M = lse_T_M
    if TWO:
        head_lse_M = head_peak_M + tl.load(numbers_M + HEAD_LSE_1 * n_rows, mask=counted_M, other=0.0)
        lse_1_M = logaddexp(tail_peak_M + tl.log(sum_1_M), head_lse_M)
    n_entries_M = tl.load(numbers_M + N_ENTRIES * n_rows, mask=counted_M, other=0.0)
    lse_T_M = tl.where(n_marks_M == n_entries_M, lse_T_M, float("nan"))
    lse_1_M = tl.where(n_marks_M == n_entries_M, lse_1_M, float("nan"))
    tl.store(numbers_M + LSE_T * n_rows, lse_T_M, mask=counted_M)
    tl.store(numbers_M + LSE_1 * n_rows, lse_1_M, mask=counted_M)
    tl.store(numbers_M + SHAPE_LSE * n_rows, shape_lse_M, mask=counted_M)
    tl.store(numbers_M + SHAPE_KL * n_rows, shape_kl_M, mask=counted_M)
    tl.store(numbers_M + ROW_PEAK * n_rows, row_peak_M, mask=counted_M)
    tl.store(numbers_M + TAIL_TOTAL * n_rows, total_M, mask=counted_M)

    if GRADIENT:
        upstream_M = tl.load(upstream_ptr + row_M, mask=counted_M, other=0.0)
        kl_scale_M = alpha * temperature * upstream_M
        scale_T_M = tl.exp(tail_peak_M * beta - lse_T_M) * kl_scale_M
        shape_scale_M = tl.where(has_tail_M, tl.exp(logt_tail_M) * kl_scale_M, 0.0)
        scale_1_M = tl.zeros((M,), tl.float32)
        constant_M = tl.zeros((M,), tl.float32)
        if CE:
            ce_scale_M = (1 - alpha) * upstream_M
            scale_1_M = tl.exp(tail_peak_M - lse_1_M) * ce_scale_M * (1 + 2 * z_loss * (lse_1_M + row_peak_M))
            constant_M = ce_scale_M * label_smoothing / vocab_size
            if not TWO:
                scale_T_M += scale_1_M
        for start in range(0, vocab_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            in_vocabulary = column < vocab_size
            wanted_MV = counted_M[:, None] & in_vocabulary[None, :]
            x_MV = tl.load(work_M[:, None] + column[None, :], mask=wanted_MV, other=NEG_INF).to(tl.float32)
            g_MV = shape_tile(
                coefs_ptr, basis_ptr, bias_ptr, row_M, has_tail_M, column, in_vocabulary, n_coefs, beta, PRECISION,
                M, BLOCK, BLOCK_R,
            )  # fmt: skip
            x_MV = capped(tl.where(x_MV == x_MV, x_MV, NEG_INF), softcap, SOFTCAP)
            e_T_MV, e_1_MV = exponentials(x_MV, peak_M[:, None], beta, TWO, SQUARE)
            gradient_MV = e_T_MV * scale_T_M[:, None] - constant_M[:, None]
            if TWO:
                gradient_MV += e_1_MV * scale_1_M[:, None]
            # At entries, which are written later, g may exceed the tail's peak.
            shape_MV = tl.exp(tl.minimum(g_MV - shape_lse_M[:, None], 0.0))
            gradient_MV -= tl.where(has_tail_M[:, None], shape_MV * shape_scale_M[:, None], 0.0)
            gradient_MV *= slope_of_cap(x_MV, softcap, SOFTCAP)
            tl.store(
                work_M[:, None] + column[None, :],
                gradient_MV.to(work_ptr.dtype.element_ty),
                mask=wanted_MV,
            )


@triton.jit
def finish_rows_kernel(
    work_ptr,
    head_ptr,
    row_numbers_ptr,
    ids_ptr,
    values_ptr,
    table_ptr,
    scale_ptr,
    offset_ptr,
    logmass_ptr,
    half_ptr,
    coefs_ptr,
    basis_ptr,
    bias_ptr,
    labels_ptr,
    counted_ptr,
    upstream_ptr,
    loss_ptr,
    kl_ptr,
    ce_ptr,
    n_rows,
    vocab_size,
    n_columns,
    n_slots,
    n_coefs,
    work_stride,
    beta,
    temperature,
    alpha,
    label_smoothing,
    z_loss,
    softcap,
    CE: tl.constexpr,
    AT_ONE: tl.constexpr,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CODES: tl.constexpr,
    NUMBERS: tl.constexpr,
    SLOTS: tl.constexpr,
    COEFS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: the values, the gradient of the entries and the label, and zeros where no gradient is."""
    row = tl.program_id(0).to(tl.int64)
    work_row = work_ptr + row * work_stride
    loss, kl, ce = 0.0, 0.0, 0.0
    if tl.load(counted_ptr + row) == 0:
        if GRADIENT:
            zero_columns(work_row, 0, n_columns, BLOCK)
    else:
        numbers = row_numbers_ptr + row
        lse_T, lse_1 = tl.load(numbers + LSE_T * n_rows), tl.load(numbers + LSE_1 * n_rows)
        row_peak = tl.load(numbers + ROW_PEAK * n_rows)
        logt_tail, label_x = tl.load(numbers + LOGT_TAIL * n_rows), tl.load(numbers + LABEL * n_rows) - row_peak
        shape_lse = tl.load(numbers + SHAPE_LSE * n_rows)
        slot = tl.arange(0, SLOTS)
        slot_at_K = row * n_slots + slot
        ids_K = tl.load(ids_ptr + slot_at_K, mask=slot < n_slots, other=-1).to(tl.int64)
        entry_K = ids_K >= 0
        inside_K = entry_K & (ids_K < vocab_size)
        n_entries = tl.sum(entry_K.to(tl.int32), axis=0)
        head_K = tl.load(head_ptr + slot_at_K, mask=entry_K, other=NEG_INF) - row_peak
        logp_K = decoded_logprobs(values_ptr, table_ptr, scale_ptr, offset_ptr, row, slot_at_K, entry_K, CODES, NUMBERS)
        logmass = tl.load(logmass_ptr + row).to(tl.float32)
        logt_K, _ = tempered(logp_K, logmass, half_ptr, row, vocab_size - n_entries, beta, "dense", AT_ONE)
        t_tail = tl.exp(logt_tail)
        logq_K = head_K * beta - lse_T
        kl = tl.sum(times_log_ratio(logt_K, logq_K), axis=0)
        tail_kl = logt_tail + lse_T + tl.load(numbers + SHAPE_KL * n_rows)
        kl += tl.where(t_tail == 0, 0.0, t_tail * tail_kl)

        row_scale = 1.0
        if GRADIENT:
            row_scale = tl.load(upstream_ptr + row)
        kl_scale = alpha * temperature * row_scale
        gradient_K = (tl.exp(logq_K) - tl.exp(logt_K)) * kl_scale
        if CE:
            ce = lse_1 - label_x
            lse = lse_1 + row_peak
            if label_smoothing > 0:
                head_total = tl.sum(tl.where(entry_K, head_K + row_peak, 0.0), axis=0)
                all_mean = (tl.load(numbers + TAIL_TOTAL * n_rows) + head_total) / vocab_size
                ce = (1 - label_smoothing) * ce + label_smoothing * (lse - all_mean)
            ce += z_loss * lse * lse
            ce_scale = (1 - alpha) * row_scale
            p_scale = ce_scale * (1 + 2 * z_loss * lse)
            each = ce_scale * label_smoothing / vocab_size
            label_gradient = (1 - label_smoothing) * ce_scale
            gradient_K += tl.exp(head_K - lse_1) * p_scale - each
        loss = tl.where(alpha > 0, alpha * temperature * temperature * kl, 0.0)
        loss += tl.where(alpha < 1, (1 - alpha) * ce, 0.0)
        if GRADIENT:
            if CE:
                label = tl.load(labels_ptr + row).to(tl.int64)
                label_inside = (label >= 0) & (label < vocab_size)
                is_label_K = entry_K & (ids_K == label)
                write_label = label_inside & (tl.sum(is_label_K.to(tl.int32), axis=0) == 0)
                gradient_K = tl.where(is_label_K, gradient_K - label_gradient, gradient_K)
                r = tl.arange(0, COEFS)
                used = r < tl.where(t_tail > 0, n_coefs, 0)  # coefficients of a row without a tail may be anything
                safe_label = tl.where(label_inside, label, 0)
                coefs_r = tl.load(coefs_ptr + row * n_coefs + r, mask=used, other=0.0).to(tl.float32)
                basis_r = tl.load(basis_ptr + safe_label * n_coefs + r, mask=used, other=0.0).to(tl.float32)
                bias = tl.load(bias_ptr + safe_label).to(tl.float32)
                g = (tl.sum(coefs_r * basis_r, axis=0) + bias) * beta
                t_label = tl.where(t_tail == 0, 0.0, tl.exp(tl.minimum(logt_tail + g - shape_lse, 0.0)))
                at_label = (tl.exp(label_x * beta - lse_T) - t_label) * kl_scale
                at_label += tl.exp(label_x - lse_1) * p_scale - each - label_gradient
                at_label *= slope_of_cap(label_x + row_peak, softcap, SOFTCAP)
                tl.store(
                    work_row + label,
                    at_label.to(work_ptr.dtype.element_ty),
                    mask=write_label,
                )
            gradient_K *= slope_of_cap(head_K + row_peak, softcap, SOFTCAP)
            tl.store(work_row + ids_K, gradient_K.to(work_ptr.dtype.element_ty), mask=inside_K)
            zero_columns(work_row, vocab_size, n_columns, BLOCK)
    tl.store(loss_ptr + row, loss)
    tl.store(kl_ptr + row, kl)
    tl.store(ce_ptr + row, ce)
