"""topk_with_tail as one Triton program a row: the k largest logits and both moments of the others, in two passes.

The first pass keeps, of every BLOCK-th column, the largest: V / BLOCK columns are a group, and no reduction happens in
the loop. The k + 1 largest logits lie in the k + 1 groups with the largest maxima, so only those groups' columns are
looked at again; which groups, and then which columns, is found by bisecting the bits of an order-preserving integer.
What is chosen is sorted. The second pass sums over what lies below the k-th, relative to the tail's own peak, and
counts what equals it: those that are not among the k belong to the tail.

Nothing is written but the results and a scratch row of SLOTS integers. Row addresses are 64 bits wide. It has been run
by the interpreter and compiled for sm_90, not run on a GPU. Letters: N rows, K entries kept, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitstore_kernels.triton_launch import say_odd_rows
from logitstore_kernels.triton_math import LOG2E, logaddexp, logsumexp

NEG_INF = tl.constexpr(float("-inf"))
LEAST = tl.constexpr(-(2**31))
MAX_CANDIDATES = 4096  # columns of the chosen groups that one program holds in registers
_MAX_BLOCK = 8192
_NARROW_BLOCK = 4096
_TILE = 2048
# The low bits of a float32 that say nothing of a value of a narrower type.
_UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def order_key(x, SHIFT: tl.constexpr):
    """An int32 that orders as x does, equal for equal x; NaN as -inf."""
    x = tl.where(x == x, x, NEG_INF)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def key_of_rank(key, rank, SHIFT: tl.constexpr):
    """The rank-th largest key, counted from 1, by bisection."""
    found = tl.where(tl.sum((key >= 0).to(tl.int32), axis=0) >= rank, 0, LEAST >> SHIFT)
    for step in range(0, 31 - SHIFT):
        larger = found + (1 << (30 - SHIFT - step))
        found = tl.where(tl.sum((key >= larger).to(tl.int32), axis=0) >= rank, larger, found)
    return found


@triton.jit
def store_largest(scratch_ptr, value, key, rank, SHIFT: tl.constexpr):
    """scratch[0:rank] = the values that belong to the `rank` largest keys, in no order."""
    limit = key_of_rank(key, rank, SHIFT)
    above = key > limit
    equal = key == limit
    n_above = tl.sum(above.to(tl.int32), axis=0)
    place = tl.where(above, tl.cumsum(above.to(tl.int32), axis=0), n_above + tl.cumsum(equal.to(tl.int32), axis=0)) - 1
    tl.store(scratch_ptr + place, value, mask=(above | equal) & (place < rank))


@triton.jit
def topk_with_tail_kernel(
    logits_ptr,  # [N, W], rows logits_stride elements apart
    scratch_ptr,  # [N, SLOTS] int32
    ids_ptr,  # [N, K] int32
    logps_ptr,  # [N, K] float32
    mass_ptr,  # [N] float32, and so the one below
    half_ptr,
    vocab_size,
    k,
    logits_stride,
    SHIFT: tl.constexpr,
    SLOTS: tl.constexpr,  # k + 1 rounded up to a power of 2
    TILES: tl.constexpr,  # V / BLOCK rounded up to a power of 2
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,  # of the second pass
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    scratch_row = scratch_ptr + row * SLOTS
    n_wanted = tl.minimum(k + 1, vocab_size)

    best = tl.full((BLOCK,), NEG_INF, tl.float32)
    column = tl.arange(0, BLOCK)
    n_full = vocab_size // BLOCK * BLOCK
    for start in range(0, n_full, BLOCK):
        x = tl.load(logits_row + start + column, eviction_policy="evict_last").to(tl.float32)
        best = tl.maximum(best, tl.where(x == x, x, NEG_INF))
    if n_full < vocab_size:
        x = tl.load(logits_row + n_full + column, mask=n_full + column < vocab_size, other=NEG_INF).to(tl.float32)
        best = tl.maximum(best, tl.where(x == x, x, NEG_INF))
    group_key = tl.where(column < vocab_size, order_key(best, SHIFT), LEAST >> SHIFT)
    store_largest(scratch_row, column, group_key, n_wanted, SHIFT)
    tl.debug_barrier()

    candidate = tl.arange(0, SLOTS * TILES)
    place = candidate // TILES
    group = tl.load(scratch_row + place, mask=place < n_wanted, other=vocab_size)
    ids = group + candidate % TILES * BLOCK
    there = (place < n_wanted) & (ids < vocab_size)
    x = tl.load(logits_row + ids, mask=there, other=NEG_INF).to(tl.float32)
    key = tl.where(there, order_key(x, SHIFT), LEAST >> SHIFT)
    tl.debug_barrier()  # the groups are read before the columns are written over them
    store_largest(scratch_row, ids, key, n_wanted, SHIFT)
    tl.debug_barrier()

    slot = tl.arange(0, SLOTS)
    chosen = slot < n_wanted
    ids_K = tl.load(scratch_row + slot, mask=chosen, other=0)
    x_K = tl.load(logits_row + ids_K, mask=chosen, other=NEG_INF).to(tl.float32)
    # By value downwards, equal ones by id upwards.
    packed_K = (order_key(x_K, 0).to(tl.int64) << 32) | (0x7FFFFFFF - ids_K).to(tl.int64)
    packed_K = tl.sort(tl.where(chosen, packed_K, -(2**63)), descending=True)
    ids_K = 0x7FFFFFFF - (packed_K & 0x7FFFFFFF).to(tl.int32)
    x_K = tl.load(logits_row + ids_K, mask=chosen, other=NEG_INF).to(tl.float32)
    entry_K = slot < k
    peak = tl.max(tl.where(slot == 0, x_K, NEG_INF), axis=0)
    least = tl.max(tl.where(slot == k - 1, x_K, NEG_INF), axis=0)
    tail_peak = tl.max(tl.where(slot == k, x_K, NEG_INF), axis=0)
    tail_peak = tl.where(tail_peak == NEG_INF, peak, tail_peak)

    tile = tl.arange(0, TILE)
    roots, squares = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    n_equal = tl.zeros((TILE,), tl.int32)
    n_full = vocab_size // TILE * TILE
    for start in range(0, n_full, TILE):
        z = tl.load(logits_row + start + tile, eviction_policy="evict_first").to(tl.float32)
        root = tl.where(z >= least, 0.0, tl.exp2((z - tail_peak) * (0.5 * LOG2E)))
        roots += root
        squares += root * root
        n_equal += (z == least).to(tl.int32)
    if n_full < vocab_size:
        inside = n_full + tile < vocab_size
        z = tl.load(logits_row + n_full + tile, mask=inside, other=NEG_INF).to(tl.float32)
        root = tl.where((z >= least) | ~inside, 0.0, tl.exp2((z - tail_peak) * (0.5 * LOG2E)))
        roots += root
        squares += root * root
        n_equal += ((z == least) & inside).to(tl.int32)
    # Equals of the k-th that are not among the k: then it is the tail's peak, too.
    n_left = tl.sum(n_equal, axis=0) - tl.sum((entry_K & (x_K == least)).to(tl.int32), axis=0)
    n_left = tl.where(least == NEG_INF, 0, n_left).to(tl.float32)
    half = (tail_peak - peak) * 0.5 + tl.log(tl.sum(roots, axis=0) + n_left)
    mass = tail_peak - peak + tl.log(tl.sum(squares, axis=0) + n_left)

    head_K = x_K - peak
    lse = logaddexp(logsumexp(tl.where(entry_K, head_K, NEG_INF)), mass)
    logps_K = head_K - lse
    at_K = row * k + slot
    tl.store(ids_ptr + at_K, tl.where(head_K == NEG_INF, -1, ids_K), mask=entry_K)
    tl.store(logps_ptr + at_K, tl.where(logps_K > 0, 0.0, logps_K), mask=entry_K)
    mass -= lse
    tl.store(mass_ptr + row, tl.where(mass > 0, 0.0, mass))
    tl.store(half_ptr + row, half - lse * 0.5)


def topk_constants(vocab_size: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """The compile-time arguments of the kernel, by its own names, for k at most vocab_size."""
    slots = triton.next_power_of_2(k + 1)
    block = _NARROW_BLOCK if vocab_size <= 32 * _NARROW_BLOCK else _MAX_BLOCK
    block = min(block, max(128, slots, triton.next_power_of_2(vocab_size)))
    tiles = triton.next_power_of_2(triton.cdiv(vocab_size, block))
    return {
        "SHIFT": _UNUSED_BITS[dtype],
        "SLOTS": slots,
        "TILES": tiles,
        "BLOCK": block,
        "TILE": min(_TILE, block),
    }


def topk_options(constants: dict[str, int]) -> dict[str, int]:
    """Warps and registers with which the kernel of these constants keeps everything in registers, in Triton 3.6 to 3.9.

    A limit of 128 makes the assembler spill what it fits into 112 without one.
    """
    return {"num_warps": 16} if constants["BLOCK"] > _NARROW_BLOCK else {"num_warps": 8, "maxnreg": 160}


def fits_topk(vocab_size: int, k: int) -> bool:
    """Whether one program can hold the columns that k entries are chosen from."""
    constants = topk_constants(vocab_size, k, torch.float32)
    return constants["SLOTS"] * constants["TILES"] <= MAX_CANDIDATES and constants["SLOTS"] <= constants["BLOCK"]


def launch_topk(logits_NW: Tensor, k: int, *, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids_NK, logps_NK, tail_logmass_N, tail_logmoment_half_N) as topk_with_tail returns them, for k <= vocab_size.

    logits_NW: [N, W] with unit column stride, 16 or 32 bits a number. Columns at or beyond vocab_size are not read.
    """
    n_rows = logits_NW.shape[0]
    constants = topk_constants(vocab_size, k, logits_NW.dtype)
    ids_NK = logits_NW.new_empty(n_rows, k, dtype=torch.int32)
    logps_NK = logits_NW.new_empty(n_rows, k, dtype=torch.float32)
    mass_N, half_N = (logits_NW.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    if n_rows:
        say_odd_rows(logits_NW)
        scratch = logits_NW.new_empty(n_rows, constants["SLOTS"], dtype=torch.int32)
        with torch.cuda.device_of(logits_NW):  # where Triton launches, whatever the tensors say; nothing on a CPU
            topk_with_tail_kernel[(n_rows,)](
                logits_NW, scratch, ids_NK, logps_NK, mass_N, half_N, vocab_size, k, logits_NW.stride(0),
                **constants, **topk_options(constants),
            )  # fmt: skip
    return ids_NK, logps_NK, mass_N, half_N
