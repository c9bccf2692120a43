"""Entropy coding: every number comes back, streams are those of constriction, tables cost what they say."""

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.entropy_code import (
    ALPHABET,
    FREQUENCY_BITS,
    NumberDecoder,
    NumberEncoder,
    StaticTables,
    fitted_tables,
    symbols_of,
)
from logitstore.errors import CorruptionError

Group = tuple[StaticTables, np.ndarray, np.ndarray]


def coded(groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
    encoder = NumberEncoder()
    for group in groups:
        encoder.put(*group)
    return encoder.coded()


def some_groups(seed: int, n_numbers: int, n_contexts: int, fitted: bool) -> list[Group]:
    """Three groups of numbers of all sizes, with tables that were fitted to them or to nothing."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(3):
        contexts = rng.integers(0, n_contexts, n_numbers).astype(np.uint8)
        numbers = rng.geometric(0.02 + 0.2 * rng.random(), n_numbers) - 1
        large = rng.random(n_numbers) < 0.05
        numbers[large] = rng.integers(0, 2 ** rng.integers(1, 26), int(large.sum()))
        seen = n_numbers if fitted else 0
        groups.append((fitted_tables(symbols_of(numbers[:seen]), contexts[:seen], n_contexts), numbers, contexts))
    return groups


def constriction_models(tables: StaticTables) -> list:
    return [
        constriction.stream.model.Categorical(frequencies.astype(np.float64), perfect=False, lazy=False)
        for frequencies in tables.frequencies
    ]


def constriction_words(groups: list[Group]) -> np.ndarray:
    """The stream that constriction's AnsCoder writes, symbol by symbol in the order of the format, last first."""
    coder = constriction.stream.stack.AnsCoder()
    for tables, numbers, contexts in reversed(groups):
        symbols = symbols_of(numbers).astype(np.int32)
        for context, model in reversed(list(enumerate(constriction_models(tables)))):
            coder.encode_reverse(np.ascontiguousarray(symbols[contexts == context]), model)
    return coder.get_compressed()


def constriction_symbols(words: np.ndarray, groups: list[Group]) -> list[np.ndarray]:
    """The symbols of each group that constriction reads off a stream."""
    coder = constriction.stream.stack.AnsCoder(words, False)
    found = []
    for tables, numbers, contexts in groups:
        symbols = np.empty(len(numbers), np.int32)
        for context, model in enumerate(constriction_models(tables)):
            symbols[contexts == context] = coder.decode(model, int((contexts == context).sum()))
        found.append(symbols)
    return found


def test_every_integer_has_one_symbol_and_its_raw_bits() -> None:
    values = np.concatenate([np.arange(5000), 2 ** np.arange(3, 25) - 1, 2 ** np.arange(3, 25), [2**25 - 1]])
    symbols = symbols_of(values)
    assert symbols.max() == ALPHABET - 1
    small = values < 128
    np.testing.assert_array_equal(symbols[small], values[small])
    n_raw = np.floor(np.log2(values[~small])).astype(int) - 3
    np.testing.assert_array_equal(symbols[~small], 128 + 8 * (n_raw - 4) + (values[~small] >> n_raw) - 8)
    tables = fitted_tables(symbols, np.zeros_like(symbols), 1)
    contexts = np.zeros(len(values), np.uint8)
    words, raw = coded([(tables, values, contexts)])
    assert len(raw) == (int(n_raw.sum()) + 7) // 8
    decoder = NumberDecoder(words, raw)
    np.testing.assert_array_equal(decoder.take(tables, contexts), values)
    decoder.finish()


@pytest.mark.parametrize("number", [-1, 2**25, 2**40])
def test_a_number_without_a_symbol_is_refused(number: int) -> None:
    tables = fitted_tables(np.zeros(0, int), np.zeros(0, int), 1)
    for call in (symbols_of, lambda numbers: NumberEncoder().put(tables, numbers, np.zeros(2, np.uint8))):
        with pytest.raises(ValueError, match=f"numbers from .*{number}.* those from 0 to 2\\^25 - 1 can be coded"):
            call(np.array([5, number]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 400), st.integers(1, 9), st.booleans())
def test_numbers_of_several_groups_come_back(seed: int, n_numbers: int, n_contexts: int, fitted: bool) -> None:
    groups = some_groups(seed, n_numbers, n_contexts, fitted)
    decoder = NumberDecoder(*coded(groups))
    for tables, numbers, contexts in groups:
        np.testing.assert_array_equal(decoder.take(tables, contexts), numbers)
    decoder.finish()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 400), st.integers(1, 9), st.booleans())
def test_streams_are_those_of_constriction(seed: int, n_numbers: int, n_contexts: int, fitted: bool) -> None:
    groups = some_groups(seed, n_numbers, n_contexts, fitted)
    words, _ = coded(groups)
    np.testing.assert_array_equal(words, constriction_words(groups))
    for found, (_, numbers, _) in zip(constriction_symbols(words, groups), groups, strict=True):
        np.testing.assert_array_equal(found, symbols_of(numbers))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 2**32 - 1), max_size=60), st.booleans())
