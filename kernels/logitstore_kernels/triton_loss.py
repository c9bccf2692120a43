"""The distillation loss of a row as one Triton program: decode, temper, two passes over the logits, gradient in place.

A program owns a row of a work buffer: the logits themselves (in place), the gradient (out of place), or scratch (no
gradient). Tails that need the student's own tail mass first set the K kept logits to -inf there, so that what is
streamed is the tail alone and its log-sum-exp keeps its digits; 1 - sum(q) is never formed. The first pass reduces the
row online, the second writes the gradient, and then the K + 1 columns that differ from the dense formula are written
over it from gathered float32 logits. Only barriers order those stores: Triton does not know that they alias.

Computes in float32. Row addresses are 64 bits wide. An id or label outside the vocabulary reads nothing and makes the
row NaN. Full tiles are not masked, so that they load 128 bits a thread where the row stride is a multiple of 16. The
second pass walks backwards: what the first read last is what a cache still holds.

Letters: N rows, K entries kept, V vocabulary, W columns (W >= V). T is the temperature, beta = 1 / T.
"""

import triton
import triton.language as tl

from logitstore_kernels.triton_math import LOG2E, log1mexp, logaddexp, logsumexp, tanh

NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def capped(z, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(z / softcap); a token that is ruled out, at -inf, stays so."""
    if SOFTCAP:
        return tl.where(z == NEG_INF, z, softcap * tanh(z / softcap))
    else:
        return z


@triton.jit
def slope_of_cap(x, softcap, SOFTCAP: tl.constexpr):
    """d x / d z of x = softcap * tanh(z / softcap)."""
    if SOFTCAP:
        share = x / softcap
        return tl.where(x == NEG_INF, 1.0, 1 - share * share)
    else:
        return 1.0


@triton.jit
def finite_or_zero(x):
    return tl.where(x == NEG_INF, 0.0, x)


@triton.jit
def times_log_ratio(logt, logq):
    """t * (ln t - ln q), 0 where t = 0."""
    t = tl.exp(logt)
    return tl.where(t == 0, 0.0, t * (logt - logq))


@triton.jit
def decoded_logprobs(
    values_ptr, table_ptr, scale_ptr, offset_ptr, row, slot_at_K, entry_K, CODES: tl.constexpr, NUMBERS: tl.constexpr
):
    """ln p at T = 1 of the row's entries as stored, -inf in pads."""
    if CODES:
        codes_K = tl.load(values_ptr + slot_at_K, mask=entry_K, other=0).to(tl.int32)
        logp_K = tl.load(table_ptr + codes_K, mask=entry_K, other=0.0)
        if NUMBERS:
            logp_K = tl.load(scale_ptr + row) * logp_K + tl.load(offset_ptr + row)
    else:
        logp_K = tl.load(values_ptr + slot_at_K, mask=entry_K, other=0.0).to(tl.float32)
    return tl.where(entry_K, logp_K, NEG_INF)


@triton.jit
def tempered(logp_K, logmass, half_ptr, row, n_tail, beta, TAIL: tl.constexpr, AT_ONE: tl.constexpr):
    """(ln t of the entries, ln t of the tail) at T: the same as tempering.temper_teacher."""
    if TAIL == "sampled":
        return logp_K, NEG_INF
    else:
        if TAIL == "renormalised":
            head_K = logp_K * beta
            return head_K - logsumexp(head_K), NEG_INF
        else:
            head_K = (logp_K + (log1mexp(logmass) - logsumexp(logp_K))) * beta
            log_tail = logmass
            if not AT_ONE:
                half = tl.load(half_ptr + row).to(tl.float32)
                log_n = tl.log(tl.maximum(n_tail, 1).to(tl.float32))
                between = half + (2 * beta - 1) * (logmass - half)
                log_tail = tl.where(beta >= 0.5, between, log_n + 2 * beta * (half - log_n))
            log_tail = tl.where((logmass == NEG_INF) | (n_tail <= 0), NEG_INF, log_tail)
            log_normaliser = logaddexp(logsumexp(head_K), log_tail)
            if TAIL == "dropped":
                return head_K - log_normaliser, NEG_INF
            else:
                return head_K - log_normaliser, log_tail - log_normaliser


@triton.jit
def exponentials(x, peak, beta, TWO: tl.constexpr, SQUARE: tl.constexpr):
    """(e^((x - peak) beta), e^(x - peak)); the second is the square of the first at T = 2, or the first itself."""
    e_T = tl.exp2((x - peak) * (beta * LOG2E))
    if TWO:
        if SQUARE:
            return e_T, e_T * e_T
        else:
            return e_T, tl.exp2((x - peak) * LOG2E)
    else:
        return e_T, e_T


@triton.jit
def stream_tile(
    x, peak, sum_T, sum_1, total, n_ruled_out, beta, TWO: tl.constexpr, SQUARE: tl.constexpr, TOTAL: tl.constexpr
):
    """One tile into the row's running statistics: the peak, both sums of exponentials, and the sum of the logits."""
    new_peak = tl.maximum(peak, tl.max(x, axis=0))
    finite_peak = finite_or_zero(new_peak)
    e_T, e_1 = exponentials(x, finite_peak, beta, TWO, SQUARE)
    old_T, old_1 = exponentials(peak, finite_peak, beta, TWO, SQUARE)
    sum_T = sum_T * old_T + tl.sum(e_T, axis=0)
    if TWO:
        sum_1 = sum_1 * old_1 + tl.sum(e_1, axis=0)
    if TOTAL:
        total += tl.sum(finite_or_zero(x), axis=0)
        n_ruled_out += tl.sum((x == NEG_INF).to(tl.int32), axis=0)
    return new_peak, sum_T, sum_1, total, n_ruled_out


@triton.jit
def gradient_tile(
    x, peak, beta, scale_T, scale_1, constant, softcap, TWO: tl.constexpr, SQUARE: tl.constexpr, SOFTCAP: tl.constexpr
):
    """scale_T e^((x - peak) beta) + scale_1 e^(x - peak) - constant, times the slope of the softcap."""
    e_T, e_1 = exponentials(x, peak, beta, TWO, SQUARE)
    gradient = e_T * scale_T - constant
    if TWO:
        gradient += e_1 * scale_1
    return gradient * slope_of_cap(x, softcap, SOFTCAP)


@triton.jit
def zero_columns(row_ptr, first, end, BLOCK: tl.constexpr):
    """Zeros in columns [first, end)."""
    for start in range(first, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + column, tl.zeros((BLOCK,), tl.float32), mask=column < end)


@triton.jit
def copy_columns(source_ptr, target_ptr, n_full, n_columns, BLOCK: tl.constexpr):
    for start in range(0, n_full, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(target_ptr + column, tl.load(source_ptr + column))
    if n_full < n_columns:
        column = n_full + tl.arange(0, BLOCK)
        inside = column < n_columns
        tl.store(target_ptr + column, tl.load(source_ptr + column, mask=inside, other=0.0), mask=inside)


@triton.jit
def distillation_loss_kernel(
    logits_ptr,  # [N, W], rows logits_stride elements apart
    work_ptr,  # [N, W] to own, or [programs, V] without a gradient; unused where neither is needed
    ids_ptr,  # [N, K] int32 or int64
    values_ptr,  # [N, K] uint8 codes or floats
    table_ptr,  # [256] float32
    scale_ptr,  # [N] float32
    offset_ptr,  # [N] float32
    logmass_ptr,  # [N] float32
    half_ptr,  # [N] float32, unread at T = 1
    labels_ptr,  # [N] int32 or int64
    counted_ptr,  # [N] uint8
    upstream_ptr,  # [N] float32, what the gradient of each row is multiplied with
    loss_ptr,  # [N] float32, and so the two below
    kl_ptr,
    ce_ptr,
    n_rows,
    vocab_size,
    n_columns,
    n_slots,
    logits_stride,
    work_stride,
    beta,
    temperature,
    alpha,
    label_smoothing,
    z_loss,
    softcap,
    TAIL: tl.constexpr,
    KL: tl.constexpr,
    CE: tl.constexpr,
    TWO: tl.constexpr,  # exponentials at two temperatures
    SQUARE: tl.constexpr,  # of which one is the other's square
    AT_ONE: tl.constexpr,
    GRADIENT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    CODES: tl.constexpr,
    NUMBERS: tl.constexpr,  # scale and offset
    SLOTS: tl.constexpr,  # K rounded up to a power of 2
    BLOCK: tl.constexpr,
):
    TAIL_ALONE: tl.constexpr = KL and (TAIL == "bucket" or TAIL == "uniform")
    TOTAL: tl.constexpr = SMOOTHING or (KL and TAIL == "uniform")
    n_full = vocab_size // BLOCK * BLOCK
    for row_32 in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(row_32, tl.int64)
        logits_row = logits_ptr + row * logits_stride
        work_row = work_ptr + row * work_stride if GRADIENT else work_ptr + tl.program_id(0).to(tl.int64) * work_stride
        loss, kl, ce = 0.0, 0.0, 0.0
        if tl.load(counted_ptr + row) == 0:
            if GRADIENT:
                zero_columns(work_row, 0, n_columns, BLOCK)
        else:
            label = tl.load(labels_ptr + row).to(tl.int64)
            label_inside = (label >= 0) & (label < vocab_size)
            label_x = tl.load(logits_row + label, mask=label_inside, other=float("nan")).to(tl.float32)
            label_x = capped(label_x, softcap, SOFTCAP)

            slot = tl.arange(0, SLOTS)
            slot_at_K = row * n_slots + slot
            ids_K = tl.load(ids_ptr + slot_at_K, mask=slot < n_slots, other=-1).to(tl.int64)
            entry_K = ids_K >= 0
            inside_K = entry_K & (ids_K < vocab_size)
            n_entries = tl.sum(entry_K.to(tl.int32), axis=0)
            if KL:
                head_K = tl.load(logits_row + ids_K, mask=inside_K, other=float("nan")).to(tl.float32)
                head_K = tl.where(entry_K, capped(head_K, softcap, SOFTCAP), NEG_INF)

            source_row = logits_row
            if TAIL_ALONE:
                if not IN_PLACE:
                    tl.debug_barrier()  # scratch may still be read for the row before
                    copy_columns(logits_row, work_row, n_full, vocab_size, BLOCK)
                tl.debug_barrier()  # the kept logits are read before and copied before they are ruled out
                tl.store(work_row + ids_K, tl.full((SLOTS,), NEG_INF, tl.float32), mask=inside_K)
                tl.debug_barrier()
                source_row = work_row

            peak, sum_T, sum_1, total, n_ruled_out = float("-inf"), 0.0, 0.0, 0.0, 0
            for start in range(0, n_full, BLOCK):
                x = tl.load(source_row + start + tl.arange(0, BLOCK), eviction_policy="evict_last").to(tl.float32)
                peak, sum_T, sum_1, total, n_ruled_out = stream_tile(
                    capped(x, softcap, SOFTCAP), peak, sum_T, sum_1, total, n_ruled_out, beta, TWO, SQUARE, TOTAL
                )
            if n_full < vocab_size:
                column = n_full + tl.arange(0, BLOCK)
                x = tl.load(source_row + column, mask=column < vocab_size, other=NEG_INF).to(tl.float32)
                peak, sum_T, sum_1, total, n_ruled_out = stream_tile(
                    capped(x, softcap, SOFTCAP), peak, sum_T, sum_1, total, n_ruled_out, beta, TWO, SQUARE, TOTAL
                )
                n_ruled_out -= n_full + BLOCK - vocab_size

            # From here on logs are relative to the row's peak, streamed sums to that of what was streamed.
            row_peak = peak
            if TAIL_ALONE:
                row_peak = tl.maximum(peak, tl.max(head_K, axis=0))
                n_ruled_out -= n_entries
                peak = tl.where(peak == NEG_INF, row_peak, peak)
            stream_peak = peak - row_peak
            if TOTAL:
                total = tl.where(n_ruled_out > 0, NEG_INF, total)
            lse_T = stream_peak * beta + tl.log(sum_T)
            lse_1 = lse_T
            if TWO:
                lse_1 = stream_peak + tl.log(sum_1)
            tail_lse_T = lse_T
            if KL:
                head_K = head_K - row_peak
            if TAIL_ALONE:
                lse_T = logaddexp(lse_T, logsumexp(head_K * beta))
                lse_1 = lse_T
                if TWO:
                    lse_1 = logaddexp(stream_peak + tl.log(sum_1), logsumexp(head_K))
            label_x -= row_peak

            row_scale = 1.0
            if GRADIENT:
                row_scale = tl.load(upstream_ptr + row)
            scale_T, scale_1, constant = 0.0, 0.0, 0.0
            label_gradient = 0.0
            if KL:
                n_tail = vocab_size - n_entries
                logp_K = decoded_logprobs(
                    values_ptr, table_ptr, scale_ptr, offset_ptr, row, slot_at_K, entry_K, CODES, NUMBERS
                )
                logt_K, logt_tail = tempered(
                    logp_K, tl.load(logmass_ptr + row).to(tl.float32), half_ptr, row, n_tail, beta, TAIL, AT_ONE
                )
                logq_K = head_K * beta - lse_T
                kl = tl.sum(times_log_ratio(logt_K, logq_K), axis=0)
                if TAIL == "bucket":
                    kl += times_log_ratio(logt_tail, tail_lse_T - lse_T)
                if TAIL == "uniform":
                    n_each = tl.maximum(n_tail, 1).to(tl.float32)
                    mean_logq = (total / n_each - row_peak) * beta - lse_T
                    t_tail = tl.exp(logt_tail)
                    kl += tl.where(t_tail == 0, 0.0, t_tail * (logt_tail - tl.log(n_each) - mean_logq))

                kl_scale = alpha * temperature * row_scale
                t_K = tl.exp(logt_K)
                q_K = tl.exp(logq_K)
                scale_T = tl.exp(stream_peak * beta - lse_T)
                if TAIL == "dropped" or TAIL == "sampled":
                    head_mass = tl.sum(t_K, axis=0)
                    q_K *= head_mass
                    scale_T *= head_mass
                if TAIL == "bucket":
                    scale_T -= tl.exp(logt_tail) / tl.maximum(sum_T, 1.0)
                scale_T *= kl_scale
                head_gradient_K = (q_K - t_K) * kl_scale
                if TAIL == "uniform":
                    constant = tl.exp(logt_tail) / n_each * kl_scale
            if CE:
                all_mean = 0.0
                lse = lse_1 + row_peak
                ce = lse_1 - label_x
                if SMOOTHING:
                    if TAIL_ALONE:
                        total += tl.sum(tl.where(entry_K, head_K + row_peak, 0.0), axis=0)
                    all_mean = total / vocab_size
                    ce = (1 - label_smoothing) * ce + label_smoothing * (lse - all_mean)
                ce += z_loss * lse * lse

                ce_scale = (1 - alpha) * row_scale
                p_scale = ce_scale * (1 + 2 * z_loss * lse)
                each = ce_scale * label_smoothing / vocab_size
                constant += each
                scale_1 = tl.exp(stream_peak - lse_1) * p_scale
                label_gradient = (1 - label_smoothing) * ce_scale
                if not TWO:
                    scale_T += scale_1
            loss = tl.where(alpha > 0, alpha * temperature * temperature * kl, 0.0)
            loss += tl.where(alpha < 1, (1 - alpha) * ce, 0.0)

            if GRADIENT:
                # The columns that the dense formula does not hold for, before it, so that little is kept meanwhile.
                is_label_K = entry_K & (ids_K == label)
                if CE:
                    label_x = label_x + row_peak
                    at_label = gradient_tile(label_x, peak, beta, scale_T, scale_1, constant, 0.0, TWO, SQUARE, False)
                    at_label = (at_label - label_gradient) * slope_of_cap(label_x, softcap, SOFTCAP)
                    write_label = label_inside
                    if KL:
                        write_label = label_inside & (tl.sum(is_label_K.to(tl.int32), axis=0) == 0)
                if KL:
                    if CE:
                        head_gradient_K += tl.exp(head_K - lse_1) * p_scale - each
                        head_gradient_K = tl.where(is_label_K, head_gradient_K - label_gradient, head_gradient_K)
                    head_gradient_K *= slope_of_cap(head_K + row_peak, softcap, SOFTCAP)
                tl.debug_barrier()  # every gathered logit has been read
                if n_full < vocab_size:
                    column = n_full + tl.arange(0, BLOCK)
                    in_vocabulary = column < vocab_size
                    x = tl.load(source_row + column, mask=in_vocabulary, other=0.0).to(tl.float32)
                    gradient = gradient_tile(
                        capped(x, softcap, SOFTCAP),
                        peak,
                        beta,
                        scale_T,
                        scale_1,
                        constant,
                        softcap,
                        TWO,
                        SQUARE,
                        SOFTCAP,
                    )
                    tl.store(work_row + column, gradient.to(work_ptr.dtype.element_ty), mask=in_vocabulary)
                for tile in range(n_full // BLOCK):
                    column = n_full - (tile + 1) * BLOCK + tl.arange(0, BLOCK)
                    x = tl.load(source_row + column, eviction_policy="evict_first").to(tl.float32)
                    gradient = gradient_tile(
                        capped(x, softcap, SOFTCAP),
                        peak,
                        beta,
                        scale_T,
                        scale_1,
                        constant,
                        softcap,
                        TWO,
                        SQUARE,
                        SOFTCAP,
                    )
                    tl.store(work_row + column, gradient.to(work_ptr.dtype.element_ty), eviction_policy="evict_first")
                zero_columns(work_row, vocab_size, n_columns, BLOCK)
                tl.debug_barrier()  # the columns below were just written by other threads
                if CE:
                    tl.store(work_row + label, at_label.to(work_ptr.dtype.element_ty), mask=write_label)
                if KL:
                    tl.store(work_row + ids_K, head_gradient_K.to(work_ptr.dtype.element_ty), mask=inside_K)
        tl.store(loss_ptr + row, loss)
        tl.store(kl_ptr + row, kl)
        tl.store(ce_ptr + row, ce)
