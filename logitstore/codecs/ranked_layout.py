"""Blob layout 2: ids as ranks in fitted candidate lists, everything entropy coded with fitted static tables.

A blob's numbers are coded in groups, each with contexts that what came before decides: log-odds of the tails, excesses
of the half moments, counts of entries, head codes, id codes, and corrections of a predicted tail. Within a row, entries
whose head codes are equal are in the order of their id codes, the first entry excepted: the order of equals says
nothing, so only the difference to the code before is coded.

Unfitted and badly fitted tables cost bytes and never correctness: every number has a code in every table.

Letters: R rows, P present rows, E entries.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitstore.blob import BlobHeader, pack_blob
from logitstore.codec_tables import N_RANK_GROUPS, N_TIE_SIZES, CodecTables
from logitstore.codecs.checks import check_counts
from logitstore.codecs.flat_layout import StoredRows
from logitstore.corrections import FIRST_CODED, row_classes, undo_zigzag, zigzag
from logitstore.entropy_code import (
    RawBits,
    SymbolDecoder,
    SymbolEncoder,
    join_integers,
    pack_raw_bits,
    raw_bits_of,
    split_integers,
)
from logitstore.errors import CorruptionError
from logitstore.head_values import HeadFormat
from logitstore.id_lists import IdLists
from logitstore.planes import PlaneReader, delta_along_rank, offsets_of, undo_delta_along_rank
from logitstore.tail_moments import COARSE, NO_TAIL, ODDS_OFFSET

CODEC_ID = 2
_CENTRE = int((ODDS_OFFSET - 2) * COARSE.odds_steps)  # tails of e^-2 are the most common
_BYTES_OF_ROW, _BYTES_OF_ENTRY, _BYTES_OF_CORRECTION = 24, 9, 5  # more than any of them can take


class EntryContext(NamedTuple):
    """What is known of each entry [E] before its id: row, rank in its row, tied (same head code as the entry before
    it, the first entry of a row excepted), and the context of its id."""

    row: NDArray[np.int64]
    rank: NDArray[np.int64]
    tied: NDArray[np.bool_]
    id_context: NDArray[np.int64]


def encode_ranked(
    header: BlobHeader,
    head_format: HeadFormat,
    tables: CodecTables,
    tokens: NDArray[np.int32],
    rows: StoredRows,
) -> bytes:
    """The blob of these rows; the header's counts of rows and entries are filled in here."""
    counts = np.diff(rows.offsets)
    present = counts > 0
    rows = rows._replace(ids=rows.ids[canonical_order(tables.lists, rows, tokens)])
    context = entry_context(rows.codes, rows.offsets)
    odds, excess = zigzag_moments(rows.moment_codes)
    odds_context = odds_contexts(odds)
    id_codes = codes_of_ids(tables.lists, rows.ids, tokens, rows.offsets, context)
    groups = [
        (tables.odds, odds, np.zeros_like(odds)),
        (tables.excess, excess, odds_context),
        (tables.counts, counts[present] - 1, odds_context),
        (tables.values, head_steps(rows.codes, rows.offsets, head_format), rank_groups(context.rank)),
        (tables.ids, differences_of_tied(id_codes, context.tied), context.id_context),
    ]
    if tables.corrections is not None and rows.correction_steps is not None:
        contexts = tables.corrections.contexts[row_classes(excess, odds_context)]
        coded = contexts >= FIRST_CODED
        groups.append((tables.corrections.symbols, zigzag(rows.correction_steps[coded]), contexts[coded]))
    encoder, raw, n_raw = SymbolEncoder(), [], []
    for symbol_tables, numbers, contexts in groups:
        symbols, bits, n_bits = split_integers(numbers)
        encoder.put(symbol_tables, symbols, contexts)
        raw.append(bits)
        n_raw.append(n_bits)
    words = encoder.words()
    planes = [] if present.all() else [np.packbits(present, bitorder="little").tobytes()]
    if head_format.has_row_scale and rows.scale is not None and rows.offset is not None:
        planes += [numbers[present].astype("<f2").tobytes() for numbers in (rows.scale, rows.offset)]
    planes += [np.uint32(len(words)).astype("<u4").tobytes(), words.astype("<u4").tobytes()]
    planes.append(pack_raw_bits(np.concatenate(raw), np.concatenate(n_raw)))
    return pack_blob(replace(header, n_present=int(present.sum()), n_entries=len(rows.ids)), planes)


