"""Compiled loops against plain Python and against the numpy code whose verdict they share, and where they are kept."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.codecs.ranked_layout import codes_of_steps, head_steps
from logitstore.entry_loops import (
    differences_of_tied,
    id_contexts,
    rank_groups,
    sort_tied,
    undo_differences_of_tied,
)
from logitstore.errors import CorruptionError
from logitstore.head_rows import decoded_head
from logitstore.head_values import head_format
from logitstore.row_input import GivenRows, checked_rows
from logitstore.row_loops import given_rows_are_sound, rows_are_sound
from logitstore.targets import TeacherTargets
from logitstore.temperature import log1mexp, segment_logsumexp

ROOT = Path(__file__).parents[2]
SEEDS = st.integers(0, 2**32)


def some_offsets(rng: np.random.Generator, n_rows: int = 9, longest: int = 40) -> np.ndarray:
    """Offsets of rows without entries, with few, and one with several hundred."""
    counts = rng.integers(0, longest, n_rows) * (rng.random(n_rows) < 0.8)
    counts[rng.integers(n_rows)] = 300
    return np.concatenate([[0], np.cumsum(counts)])


def some_codes(rng: np.random.Generator, offsets: np.ndarray, dtype: type = np.uint8) -> np.ndarray:
    """Codes that rise along each row, with many that are equal."""
    steps = rng.integers(0, 2, offsets[-1])
    return np.concatenate(
        [np.zeros(0, int), *(np.cumsum(steps[a:b]) // rng.integers(1, 30) for a, b in pairwise(offsets))]
    ).astype(dtype)


def rank_group(rank: int) -> int:
    return rank if rank < 4 else min(2 + int(math.log2(rank)), 9)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_contexts_are_those_of_the_format(seed: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = some_offsets(rng)
    codes = some_codes(rng, offsets)
    tied, contexts = id_contexts(codes, offsets)
    for a, b in pairwise(offsets.tolist()):
        ranks = range(b - a)
        np.testing.assert_array_equal(rank_groups(offsets)[a:b], [rank_group(rank) for rank in ranks])
        row_tied = [rank >= 2 and codes[a + rank] == codes[a + rank - 1] for rank in ranks]
        np.testing.assert_array_equal(tied[a:b], row_tied)
        starts = [rank for rank in ranks if not row_tied[rank]] + [b - a]
        for start, end in pairwise(starts):
            size = min(math.ceil(math.log2(end - start)), 5)
            assert contexts[a + start] == 3 * rank_group(start) + min(size, 2)
            assert set(contexts[a + start + 1 : a + end].tolist()) <= {30 + size - 1}


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_runs_are_sorted_and_their_differences_give_them_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = some_offsets(rng)
    tied, _ = id_contexts(some_codes(rng, offsets), offsets)
    id_codes = rng.permutation(5000)[: offsets[-1]].astype(np.int32)
    ids = rng.permutation(5000)[: offsets[-1]].astype(np.int32)
    sorted_ids, sorted_codes = ids.copy(), id_codes.copy()
    sort_tied(sorted_ids, sorted_codes, tied)
    order = np.lexsort((id_codes, np.cumsum(~tied)))
    np.testing.assert_array_equal(sorted_codes, id_codes[order])
    np.testing.assert_array_equal(sorted_ids, ids[order])
    differences = differences_of_tied(sorted_codes, tied)
    assert np.all(differences >= 0)
    np.testing.assert_array_equal(differences[~tied], sorted_codes[~tied])
    np.testing.assert_array_equal(undo_differences_of_tied(differences, tied), sorted_codes)


@pytest.mark.parametrize("head", ["fp8", "int8", "fp16", "log", "sqrtp"])
def test_steps_of_any_codes_give_them_back(head: str) -> None:
    form, rng = head_format(head), np.random.default_rng(1)
    offsets = some_offsets(rng)
    codes = rng.integers(0, np.iinfo(form.code_type).max + 1, offsets[-1]).astype(form.code_type)
    steps = head_steps(codes, offsets, form)
    based = (form.base - codes.astype(int)) if form.descends else codes.astype(int) ^ form.base
    modulus = 1 << (8 * form.code_bytes)
    for a, b in pairwise(offsets):
        np.testing.assert_array_equal(steps[a:b], np.diff(based[a:b], prepend=0) % modulus)
    np.testing.assert_array_equal(codes_of_steps(steps, offsets, form), codes)
    steps[-1] = modulus
    with pytest.raises(CorruptionError, match=f"a head code's step is {modulus}, beyond the {modulus - 1}"):
        codes_of_steps(steps, offsets, form)


def test_a_log_head_has_the_mass_that_the_tail_leaves() -> None:
    rng = np.random.default_rng(2)
    offsets, form = some_offsets(rng), head_format("log", 0.5)
    codes = some_codes(rng, offsets)
    codes[offsets[:-1][np.diff(offsets) > 0]] = 0
    tail = np.log(rng.random(len(offsets) - 1)).astype(np.float32)
    tail[:3] = -np.inf, -1e-6, -40
    head = decoded_head(form, codes, offsets, tail)
    expected = log1mexp(tail.astype(np.float64)) - segment_logsumexp(-0.5 * codes.astype(np.float64), offsets)
    present = np.diff(offsets) > 0
    np.testing.assert_allclose(head.offset[present], expected[present], rtol=2e-7, atol=1e-7)
    assert not head.offset[~present].any()
    np.testing.assert_array_equal(head.logps, form.table[codes] + np.repeat(head.offset, np.diff(offsets)))


V = 400


def some_targets(rng: np.random.Generator) -> TeacherTargets:
    offsets = some_offsets(rng, longest=90)
    counts = np.diff(offsets)
    rows = [(rng.permutation(V)[:n], np.sort(-8 * rng.random(n))[::-1]) for n in counts]
    ids, logps = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    moments = np.where(counts > 0, -rng.random((2, len(counts))), np.nan).astype(np.float32)
    moments[:, rng.random(len(counts)) < 0.2] = -np.inf
    moments[:, counts == 0] = np.nan
    tokens = np.zeros(len(counts) + 1, np.int32)
    return TeacherTargets(offsets, ids.astype(np.int32), logps.astype(np.float32), *moments, V, tokens)


BAD = [np.nan, np.inf, -np.inf, 1e-3, 0.0, -1.0, 1.0]


def damaged(rng: np.random.Generator, arrays: list[np.ndarray], ids: np.ndarray, firsts: np.ndarray) -> None:
    """Puts a number that may be wrong into one place, or an id where it may not be; often into a row's first place."""
    array = [ids, *arrays][rng.integers(1 + len(arrays))]
    place = rng.integers(array.size)
    if array.size == ids.size and rng.random() < 0.5:
        place = rng.choice(firsts)
    bad = [-1, V, V - 1, ids.flat[place - 1], ids.flat[rng.integers(ids.size)]] if array is ids else BAD
    array.flat[place] = rng.choice(bad)


