"""Entropy coding: every integer comes back, tables cost what they say, and damage is found or harmless."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.entropy_code import (
    ALPHABET,
    FREQUENCY_BITS,
    RawBits,
    StaticTables,
    SymbolDecoder,
    SymbolEncoder,
    fitted_tables,
    join_integers,
    pack_raw_bits,
    raw_bits_of,
    split_integers,
)
from logitstore.errors import CorruptionError


def test_every_integer_has_one_symbol_and_its_raw_bits() -> None:
    values = np.concatenate([np.arange(5000), 2 ** np.arange(3, 25) - 1, 2 ** np.arange(3, 25), [2**25 - 1]])
    symbols, raw, n_raw = split_integers(values)
    assert symbols.max() == ALPHABET - 1
    np.testing.assert_array_equal(raw_bits_of(symbols), n_raw)
    np.testing.assert_array_equal(join_integers(symbols, raw), values)
    small = values < 128
    np.testing.assert_array_equal(symbols[small], values[small])
    assert np.all(np.diff(symbols[:5000]) >= 0)
    assert np.all(n_raw[~small] == np.floor(np.log2(values[~small])) - 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 400), st.integers(1, 9), st.booleans())
def test_symbols_of_several_groups_come_back(seed: int, n_symbols: int, n_contexts: int, fitted: bool) -> None:
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(3):
        contexts = rng.integers(0, n_contexts, n_symbols)
        symbols = rng.geometric(0.02 + 0.2 * rng.random(), n_symbols).clip(max=ALPHABET) - 1
        seen = n_symbols if fitted else 0
        groups.append((fitted_tables(symbols[:seen], contexts[:seen], n_contexts), symbols.astype(np.int32), contexts))
    encoder = SymbolEncoder()
    for group in groups:
        encoder.put(*group)
    decoder = SymbolDecoder(encoder.words())
    for tables, symbols, contexts in groups:
        np.testing.assert_array_equal(decoder.take(tables, contexts), symbols)
    decoder.finish()


def test_the_stream_is_as_long_as_the_tables_say() -> None:
    rng = np.random.default_rng(3)
    contexts = rng.integers(0, 4, 20_000)
    symbols = (rng.geometric(0.05, 20_000) * (contexts + 1)).clip(max=ALPHABET - 1).astype(np.int32)
    tables = fitted_tables(symbols, contexts, 4)
    encoder = SymbolEncoder()
    encoder.put(tables, symbols, contexts)
    expected_bits = tables.bits[contexts, symbols].sum()
    assert expected_bits <= 32 * len(encoder.words()) <= expected_bits * 1.005 + 64


def test_a_tiny_reference_decoder_reads_the_stream() -> None:
    """The stream as FORMAT.md has it: a 64-bit state, 32-bit words, cumulative frequencies of 24 bits."""
    rng = np.random.default_rng(4)
    symbols = rng.geometric(0.1, 300).clip(max=ALPHABET).astype(np.int32) - 1
    tables = fitted_tables(symbols, np.zeros(300, int), 1)
    encoder = SymbolEncoder()
    encoder.put(tables, symbols, np.zeros(300, int))
    words = [int(word) for word in encoder.words()]
    below = np.concatenate([[0], np.cumsum(tables.frequencies[0].astype(np.int64))])
    scale = ((1 << 24) - ALPHABET) / (1 << FREQUENCY_BITS)
    lefts = [int(float(b) * scale) + i for i, b in enumerate(below)]
    lefts[-1] = 1 << 24
    state = words.pop() << 32 | words.pop()
    for expected in symbols:
        quantile = state % (1 << 24)
        symbol = int(np.searchsorted(lefts, quantile, side="right")) - 1
        assert symbol == expected
        state = (state >> 24) * (lefts[symbol + 1] - lefts[symbol]) + quantile - lefts[symbol]
        if state < 1 << 32 and words:
            state = state << 32 | words.pop()
    assert not words


def test_frequencies_are_positive_and_add_up_whatever_was_seen() -> None:
    empty = fitted_tables(np.zeros(0, int), np.zeros(0, int), 2).frequencies
    skewed = fitted_tables(np.full(10**6, 7), np.zeros(10**6, int), 2).frequencies
    for frequencies in (empty, skewed):
        assert frequencies.min() >= 1
        np.testing.assert_array_equal(frequencies.sum(axis=1, dtype=int), [1 << FREQUENCY_BITS] * 2)
    assert skewed[0, 7] > 65_000


@pytest.mark.parametrize("broken", [np.zeros((1, ALPHABET), np.uint16), np.ones((1, ALPHABET), np.uint16)])
def test_tables_that_are_no_frequencies_are_refused(broken: np.ndarray) -> None:
    with pytest.raises(CorruptionError, match="hold a 0, or do not add up"):
        StaticTables(broken)
    with pytest.raises(CorruptionError, match="expected uint16"):
        StaticTables(broken[:, 1:])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**25 - 1), max_size=60))
def test_raw_bits_come_back(values: list[int]) -> None:
    _, raw, n_raw = split_integers(np.array(values, np.int64))
    packed = pack_raw_bits(raw, n_raw)
    assert len(packed) == (int(n_raw.sum()) + 7) // 8
    reader = RawBits(np.frombuffer(packed, np.uint8))
    half = len(values) // 2
    np.testing.assert_array_equal(np.concatenate([reader.take(n_raw[:half]), reader.take(n_raw[half:])]), raw)
    reader.finish()
    with pytest.raises(CorruptionError, match="raw bits end at bit"):
        reader.take(np.array([21], np.uint8))
    longer = RawBits(np.frombuffer(packed + b"\0", np.uint8))
    longer.take(n_raw)
    with pytest.raises(CorruptionError, match="raw bits go on"):
        longer.finish()


def test_a_stream_that_goes_on_is_refused() -> None:
    tables = fitted_tables(np.arange(50), np.zeros(50, int), 1)
    encoder = SymbolEncoder()
    encoder.put(tables, np.arange(50, dtype=np.int32), np.zeros(50, int))
    words = encoder.words()
    decoder = SymbolDecoder(words)
    decoder.take(tables, np.zeros(49, int))
    with pytest.raises(CorruptionError, match="goes on"):
        decoder.finish()
    with pytest.raises(CorruptionError, match="is damaged"):
        SymbolDecoder(np.array([5, 0], np.uint32))
