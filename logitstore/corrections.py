"""Corrections of a predicted tail: what the prediction leaves over, quantised with one step size.

The coefficients' basis is such that equal errors cost equal KL on average; how much an error costs in one row depends
on the row, and follows to good part from its tail's moments, which a decoder has. Rows fall into classes by the codes
of their moments (integers, so that no machine's rounding decides); a class has a weight, and a row's step is
tail_step / sqrt(weight). Which table a coefficient is coded with follows from its spread, class by direction; those
whose spread is far below the step are not coded at all.

Values are put back at the centre of what was rounded to them, not in the middle of their interval, and one step is
written only where it is worth its bits, which is the encoder's affair alone: a decoder does not know of it.

Letters: R rows, r coefficients, C classes.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from logitstore.entropy_code import StaticTables, fitted_tables, symbols_of
from logitstore.errors import CorruptionError
from logitstore.tail_moments import COARSE

N_ODDS, N_EXCESS = 9, 8
N_CLASSES = N_ODDS * N_EXCESS
N_CONTEXTS = 30
FIRST_CODED = 3  # contexts below: a spread of less than a quarter of a step
N_LEVELS = 3
# what a bit is worth, in squared steps: a value is one step where that costs less than leaving it at zero
SQUARES_A_BIT = 0.1
LEAST_LARGER = 0.335  # how much of a step beyond a whole number makes it the next one, from 1 on
ROUNDS = 3  # of quantising and counting; each counts what the costs of the one before it round to


@dataclass(frozen=True, eq=False)
class CorrectionTables:
    """weights float32 [C] > 0: of an error in a row of each class. contexts uint8 [C, r]: the table of each
    coefficient, below FIRST_CODED where it is not coded. levels float32 [N_CONTEXTS, 3]: where values of 1, 2 and more
    steps are put back, in steps (of the last: its distance from the whole number). symbols: the tables."""

    step: float
    weights: NDArray[np.float32]
    contexts: NDArray[np.uint8]
    levels: NDArray[np.float32]
    symbols: StaticTables

    def __post_init__(self) -> None:
        weights, contexts, levels = self.weights, self.contexts, self.levels
        if weights.shape != (N_CLASSES,) or weights.dtype != np.float32 or not np.all((weights > 0) & (weights < 2)):
            raise CorruptionError(f"weights of corrections are {weights.dtype} {weights.shape}, or not above 0")
        if contexts.ndim != 2 or len(contexts) != N_CLASSES or contexts.dtype != np.uint8:
            raise CorruptionError(f"contexts of corrections are {contexts.dtype} {contexts.shape}")
        if contexts.size and contexts.max() >= N_CONTEXTS:
            raise CorruptionError(f"a correction has context {contexts.max()}, there are {N_CONTEXTS}")
        if levels.shape != (N_CONTEXTS, N_LEVELS) or levels.dtype != np.float32 or not np.isfinite(levels).all():
            raise CorruptionError(f"levels of corrections are {levels.dtype} {levels.shape}, or not finite")
        if self.symbols.n_contexts != N_CONTEXTS:
            raise CorruptionError(f"corrections have {self.symbols.n_contexts} symbol tables, expected {N_CONTEXTS}")

    @property
    def width(self) -> int:
        """Coefficients that are coded in some class; those behind them never are."""
        return self.contexts.shape[1]

    @cached_property
    def first_steps(self) -> NDArray[np.float32]:
        """From which size on a value is one step, in steps [N_CONTEXTS]: (x - level)^2 + price of its bits < x^2."""
        bits, level = self.symbols.bits, self.levels[:, 0].astype(np.float64)
        price = SQUARES_A_BIT * ((bits[:, 1] + bits[:, 2]) / 2 - bits[:, 0])
        return np.clip(level / 2 + price / (2 * level), 0.5, np.minimum(0.95, 0.98 * level)).astype(np.float32)

    def quantised(self, errors_Rr: NDArray[np.float32], classes_R: NDArray[np.int64]) -> NDArray[np.int32]:
        """Whole steps [R, width], 0 where a coefficient is not coded."""
        scaled = errors_Rr[:, : self.width] * (np.sqrt(self.weights[classes_R]) / np.float32(self.step))[:, None]
        contexts_Rr, size = self.contexts[classes_R], np.abs(scaled)
        steps = np.floor(size + np.float32(LEAST_LARGER))
        steps = np.sign(scaled) * np.where(steps > 1, steps, size >= self.first_steps[contexts_Rr])
        steps[contexts_Rr < FIRST_CODED] = 0
        return np.clip(steps, -(1 << 20), 1 << 20).astype(np.int32)

    def coded_contexts(self, classes_R: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The context of each coefficient that is coded in rows of these classes, row by row."""
        from logitstore import correction_loops

        return correction_loops.coded_contexts(classes_R, self.contexts, FIRST_CODED)

    def numbers(self, steps_Rr: NDArray[np.int32], classes_R: NDArray[np.int64]) -> NDArray[np.int32]:
        """The numbers that code these steps [R, width], in the order of coded_contexts."""
        from logitstore import correction_loops

        return correction_loops.numbers_of_steps(steps_Rr, classes_R, self.contexts, FIRST_CODED)

    def steps(self, numbers: NDArray[np.int32], classes_R: NDArray[np.int64]) -> NDArray[np.int32]:
        """The steps [R, width] of which `numbers` made these; as many as coded_contexts says."""
        from logitstore import correction_loops

        return correction_loops.steps_of_numbers(numbers, classes_R, self.contexts, FIRST_CODED)

    def corrections(self, steps_Rr: NDArray[np.int32], classes_R: NDArray[np.int64]) -> NDArray[np.float32]:
        """What these steps add to the prediction [R, width] float32."""
        from logitstore import correction_loops

        unit_C = np.float32(self.step) / np.sqrt(self.weights)
        return correction_loops.values_of_steps(steps_Rr, classes_R, self.contexts, self.levels, unit_C)


