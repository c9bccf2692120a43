"""Two questions to a store that only its tail answers: its mass at any temperature, and the probability of any token.

Letters: R rows, E entries, M tokens asked for, V vocabulary. T is the temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logitstore import TeacherTargets
from logitstore.logits_source import iter_logit_chunks
from logitstore.temperature import segment_logsumexp, shifted_head, tail_logmoment

TEMPERATURES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
ASKED, NOISE, SEED = 32, 2.0, 0  # a made-up student's 32 most probable tokens: the teacher's logits and noise of 2 nats
MOST_ROWS = 1024  # of a kind, per candidate


@dataclass
class TailErrors:
    """Sums over rows. mass: |tail mass as stored - the teacher's| at each of TEMPERATURES, of the tokens that are not
    entries; logprob: mean |ln q - ln p| at T = 1 over the tokens that a student would ask for."""

    n_rows: int = 0
    n_answered: int = 0
    mass: np.ndarray = field(default_factory=lambda: np.zeros(len(TEMPERATURES)))
    logprob: float = 0.0

    def add(self, decoded: TeacherTargets, logits: Any) -> None:
        """Adds a sample: what was read back, and the teacher's logits [L, V] or FactoredLogits."""
        if decoded.is_sampled or self.n_rows >= MOST_ROWS:
            return
        stored = np.stack([_stored_mass(decoded, t) for t in TEMPERATURES])
        rng = np.random.default_rng(SEED)
        start = 0
        for chunk_NV in iter_logit_chunks(logits, np.arange(decoded.n_rows), vocab_size=decoded.vocab_size):
            rows = slice(start, start + len(chunk_NV))
            start = rows.stop
            true = np.stack([_true_mass(decoded, rows, chunk_NV, t) for t in TEMPERATURES])
            self.mass += np.abs(stored[:, rows] - true).sum(axis=1)
        self._add_answers(decoded, logits, rng)
        self.n_rows += decoded.n_rows

    def _add_answers(self, decoded: TeacherTargets, logits: Any, rng: np.random.Generator) -> None:
        n_asked = min(ASKED, decoded.vocab_size)
        asked, true = [], []
        for chunk_NV in iter_logit_chunks(logits, np.arange(decoded.n_rows), vocab_size=decoded.vocab_size):
            noisy_NV = chunk_NV + NOISE * rng.standard_normal(chunk_NV.shape, dtype=np.float32)
            ids_NM = np.argpartition(-noisy_NV, n_asked - 1, axis=1)[:, :n_asked]
            asked.append(ids_NM)
            lse_N1 = _logsumexp(chunk_NV.astype(np.float64))[:, None]
            true.append(np.take_along_axis(chunk_NV, ids_NM, axis=1) - lse_N1)
        answers = decoded.logprobs_at(np.concatenate(asked))
        error_R = np.abs(answers - np.concatenate(true)).mean(axis=1)
        answered = np.isfinite(error_R)
        self.logprob += float(error_R[answered].sum())
        self.n_answered += int(answered.sum())

    @classmethod
    def joined(cls, parts: Sequence["TailErrors"]) -> "TailErrors":
        """The sums over several kinds."""
        rows, answered = sum(part.n_rows for part in parts), sum(part.n_answered for part in parts)
        mass = np.sum([part.mass for part in parts], axis=0)
        return cls(rows, answered, mass, sum(part.logprob for part in parts))

    def as_json(self) -> dict[str, Any]:
        """tail_mass_error: {T: mean absolute error}, logprobs_at_error in nats; None where no row says."""
        mass = None
        if self.n_rows:
            mass = {f"{t:g}": float(x) / self.n_rows for t, x in zip(TEMPERATURES, self.mass, strict=True)}
        return {
            "tail_mass_error": mass,
            "logprobs_at_error": self.logprob / self.n_answered if self.n_answered else None,
        }


def _stored_mass(decoded: TeacherTargets, temperature: float) -> np.ndarray:
    """The tail's share of q_T [R]."""
    head_E = shifted_head(decoded.logps, decoded.offsets, decoded.tail_logmass) / temperature
    n_tail_R = decoded.vocab_size - decoded.counts
    tail_R = tail_logmoment(decoded.tail_logmass, decoded.tail_logmoment_half, n_tail_R, temperature=temperature)
    return np.exp(tail_R - np.logaddexp(segment_logsumexp(head_E, decoded.offsets), tail_R))


def _true_mass(decoded: TeacherTargets, rows: slice, logits_NV: np.ndarray, temperature: float) -> np.ndarray:
    """The share of p_T [n] of the tokens that are no entries of these rows."""
    scaled_NV = logits_NV.astype(np.float64) / temperature
    lse_N = _logsumexp(scaled_NV)
    row_E = np.repeat(np.arange(rows.stop - rows.start), decoded.counts[rows])
    entries = slice(decoded.offsets[rows.start], decoded.offsets[rows.stop])
    p_E = np.exp(scaled_NV[row_E, decoded.ids[entries]] - lse_N[row_E])
    return 1 - np.bincount(row_E, p_E, minlength=len(lse_N))


def _logsumexp(values_NV: np.ndarray) -> np.ndarray:
    peak_N = values_NV.max(axis=1)
    return np.log(np.exp(values_NV - peak_N[:, None]).sum(axis=1)) + peak_N
