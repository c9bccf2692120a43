"""Candidate lists: every id has a code that gives it back, and the best candidates have the smallest codes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.errors import CorruptionError
from logitstore.id_lists import ESCAPE, LIST_LENGTH, CandidateLists, IdLists, PairCounts


def ranked_lists(keys, members, weights, vocab_size: int, chunk_pairs: int = 1 << 22) -> CandidateLists:
    pairs = PairCounts(chunk_pairs)
    for part in np.array_split(np.arange(len(keys)), 5):
        pairs.add(keys[part], members[part], weights[part])
    return pairs.ranked(vocab_size)


def some_lists(rng: np.random.Generator, vocab_size: int, n_seen: int) -> IdLists:
    def lists():
        keys, members = rng.integers(0, vocab_size, (2, n_seen))
        return ranked_lists(keys, members, rng.random(n_seen), vocab_size)

    return IdLists(lists(), lists(), lists(), rng.permutation(vocab_size).astype(np.int32))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 17, 300, 5000]), st.sampled_from([0, 1, 50, 3000]))
def test_every_id_comes_back_from_its_code(seed: int, vocab_size: int, n_seen: int) -> None:
    rng = np.random.default_rng(seed)
    lists = some_lists(rng, vocab_size, n_seen)
    ids, key, current = (rng.integers(0, vocab_size, 400).astype(np.int32) for _ in range(3))
    is_first = rng.random(400) < 0.3
    codes = lists.codes(ids, is_first, key, current)
    assert codes.min() >= 0
    assert codes.max() < ESCAPE + vocab_size
    for chosen, source in ((is_first, lists.beside), (~is_first, lists.together)):
        np.testing.assert_array_equal(lists.ids(codes[chosen], source, key[chosen], current[chosen]), ids[chosen])


def test_codes_are_places_in_the_two_lists_interleaved_and_frequency_ranks_behind_them() -> None:
    together = ranked_lists(np.array([3, 3, 3]), np.array([7, 8, 9]), np.array([1.0, 3.0, 2.0]), 10)
    after = ranked_lists(np.array([5, 5]), np.array([9, 1]), np.array([2.0, 1.0]), 10)
    nothing = ranked_lists(np.zeros(0, int), np.zeros(0, int), np.zeros(0), 10)
    lists = IdLists(after, nothing, together, np.arange(10, dtype=np.int32)[::-1].copy())
    ids = np.array([8, 9, 7, 1, 4], np.int32)
    key, current = np.full(5, 3, np.int32), np.full(5, 5, np.int32)
    codes = lists.codes(ids, np.zeros(5, bool), key, current)
    np.testing.assert_array_equal(codes, [0, 1, 4, 3, ESCAPE + 5])


def test_lists_are_ordered_by_weight_and_cut() -> None:
    n = LIST_LENGTH + 40
    lists = ranked_lists(np.ones(n, int), np.arange(n), np.arange(n, dtype=float), n)
    np.testing.assert_array_equal(lists.members, np.arange(n)[::-1][:LIST_LENGTH])
    np.testing.assert_array_equal(np.diff(lists.offsets), [0, LIST_LENGTH] + [0] * (n - 2))
    places = lists.places(np.array([1, 1, 1, 0]), np.array([n - 1, n - LIST_LENGTH, 39, n - 1]))
    np.testing.assert_array_equal(places, [0, LIST_LENGTH - 1, -1, -1])


def test_codes_that_no_id_has_are_refused() -> None:
    lists = some_lists(np.random.default_rng(0), 50, 20)
    zero = np.zeros(1, np.int32)
    with pytest.raises(CorruptionError, match="outside the vocabulary of 50"):
        lists.ids(np.array([ESCAPE + 50]), lists.together, zero, zero)
    with pytest.raises(CorruptionError, match="behind the end of its candidate list"):
        lists.ids(np.array([ESCAPE - 2]), lists.together, zero, zero)


def test_weights_add_up_over_chunks_whatever_their_size() -> None:
    rng = np.random.default_rng(1)
    keys, members = rng.integers(0, 20, (2, 4000))
    weights = rng.integers(0, 5, 4000).astype(float)
    lists = ranked_lists(keys, members, weights, 20)
    small = ranked_lists(keys, members, weights, 20, chunk_pairs=10)
    np.testing.assert_array_equal(lists.members, small.members)
    summed = np.zeros((20, 20))
    np.add.at(summed, (keys, members), weights)
    for key in range(20):
        expected = [m for m in np.argsort(-summed[key], kind="stable") if summed[key, m] > 0]
        np.testing.assert_array_equal(lists.members[lists.offsets[key] : lists.offsets[key + 1]], expected)
