"""Entropy coding with static tables: symbols of several contexts in one ANS stream.

Which table a symbol is coded with, its context, must be known to the decoder before it reads the symbol. Symbols go
context by context, within a context in their own order, so that one stream needs one call of the coder a context and
no Python a symbol. The coder is constriction's AnsCoder (asymmetric numeral systems, Duda 2013): 32-bit words, a
64-bit state, probabilities of 24 bits made from our 16-bit integer frequencies, so that nothing depends on a machine.

Integers of any size become a symbol and raw bits: below 128 themselves, above it one of eight intervals an octave,
with the place in the interval as raw bits, which go to a bit string of their own.

Letters: S symbols, C contexts, A alphabet.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptionError

FREQUENCY_BITS = 16
EXACT_BELOW = 128
ALPHABET = EXACT_BELOW + 8 * 18  # integers below 2**25
_BITS_OF = np.array([n.bit_length() for n in range(1 << 13)], np.uint8)


@dataclass(frozen=True, eq=False)
class StaticTables:
    """Integer frequencies [C, A] uint16 of the symbols in each context; every one at least 1, their sums 2^16.

    Raises CorruptionError for frequencies that are not such.
    """

    frequencies: NDArray[np.uint16]
    _models: dict[int, Any] = field(default_factory=dict, repr=False)

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

    def model(self, context: int) -> Any:
        """constriction's model of one context, made on first use."""
        if context not in self._models:
            import constriction

            self._models[context] = constriction.stream.model.Categorical(
                self.frequencies[context].astype(np.float64), perfect=False, lazy=False
            )
        return self._models[context]


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


def split_integers(values: NDArray[np.integer]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.uint8]]:
    """(symbols, raw bits, how many raw bits) of non-negative integers below 2^25."""
    values = values.astype(np.int64)
    n_raw = np.maximum(_bit_length(values) - 4, 0) * (values >= EXACT_BELOW)
    symbols = np.where(n_raw > 0, EXACT_BELOW + (n_raw - 4) * 8 + (values >> n_raw) - 8, values)
    return symbols.astype(np.int32), values & ((1 << n_raw) - 1), n_raw.astype(np.uint8)


def raw_bits_of(symbols: NDArray[np.integer]) -> NDArray[np.uint8]:
    """How many raw bits follow each symbol."""
    return _RAW_BITS[symbols]


def join_integers(symbols: NDArray[np.integer], raw: NDArray[np.integer] | int) -> NDArray[np.int64]:
    """The integers of which `split_integers` made these symbols and raw bits."""
    return _LEAST_VALUE[symbols] + raw


def _bit_length(values: NDArray[np.int64]) -> NDArray[np.int64]:
    high = values >> 12
    return np.where(high > 0, 12 + _BITS_OF[high].astype(np.int64), _BITS_OF[values & 4095])


