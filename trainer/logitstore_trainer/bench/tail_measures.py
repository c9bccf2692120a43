"""Two questions to a store that only its tail answers: its mass at any temperature, and the probability of any token.

Letters: R rows, E entries, M tokens asked for, V vocabulary. T is the temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore import TeacherTargets
from logitstore.temperature import segment_logsumexp, shifted_head, tail_logmoment

TEMPERATURES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
ASKED, NOISE, SEED = 32, 2.0, 0  # a made-up student's 32 most probable tokens: the teacher's logits and noise of 2 nats


@dataclass(frozen=True, eq=False)
class TeacherTail:
    """What the teacher says of a sample, for any number of stores: logp [R, V] float64 at T = 1, its log-sum-exp at
    each of TEMPERATURES [6, R], and the tokens that a student asks for [R, M]."""

    logp: NDArray[np.float64]
    lse: NDArray[np.float64]
    asked: NDArray[np.int64]

    @classmethod
    def of(cls, logp_RV: NDArray[np.float64]) -> "TeacherTail":
        """From the teacher's log-probs at T = 1."""
        rng = np.random.default_rng(SEED)
        lse = np.stack([np.log(np.exp(logp_RV / t).sum(axis=1)) for t in TEMPERATURES])
        noisy_RV = logp_RV + NOISE * rng.standard_normal(logp_RV.shape, dtype=np.float32)
        n_asked = min(ASKED, logp_RV.shape[1])
        return cls(logp_RV, lse, np.argpartition(-noisy_RV, n_asked - 1, axis=1)[:, :n_asked])


@dataclass
class TailErrors:
    """Sums over rows. mass: |tail mass as stored - the teacher's| at each of TEMPERATURES, of the tokens that are not
    entries; logprob: mean |ln q - ln p| at T = 1 over the tokens that a student would ask for."""

    n_rows: int = 0
    n_answered: int = 0
    mass: np.ndarray = field(default_factory=lambda: np.zeros(len(TEMPERATURES)))
    logprob: float = 0.0

    def add(self, decoded: TeacherTargets, q_logprobs_RV: NDArray[np.float32], teacher: TeacherTail) -> None:
        """Adds a sample: what was read back, and its log-probs [R, V] at T = 1. Samples of a tail count for nothing."""
        if decoded.is_sampled:
            return
        row_E = np.repeat(np.arange(decoded.n_rows), decoded.counts)
        logp_E = teacher.logp[row_E, decoded.ids]
        for i, temperature in enumerate(TEMPERATURES):
            p_E = np.exp(logp_E / temperature - teacher.lse[i, row_E])
            true_R = 1 - np.bincount(row_E, p_E, minlength=decoded.n_rows)
            self.mass[i] += np.abs(_stored_mass(decoded, temperature) - true_R).sum()
        true_RM = np.take_along_axis(teacher.logp, teacher.asked, axis=1)
        error_R = np.abs(np.take_along_axis(q_logprobs_RV, teacher.asked, axis=1) - true_RM).mean(axis=1)
        answered = np.isfinite(error_R)
        self.logprob += float(error_R[answered].sum())
        self.n_answered += int(answered.sum())
        self.n_rows += decoded.n_rows

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
