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
from logitstore.codec_tables import CodecTables
from logitstore.codecs.checks import check_counts
from logitstore.codecs.flat_layout import StoredRows
from logitstore.corrections import row_classes, undo_zigzag, zigzag
from logitstore.entropy_code import NumberDecoder, NumberEncoder, StaticTables
from logitstore.errors import CorruptionError
from logitstore.head_values import HeadFormat
from logitstore.id_lists import IdLists
from logitstore.planes import PlaneReader, offsets_of
from logitstore.tail_moments import COARSE, NO_TAIL, ODDS_OFFSET

CODEC_ID = 2
_CENTRE = int((ODDS_OFFSET - 2) * COARSE.odds_steps)  # tails of e^-2 are the most common
_BYTES_OF_ROW, _BYTES_OF_ENTRY, _BYTES_OF_CORRECTION = 24, 9, 5  # more than any of them can take


def encode_ranked(
    header: BlobHeader,
    head_format: HeadFormat,
    tables: CodecTables,
    tokens: NDArray[np.int32],
    rows: StoredRows,
) -> bytes:
    """The blob of these rows; the header's counts of rows and entries are filled in here."""
    present = np.diff(rows.offsets) > 0
    encoder = NumberEncoder()
    for group in coded_groups(head_format, tables, tokens, rows):
        encoder.put(group.tables, group.numbers, group.contexts)
    words, raw = encoder.coded()
    planes = [] if present.all() else [np.packbits(present, bitorder="little").tobytes()]
    if head_format.has_row_scale and rows.scale is not None and rows.offset is not None:
        planes += [numbers[present].astype("<f2").tobytes() for numbers in (rows.scale, rows.offset)]
    planes += [np.uint32(len(words)).astype("<u4").tobytes(), words.astype("<u4").tobytes(), raw.tobytes()]
    return pack_blob(replace(header, n_present=int(present.sum()), n_entries=len(rows.ids)), planes)


class CodedGroup(NamedTuple):
    """Numbers [N] that are coded one after another, each in its context; part: "ids", "values", "tail" or "side"."""

    part: str
    tables: StaticTables
    numbers: NDArray[np.integer]
    contexts: NDArray[np.uint8]


def coded_groups(
    head_format: HeadFormat, tables: CodecTables, tokens: NDArray[np.int32], rows: StoredRows
) -> list[CodedGroup]:
    """What is entropy coded of these rows, in the order in which it is read."""
    from logitstore.entry_loops import rank_groups

    counts = np.diff(rows.offsets)
    odds, excess = zigzag_moments(rows.moment_codes)
    odds_context = odds_contexts(odds)
    steps = head_steps(rows.codes, rows.offsets, head_format)
    groups = [
        CodedGroup("tail", tables.odds, odds, np.zeros(len(odds), np.uint8)),
        CodedGroup("tail", tables.excess, excess, odds_context),
        CodedGroup("side", tables.counts, counts[counts > 0] - 1, odds_context),
        CodedGroup("values", tables.values, steps, rank_groups(rows.offsets)),
        CodedGroup("ids", tables.ids, *id_numbers(tables.lists, rows, tokens)),
    ]
    if tables.corrections is not None and rows.correction_steps is not None:
        classes = row_classes(excess, odds_context)
        numbers = tables.corrections.numbers(rows.correction_steps, classes)
        contexts = tables.corrections.coded_contexts(classes)
        groups.append(CodedGroup("tail", tables.corrections.symbols, numbers, contexts))
    return groups


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
    from logitstore.entry_loops import id_contexts, rank_groups, undo_differences_of_tied

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
    decoder = NumberDecoder(planes.take("<u4", n_words), planes.take_rest())

    odds = decoder.take(tables.odds, np.zeros(header.n_present, np.uint8))
    odds_context = odds_contexts(odds)
    excess = decoder.take(tables.excess, odds_context)
    counts = np.zeros(header.n_rows, np.int64)
    counts[present] = decoder.take(tables.counts, odds_context) + 1
    check_counts(counts, header, max_entries=k)
    offsets = offsets_of(counts)
    codes = codes_of_steps(decoder.take(tables.values, rank_groups(offsets)), offsets, head_format)
    tied, contexts = id_contexts(codes, offsets)
    id_codes = undo_differences_of_tied(decoder.take(tables.ids, contexts), tied)
    steps = None
    if tables.corrections is not None:
        classes = row_classes(excess, odds_context)
        numbers = decoder.take(tables.corrections.symbols, tables.corrections.coded_contexts(classes))
        steps = tables.corrections.steps(numbers, classes)
    decoder.finish()
    ids = tables.lists.ids(id_codes, offsets, tokens)
    return StoredRows(offsets, ids, codes, moment_codes_of(odds, excess), scale, offset, steps)


