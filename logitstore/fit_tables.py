"""Fits a codec's tables to sample rows: which ids to expect where, and how often each symbol occurs.

Candidate lists are first made from four fifths of the samples; how their ranks are distributed is counted on the last
fifth, because on its own samples a list looks better than it is. The lists that are kept are then made from all.

Memory: 10 bytes an entry of the sample, and some 30 bytes a pair of tokens seen together, in chunks of 4 M pairs.

Letters: R rows, E entries, K entries of the longest row, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitstore.codec_tables import N_ID_CONTEXTS, N_ODDS_CONTEXTS, N_RANK_GROUPS, CodecTables
from logitstore.codecs.flat_layout import StoredRows
from logitstore.codecs.ranked_layout import head_steps, id_numbers, odds_contexts, zigzag_moments
from logitstore.entropy_code import StaticTables, fitted_tables, symbols_of
from logitstore.head_values import HeadFormat
from logitstore.id_lists import CandidateLists, IdLists, PairCounts
from logitstore.planes import offsets_of
from logitstore.tail_moments import COARSE, encode_moments
from logitstore.targets import TeacherTargets

KEYS_OF_A_ROW = 6  # the first entries whose company is counted
MEMBERS_OF_A_ROW = 64


@dataclass(frozen=True)
class FittingRows:
    """Rows of many samples as if they were one: tokens [R+1], of which those between two samples have no row.

    rows: what a layout stores of them; logps [E]; sample [R]: the sample of each row.
    """

    tokens: NDArray[np.int32]
    rows: StoredRows
    logps: NDArray[np.float32]
    sample: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        return np.diff(self.rows.offsets)

    def of_samples(self, wanted: NDArray[np.bool_]) -> "FittingRows":
        """The same with all rows absent but those of wanted samples (a flag for each sample)."""
        keep_R = wanted[self.sample]
        keep_E = np.repeat(keep_R, self.counts)
        keep_P = keep_R[self.counts > 0]
        rows = self.rows
        offsets = offsets_of(self.counts * keep_R)
        moment_codes = (rows.moment_codes[0][keep_P], rows.moment_codes[1][keep_P])
        kept = StoredRows(offsets, rows.ids[keep_E], rows.codes[keep_E], moment_codes, None, None)
        return FittingRows(self.tokens, kept, self.logps[keep_E], self.sample)


def joined(samples: Iterable[TeacherTargets]) -> FittingRows:
    """All rows of some samples. Raises ValueError where none of them has an entry."""
    targets = [sample for sample in samples if sample.n_rows]
    if not any(len(sample.ids) for sample in targets):
        raise ValueError("nothing to fit on: no sample has a present row")
    counts = np.concatenate([np.append(sample.counts, 0) for sample in targets])[:-1]
    present = [sample.present for sample in targets]
    masses, halves = (
        np.concatenate([getattr(sample, name)[rows] for sample, rows in zip(targets, present, strict=True)])
        for name in ("tail_logmass", "tail_logmoment_half")
    )
    codes = [
        sample.logps.astype(np.float16).view(np.uint16) if sample.codes is None else sample.codes for sample in targets
    ]
    rows = StoredRows(
        offsets_of(counts),
        np.concatenate([sample.ids for sample in targets]),
        np.concatenate(codes),
        encode_moments(masses, halves, COARSE),
        None,
        None,
    )
    sample = np.repeat(np.arange(len(targets)), [sample.n_rows + 1 for sample in targets])[:-1]
    tokens = np.concatenate([sample.input_ids for sample in targets])
    return FittingRows(tokens, rows, np.concatenate([sample.logps for sample in targets]), sample)


def fit_tables(fitting: FittingRows, head_format: HeadFormat, vocab_size: int) -> CodecTables:
    """The tables for rows like these. Deterministic: equal rows give equal tables."""
    n_samples = int(fitting.sample.max()) + 1
    if n_samples < 5:  # too few samples to keep some apart: every fifth row instead
        fitting = FittingRows(fitting.tokens, fitting.rows, fitting.logps, np.arange(len(fitting.sample)))
        n_samples = len(fitting.sample)
    counted = np.arange(n_samples) % 5 == 4
    listed, ranked = fitting.of_samples(~counted), fitting.of_samples(counted)
    if not len(ranked.rows.ids) or not len(listed.rows.ids):
        listed = ranked = fitting
    symbols = _symbol_tables(ranked, head_format, id_lists(listed, vocab_size))
    return CodecTables(lists=id_lists(fitting, vocab_size), **symbols)


def id_lists(fitting: FittingRows, vocab_size: int) -> IdLists:
    """Candidate lists from the company that tokens keep in these rows, each pair weighed by p^(1/4)."""
    frequency = np.bincount(fitting.rows.ids, minlength=vocab_size)
    by_frequency = np.argsort(-frequency, kind="stable").astype(np.int32)
    after, beside, together = (PairCounts() for _ in range(3))
    for chunk in _row_chunks(fitting):
        current, following, ids_NK, weights_NK = chunk
        after.add(current[:, None], ids_NK, weights_NK)
        beside.add(following[:, None], ids_NK[:, :1], weights_NK[:, :1])
        for j in range(min(KEYS_OF_A_ROW, ids_NK.shape[1])):
            weights = weights_NK * weights_NK[:, j : j + 1]
            weights[:, j] = 0
            together.add(ids_NK[:, j : j + 1], ids_NK, weights)
    lists: list[CandidateLists] = [pairs.ranked(vocab_size) for pairs in (after, beside, together)]
    return IdLists(*lists, by_frequency)


def _row_chunks(
    fitting: FittingRows, n_rows: int = 1 << 15
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]]:
    """(current token, next token, ids [N, K], weights [N, K], 0 in pads) of the present rows, in chunks."""
    counts, offsets = fitting.counts, fitting.rows.offsets
    present = np.flatnonzero(counts)
    for start in range(0, len(present), n_rows):
        rows = present[start : start + n_rows]
        width = min(int(counts[rows].max()), MEMBERS_OF_A_ROW)
        entry_NK = np.arange(width) < counts[rows, None]
        index_NK = np.where(entry_NK, offsets[rows, None] + np.arange(width), 0)
        weights = np.where(entry_NK, np.exp(fitting.logps[index_NK] / 4), 0).astype(np.float32)
        yield fitting.tokens[rows], fitting.tokens[rows + 1], fitting.rows.ids[index_NK], weights


def _symbol_tables(fitting: FittingRows, head_format: HeadFormat, lists: IdLists) -> dict[str, StaticTables]:
    from logitstore.entry_loops import rank_groups

    rows = fitting.rows
    odds, excess = zigzag_moments(rows.moment_codes)
    odds_context = odds_contexts(odds)
    counts = fitting.counts
    numbers = {
        "odds": (odds, np.zeros_like(odds_context), 1),
        "excess": (excess, odds_context, N_ODDS_CONTEXTS),
        "counts": (counts[counts > 0] - 1, odds_context, N_ODDS_CONTEXTS),
        "values": (head_steps(rows.codes, rows.offsets, head_format), rank_groups(rows.offsets), N_RANK_GROUPS),
        "ids": (*id_numbers(lists, rows, fitting.tokens), N_ID_CONTEXTS),
    }
    return {name: fitted_tables(symbols_of(n), c, size) for name, (n, c, size) in numbers.items()}