_INTERVAL = np.maximum(np.arange(ALPHABET) - EXACT_BELOW, 0)
_RAW_BITS = np.where(np.arange(ALPHABET) >= EXACT_BELOW, _INTERVAL // 8 + 4, 0).astype(np.uint8)
_LEAST_VALUE = np.where(
    np.arange(ALPHABET) >= EXACT_BELOW, (8 + _INTERVAL % 8) << _RAW_BITS.astype(np.int64), np.arange(ALPHABET)
)


class SymbolEncoder:
    """Collects symbol groups in the order in which a decoder will read them, and codes them at once."""

    def __init__(self) -> None:
        self._groups: list[tuple[StaticTables, NDArray[np.int32], NDArray[np.uint16]]] = []

    def put(self, tables: StaticTables, symbols_S: NDArray[np.int32], contexts_S: NDArray[np.integer]) -> None:
        """Symbols, each in its context. What is put first is read first."""
        self._groups.append((tables, symbols_S, contexts_S.astype(np.uint16)))

    def words(self) -> NDArray[np.uint32]:
        """The stream. An AnsCoder is a stack, so the last is coded first."""
        import constriction

        coder = constriction.stream.stack.AnsCoder()
        for tables, symbols_S, contexts_S in reversed(self._groups):
            order, starts = _by_context(contexts_S, tables.n_contexts)
            ordered = np.ascontiguousarray(symbols_S[order], np.int32)
            for context in range(tables.n_contexts - 1, -1, -1):
                start, end = starts[context], starts[context + 1]
                if end > start:
                    coder.encode_reverse(ordered[start:end], tables.model(context))
        return coder.get_compressed()


class SymbolDecoder:
    """Reads back what SymbolEncoder coded, group by group."""

    def __init__(self, words: NDArray[np.uint32]) -> None:
        import constriction

        try:
            self._coder = constriction.stream.stack.AnsCoder(np.ascontiguousarray(words, np.uint32), False)
        except ValueError as error:
            raise CorruptionError(f"entropy-coded stream of {len(words)} words is damaged: {error}") from None

    def take(self, tables: StaticTables, contexts_S: NDArray[np.integer]) -> NDArray[np.int32]:
        """The next symbols, as many as there are contexts, in the order of the contexts."""
        order, starts = _by_context(contexts_S.astype(np.uint16), tables.n_contexts)
        ordered = np.empty(len(contexts_S), np.int32)
        for context in range(tables.n_contexts):
            start, end = starts[context], starts[context + 1]
            if end > start:
                ordered[start:end] = self._coder.decode(tables.model(context), end - start)
        symbols = np.empty(len(contexts_S), np.int32)
        symbols[order] = ordered
        return symbols

    def finish(self) -> None:
        """Raises CorruptionError where the stream goes on."""
        if not self._coder.is_empty():
            raise CorruptionError("entropy-coded stream goes on behind its last symbol")


def _by_context(contexts_S: NDArray[np.uint16], n_contexts: int) -> tuple[NDArray[np.int64], list[int]]:
    """(stable order by context, where each context starts in it [C+1])."""
    order = np.argsort(contexts_S, kind="stable")
    starts = np.zeros(n_contexts + 1, np.int64)
    np.cumsum(np.bincount(contexts_S, minlength=n_contexts), out=starts[1:])
    return order, starts.tolist()


def pack_raw_bits(raw: NDArray[np.int64], n_bits: NDArray[np.uint8]) -> bytes:
    """The n_bits lowest bits of each number, lowest first, one behind the other, padded to whole bytes."""
    widths = n_bits.astype(np.int64)
    within = np.arange(widths.sum()) - np.repeat(np.cumsum(widths) - widths, widths)
    bits = (np.repeat(raw, widths) >> within) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


class RawBits:
    """Reads numbers of given widths off a bit string that `pack_raw_bits` made."""

    def __init__(self, packed: NDArray[np.uint8]) -> None:
        self._n_bits = 8 * len(packed)
        self._padded = np.concatenate([packed, np.zeros(4, np.uint8)])
        self._position = 0

    def take(self, n_bits: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The next numbers, of n_bits each, at most 21. Raises CorruptionError where the string is too short."""
        numbers = np.zeros(len(n_bits), np.int64)
        wide = np.flatnonzero(n_bits)
        if not len(wide):
            return numbers
        widths = n_bits[wide].astype(np.int64)
        ends = self._position + np.cumsum(widths)
        if ends[-1] > self._n_bits:
            raise CorruptionError(f"raw bits end at bit {self._n_bits}, {ends[-1]} expected")
        begins = ends - widths
        window = np.zeros(len(widths), np.int64)
        for byte in range(4):  # 7 bits of misalignment and at most 21 of content
            window |= self._padded[(begins >> 3) + byte].astype(np.int64) << (8 * byte)
        numbers[wide] = (window >> (begins & 7)) & ((1 << widths) - 1)
        self._position = int(ends[-1])
        return numbers

    def finish(self) -> None:
        """Raises CorruptionError where whole bytes are left over, or bits that are set."""
        left = self._padded[self._position >> 3 : -4]
        if len(left) > 1 or (len(left) and (self._position % 8 == 0 or left[0] >> (self._position % 8))):
            raise CorruptionError(f"raw bits go on behind bit {self._position}")
