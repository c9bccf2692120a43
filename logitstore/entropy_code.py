"""Entropy coding with static tables: numbers of several contexts in one ANS stream and one string of raw bits.

Which table a number is coded with, its context, must be known to the decoder before it reads the number. Symbols go
context by context, within a context in their own order. The coder is a stack (asymmetric numeral systems, Duda 2013):
32-bit words, a 64-bit state, probabilities of 24 bits made from our 16-bit integer frequencies, so that nothing depends
on a machine. It is bit-compatible with the AnsCoder of the constriction library, to which the tests hold it.

Integers of any size become a symbol and raw bits: below 128 themselves, above it one of eight intervals an octave,
with the place in the interval as raw bits, which go to a bit string of their own.

Letters: N numbers, C contexts, A alphabet.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptionError

FREQUENCY_BITS, PROBABILITY_BITS = 16, 24
EXACT_BELOW = 128
ALPHABET = EXACT_BELOW + 8 * 18  # integers below 2**25


@dataclass(frozen=True, eq=False)
class StaticTables:
    """Integer frequencies [C, A] uint16 of the symbols in each context; every one at least 1, their sums 2^16.

    Raises CorruptionError for frequencies that are not such.
    """

    frequencies: NDArray[np.uint16]

    def __post_init__(self) -> None:
        frequencies = self.frequencies
        if frequencies.ndim != 2 or frequencies.dtype != np.uint16 or frequencies.shape[1] != ALPHABET:
            raise CorruptionError(
                f"symbol frequencies are {frequencies.dtype} {frequencies.shape}, expected uint16 [C, {ALPHABET}]"
            )
        sums = frequencies.sum(axis=1, dtype=np.int64)
        if np.any(frequencies == 0) or np.any(sums != 1 << FREQUENCY_BITS):
            raise CorruptionError("symbol frequencies hold a 0, or do not add up to 65,536")

    @property
    def n_contexts(self) -> int:
        return len(self.frequencies)

    @cached_property
    def bits(self) -> NDArray[np.float64]:
        """Cost of each symbol in each context [C, A], in bits."""
        return FREQUENCY_BITS - np.log2(self.frequencies.astype(np.float64))

    @cached_property
    def lefts(self) -> NDArray[np.uint32]:
        """Where the interval of each symbol begins [C, A+1], in quantiles of 24 bits; the last is 2^24.

        Every symbol has one quantile, and the others are dealt out by frequency: floor(F (2^24 - A) / 2^16) + i.
        """
        below = np.zeros((self.n_contexts, ALPHABET + 1), np.int64)
        np.cumsum(self.frequencies, axis=1, out=below[:, 1:])
        dealt = (below * ((1 << PROBABILITY_BITS) - ALPHABET)) >> FREQUENCY_BITS
        return (dealt + np.arange(ALPHABET + 1)).astype(np.uint32)

    @cached_property
    def first_symbols(self) -> NDArray[np.uint16]:
        """Where decoding a quantile begins to look for its symbol [C, parts]."""
        from logitstore.ans_loops import first_symbols

        return first_symbols(self.lefts)


def fitted_tables(symbols_S: NDArray[np.integer], contexts_S: NDArray[np.integer], n_contexts: int) -> StaticTables:
    """The tables for these symbols, smoothed: a context that was hardly seen leans on all contexts together."""
    keys = contexts_S.astype(np.int64) * ALPHABET + symbols_S
    counts = np.bincount(keys, minlength=n_contexts * ALPHABET).reshape(n_contexts, ALPHABET).astype(np.float64)
    overall = counts.sum(axis=0) + 0.05
    counts += 20 * overall / overall.sum() + 0.005
    return StaticTables(_integer_frequencies(counts))


def _integer_frequencies(weights_CA: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Integers of at least 1 that add up to 2^16, nearly proportional to the weights; the greatest takes the rest."""
    total = 1 << FREQUENCY_BITS
    shares = weights_CA / weights_CA.sum(axis=1, keepdims=True)
    frequencies = 1 + np.floor(shares * (total - weights_CA.shape[1])).astype(np.int64)
    rest = total - frequencies.sum(axis=1)
    frequencies[np.arange(len(frequencies)), frequencies.argmax(axis=1)] += rest
    return frequencies.astype(np.uint16)


def symbols_of(numbers_N: NDArray[np.integer]) -> NDArray[np.uint16]:
    """The symbol of each number [N]. Raises ValueError for one outside 0..2^25 - 1."""
    return _symbols_and_bits(numbers_N)[0]


