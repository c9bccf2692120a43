"""Corrections of rows to and from the numbers that they are coded as, as corrections.py describes them; compiled.

A row's class says which of its coefficients are coded and how: those of context first_coded and above.

Letters: P present rows, W coefficients, C classes, N coded coefficients of all rows together.
"""

import numpy as np
from numpy.typing import NDArray

from logitstore.compiled import compiled


@compiled
def coded_contexts(classes_P: NDArray[np.int64], contexts_CW: NDArray[np.uint8], first_coded: int) -> NDArray[np.uint8]:
    """The context of each coded coefficient [N], row by row."""
    coded_N = np.empty(len(classes_P) * contexts_CW.shape[1], np.uint8)
    n = 0
    for row_class in classes_P:
        for context in contexts_CW[row_class]:
            coded_N[n] = context
            n += context >= first_coded
    return coded_N[:n].copy()


@compiled
def numbers_of_steps(
    steps_PW: NDArray[np.int32], classes_P: NDArray[np.int64], contexts_CW: NDArray[np.uint8], first_coded: int
) -> NDArray[np.int32]:
    """The zigzag (0, -1, 1, -2 ... as 0, 1, 2, 3 ...) of the steps of each coded coefficient [N], row by row."""
    numbers_N = np.empty(steps_PW.size, np.int32)
    n = 0
    for p in range(len(classes_P)):
        contexts = contexts_CW[classes_P[p]]
        for w in range(len(contexts)):
            step = steps_PW[p, w]
            numbers_N[n] = (step << 1) ^ (step >> 31)
            n += contexts[w] >= first_coded
    return numbers_N[:n].copy()


@compiled
def steps_of_numbers(
    numbers_N: NDArray[np.int32], classes_P: NDArray[np.int64], contexts_CW: NDArray[np.uint8], first_coded: int
) -> NDArray[np.int32]:
    """The steps [P, W] of which numbers_of_steps made these, 0 for coefficients that are not coded."""
    steps_PW = np.zeros((len(classes_P), contexts_CW.shape[1]), np.int32)
    n = 0
    for p in range(len(classes_P)):
        contexts = contexts_CW[classes_P[p]]
        for w in range(len(contexts)):
            if contexts[w] >= first_coded:
                steps_PW[p, w] = (numbers_N[n] >> 1) ^ -(numbers_N[n] & 1)
                n += 1
    return steps_PW


@compiled
def values_of_steps(
    steps_PW: NDArray[np.int32],
    classes_P: NDArray[np.int64],
    contexts_CW: NDArray[np.uint8],
    levels: NDArray[np.float32],
    unit_C: NDArray[np.float32],
) -> NDArray[np.float32]:
    """What steps stand for [P, W]: levels of the coefficient's context, from the last on a distance from the whole
    number, in units of the row's class."""
    values_PW = np.zeros(steps_PW.shape, np.float32)
    n_levels = levels.shape[1]
    for p in range(len(classes_P)):
        contexts, unit = contexts_CW[classes_P[p]], np.float64(unit_C[classes_P[p]])
        for w in range(len(contexts)):
            size = abs(np.int64(steps_PW[p, w]))
            if size == 0:
                continue
            value = np.float64(levels[contexts[w], min(size, n_levels) - 1])
            if size >= n_levels:
                value += size
            values_PW[p, w] = (value if steps_PW[p, w] > 0 else -value) * unit
    return values_PW
