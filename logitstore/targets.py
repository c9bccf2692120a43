"""TeacherTargets: what a store says of one sequence's next-token distributions, as ragged numpy arrays.

Row t is the teacher's distribution for token t + 1: its context ends with input_ids[t] and its label is
input_ids[t + 1]. A sequence of L tokens has R = L - 1 rows; row t owns entries offsets[t] to offsets[t + 1]. A row
without entries is absent: nothing was stored for it (its label is not to be learned), and its moments are NaN.

Letters: R rows, E entries of all rows together, V vocabulary, L sequence length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptionError, SpecMismatchError
from logitstore.temperature import segment_logsumexp, shifted_head, tail_logmoment

_WEIGHT_SUM_ERROR = 1e-3
_CHUNK_NUMBERS = 1 << 23  # of a dense chunk, 32 MiB


@dataclass(frozen=True, eq=False)
class StoredSamples:
    """What a codec that samples keeps of its rows besides ids and weights.

    n_exact [R] int64: so many entries, first in a row, have their token's own probability as their weight; the others
    were drawn. The rest is for codecs that quantise: codes [sum of n_exact] uint8 or uint16 of the exact entries'
    log-probs in a head format, scale and offset [R] float32 where the format has them (0 in rows without exact
    entries), tail_codes [R] uint16, the log-odds code of the mass that the drawn entries stand for.
    """

    n_exact: NDArray[np.int64]
    codes: NDArray[np.uint8] | NDArray[np.uint16] | None = None
    scale: NDArray[np.float32] | None = None
    offset: NDArray[np.float32] | None = None
    tail_codes: NDArray[np.uint16] | None = None


@dataclass(frozen=True, eq=False)
class TeacherTargets:
    """The stored rows of one sequence.

    offsets [R+1] int64; ids [E] int32, unique in a row; logps [E] float32, natural log at T = 1, descending in a row,
    before the head shift; tail_logmass [R] float32, ln of the mass of all other tokens (-inf: nothing is left);
    tail_logmoment_half [R] float32, ln of the sum over the tail of sqrt(p).
    codes [E] uint8, code_scale and code_offset [R] float32: where the head format has one byte an entry,
    logps = code_scale * table[codes] + code_offset. vocab_size and input_ids [R+1] int32 bind the rows to their text.
    samples: None, or the mark of rows that were sampled. Then logps are ln of weights whose expectation is p, a row's
    weights sum to 1, there is no tail, and T = 1 is the only temperature.
    tail_model: what predicts the tail's shape (a TailPredictor), None where it is uniform. corrections [R, width]
    float32: what is added to the first coefficients of the prediction, None where nothing is; 0 in absent rows.
    teacher_coefs [R, r] float32: the coefficients of the teacher's own logits, where targets come from them.
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    logps: NDArray[np.float32]
    tail_logmass: NDArray[np.float32]
    tail_logmoment_half: NDArray[np.float32]
    vocab_size: int
    input_ids: NDArray[np.int32]
    codes: NDArray[np.uint8] | None = None
    code_scale: NDArray[np.float32] | None = None
    code_offset: NDArray[np.float32] | None = None
    teacher_coefs: NDArray[np.float32] | None = None
    corrections: NDArray[np.float32] | None = None
    tail_model: Any = None
    samples: StoredSamples | None = None

    @property
    def is_sampled(self) -> bool:
        """True where the entries are weighted samples instead of the top of the distribution."""
        return self.samples is not None

    @property
    def n_rows(self) -> int:
        """R: one row for each predicted token, absent rows included."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """Entries of each row [R]; 0 for an absent row."""
        return np.diff(self.offsets)

    @property
    def present(self) -> NDArray[np.bool_]:
        """True [R] where a distribution is stored."""
        return self.counts > 0

    def validate(self) -> None:
        """Raises CorruptionError, naming the first row that breaks an invariant of the class docstring."""
        self.validate_shapes()
        counts = self.counts
        row_E = np.repeat(np.arange(self.n_rows), counts)
        _refuse(row_E, (self.ids < 0) | (self.ids >= self.vocab_size), f"an id outside 0..{self.vocab_size - 1}")
        _refuse(row_E, ~(np.isfinite(self.logps) & (self.logps <= 0)), "a log-prob that is not finite or above 0")
        same_row = row_E[1:] == row_E[:-1]
        _refuse(row_E[1:], same_row & (self.logps[1:] > self.logps[:-1]), "log-probs that are not descending")
        keys = np.sort(row_E * np.int64(self.vocab_size) + self.ids)
        repeated = np.flatnonzero(keys[1:] == keys[:-1])
        if len(repeated):
            raise CorruptionError(f"row {keys[repeated[0]] // self.vocab_size} holds a token id twice")
        present = counts > 0
        mass, half = self.tail_logmass, self.tail_logmoment_half
        rows = np.arange(self.n_rows)
        _refuse(rows, present & ~(mass <= 0), "a tail log-mass above 0 or NaN")
        _refuse(rows, present & (np.isneginf(mass) != np.isneginf(half)), "one infinite tail moment of two")
        _refuse(rows, present & (np.isnan(half) | np.isposinf(half)), "a half moment that is NaN or infinite")
        _refuse(rows, present & (counts == self.vocab_size) & ~np.isneginf(mass), "a tail though every token is kept")
        _refuse(rows, ~present & ~(np.isnan(mass) & np.isnan(half)), "no entries and a tail moment that is not NaN")
        if self.samples is not None:
            n_exact, sums = self.samples.n_exact, segment_logsumexp(self.logps.astype(np.float64), self.offsets)
            _refuse(rows, (n_exact < 0) | (n_exact > counts), "more exact entries than entries, or fewer than 0")
            _refuse(rows, present & ~np.isneginf(mass), "samples and a tail; samples stand for the whole vocabulary")
            _refuse(rows, present & ~(np.abs(sums) < _WEIGHT_SUM_ERROR), "weights that do not sum to 1")

    def validate_shapes(self) -> None:
        """The part of validate that asks whether the arrays' sizes fit together."""
        n_rows, n_entries = self.n_rows, len(self.ids)
        if n_rows != max(len(self.input_ids) - 1, 0):
            raise CorruptionError(f"{n_rows} rows for {len(self.input_ids)} tokens, expected one row fewer than tokens")
        if self.offsets[0] != 0 or self.offsets[-1] != n_entries or np.any(np.diff(self.offsets) < 0):
            raise CorruptionError(f"offsets do not rise from 0 to the {n_entries} entries")
        sizes = {"logps": (self.logps, n_entries), "tail_logmass": (self.tail_logmass, n_rows)}
        sizes["tail_logmoment_half"] = (self.tail_logmoment_half, n_rows)
        if self.samples is not None:
            sizes["samples.n_exact"] = (self.samples.n_exact, n_rows)
            for name in ("scale", "offset", "tail_codes"):
                sizes[f"samples.{name}"] = (getattr(self.samples, name), n_rows)
            sizes["samples.codes"] = (self.samples.codes, int(self.samples.n_exact.sum()))
        for name, (array, expected) in sizes.items():
            if array is not None and array.shape != (expected,):
                raise CorruptionError(f"{name} has shape {array.shape}, expected ({expected},)")

    def dense_logprobs(self, temperature: float = 1.0) -> NDArray[np.float32]:
        """ln q_T over the vocabulary, float32 [R, V]: the distribution that the store stands for, at temperature T.

        The head is shifted to a mass of 1 - tail mass, head and tail are tempered, the tail's mass is spread over its
        tokens (uniformly, or as the tail model says), and the row is normalised. Sampled rows are -inf where no token
        was kept. Absent rows are NaN. It allocates R x V numbers: meant for measurement; training uses the loss
        kernels, which never do.

        Raises ValueError for a temperature that is not positive, SpecMismatchError for one other than 1 where the rows
        are sampled.
        """
        dense = np.empty((self.n_rows, self.vocab_size), np.float32)
        for start, logprobs in self._dense_chunks(temperature):
            dense[start : start + len(logprobs)] = logprobs
        return dense

    def logprobs_at(self, ids_RM: NDArray[np.integer], temperature: float = 1.0) -> NDArray[np.float32]:
        """ln q_T at given tokens, float32 [R, M], of ids [R, M] in the vocabulary: dense_logprobs without holding it.

        Raises ValueError for ids of another number of rows or outside the vocabulary, else as dense_logprobs does.
        """
        ids = np.asarray(ids_RM)
        if ids.ndim != 2 or len(ids) != self.n_rows or ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers [{self.n_rows}, M], got {ids.dtype} {ids.shape}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        at = np.empty(ids.shape, np.float32)
        for start, logprobs in self._dense_chunks(temperature):
            rows = slice(start, start + len(logprobs))
            at[rows] = np.take_along_axis(logprobs, ids[rows], axis=1)
        return at

    def _dense_chunks(self, temperature: float) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, ln q_T of some rows [n, V]), chunk by chunk."""
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if self.is_sampled and temperature != 1:
            raise SpecMismatchError(
                f"sampled rows say nothing of temperature {temperature}: their weights are unbiased at temperature 1 "
                "alone; use temperature 1, or store with codec 'topk'"
            )
        counts = self.counts
        head_E = shifted_head(self.logps, self.offsets, self.tail_logmass) / temperature
        rho_R = tail_logmoment(
            self.tail_logmass, self.tail_logmoment_half, self.vocab_size - counts, temperature=temperature
        )
        log_normaliser_R = np.logaddexp(segment_logsumexp(head_E, self.offsets), rho_R)
        head_E -= np.repeat(log_normaliser_R, counts)
        coefs_Rr = self._coefs()
        n_chunk = max(1, _CHUNK_NUMBERS // self.vocab_size)
        for start in range(0, self.n_rows, n_chunk):
            rows = slice(start, min(start + n_chunk, self.n_rows))
            entries = slice(self.offsets[rows.start], self.offsets[rows.stop])
            row_E = np.repeat(np.arange(rows.stop - start), counts[rows])
            with np.errstate(invalid="ignore", divide="ignore"):
                level_N = (rho_R - log_normaliser_R)[rows]
                if coefs_Rr is None:
                    level_N = level_N - np.log(self.vocab_size - counts[rows])
                else:
                    shape_NV = self.tail_model.tail_logits(coefs_Rr[rows]) / np.float32(temperature)
                    shape_NV[row_E, self.ids[entries]] = -np.inf
                    level_N = level_N - _logsumexp_rows(shape_NV)
                level_N[np.isneginf(rho_R[rows])] = -np.inf
                level_N[counts[rows] == 0] = np.nan
                level_N1 = level_N.astype(np.float32)[:, None]
                if coefs_Rr is None:
                    shape_NV = np.repeat(level_N1, self.vocab_size, axis=1)
                else:
                    shape_NV += level_N1
            shape_NV[row_E, self.ids[entries]] = head_E[entries]
            yield start, shape_NV

    def _coefs(self) -> NDArray[np.float32] | None:
        """Coefficients of the tails' logits [R, r], None where tails are uniform."""
        if self.tail_model is None:
            return None
        (coefs_Rr,) = self.tail_model.predicted([self])
        if self.corrections is not None:
            coefs_Rr = coefs_Rr.copy()
            coefs_Rr[:, : self.corrections.shape[1]] += self.corrections
        return coefs_Rr


def _logsumexp_rows(values_NV: NDArray[np.float32]) -> NDArray[np.float64]:
    """ln of the sum of e^values over each row [N]; -inf for a row of nothing but -inf."""
    peak_N = values_NV.max(axis=1)
    peak_N[np.isneginf(peak_N)] = 0
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values_NV - peak_N[:, None]).sum(axis=1, dtype=np.float64)) + peak_N


def _refuse(rows: NDArray[np.int64], broken: NDArray[np.bool_], what: str) -> None:
    first = np.flatnonzero(broken)
    if len(first):
        raise CorruptionError(f"row {rows[first[0]]} holds {what}")