def row_classes(excess_codes: NDArray[np.integer], odds_context: NDArray[np.integer]) -> NDArray[np.int64]:
    """The class of each present row, from the coarse code of its half moment and the context of its odds (0 to 8)."""
    excess = np.minimum(excess_codes.astype(np.int64) // int(COARSE.excess_steps / 2), N_EXCESS - 1)
    return odds_context.astype(np.int64) * N_EXCESS + excess


def fit_corrections(
    step: float, errors_Rr: NDArray[np.float32], weights_R: NDArray[np.float32], classes_R: NDArray[np.int64]
) -> CorrectionTables:
    """The tables for errors [R, r] of predictions in rows of these weights and classes."""
    overall = float(weights_R.mean())
    weights = np.full(N_CLASSES, overall)
    counts = np.bincount(classes_R, minlength=N_CLASSES)
    weights += (np.bincount(classes_R, weights_R, N_CLASSES) - counts * overall) / (counts + 10)
    weights = np.clip(weights, 1e-6, 1.5).astype(np.float32)
    weighted = errors_Rr * np.sqrt(weights[classes_R])[:, None]
    spread = np.sqrt(np.mean(weighted.astype(np.float64) ** 2, axis=0)) + 1e-12
    row_energy = np.mean((weighted / spread) ** 2, axis=1)
    scale = np.sqrt((np.bincount(classes_R, row_energy, N_CLASSES) + 10) / (counts + 10))
    contexts = np.clip(np.rint(3 * np.log2(scale[:, None] * spread[None] / step)) + 9, 0, N_CONTEXTS - 1)
    coded = np.flatnonzero((contexts >= FIRST_CODED).any(axis=0))
    width = int(coded[-1]) + 1 if len(coded) else 0
    contexts = contexts[:, :width].astype(np.uint8)
    no_symbols = fitted_tables(np.zeros(0, np.int64), np.zeros(0, np.int64), N_CONTEXTS)
    levels = np.tile(np.array([1, 2, 0], np.float32), (N_CONTEXTS, 1))
    tables = CorrectionTables(step, weights, contexts, levels, no_symbols)
    for _ in range(ROUNDS):
        steps = tables.quantised(errors_Rr, classes_R)
        symbols = symbols_of(tables.numbers(steps, classes_R))
        fitted = fitted_tables(symbols, tables.coded_contexts(classes_R), N_CONTEXTS)
        levels = _centres(steps, weighted[:, :width] / np.float32(step), contexts[classes_R])
        tables = CorrectionTables(step, weights, contexts, levels, fitted)
    return tables


def _centres(
    steps_Rr: NDArray[np.int32], scaled_Rr: NDArray[np.float32], contexts_Rr: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Mean of what was rounded to 1 and 2 steps, and mean distance from the whole number for more, by context."""
    size = np.abs(steps_Rr)
    level = np.clip(size, 1, N_LEVELS) - 1
    distance = np.abs(scaled_Rr) - size
    some = size > 0
    keys = contexts_Rr[some].astype(np.int64) * N_LEVELS + level[some]
    counts = np.bincount(keys, minlength=N_CONTEXTS * N_LEVELS)
    shift = np.bincount(keys, distance[some], N_CONTEXTS * N_LEVELS) / (counts + 20)
    return (shift.reshape(N_CONTEXTS, N_LEVELS) + np.array([1, 2, 0])).astype(np.float32)


def zigzag(numbers: NDArray[np.integer]) -> NDArray[np.int64]:
    """0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ..."""
    wide = numbers.astype(np.int64)
    return np.where(wide < 0, -2 * wide - 1, 2 * wide)


def undo_zigzag(numbers: NDArray[np.integer]) -> NDArray[np.int64]:
    """The numbers of which zigzag made these."""
    return np.where(numbers & 1, -((numbers + 1) >> 1), numbers >> 1)