@settings(max_examples=300, deadline=None)
@given(SEEDS)
def test_rows_are_sound_where_validate_finds_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = some_targets(rng)
    arrays = [targets.logps, targets.tail_logmass, targets.tail_logmoment_half]
    for _ in range(rng.integers(0, 3)):
        damaged(rng, arrays, targets.ids, targets.offsets[:-1][targets.present])
    if rng.random() < 0.1:
        targets = replace(targets, vocab_size=300)
    faults = []
    try:
        targets.validate()
    except CorruptionError as error:
        faults.append(str(error))
    assert rows_are_sound(targets.offsets, targets.ids, *arrays, targets.vocab_size) == (not faults), faults


@settings(max_examples=300, deadline=None)
@given(SEEDS, st.sampled_from([1, 5, 70]))
def test_given_rows_are_sound_where_numpy_finds_nothing(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(V)[:width] for _ in range(6)])
    logps = -np.sort(8 * rng.random((6, width)), axis=1).astype(np.float32)
    pad = np.arange(width) >= rng.integers(1, width + 2, 6)[:, None]
    ids[pad], logps[pad] = -1, rng.choice([-np.inf, np.nan, 0])
    moments = -rng.random((2, 6)).astype(np.float32)
    moments[:, rng.random(6) < 0.2] = -np.inf
    for _ in range(rng.integers(0, 3)):
        damaged(rng, [logps, *moments], ids, np.arange(6) * width)
    faults = []
    try:
        checked_rows(ids, logps, *moments, keep_mask=np.ones(6, bool), vocab_size=V)
    except ValueError as error:
        faults.append(str(error))
    assert given_rows_are_sound(*GivenRows(ids, logps, *moments), V, 1e-5) == (not faults), faults
    with pytest.raises(ValueError, match=faults[0][:40]) if faults else contextlib.nullcontext():
        checked_rows(ids, logps, *moments, keep_mask=np.ones(6, bool), vocab_size=V, compiled=True)


CALL = (
    "import sys; sys.path.insert(0, {folder!r}); import numpy as np; from logitstore import entry_loops; "
    "print(entry_loops.__file__, entry_loops.rank_groups(np.array([0, 5])).tolist())"
)


@pytest.mark.parametrize("home_is_writable", [True, False])
def test_loops_run_where_their_folder_cannot_be_written(tmp_path: Path, home_is_writable: bool) -> None:
    """The folder for compiled functions is a file, so that not even root can write into it; so may be the home."""
    package = tmp_path / "installed" / "logitstore"
    shutil.copytree(ROOT / "logitstore", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__pycache__").write_text("")
    home = tmp_path / "home"
    home.mkdir() if home_is_writable else home.write_text("")
    environment = {**os.environ, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        environment.pop(name, None)
    command = [sys.executable, "-c", CALL.format(folder=str(package.parent))]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == f"{package / 'entry_loops.py'} [0, 1, 2, 3, 4]"
    assert bool(list(tmp_path.rglob("*.nbi"))) == home_is_writable