def max_row_bytes(vocab_size: int, k: int, n_corrections: int) -> int:
    """Bytes that no row exceeds."""
    return _BYTES_OF_ROW + min(k, vocab_size) * _BYTES_OF_ENTRY + n_corrections * _BYTES_OF_CORRECTION


def canonical_ids(lists: IdLists, rows: StoredRows, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """The ids of the rows [E], each run of equal head codes in the order of its id codes; first entries stay."""
    return _canonical(lists, rows, tokens)[0]


def id_numbers(
    lists: IdLists, rows: StoredRows, tokens: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """(numbers that code the ids [E], their contexts [E])."""
    from logitstore.entry_loops import differences_of_tied

    _, id_codes, tied, contexts = _canonical(lists, rows, tokens)
    return differences_of_tied(id_codes, tied), contexts


def _canonical(
    lists: IdLists, rows: StoredRows, tokens: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_], NDArray[np.uint8]]:
    """(ids, id codes, tied, context of the id), each [E], in canonical order."""
    from logitstore.entry_loops import id_contexts, sort_tied

    tied, contexts = id_contexts(rows.codes, rows.offsets)
    id_codes, ids = lists.codes(rows.ids, rows.offsets, tokens), rows.ids.copy()
    sort_tied(ids, id_codes, tied)
    return ids, id_codes, tied, contexts


def head_steps(codes: NDArray[np.integer], offsets: NDArray[np.int64], head_format: HeadFormat) -> NDArray[np.int32]:
    """Each code's distance from the one before it in its row, a first one's from the format's base; never negative."""
    from logitstore.entry_loops import steps_of_codes

    return steps_of_codes(codes, offsets, *_range_and_direction(head_format))


def codes_of_steps(
    steps: NDArray[np.int32], offsets: NDArray[np.int64], head_format: HeadFormat
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The codes of which head_steps made these. Raises CorruptionError for a step beyond the format's range."""
    from logitstore import entry_loops

    codes = np.empty(len(steps), head_format.code_type)
    greatest, base, descends = _range_and_direction(head_format)
    if entry_loops.codes_of_steps(steps, offsets, greatest, base, descends, codes) != entry_loops.OK:
        raise CorruptionError(f"a head code's step is {steps.max()}, beyond the {greatest} of its format")
    return codes


def _range_and_direction(head_format: HeadFormat) -> tuple[int, int, bool]:
    """(greatest code, code from which a row's first step is taken, True where codes fall from there)."""
    return (1 << 8 * head_format.code_bytes) - 1, head_format.base, head_format.descends


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
    if np.any(odds > _GREATEST_ODDS) or np.any(excess >= NO_TAIL):
        raise CorruptionError("a tail moment's code is outside its range")
    excess_codes = excess.astype(np.uint16)
    excess_codes[odds == 0] = NO_TAIL
    return _ODDS_CODES[odds], excess_codes


def odds_contexts(odds: NDArray[np.integer]) -> NDArray[np.uint8]:
    """0 for no tail, else 1 to 8: the tail's log-odds in steps of 2 nats from below -8 on."""
    return _ODDS_CONTEXTS[np.minimum(odds, _GREATEST_ODDS)]


_GREATEST_ODDS = 2 * max(_CENTRE, COARSE.greatest_odds_code - _CENTRE)  # of the numbers that stand for odds
_DISTANCE = undo_zigzag(np.arange(_GREATEST_ODDS + 1) - 1)
_ODDS_CODES = np.where(np.arange(_GREATEST_ODDS + 1) == 0, NO_TAIL, _DISTANCE + _CENTRE).astype(np.uint16)
_ODDS_CONTEXTS = np.clip(_DISTANCE // int(2 * COARSE.odds_steps) + 4, 1, 8).astype(np.uint8)
_ODDS_CONTEXTS[0] = 0


def moment_classes(moment_codes: tuple[NDArray[np.uint16], NDArray[np.uint16]]) -> NDArray[np.int64]:
    """The class of each present row [P], which decides how its corrections are coded."""
    odds, excess = zigzag_moments(moment_codes)
    return row_classes(excess, odds_contexts(odds))