def _symbols_and_bits(numbers_N: NDArray[np.integer]) -> tuple[NDArray[np.uint16], int]:
    """(symbols [N], how many raw bits they have together)."""
    from logitstore import ans_loops

    symbols_N = np.empty(len(numbers_N), np.uint16)
    n_bits = ans_loops.symbols_of(numbers_N, symbols_N)
    if n_bits < 0:
        raise ValueError(f"numbers from {numbers_N.min()} to {numbers_N.max()}, those from 0 to 2^25 - 1 can be coded")
    return symbols_N, n_bits


def cost_bits(tables: StaticTables, numbers_N: NDArray[np.integer], contexts_N: NDArray[np.uint8]) -> float:
    """Bits that these numbers take, raw bits included; the stream adds less than a word and a state to the sum."""
    symbols_N, n_raw_bits = _symbols_and_bits(numbers_N)
    return float(tables.bits[contexts_N, symbols_N].sum()) + n_raw_bits


class NumberEncoder:
    """Collects groups of numbers in the order in which a decoder will read them, and codes them at once."""

    def __init__(self) -> None:
        self._groups: list[tuple[StaticTables, NDArray, NDArray[np.uint16], NDArray[np.uint8]]] = []
        self._n_bits = 0

    def put(self, tables: StaticTables, numbers_N: NDArray[np.integer], contexts_N: NDArray[np.uint8]) -> None:
        """Numbers, each in its context. What is put first is read first. Raises ValueError as symbols_of does."""
        symbols_N, n_bits = _symbols_and_bits(numbers_N)
        self._groups.append((tables, numbers_N, symbols_N, contexts_N))
        self._n_bits += n_bits

    def coded(self) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """(words of the stream, raw bits padded to whole bytes). The stream is a stack, so the last is coded first."""
        from logitstore import ans_loops

        coder = np.zeros(3, np.uint64)
        raw = np.zeros((self._n_bits + 7) // 8, np.uint8)
        words = np.empty(sum(len(group[1]) for group in self._groups) + 2, np.uint32)
        for _, numbers_N, symbols_N, _ in self._groups:
            ans_loops.write_raw_bits(numbers_N, symbols_N, raw, coder)
        for tables, _, symbols_N, contexts_N in reversed(self._groups):
            ans_loops.encode_symbols(words, coder, tables.lefts, contexts_N, symbols_N)
        state, n_words = int(coder[ans_loops.STATE]), int(coder[ans_loops.N_WORDS])
        while state:
            words[n_words] = state & 0xFFFFFFFF
            state, n_words = state >> 32, n_words + 1
        return words[:n_words], raw


class NumberDecoder:
    """Reads back what NumberEncoder coded, group by group. Raises CorruptionError for words that are no stream."""

    def __init__(self, words: NDArray[np.uint32], raw: NDArray[np.uint8]) -> None:
        if len(words) and words[-1] == 0:
            raise CorruptionError(f"entropy-coded stream of {len(words)} words is damaged: its last word is 0")
        self._words, self._raw = np.array(words, np.uint32), np.array(raw)  # aligned and writable, as compiled
        top = [int(word) for word in words[-2:]]
        self._coder = np.array([sum(word << 32 * i for i, word in enumerate(top)), len(words) - len(top), 0], np.uint64)

    def take(self, tables: StaticTables, contexts_N: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The next numbers, as many as there are contexts, in the order of the contexts.

        Raises CorruptionError where they need more raw bits than there are.
        """
        from logitstore import ans_loops

        numbers_N = np.empty(len(contexts_N), np.int32)
        status = ans_loops.decode_numbers(
            self._words, self._raw, self._coder, tables.lefts, tables.first_symbols, contexts_N, numbers_N
        )
        if status != ans_loops.OK:
            raise CorruptionError(f"raw bits end at bit {8 * len(self._raw)}, a number goes on behind it")
        return numbers_N

    def finish(self) -> None:
        """Raises CorruptionError where the stream goes on, where whole bytes of raw bits are left over, or bits of the
        last one that are set."""
        state, n_words, bit = (int(number) for number in self._coder)
        if state or n_words:
            raise CorruptionError("entropy-coded stream goes on behind its last symbol")
        left = self._raw[bit >> 3 :]
        if len(left) > 1 or (len(left) and (bit % 8 == 0 or left[0] >> (bit % 8))):
            raise CorruptionError(f"raw bits go on behind bit {bit}")