def decode_ranked(
    header: BlobHeader,
    planes: PlaneReader,
    head_format: HeadFormat,
    tables: CodecTables,
    tokens: NDArray[np.int32],
    *,
    k: int,
) -> StoredRows:
    """The rows of a blob that checks.opened_blob has opened. Raises CorruptionError."""
    if header.n_entries > header.n_present * k:
        raise CorruptionError(f"blob claims {header.n_entries} entries in {header.n_present} rows of {k} at most")
    present = np.ones(header.n_rows, bool)
    if header.n_present < header.n_rows:
        flags = planes.take("u1", (header.n_rows + 7) // 8)
        present = np.unpackbits(flags, count=header.n_rows, bitorder="little").astype(bool)
    if np.count_nonzero(present) != header.n_present:
        raise CorruptionError(f"{np.count_nonzero(present)} rows are marked present, the header says otherwise")
    scale = offset = None
    if head_format.has_row_scale:
        scale, offset = (np.zeros(header.n_rows, np.float32) for _ in range(2))
        scale[present], offset[present] = (planes.take("<f2", header.n_present) for _ in range(2))
    n_words = int(planes.take("<u4", 1)[0])
    decoder, raw = SymbolDecoder(planes.take("<u4", n_words)), RawBits(planes.take_rest())

    def numbers(symbol_tables, contexts):
        symbols = decoder.take(symbol_tables, contexts)
        return join_integers(symbols, raw.take(raw_bits_of(symbols)))

    odds = numbers(tables.odds, np.zeros(header.n_present, np.uint16))
    odds_context = odds_contexts(odds)
    excess = numbers(tables.excess, odds_context)
    counts = np.zeros(header.n_rows, np.int64)
    counts[present] = numbers(tables.counts, odds_context) + 1
    check_counts(counts, header, max_entries=k)
    offsets = offsets_of(counts)
    rank = np.arange(header.n_entries) - np.repeat(offsets[:-1], counts)
    codes = codes_of_steps(numbers(tables.values, rank_groups(rank)), offsets, head_format)
    context = entry_context(codes, offsets)
    id_codes = undo_differences_of_tied(numbers(tables.ids, context.id_context), context.tied)
    steps = None
    if tables.corrections is not None:
        contexts = tables.corrections.contexts[row_classes(excess, odds_context)]
        coded = contexts >= FIRST_CODED
        steps = np.zeros(contexts.shape, np.int32)
        steps[coded] = undo_zigzag(numbers(tables.corrections.symbols, contexts[coded]))
    decoder.finish()
    raw.finish()
    ids = ids_of_codes(tables.lists, id_codes, tokens, offsets, context)
    return StoredRows(offsets, ids, codes, moment_codes_of(odds, excess), scale, offset, steps)


def max_row_bytes(vocab_size: int, k: int, n_corrections: int) -> int:
    """Bytes that no row exceeds."""
    return _BYTES_OF_ROW + min(k, vocab_size) * _BYTES_OF_ENTRY + n_corrections * _BYTES_OF_CORRECTION


def canonical_order(lists: IdLists, rows: StoredRows, tokens: NDArray[np.int32]) -> NDArray[np.int64]:
    """Entry indices [E] that put each run of equal head codes in the order of its id codes; first entries stay."""
    context = entry_context(rows.codes, rows.offsets)
    id_codes = codes_of_ids(lists, rows.ids, tokens, rows.offsets, context)
    return np.argsort((np.cumsum(~context.tied) << 26) | id_codes, kind="stable")


def entry_context(codes: NDArray[np.integer], offsets: NDArray[np.int64]) -> EntryContext:
    """What the head codes of all rows say of each entry."""
    counts = np.diff(offsets)
    row = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(codes)) - offsets[row]
    tied = np.zeros(len(codes), bool)
    tied[1:] = (codes[1:] == codes[:-1]) & (rank[1:] > 1)
    run = np.cumsum(~tied) - 1
    size = _BIT_LENGTH_OF_LESS_ONE[np.minimum(np.bincount(run, minlength=1), 32)][run] if len(codes) else run
    id_context = np.where(tied, 3 * N_RANK_GROUPS + size - 1, 3 * rank_groups(rank) + np.minimum(size, 2))
    return EntryContext(row, rank, tied, id_context)


# ceil(log2(size)) of a run of equal entries, 5 for 17 and more
_BIT_LENGTH_OF_LESS_ONE = np.array([0, *(min((n - 1).bit_length(), N_TIE_SIZES) for n in range(1, 33))])
_RANK_GROUPS = np.array([min(rank if rank < 4 else 2 + int(np.log2(rank)), N_RANK_GROUPS - 1) for rank in range(256)])


