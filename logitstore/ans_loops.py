"""Numbers to and from an ANS stream and a string of raw bits, as entropy_code.py describes them; compiled.

The state of a coder is an array [3] of uint64: the ANS state, how many words the stack holds, and the position in the
raw bits. A symbol is found through the 2^10 equal parts of its context's range: the part's first symbol, and then on
from there.

Letters: N numbers, C contexts, A alphabet.
"""

import numpy as np
from numpy.typing import NDArray

from logitstore.compiled import compiled
from logitstore.entropy_code import EXACT_BELOW, PROBABILITY_BITS

PART_BITS = 10
STATE, N_WORDS, BIT = 0, 1, 2
OK, RAW_BITS_END = 0, 1
_TO_PART = np.uint64(PROBABILITY_BITS - PART_BITS)
_BITS = np.uint64(PROBABILITY_BITS)
_QUANTILE = np.uint64((1 << PROBABILITY_BITS) - 1)
_WORD = np.uint64(32)
_LOW_WORD = np.uint64((1 << 32) - 1)


@compiled
def first_symbols(lefts_CA: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """The symbol that holds the first quantile of each part [C, 2^PART_BITS]."""
    n_contexts = lefts_CA.shape[0]
    first = np.empty((n_contexts, 1 << PART_BITS), np.uint16)
    for c in range(n_contexts):
        symbol = 0
        for part in range(1 << PART_BITS):
            while lefts_CA[c, symbol + 1] <= part << (PROBABILITY_BITS - PART_BITS):
                symbol += 1
            first[c, part] = symbol
    return first


@compiled
def _chains(contexts_N: NDArray[np.uint8], n_contexts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(place of the first number of each context [C], place of the next one of the same context [N]); -1: no more."""
    first, following = np.full(n_contexts, -1, np.int64), np.empty(len(contexts_N), np.int64)
    for i in range(len(contexts_N) - 1, -1, -1):
        context = contexts_N[i]
        if context >= n_contexts:
            raise IndexError("a number's context has no table")
        following[i], first[context] = first[context], i
    return first, following


@compiled
def _backward_chains(contexts_N: NDArray[np.uint8], n_contexts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(place of the last number of each context [C], place of the one before of the same context [N]); -1: no more."""
    last, before = np.full(n_contexts, -1, np.int64), np.empty(len(contexts_N), np.int64)
    for i in range(len(contexts_N)):
        context = contexts_N[i]
        if context >= n_contexts:
            raise IndexError("a number's context has no table")
        before[i], last[context] = last[context], i
    return last, before


@compiled
def decode_numbers(
    words: NDArray[np.uint32],
    raw: NDArray[np.uint8],
    coder: NDArray[np.uint64],
    lefts_CA: NDArray[np.uint32],
    first_CP: NDArray[np.uint16],
    contexts_N: NDArray[np.uint8],
    numbers_N: NDArray[np.int32],
) -> int:
    """Fills numbers_N and moves the coder on; OK, or RAW_BITS_END where a number needs more bits than there are.

    A stream without words left goes on to give numbers, all of them the same in the end.
    """
    n_contexts = lefts_CA.shape[0]
    start_C, following_N = _chains(contexts_N, n_contexts)
    state, n_words = coder[STATE], np.int64(coder[N_WORDS])
    for c in range(n_contexts):
        lefts, first, i = lefts_CA[c], first_CP[c], start_C[c]
        while i >= 0:
            quantile = state & _QUANTILE
            symbol = np.int64(first[quantile >> _TO_PART])
            right = np.uint64(lefts[symbol + 1])
            while right <= quantile:
                symbol += 1
                right = np.uint64(lefts[symbol + 1])
            left = np.uint64(lefts[symbol])
            state = (state >> _BITS) * (right - left) + (quantile - left)
            if state <= _LOW_WORD and n_words > 0:
                n_words -= 1
                state = (state << _WORD) | np.uint64(words[n_words])
            numbers_N[i] = symbol
            i = following_N[i]
    coder[STATE], coder[N_WORDS] = state, np.uint64(n_words)
    return _read_raw_bits(raw, coder, numbers_N)


@compiled
def _read_raw_bits(raw: NDArray[np.uint8], coder: NDArray[np.uint64], numbers_N: NDArray[np.int32]) -> int:
    """Puts the raw bits of symbols above EXACT_BELOW to them, in the order of the numbers."""
    at, n_bits = np.int64(coder[BIT]), 8 * len(raw)
    for i in range(len(numbers_N)):
        symbol = np.int64(numbers_N[i])
        if symbol < EXACT_BELOW:
            continue
        interval = symbol - EXACT_BELOW
        width = (interval >> 3) + 4
        if at + width > n_bits:
            return RAW_BITS_END
        window = 0
        for byte in range(at >> 3, (at + width + 7) >> 3):
            window |= np.int64(raw[byte]) << (8 * (byte - (at >> 3)))
        low = (window >> (at & 7)) & ((1 << width) - 1)
        at += width
        numbers_N[i] = ((8 + (interval & 7)) << width) + low
    coder[BIT] = np.uint64(at)
    return OK


@compiled
def symbol_of(number: int) -> int:
    """The symbol of a number of 0 to 2^25 - 1."""
    if number < EXACT_BELOW:
        return number
    width = 4
    while number >> (width + 4):
        width += 1
    return EXACT_BELOW + (width - 4) * 8 + (number >> width) - 8


@compiled
def symbols_of(numbers_N: NDArray[np.integer], symbols_N: NDArray[np.uint16]) -> int:
    """Fills the symbols of the numbers; how many raw bits they have together, -1 for a number outside 0..2^25 - 1."""
    n_bits = 0
    for i in range(len(numbers_N)):
        number = np.int64(numbers_N[i])
        if number < 0 or number >> 25:
            return -1
        symbol = symbol_of(number)
        symbols_N[i] = symbol
        if symbol >= EXACT_BELOW:
            n_bits += ((symbol - EXACT_BELOW) >> 3) + 4
    return n_bits


@compiled
def write_raw_bits(
    numbers_N: NDArray[np.integer], symbols_N: NDArray[np.uint16], raw: NDArray[np.uint8], coder: NDArray[np.uint64]
) -> None:
    """Writes the lowest bits of the numbers that have some; raw is long enough and was zero."""
    at = np.int64(coder[BIT])
    for i in range(len(numbers_N)):
        symbol = np.int64(symbols_N[i])
        if symbol < EXACT_BELOW:
            continue
        width = ((symbol - EXACT_BELOW) >> 3) + 4
        window = (np.int64(numbers_N[i]) & ((1 << width) - 1)) << (at & 7)
        for byte in range(at >> 3, (at + width + 7) >> 3):
            raw[byte] |= np.uint8((window >> (8 * (byte - (at >> 3)))) & 255)
        at += width
    coder[BIT] = np.uint64(at)


@compiled
def encode_symbols(
    words: NDArray[np.uint32],
    coder: NDArray[np.uint64],
    lefts_CA: NDArray[np.uint32],
    contexts_N: NDArray[np.uint8],
    symbols_N: NDArray[np.uint16],
) -> None:
    """Puts symbols on the stack, the last of the last context first; words has room for one more a symbol."""
    n_contexts = lefts_CA.shape[0]
    last_C, before_N = _backward_chains(contexts_N, n_contexts)
    state, n_words = coder[STATE], np.int64(coder[N_WORDS])
    for c in range(n_contexts - 1, -1, -1):
        lefts, i = lefts_CA[c], last_C[c]
        while i >= 0:
            symbol = symbols_N[i]
            left = np.uint64(lefts[symbol])
            probability = np.uint64(lefts[symbol + 1]) - left
            if state >> (np.uint64(64) - _BITS) >= probability:
                words[n_words] = np.uint32(state & _LOW_WORD)
                n_words += 1
                state >>= _WORD
            state = ((state // probability) << _BITS) | (left + state % probability)
            i = before_N[i]
    coder[STATE], coder[N_WORDS] = state, np.uint64(n_words)
