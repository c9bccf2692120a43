"""Corrections: within half a step of what was left over, in small numbers, put back where the centre of them lies."""

from dataclasses import replace

import numpy as np
import pytest

from logitstore.corrections import (
    FIRST_CODED,
    N_CLASSES,
    N_CONTEXTS,
    SQUARES_A_BIT,
    CorrectionTables,
    fit_corrections,
    row_classes,
    undo_zigzag,
    zigzag,
)
from logitstore.entropy_code import cost_bits
from logitstore.errors import CorruptionError

SPREAD = np.array([4.0, 2.0, 1.0, 0.5, 0.1, 0.01])


def some_errors(seed: int, n_rows: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(errors [R, 6], weights [R], classes [R]): rows of class 5 have a quarter of the weight of those of class 9."""
    rng = np.random.default_rng(seed)
    classes = rng.choice([5, 9], n_rows)
    weights = np.where(classes == 5, 0.25, 1.0).astype(np.float32)
    errors = rng.laplace(0, SPREAD / np.sqrt(2), (n_rows, 6)) / np.sqrt(weights)[:, None]
    return errors.astype(np.float32), weights, classes


def test_coded_errors_come_back_within_a_step_of_their_row() -> None:
    errors, weights, classes = some_errors(0)
    tables = fit_corrections(0.5, errors, weights, classes)
    fresh, _, classes = some_errors(1)
    steps = tables.quantised(fresh, classes)
    back = tables.corrections(steps, classes)
    row_step = 0.5 / np.sqrt(tables.weights[classes])
    coded = tables.contexts[classes] >= FIRST_CODED
    left = np.abs(fresh[:, : tables.width] - back) / row_step[:, None]
    assert left[coded & (steps != 0)].max() < 1.0
    first_steps = tables.first_steps[tables.contexts[classes]]
    assert np.all((left <= first_steps + 1e-5)[coded & (steps == 0)])
    assert first_steps[coded].max() < 1.0
    assert np.all(back[~coded] == 0)
    np.testing.assert_allclose(row_step[classes == 5].mean() / row_step[classes == 9].mean(), 2.0, rtol=0.02)


def test_no_other_threshold_gives_less_error_and_bits_together() -> None:
    errors, weights, classes = some_errors(0)
    tables = fit_corrections(1.0, errors, weights, classes)
    fresh, _, classes = some_errors(1)
    scaled = (fresh * np.sqrt(tables.weights[classes])[:, None])[:, : tables.width]

    def squares_and_price(threshold: float | None) -> float:
        other = replace(tables)
        if threshold is not None:
            other.__dict__["first_steps"] = np.full(N_CONTEXTS, threshold, np.float32)
        steps = other.quantised(fresh, classes)
        back = other.corrections(steps, classes) * np.sqrt(tables.weights[classes])[:, None]
        bits = cost_bits(other.symbols, other.numbers(steps, classes), other.coded_contexts(classes))
        return float(np.square(scaled - back).sum()) + SQUARES_A_BIT * bits

    assert squares_and_price(None) < min(squares_and_price(threshold) for threshold in (0.5, 0.6, 0.665, 0.7, 0.8, 0.9))


def test_what_was_put_back_is_rounded_to_the_same_steps() -> None:
    errors, weights, classes = some_errors(0)
    for step in (0.1, 0.5, 2.0):
        tables = fit_corrections(step, errors, weights, classes)
        steps = tables.quantised(errors, classes)
        back = np.zeros_like(errors)
        back[:, : tables.width] = tables.corrections(steps, classes)
        np.testing.assert_array_equal(tables.quantised(back, classes), steps)


def test_smaller_steps_leave_less_and_code_more_directions() -> None:
    errors, weights, classes = some_errors(0)
    fresh, fresh_weights, fresh_classes = some_errors(1)
    left, widths = [], []
    for step in (8.0, 2.0, 0.5, 0.1):
        tables = fit_corrections(step, errors, weights, classes)
        back = np.zeros_like(fresh)
        back[:, : tables.width] = tables.corrections(tables.quantised(fresh, fresh_classes), fresh_classes)
        left.append(float((((fresh - back) ** 2).sum(1) * fresh_weights).mean()))
        widths.append(tables.width)
    assert np.all(np.diff(left) < 0)
    assert widths == sorted(widths)
    assert (widths[0], widths[-1]) == (2, 5)
    uniform = 5 * 0.1**2 / 12  # of a fine step in the five coded directions, and all of the sixth
    assert left[-1] == pytest.approx(uniform + SPREAD[5] ** 2, rel=0.2)


def test_centres_beat_middles() -> None:
    errors, weights, classes = some_errors(0, 20_000)
    tables = fit_corrections(2.0, errors, weights, classes)
    middles = np.tile(np.array([1, 2, 0], np.float32), (N_CONTEXTS, 1))
    plain = CorrectionTables(tables.step, tables.weights, tables.contexts, middles, tables.symbols)
    fresh, fresh_weights, fresh_classes = some_errors(1, 20_000)
    steps = tables.quantised(fresh, fresh_classes)

    def left(which: CorrectionTables) -> float:
        back = which.corrections(steps, fresh_classes)
        return float((((fresh[:, : which.width] - back) ** 2).sum(1) * fresh_weights).mean())

    assert left(tables) < 0.99 * left(plain)


def test_what_came_back_is_coded_alike_again() -> None:
    errors, weights, classes = some_errors(0)
    tables = fit_corrections(0.7, errors, weights, classes)
    steps = tables.quantised(errors, classes)
    np.testing.assert_array_equal(tables.quantised(tables.corrections(steps, classes), classes), steps)


def test_numbers_and_values_are_those_of_plain_python() -> None:
    errors, weights, classes = some_errors(0)
    tables = fit_corrections(0.3, errors, weights, classes)
    contexts = tables.contexts.copy()
    contexts[9, [0, 3]] = 0, FIRST_CODED - 1
    tables = replace(tables, contexts=contexts)
    fresh, _, classes = some_errors(2, 50)
    steps = tables.quantised(fresh, classes)
    assert np.abs(steps).max() > 3
    numbers, contexts = [], []
    values = np.zeros(steps.shape, np.float32)
    for row, row_class in enumerate(classes):
        for column, context in enumerate(tables.contexts[row_class]):
            step = int(steps[row, column])
            if context >= FIRST_CODED:
                numbers.append(2 * step if step >= 0 else -2 * step - 1)
                contexts.append(context)
            if step:
                level = float(tables.levels[context, min(abs(step), 3) - 1]) + (abs(step) if abs(step) >= 3 else 0)
                unit = np.float32(tables.step) / np.sqrt(tables.weights[row_class])
                values[row, column] = np.sign(step) * level * float(unit)
    assert len(numbers) < steps.size
    np.testing.assert_array_equal(tables.numbers(steps, classes), numbers)
    np.testing.assert_array_equal(tables.coded_contexts(classes), contexts)
    np.testing.assert_array_equal(tables.steps(np.array(numbers, np.int32), classes), steps)
    np.testing.assert_array_equal(tables.corrections(steps, classes), values)


def test_zigzag() -> None:
    numbers = np.arange(-9, 10)
    np.testing.assert_array_equal(zigzag(np.array([0, -1, 1, -2, 2])), np.arange(5))
    np.testing.assert_array_equal(undo_zigzag(zigzag(numbers)), numbers)


def test_a_spread_far_below_the_step_leaves_nothing_to_code() -> None:
    errors, weights, classes = some_errors(0)
    tables = fit_corrections(1e4, errors, weights, classes)
    assert tables.width == 0
    assert tables.quantised(errors, classes).shape == (len(errors), 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights", np.zeros(N_CLASSES, np.float32), "not above 0"),
        ("contexts", np.full((N_CLASSES, 2), N_CONTEXTS, np.uint8), "a correction has context 30, there are 30"),
        ("contexts", np.zeros((3, 2), np.uint8), "contexts of corrections are uint8"),
        ("levels", np.full((N_CONTEXTS, 3), np.nan, np.float32), "or not finite"),
    ],
)
def test_tables_that_are_none_are_refused(name: str, value: np.ndarray, message: str) -> None:
    good = fit_corrections(1.0, *some_errors(0))
    fields = {key: getattr(good, key) for key in ("step", "weights", "contexts", "levels", "symbols")}
    with pytest.raises(CorruptionError, match=message):
        CorrectionTables(**{**fields, name: value})


def test_each_row_has_the_class_of_its_own_moments() -> None:
    excess, odds = np.array([0, 7, 8, 41, 200]), np.array([0, 4, 4, 8, 1])
    np.testing.assert_array_equal(row_classes(excess, odds), [0, 32, 33, 69, 15])
