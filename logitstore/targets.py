"""TeacherTargets: what a store says of one sequence's next-token distributions, as ragged numpy arrays.

Row t is the teacher's distribution for token t + 1: its context ends with input_ids[t] and its label is
input_ids[t + 1]. A sequence of L tokens has R = L - 1 rows; row t owns entries offsets[t] to offsets[t + 1]. A row
without entries is absent: nothing was stored for it (its label is not to be learned), and its moments are NaN.

Letters: R rows, E entries of all rows together, V vocabulary, L sequence length.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptionError, SpecMismatchError
from logitstore.temperature import segment_logsumexp, shifted_head, tail_logmoment

_WEIGHT_SUM_ERROR = 1e-3


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
    teacher_coefs, corrections and tail_model are for codecs that predict the tail, None elsewhere.
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
        self._validate_shapes()
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

    def _validate_shapes(self) -> None:
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

        The head is shifted to a mass of 1 - tail mass, head and tail are tempered, the tail's mass is spread
        uniformly over its tokens, and the row is normalised. Sampled rows are -inf where no token was kept. Absent
        rows are NaN. It allocates R x V numbers: meant for measurement; training uses the loss kernels, which never do.

        Raises ValueError for a temperature that is not positive, SpecMismatchError for one other than 1 where the rows
        are sampled.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if self.is_sampled and temperature != 1:
            raise SpecMismatchError(
                f"sampled rows say nothing of temperature {temperature}: their weights are unbiased at temperature 1 "
                "alone; use temperature 1, or store with codec 'topk'"
            )
        counts = self.counts
        n_tail_R = self.vocab_size - counts
        head_E = shifted_head(self.logps, self.offsets, self.tail_logmass) / temperature
        rho_R = tail_logmoment(self.tail_logmass, self.tail_logmoment_half, n_tail_R, temperature=temperature)
        log_normaliser_R = np.logaddexp(segment_logsumexp(head_E, self.offsets), rho_R)
        with np.errstate(invalid="ignore", divide="ignore"):
            tail_R = np.where(n_tail_R > 0, rho_R - np.log(np.maximum(n_tail_R, 1)) - log_normaliser_R, -np.inf)
        tail_R[counts == 0] = np.nan
        dense = np.repeat(tail_R.astype(np.float32)[:, None], self.vocab_size, axis=1)
        row_E = np.repeat(np.arange(self.n_rows), counts)
        dense[row_E, self.ids] = head_E - np.repeat(log_normaliser_R, counts)
        return dense


def _refuse(rows: NDArray[np.int64], broken: NDArray[np.bool_], what: str) -> None:
    first = np.flatnonzero(broken)
    if len(first):
        raise CorruptionError(f"row {rows[first[0]]} holds {what}")
