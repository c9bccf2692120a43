"""The self-check for off-by-one rows: is row t really the teacher's distribution for token t + 1?

For each row the probability of input_ids[t + 1 + shift] is looked up at shifts -1, 0 and +1. A teacher that has
learned anything gives the true label far more than its neighbours, so a store whose rows slipped by one gives itself
away. Several public pipelines shipped exactly that slip.

Letters: R rows, E entries.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from logitstore.targets import TeacherTargets
from logitstore.temperature import shifted_head

SHIFTS = (-1, 0, 1)


@dataclass
class LabelShift:
    """Running sums over rows of the probabilities at the three shifts, and of their differences to shift 0."""

    n_rows: int = 0
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    differences: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))

    def add(self, targets: TeacherTargets) -> None:
        """Counts the present rows of a sample for which all three tokens exist (all but the last row)."""
        rows = np.flatnonzero(targets.present[:-1])
        if len(rows) == 0:
            return
        probability = np.stack([_probability(targets, rows, targets.input_ids[rows + 1 + s]) for s in SHIFTS])
        self.n_rows += len(rows)
        self.sums += probability.sum(axis=1)
        difference = probability - probability[SHIFTS.index(0)]
        self.differences += difference.sum(axis=1)
        self.squares += np.square(difference).sum(axis=1)

    def means(self) -> dict[int, float]:
        """Mean probability at each shift; empty where no row was counted."""
        if not self.n_rows:
            return {}
        return {shift: float(total) / self.n_rows for shift, total in zip(SHIFTS, self.sums, strict=True)}

    def fault(self) -> str | None:
        """One line where another shift fits twice as well as 0, and by over four standard errors, else None."""
        if self.n_rows < 2:
            return None
        mean = self.differences / self.n_rows
        error = np.sqrt(np.maximum(self.squares / self.n_rows - mean**2, 0) / self.n_rows)
        best = int(np.argmax(mean))
        means = self.means()
        if mean[best] <= 4 * error[best] or means[SHIFTS[best]] < 2 * means[0]:
            return None
        return (
            f"rows do not belong to their tokens: the token at shift {SHIFTS[best]:+d} has mean probability "
            f"{means[SHIFTS[best]]:.4f}, the label itself {means[0]:.4f}; row t must describe token t + 1 "
            "(or the teacher has learned nothing)"
        )


def _probability(targets: TeacherTargets, rows: NDArray[np.int64], tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """The stored probability of one token a row; tokens outside the head get the tail's mass spread uniformly."""
    row_E = np.repeat(np.arange(targets.n_rows), targets.counts)
    wanted_R = np.full(targets.n_rows, -1, np.int64)
    wanted_R[rows] = tokens
    hit_E = targets.ids == wanted_R[row_E]
    n_tail_R = np.maximum(targets.vocab_size - targets.counts, 1)
    probability_R = np.exp(targets.tail_logmass.astype(np.float64)) / n_tail_R
    head_E = shifted_head(targets.logps, targets.offsets, targets.tail_logmass)
    probability_R[row_E[hit_E]] = np.exp(head_E[hit_E])
    return probability_R[rows]