def rank_groups(rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """The group of a rank: 0, 1, 2, 3, then one an octave, from 128 on the last."""
    return _RANK_GROUPS[np.minimum(rank, 255)]


def head_steps(
    codes: NDArray[np.integer], offsets: NDArray[np.int64], head_format: HeadFormat
) -> NDArray[np.unsignedinteger]:
    """Each code's distance from the one before it in its row, a first one's from the format's base; never negative."""
    based = _based(codes.astype(head_format.code_type), head_format)
    return delta_along_rank(based, offsets)


def codes_of_steps(
    steps: NDArray[np.int64], offsets: NDArray[np.int64], head_format: HeadFormat
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The codes of which head_steps made these."""
    greatest = np.iinfo(head_format.code_type).max
    if np.any(steps > greatest):
        raise CorruptionError(f"a head code's step is {steps.max()}, beyond the {greatest} of its format")
    return _based(undo_delta_along_rank(steps.astype(head_format.code_type), offsets), head_format)


def _based(codes: NDArray, head_format: HeadFormat) -> NDArray:
    """code - base, or base - code where codes fall, modulo the code's range; its own inverse for falling codes."""
    base = codes.dtype.type(head_format.base)
    return base - codes if head_format.descends else codes ^ base if head_format.base else codes


def zigzag_moments(
    moment_codes: tuple[NDArray[np.uint16], NDArray[np.uint16]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Small non-negative integers for both moments: twice the distance from the usual odds, 0 for no tail."""
    odds, excess = (codes.astype(np.int64) for codes in moment_codes)
    no_tail = odds == NO_TAIL
    return np.where(no_tail, 0, zigzag(odds - _CENTRE) + 1), np.where(no_tail, 0, excess)


def moment_codes_of(
    odds: NDArray[np.int64], excess: NDArray[np.int64]
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """The codes of which zigzag_moments made these. Raises CorruptionError for integers beyond 16 bits."""
    codes = undo_zigzag(odds - 1) + _CENTRE
    if np.any((codes < 0) | (codes >= NO_TAIL) | (excess >= NO_TAIL)):
        raise CorruptionError("a tail moment's code is outside its range")
    no_tail = odds == 0
    return np.where(no_tail, NO_TAIL, codes).astype(np.uint16), np.where(no_tail, NO_TAIL, excess).astype(np.uint16)


def odds_contexts(odds: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 for no tail, else 1 to 8: the tail's log-odds in steps of 2 nats from below -8 on."""
    nats = undo_zigzag(odds - 1) / COARSE.odds_steps - 2
    return np.where(odds == 0, 0, 1 + np.clip(np.floor(nats / 2) + 4, 0, 7)).astype(np.int64)


def moment_classes(moment_codes: tuple[NDArray[np.uint16], NDArray[np.uint16]]) -> NDArray[np.int64]:
    """The class of each present row [P], which decides how its corrections are coded."""
    odds, excess = zigzag_moments(moment_codes)
    return row_classes(excess, odds_contexts(odds))


def codes_of_ids(
    lists: IdLists,
    ids: NDArray[np.int32],
    tokens: NDArray[np.int32],
    offsets: NDArray[np.int64],
    context: EntryContext,
) -> NDArray[np.int64]:
    """The id code of each entry [E]."""
    is_first = context.rank == 0
    key = np.where(is_first, tokens[1:][context.row], _first_ids(ids, offsets)[context.row])
    return lists.codes(ids, is_first, key, tokens[context.row])


def ids_of_codes(
    lists: IdLists,
    id_codes: NDArray[np.int64],
    tokens: NDArray[np.int32],
    offsets: NDArray[np.int64],
    context: EntryContext,
) -> NDArray[np.int32]:
    """The ids of which codes_of_ids made these; first entries first, for the others' lists hang on them."""
    is_first = context.rank == 0
    row, current = context.row, tokens[context.row]
    ids = np.empty(len(id_codes), np.int32)
    ids[is_first] = lists.ids(id_codes[is_first], lists.beside, tokens[1:][row[is_first]], current[is_first])
    key = _first_ids(ids, offsets)[row[~is_first]]
    ids[~is_first] = lists.ids(id_codes[~is_first], lists.together, key, current[~is_first])
    return ids


def _first_ids(ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    """The id of each row's first entry [R]; anything for an absent row."""
    return ids[np.minimum(offsets[:-1], len(ids) - 1)] if len(ids) else np.zeros(len(offsets) - 1, np.int32)


def differences_of_tied(id_codes: NDArray[np.int64], tied: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Codes, and for a tied entry what its code has beyond one more than the code before it."""
    before = np.zeros_like(id_codes)
    before[1:] = id_codes[:-1] + 1
    return id_codes - np.where(tied, before, 0)


def undo_differences_of_tied(differences: NDArray[np.int64], tied: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The codes of which differences_of_tied made these."""
    running = np.cumsum(differences + tied)
    starts = np.flatnonzero(~tied)
    before_run = running[starts] - differences[starts]
    return running - np.repeat(before_run, np.diff(np.append(starts, len(tied))))