def test_any_words_are_read_as_constriction_reads_them(seed: int, words: list[int], fitted: bool) -> None:
    """Damaged streams too, those that are too short or too long for their numbers among them."""
    groups = some_groups(seed, 40, 3, fitted)
    stream = np.array(words, np.uint32)
    raw = np.zeros(4096, np.uint8)  # the 120 numbers take 21 bits each at most
    if words and words[-1] == 0:
        with pytest.raises(CorruptionError, match="its last word is 0"):
            NumberDecoder(stream, raw)
        return
    decoder = NumberDecoder(stream, raw)
    for expected, (tables, _, contexts) in zip(constriction_symbols(stream, groups), groups, strict=True):
        np.testing.assert_array_equal(symbols_of(decoder.take(tables, contexts)), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_a_damaged_stream_gives_other_numbers_or_an_error(seed: int, data: st.DataObject) -> None:
    groups = some_groups(seed, 60, 3, True)
    words, raw = coded(groups)
    content = bytearray(words.tobytes() + raw.tobytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoder = NumberDecoder(
            np.frombuffer(content, np.uint32, len(words)), np.frombuffer(content, np.uint8, offset=4 * len(words))
        )
        found = [decoder.take(tables, contexts) for tables, _, contexts in groups]
        decoder.finish()
    except CorruptionError:
        return
    for numbers in found:
        assert numbers.min() >= 0
        assert numbers.max() < 2**25
    assert any(not np.array_equal(numbers, group[1]) for numbers, group in zip(found, groups, strict=True))


def test_a_context_without_a_table_is_refused() -> None:
    tables = fitted_tables(np.zeros(0, int), np.zeros(0, int), 2)
    contexts = np.array([0, 2], np.uint8)
    with pytest.raises(IndexError, match="a number's context has no table"):
        coded([(tables, np.zeros(2, int), contexts)])
    with pytest.raises(IndexError, match="a number's context has no table"):
        NumberDecoder(np.array([1], np.uint32), np.zeros(0, np.uint8)).take(tables, contexts)


def test_the_stream_is_as_long_as_the_tables_say() -> None:
    rng = np.random.default_rng(3)
    contexts = rng.integers(0, 4, 20_000).astype(np.uint8)
    numbers = (rng.geometric(0.05, 20_000) * (contexts + 1)).clip(max=127)
    tables = fitted_tables(numbers, contexts, 4)
    words, raw = coded([(tables, numbers, contexts)])
    expected_bits = tables.bits[contexts, numbers].sum()
    assert expected_bits <= 32 * len(words) <= expected_bits * 1.005 + 64
    assert not len(raw)


def test_a_tiny_reference_decoder_reads_the_stream() -> None:
    """The stream as FORMAT.md has it: a 64-bit state, 32-bit words, cumulative frequencies of 24 bits."""
    rng = np.random.default_rng(4)
    symbols = rng.geometric(0.1, 300).clip(max=128) - 1
    tables = fitted_tables(symbols, np.zeros(300, int), 1)
    words = [int(word) for word in coded([(tables, symbols, np.zeros(300, np.uint8))])[0]]
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
def test_raw_bits_are_the_lowest_bits_one_behind_the_other(values: list[int]) -> None:
    tables, contexts = fitted_tables(np.zeros(0, int), np.zeros(0, int), 1), np.zeros(len(values), np.uint8)
    words, raw = coded([(tables, np.array(values, np.int64), contexts)])
    expected = "".join(f"{value:b}"[4:][::-1] for value in values if value >= 128)
    bits = np.unpackbits(raw, bitorder="little")
    assert "".join(map(str, bits[: len(expected)])) == expected
    assert len(bits) - len(expected) < 8
    assert not bits[len(expected) :].any()

    longer = NumberDecoder(words, np.concatenate([raw, np.zeros(1, np.uint8)]))
    longer.take(tables, contexts)
    with pytest.raises(CorruptionError, match=f"raw bits go on behind bit {len(expected)}"):
        longer.finish()
    if len(expected) % 8:
        unclean = NumberDecoder(words, raw | np.uint8([0] * (len(raw) - 1) + [128]))
        unclean.take(tables, contexts)
        with pytest.raises(CorruptionError, match="raw bits go on behind bit"):
            unclean.finish()
    if expected:
        with pytest.raises(CorruptionError, match=f"raw bits end at bit {8 * len(raw) - 8}, a number goes on"):
            NumberDecoder(words, raw[:-1]).take(tables, contexts)


def test_a_stream_that_goes_on_is_refused() -> None:
    tables = fitted_tables(np.arange(50), np.zeros(50, int), 1)
    words, raw = coded([(tables, np.arange(50), np.zeros(50, np.uint8))])
    decoder = NumberDecoder(words, raw)
    decoder.take(tables, np.zeros(49, np.uint8))
    with pytest.raises(CorruptionError, match="goes on"):
        decoder.finish()
    with pytest.raises(CorruptionError, match="is damaged: its last word is 0"):
        NumberDecoder(np.array([5, 0], np.uint32), raw)
